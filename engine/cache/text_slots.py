"""The evictable text of all rows while they decode: places, scores, free slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine import ranking
from engine.cache.lengths import POSITION, RECENT, TOTAL, USED, Lengths
from engine.cache.row import Row


class TextSlots:
    """Text of every layer, row and KV head; a *place* is a slot counted from the text's start.

    A row's places 0 to ``kept`` are in use during a step: ``kept`` tokens and the one in writing.
    After the step either one token per head is evicted, whose place the next token takes, or the
    text grows by a place. Scores exist only where some row evicts.

    Attributes:
        kept, room: those of ``Lengths``.
        start: ``[layers, rows]`` pool slots where text begins.
        write: ``[layers, rows, kv_heads]`` pool slots of the next token.
        scores: ``[layers, rows, kv_heads, places]`` fp32 attention received so far.
        positions: the same shape, int32; -1 where nothing lies.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        lengths: Lengths,
        kv_heads: int,
        places: int,
        device: torch.device,
    ) -> None:
        """``places`` is more than any row has room for."""
        self.evicts = any(lengths.evicts)
        self.follow(lengths)
        start = [[s.start + s.layout.text_start for s in row.layers] for row in rows]
        self.start = torch.tensor(start, device=device).T.contiguous()
        place = torch.tensor(self.kept, device=device)[:, None].expand(-1, kv_heads)
        self.write = self.start[..., None] + place
        if self.evicts:
            self._pack(rows, (*self.write.shape, places), device)

    def _pack(self, rows: Sequence[Row], shape: tuple[int, ...], device: torch.device) -> None:
        self.scores = torch.zeros(shape, device=device)
        self.positions = torch.full(shape, -1, dtype=torch.int32, device=device)
        for r, row in enumerate(rows):
            kept = self.kept[r]
            self.positions[:, r, :, kept] = row.seen
            for layer, stored in enumerate(row.layers):
                text = stored.layout.positions[:, stored.layout.text_start :]
                self.positions[layer, r, :, :kept] = text
                if stored.text_scores is not None:
                    self.scores[layer, r, :, :kept] = stored.text_scores

    def follow(self, lengths: Lengths) -> None:
        """Count as ``lengths`` does from now on."""
        self.kept, self.room = lengths.kept, lengths.room

    def tensors(self) -> list[Tensor]:
        """What differs from rows to rows."""
        return [self.start, self.write, *((self.scores, self.positions) if self.evicts else ())]

    def free_places(self, r: int) -> Tensor:
        """``[layers, kv_heads]``: row ``r``'s places of the next token."""
        return self.write[:, r] - self.start[:, r, None]


class Aging:
    """What happens after a step to the evictable text of some layers."""

    def __init__(self, text: TextSlots, layers: slice) -> None:
        self._start, self._write = text.start[layers, :, None], text.write[layers]
        self._scores, self._positions = text.scores[layers], text.positions[layers]
        self._victim = torch.empty_like(self._write, dtype=torch.int32)
        state = self._scores, self._positions, self._victim
        self._problems = [tensor.flatten(0, 1) for tensor in state]

    def evict_or_grow(
        self, logits: Tensor, lse: Tensor, first: Tensor, words: Tensor, error: Tensor
    ) -> None:
        """Credit the step's attention, then find every row and head a place for the next token.

        Args:
            logits: ``[layers * rows, heads, max]`` of the step over its lists; ``lse`` beside it.
            first: ``[layers * rows]`` int32, where text begins in the lists.
            words: ``[WORDS, layers * rows]`` int32, see ``Lengths``.
            error: see ``ranking``.
        """
        used, limits = words[USED], (words[TOTAL], words[RECENT])
        ranking.age(logits, lse, first, used, *limits, *self._problems, error=error)
        behind = used.view(*self._victim.shape[:2], 1)
        place = torch.where(self._victim < 0, behind, self._victim).long()
        torch.add(self._start, place, out=self._write)
        entry = place[..., None]
        self._scores.scatter_(-1, entry, 0.0)
        following = (words[POSITION] + 1).view(*self._victim.shape[:2], 1, 1)
        self._positions.scatter_(-1, entry, following.expand_as(entry))
