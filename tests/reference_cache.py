"""Cache policies as their papers' rules read, slowly: full-size keys and values, boolean masks.

Nothing here is shared with ``engine.cache``: this file has its own softmax and its own selections,
one head and one token at a time where that is clearer, over a decoder's slow arithmetic. What is
evicted stays in memory and is masked out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tests.reference_decoder import Arithmetic


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


class Reference:
    """One sequence whose cache keeps everything; ``prefill`` and ``decode`` return next logits."""

    def __init__(self, decoder: Arithmetic, margin: float = 3e-6) -> None:
        self.decoder, self.dtype = decoder, decoder.dtype
        heads, size = decoder.kv_heads, decoder.head_dim
        self.group = decoder.heads // heads
        self.keys = [torch.zeros(0, heads, size, dtype=self.dtype) for _ in range(decoder.layers)]
        self.values = [x.clone() for x in self.keys]
        self.stored = [torch.zeros(heads, 0, dtype=torch.bool) for _ in self.keys]
        self.received = [torch.zeros(heads, 0, dtype=self.dtype) for _ in self.keys]
        self.picture_of: list[int] = []  # by position; -1: text
        self.sizes: list[int] = []
        self.text_from: int | None = None  # None without a picture
        self.vision, self.heads = Near(margin), Near(margin * 10)

    # -- passes -----------------------------------------------------------------------------------

    def prefill(self, hidden: Tensor, spans: list[tuple[int, int]], actual: Actual) -> Tensor:
        """A turn of embeddings ``[tokens, hidden]`` with pictures at ``spans``."""
        first, self.old_pictures = len(self.picture_of), len(self.sizes)
        if not first:
            self.decoder.begin(len(hidden))
        self._see(len(hidden), spans)
        alive = list(range(first, first + len(hidden)))
        x = hidden.to(self.dtype)
        for layer in range(self.decoder.layers):
            x, weights = self._layer(layer, x, alive)
            new = torch.zeros(len(self.picture_of), dtype=torch.bool)
            new[alive] = True
            self.stored[layer] |= new
            kept = self._after_prefill(layer, weights, alive, actual)
            x = x[[alive.index(p) for p in kept]]
            alive = kept
        return self.decoder.head(x[-1])

    def decode(self, hidden: Tensor, actual: Actual) -> Tensor:
        """One token's embedding ``[1, hidden]``."""
        position = len(self.picture_of)
        self._see(1, [])
        x = hidden.to(self.dtype)
        for layer in range(self.decoder.layers):
            x, weights = self._layer(layer, x, [position])
            self.stored[layer][:, position] = True
            self._after_step(layer, weights, position, actual)
        return self.decoder.head(x[-1])

    def _after_prefill(
        self, layer: int, weights: Tensor, alive: list[int], actual: Actual
    ) -> list[int]:
        """Evict by ``weights [heads, alive, seen]``; returns whose hidden states go on."""
        return alive

    def _after_step(self, layer: int, weights: Tensor, position: int, actual: Actual) -> None:
        """Evict by ``weights [heads, 1, seen]``."""

    def _hidden(self, layer: int) -> list[int]:
        """Stored positions that this pass does not attend."""
        return []

    def _see(self, tokens: int, spans: list[tuple[int, int]]) -> None:
        """Append tokens: modality by position, and room in every layer's full-size tensors."""
        start, heads = len(self.picture_of), self.decoder.kv_heads
        self.picture_of += [-1] * tokens
        for begin, end in spans:
            self.picture_of[start + begin : start + end] = [len(self.sizes)] * (end - begin)
            self.sizes.append(end - begin)
            self.text_from = start + end
        for layer in range(self.decoder.layers):
            room = torch.zeros(tokens, heads, self.decoder.head_dim, dtype=self.dtype)
            self.keys[layer] = torch.cat([self.keys[layer], room])
            self.values[layer] = torch.cat([self.values[layer], room])
            wide = torch.zeros(heads, tokens)
            self.stored[layer] = torch.cat([self.stored[layer], wide.bool()], 1)
            self.received[layer] = torch.cat([self.received[layer], wide.to(self.dtype)], 1)

    def _layer(self, layer: int, x: Tensor, positions: list[int]) -> tuple[Tensor, Tensor]:
        """One layer; returns the new hidden states and the weights ``[heads, tokens, seen]``."""
        q, k, v = self.decoder.inputs(layer, x, positions)
        self.keys[layer][positions] = k
        self.values[layer][positions] = v
        weights, attended = self._attention(layer, q, positions)
        return self.decoder.outputs(layer, x, attended), weights

    def _attention(self, layer: int, q: Tensor, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Masked softmax over all tokens ever seen, head by head."""
        places = torch.arange(len(self.picture_of))
        causal = places[None] <= torch.tensor(positions)[:, None]
        own = torch.zeros(len(places), dtype=torch.bool)
        own[positions] = True
        hidden = torch.zeros_like(own)
        hidden[self._hidden(layer)] = True
        weights, outs = [], []
        for head in range(self.decoder.heads):
            kv = head // self.group
            visible = ((self.stored[layer][kv] | own) & ~hidden)[None] & causal
            logits = q[:, head] @ self.keys[layer][:, kv].T / math.sqrt(q.shape[-1])
            row = torch.softmax(logits.masked_fill(~visible, -math.inf), -1)
            weights.append(row)
            outs.append(row @ self.values[layer][:, kv])
        return torch.stack(weights), torch.cat(outs, -1)

    # -- selections that several policies make ----------------------------------------------------

    def _filter(
        self, last: Tensor, alive: list[int], share: Callable[[int], int], theirs: list[int] | None
    ) -> list[int]:
        """``share`` of the size of every new picture and all else go on, and the last token."""
        assert theirs is not None, "nothing was filtered"
        going: list[int] = [p for p in alive if self.picture_of[p] < 0]
        for picture in range(self.old_pictures, len(self.sizes)):
            candidates = [p for p in alive if self.picture_of[p] == picture]
            kept = [p for p in theirs if self.picture_of[p] == picture]
            count = share(self.sizes[picture])
            if len(kept) > count and kept[-1] == alive[-1]:
                kept.pop()
            going += self.vision.settle(last, candidates, count, kept)
        return sorted({*going, alive[-1]})

    def _heavy_and_recent(
        self, layer: int, start: int, heavy: int, recent: int, actual: Actual
    ) -> None:
        """Per KV head, of the tokens from ``start``: the most recent, and the heavy hitters."""
        for head in range(self.decoder.kv_heads):
            mine = self.stored[layer][head].nonzero()[:, 0].tolist()
            places = sorted(p for p in mine if p >= start)
            if len(places) <= heavy + recent:
                continue
            others, latest = places[: len(places) - recent], places[len(places) - recent :]
            theirs = actual.text(layer)[head]
            assert set(latest) <= set(theirs), "a recent token was evicted"
            rest = [p for p in theirs if p not in latest]
            chosen = self.heads.settle(self.received[layer][head], others, heavy, rest)
            for place in set(others) - set(chosen):
                self.stored[layer][head, place] = False

    def _receive(self, layer: int, weights: Tensor) -> None:
        """Add ``weights [heads, tokens, seen]`` up, by KV head."""
        self.received[layer] += weights.sum(1).unflatten(0, (-1, self.group)).sum(1)

    def _image(self, layer: int, picture: int) -> list[int]:
        """Stored positions of a picture (the heads share them)."""
        stored = self.stored[layer][0]
        return [p for p, of in enumerate(self.picture_of) if of == picture and stored[p]]


class ReferenceAvl(Reference):
    """A-VL."""

    def __init__(self, decoder: Arithmetic, settings: Settings, margin: float = 3e-6) -> None:
        super().__init__(decoder, margin)
        self.s = settings
        self.core: list[list[int] | None] = [None] * decoder.layers
        self.step, self.tiers, self.update = 0, False, False

    def prefill(self, hidden: Tensor, spans: list[tuple[int, int]], actual: Actual) -> Tensor:
        """See ``Reference``."""
        self.step, self.tiers = 0, False
        return super().prefill(hidden, spans, actual)

    def decode(self, hidden: Tensor, actual: Actual) -> Tensor:
        """See ``Reference``."""
        self.step += 1
        self.tiers = self.s.core is not None and bool(self.sizes)
        self.update = self.tiers and self.s.every > 0 and self.step % self.s.every == 0
        return super().decode(hidden, actual)

    def _hidden(self, layer: int) -> list[int]:
        """In steps between two updates, image tokens outside the core."""
        if not self.tiers or self.update:
            return []
        core = self.core[layer]
        assert core is not None
        return [p for p, of in enumerate(self.picture_of) if of >= 0 and p not in core]

    def _after_prefill(
        self, layer: int, weights: Tensor, alive: list[int], actual: Actual
    ) -> list[int]:
        last = weights[:, -1].mean(0)
        self._evict_text(layer, weights, alive, actual)
        self._choose_secondary(layer, last, actual)
        self._choose_core(layer, last, actual)
        if layer + 1 != self.s.layer or self.s.prefill == 1:
            return alive

        def share(size: int) -> int:
            return int(self.s.prefill * size)

        return self._filter(last, alive, share, actual.survivors(layer))

    def _after_step(self, layer: int, weights: Tensor, position: int, actual: Actual) -> None:
        self._evict_text(layer, weights, [position], actual)
        if self.update:
            self._choose_core(layer, weights[:, -1].mean(0), actual)

    def _choose_secondary(self, layer: int, last: Tensor, actual: Actual) -> None:
        """int(S * I) of every new picture."""
        for picture in range(self.old_pictures, len(self.sizes)):
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

    def _evict_text(self, layer: int, weights: Tensor, rows: list[int], actual: Actual) -> None:
        """Text after the last picture, by the attention of its own queries."""
        if self.text_from is None or self.s.text == 1:
            return
        text_rows = [i for i, position in enumerate(rows) if position >= self.text_from]
        self._receive(layer, weights[:, text_rows])
        seen = len(self.picture_of) - self.text_from
        budget = max(self.s.floor, round(self.s.text * seen))
        heavy = int(self.s.heavy * budget)
        self._heavy_and_recent(layer, self.text_from, heavy, budget - heavy, actual)


class ReferenceH2o(Reference):
    """int(0.125 n) heavy hitters and the int(0.375 n) latest of n tokens seen, at every step."""

    def _after_prefill(
        self, layer: int, weights: Tensor, alive: list[int], actual: Actual
    ) -> list[int]:
        self._after_step(layer, weights, alive[-1], actual)
        return alive

    def _after_step(self, layer: int, weights: Tensor, position: int, actual: Actual) -> None:
        self._receive(layer, weights)
        seen = position + 1
        self._heavy_and_recent(layer, 0, int(0.125 * seen), int(0.375 * seen), actual)


class ReferenceFastV(Reference):
    """Before layer 2, round(I * 0.5) of each picture by layer 1's last row, mean over heads."""

    def _after_prefill(
        self, layer: int, weights: Tensor, alive: list[int], actual: Actual
    ) -> list[int]:
        if layer != 1:
            return alive

        def half(size: int) -> int:
            return round(size * 0.5)

        return self._filter(weights[:, -1].mean(0), alive, half, actual.survivors(layer))
