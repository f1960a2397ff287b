"""Drives the real cache with a small seeded decoder, and reads what it keeps as positions."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.cache.decode import CORE, Decoding
from engine.cache.pool import Pool
from engine.cache.prefill import Prefill
from engine.cache.row import Row
from engine.loading.preparing import prepare
from engine.models.decoder import Decoder, DecoderConfig, View
from engine.ops.rotary import Tables
from engine.policies.layout import Layout
from engine.policies.policy import Policy


def seeded_decoder(
    seed: int = 0, layers: int = 4, heads: int = 4, kv_heads: int = 2, head_dim: int = 16
) -> Decoder:
    """A decoder whose attention is far from uniform, so that rankings mean something."""
    config = DecoderConfig(
        vocab=97,
        hidden=48,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=64,
        rope_theta=10000.0,
        norm_eps=1e-5,
        qkv_bias=True,
        tied_head=False,
        context=4096,
    )
    decoder = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                parameter.uniform_(0.7, 1.3, generator=generator)
            else:
                deviation = 0.25 if "q_proj" in name or "k_proj" in name else 0.12
                parameter.normal_(0, deviation, generator=generator)
    decoder.requires_grad_(False)
    prepare(decoder, torch.device("cpu"))
    return decoder


def embeddings(tokens: int, seed: int, hidden: int = 48) -> Tensor:
    """Inputs of a turn: text and pictures are told apart by the layout alone."""
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed))


class WatchedPrefill(Prefill):
    """A prefill that remembers what each layer let through, as positions."""

    def narrow(self, layer: int) -> Tensor | None:
        alive = self._turn.positions[0] + self.past.seen
        kept = super().narrow(layer)
        self.let_through = getattr(self, "let_through", {})
        self.let_through[layer] = None if kept is None else alive[kept].tolist()
        return kept


class CacheRun:
    """One sequence through ``Prefill`` and ``Decoding``; answers as ``reference_cache.Actual``."""

    def __init__(self, decoder: Decoder, policy: Policy) -> None:
        config = decoder.config
        self.decoder, self.policy = decoder, policy
        self.pools = [
            Pool(config.kv_heads, config.head_dim, torch.float32, torch.device("cpu"))
            for _ in range(config.layers)
        ]
        self.row: Row | None = None
        # Of a model that tells rows and columns apart: those of pictures by their tokens.
        self.grids: dict[int, tuple[int, int]] = {}
        self.decoding: Decoding | None = None

    @torch.inference_mode()
    def prefill(self, hidden: Tensor, spans: list[tuple[int, int]], new_tokens: int) -> Tensor:
        self.settle()
        layout = Layout.of_tokens(len(hidden), spans, torch.device("cpu"))
        before, seen = (self.row.rotary, self.row.seen) if self.row else (None, 0)
        places = [(seen + start, seen + end) for start, end in spans if self.grids]
        grids = [self.grids[end - start] for start, end in places]
        rotary = self.decoder.rotation.begin(len(hidden), before, places, grids)
        given = self.pools, self.policy, layout, new_tokens, self.row, None, rotary
        with WatchedPrefill(*given) as step:
            self.step = step
            out = self.decoder(hidden.clone(), step)
        self.row = self.step.row
        return self.decoder.logits(out[-1])

    @torch.inference_mode()
    def decode(self, hidden: Tensor) -> Tensor:
        if self.decoding is None:
            self.decoding = Decoding(self.pools, [self.row])
        out = self.decoder(hidden.clone(), self.decoding)
        self.decoding.advance()
        return self.decoder.logits(out[-1])

    @torch.inference_mode()
    def settle(self) -> Row | None:
        if self.decoding is not None:
            self.row = self.decoding.settle(0)
            self.decoding = None
        return self.row

    # -- what is kept -----------------------------------------------------------------------------

    def survivors(self, layer: int) -> list[int] | None:
        return self.step.let_through[layer]

    def images(self, layer: int) -> list[int]:
        layout = self.row.layers[layer].layout
        return layout.positions[0, layout.image_of >= 0].tolist()

    def core(self, layer: int) -> list[int] | None:
        stored = self.row.layers[layer]
        slots = stored.core
        if slots is None:
            return None
        if self.decoding is not None:
            size = self.decoding.state.lists.shared[CORE][0][layer]
            listed = self.decoding.state.lists.slots[CORE][layer, 0, :size].long() - stored.start
            slots = listed[stored.layout.image_of[listed] >= 0]
        return stored.layout.positions[0, slots].tolist()

    def text(self, layer: int) -> list[list[int]]:
        layout = self.row.layers[layer].layout
        heads = self.decoder.config.kv_heads
        if self.decoding is None:
            return layout.positions[:, layout.text_start :].expand(heads, -1).sort().values.tolist()
        n, seen = self.decoding.state.lengths.texts[0], self.decoding.seen[0]
        if self.decoding.evicts:
            found = self.decoding.state.text.positions[layer, 0, :, : n + 1].tolist()
            return [sorted(p for p in head if p != seen) for head in found]
        old = layout.positions[:, layout.text_start :].expand(heads, -1).tolist()
        return [head + list(range(layout.seen, seen)) for head in old]


def attended(view: View, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend through a view without a rotation: by an angle of 0."""
    still = torch.zeros(len(q), 1, q.shape[-1], dtype=q.dtype)
    return view.attend(q, k, v, Tables(torch.ones_like(still), still))
