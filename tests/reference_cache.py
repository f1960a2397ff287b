"""A-VL as the paper's rules read, slowly: full-size keys and values under boolean masks.

Nothing here is shared with ``engine.cache``: this file has its own forward pass over a decoder's
weights, its own softmax and its own selections, one head and one token at a time where that is
clearer. What is evicted stays in memory and is masked out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.models.decoder import Decoder


@dataclass(frozen=True)
class Settings:
    """S, C, K, P, L, T and the split of the text budget; core None: no core tier."""

    secondary: float = 0.45
    core: float | None = 0.30
    every: int = 3
    prefill: float = 0.90
    layer: int = 2
    text: float = 0.70
    heavy: float = 0.70
    floor: int = 20


class Actual(Protocol):
    """What the cache under test kept, as positions, so that near ties can be followed."""

    def survivors(self, layer: int) -> list[int] | None: ...

    def images(self, layer: int) -> list[int]: ...

    def core(self, layer: int) -> list[int] | None: ...

    def text(self, layer: int) -> list[list[int]]: ...


@dataclass
class Near:
    """Checks a kept set against fp64 scores; sets may differ only by scores within ``margin``."""

    margin: float
    compared: int = 0
    differed: int = 0

    def settle(
        self, scores: Tensor, candidates: Sequence[int], count: int, actual: Sequence[int]
    ) -> list[int]:
        """The ``count`` best candidates - or ``actual``, if as good within the margin."""
        ranked = sorted(candidates, key=lambda place: (-float(scores[place]), place))
        own = sorted(ranked[:count])
        self.compared += 1
        if list(actual) == own:
            return own
        assert len(actual) == len(own), f"kept {len(actual)}, expected {len(own)}"
        assert set(actual) <= set(candidates), "kept what was no candidate"
        least_kept = min(float(scores[place]) for place in actual)
        best_lost = max(float(scores[place]) for place in set(candidates) - set(actual))
        assert least_kept >= best_lost - self.margin, (
            f"kept {sorted(set(actual) - set(own))} instead of {sorted(set(own) - set(actual))}:"
            f" {least_kept} < {best_lost}"
        )
        self.differed += 1
        return sorted(actual)


class ReferenceAvl:
    """One sequence under A-VL; ``prefill`` and ``decode`` return the next token's logits."""

    def __init__(
        self, decoder: Decoder, settings: Settings, dtype: torch.dtype, margin: float = 3e-6
    ) -> None:
        self.s, self.dtype, self.config = settings, dtype, decoder.config
        self.weights = {name: p.detach().to(dtype) for name, p in decoder.named_parameters()}
        c = self.config
        self.keys = [torch.zeros(0, c.kv_heads, c.head_dim, dtype=dtype) for _ in range(c.layers)]
        self.values = [x.clone() for x in self.keys]
        self.stored = [torch.zeros(c.kv_heads, 0, dtype=torch.bool) for _ in range(c.layers)]
        self.core: list[list[int] | None] = [None] * c.layers
        self.received = [torch.zeros(c.kv_heads, 0, dtype=dtype) for _ in range(c.layers)]
        self.picture_of: list[int] = []  # by position; -1: text
        self.sizes: list[int] = []
        self.text_from: int | None = None  # None without a picture
        self.step = 0
        self.vision, self.heads = Near(margin), Near(margin * 10)

    # -- passes -----------------------------------------------------------------------------------

    def prefill(self, hidden: Tensor, spans: list[tuple[int, int]], actual: Actual) -> Tensor:
        """A turn of embeddings ``[tokens, hidden]`` with pictures at ``spans``."""
        first, self.step = len(self.picture_of), 0
        old_pictures = len(self.sizes)
        self._see(len(hidden), spans)
        alive = list(range(first, first + len(hidden)))
        x = hidden.to(self.dtype)
        for layer in range(self.config.layers):
            x, weights = self._layer(layer, x, alive, core_only=False)
            new = torch.zeros(len(self.picture_of), dtype=torch.bool)
            new[alive] = True
            self.stored[layer] |= new
            last = weights[:, -1].mean(0)
            self._evict_text(layer, weights, alive, actual)
            self._choose_secondary(layer, last, old_pictures, actual)
            self._choose_core(layer, last, actual)
            if layer + 1 == self.s.layer and self.s.prefill < 1:
                kept = self._filter(layer, last, alive, old_pictures, actual)
                x = x[[alive.index(p) for p in kept]]
                alive = kept
        return self._head(x[-1])

    def decode(self, hidden: Tensor, actual: Actual) -> Tensor:
        """One token's embedding ``[1, hidden]``."""
        self.step += 1
        position = len(self.picture_of)
        self._see(1, [])
        tiers = self.s.core is not None and bool(self.sizes)
        update = tiers and self.s.every > 0 and self.step % self.s.every == 0
        x = hidden.to(self.dtype)
        for layer in range(self.config.layers):
            x, weights = self._layer(layer, x, [position], core_only=tiers and not update)
            self.stored[layer][:, position] = True
            self._evict_text(layer, weights, [position], actual)
            if update:
                self._choose_core(layer, weights[:, -1].mean(0), actual)
        return self._head(x[-1])

    def _see(self, tokens: int, spans: list[tuple[int, int]]) -> None:
        """Append tokens: modality by position, and room in every layer's full-size tensors."""
        start = len(self.picture_of)
        self.picture_of += [-1] * tokens
        for begin, end in spans:
            self.picture_of[start + begin : start + end] = [len(self.sizes)] * (end - begin)
            self.sizes.append(end - begin)
            self.text_from = start + end
        for layer in range(self.config.layers):
            room = torch.zeros(tokens, self.config.kv_heads, self.config.head_dim, dtype=self.dtype)
            self.keys[layer] = torch.cat([self.keys[layer], room])
            self.values[layer] = torch.cat([self.values[layer], room])
            wide = torch.zeros(self.config.kv_heads, tokens)
            self.stored[layer] = torch.cat([self.stored[layer], wide.bool()], 1)
            self.received[layer] = torch.cat([self.received[layer], wide.to(self.dtype)], 1)

    # -- selections -------------------------------------------------------------------------------

    def _choose_secondary(self, layer: int, last: Tensor, old: int, actual: Actual) -> None:
        """int(S * I) of every new picture."""
        for picture in range(old, len(self.sizes)):
            candidates = self._image(layer, picture)
            count = min(int(self.s.secondary * self.sizes[picture]), len(candidates))
            kept = [p for p in actual.images(layer) if self.picture_of[p] == picture]
            chosen = self.vision.settle(last, candidates, count, kept)
            for place in set(candidates) - set(chosen):
                self.stored[layer][:, place] = False

    def _choose_core(self, layer: int, last: Tensor, actual: Actual) -> None:
        """int(C * I) of every picture, of what is stored."""
        if self.s.core is None or not self.sizes:
            return
        core: list[int] = []
        theirs = actual.core(layer)
        assert theirs is not None, "there is no core tier"
        for picture, size in enumerate(self.sizes):
            candidates = self._image(layer, picture)
            count = min(int(self.s.core * size), len(candidates))
            kept = [p for p in theirs if self.picture_of[p] == picture]
            core += self.vision.settle(last, candidates, count, kept)
        self.core[layer] = core

    def _filter(
        self, layer: int, last: Tensor, alive: list[int], old: int, actual: Actual
    ) -> list[int]:
        """int(P * I) of every new picture and all else go on after layer L, and the last token."""
        theirs = actual.survivors(layer)
        assert theirs is not None, "nothing was filtered"
        going: list[int] = [p for p in alive if self.picture_of[p] < 0]
        for picture in range(old, len(self.sizes)):
            candidates = [p for p in alive if self.picture_of[p] == picture]
            kept = [p for p in theirs if self.picture_of[p] == picture]
            count = int(self.s.prefill * self.sizes[picture])
            if len(kept) > count and kept[-1] == alive[-1]:
                kept.pop()
            going += self.vision.settle(last, candidates, count, kept)
        return sorted({*going, alive[-1]})

    def _evict_text(self, layer: int, weights: Tensor, rows: list[int], actual: Actual) -> None:
        """Per KV head: the most recent tokens, and of the others the heavy hitters."""
        if self.text_from is None or self.s.text == 1:
            return
        text_rows = [i for i, position in enumerate(rows) if position >= self.text_from]
        group = self.config.heads // self.config.kv_heads
        seen = len(self.picture_of) - self.text_from
        budget = max(self.s.floor, round(self.s.text * seen))
        heavy = int(self.s.heavy * budget)
        for head in range(self.config.kv_heads):
            got = weights[head * group : (head + 1) * group, text_rows].sum((0, 1))
            self.received[layer][head] += got
            mine = self.stored[layer][head].nonzero()[:, 0].tolist()
            text = [p for p in mine if p >= self.text_from]
            if len(text) <= budget:
                continue
            recent = sorted(text)[len(text) - (budget - heavy) :]
            others = [p for p in text if p not in recent]
            theirs = actual.text(layer)[head]
            assert set(recent) <= set(theirs), "a recent token was evicted"
            rest = [p for p in theirs if p not in recent]
            chosen = self.heads.settle(self.received[layer][head], others, heavy, rest)
            for place in set(others) - set(chosen):
                self.stored[layer][head, place] = False

    def _image(self, layer: int, picture: int) -> list[int]:
        """Stored positions of a picture (the heads share them)."""
        stored = self.stored[layer][0]
        return [p for p, of in enumerate(self.picture_of) if of == picture and stored[p]]

    # -- the decoder, once more -------------------------------------------------------------------

    def _layer(
        self, layer: int, x: Tensor, positions: list[int], core_only: bool
    ) -> tuple[Tensor, Tensor]:
        """One layer; returns the new hidden states and the weights ``[heads, tokens, seen]``."""
        normed = self._norm(x, f"layers.{layer}.attn_norm")
        q = self._rotated(self._linear(normed, f"layers.{layer}.q_proj"), positions)
        k = self._rotated(self._linear(normed, f"layers.{layer}.k_proj"), positions)
        v = self._linear(normed, f"layers.{layer}.v_proj")
        self.keys[layer][positions] = k
        self.values[layer][positions] = v.view(len(x), self.config.kv_heads, -1)
        weights, out = self._attention(layer, q, positions, core_only)
        x = x + self._linear(out, f"layers.{layer}.o_proj")
        normed = self._norm(x, f"layers.{layer}.mlp_norm")
        gate = self._linear(normed, f"layers.{layer}.gate_proj")
        up = self._linear(normed, f"layers.{layer}.up_proj")
        return x + self._linear(
            gate * torch.sigmoid(gate) * up, f"layers.{layer}.down_proj"
        ), weights

    def _attention(
        self, layer: int, q: Tensor, positions: list[int], core_only: bool
    ) -> tuple[Tensor, Tensor]:
        """Masked softmax over all tokens ever seen, head by head."""
        places = torch.arange(len(self.picture_of))
        causal = places[None] <= torch.tensor(positions)[:, None]
        own = torch.zeros(len(places), dtype=torch.bool)
        own[positions] = True
        group = self.config.heads // self.config.kv_heads
        weights, outs = [], []
        for head in range(self.config.heads):
            kv = head // group
            visible = (self.stored[layer][kv] | own)[None] & causal
            if core_only:
                core = self.core[layer]
                assert core is not None
                hidden = (torch.tensor(self.picture_of) >= 0).index_fill(
                    0, torch.tensor(core, dtype=torch.long), False
                )
                visible = visible & ~hidden[None]
            logits = q[:, head] @ self.keys[layer][:, kv].T / math.sqrt(self.config.head_dim)
            row = torch.softmax(logits.masked_fill(~visible, -math.inf), -1)
            weights.append(row)
            outs.append(row @ self.values[layer][:, kv])
        return torch.stack(weights), torch.cat(outs, -1)

    def _rotated(self, x: Tensor, positions: list[int]) -> Tensor:
        """RoPE as pairs (i, i + d/2) turned by position * theta^(-2i/d)."""
        half = self.config.head_dim // 2
        x = x.view(len(x), -1, self.config.head_dim)
        exponent = torch.arange(half, dtype=torch.float64) * 2 / self.config.head_dim
        angle = torch.tensor(positions, dtype=torch.float64)[:, None] / (
            self.config.rope_theta**exponent
        )
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
        return torch.cat([turned.real, turned.imag], -1).to(self.dtype)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.config.norm_eps)
        return x / scale * self.weights[f"{name}.weight"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return out if bias is None else out + bias

    def _head(self, x: Tensor) -> Tensor:
        return self._linear(self._norm(x, "norm"), "head")
