"""The evictable text of all rows while they decode: places, scores, free slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ops import ranking
from .lengths import POSITION, RECENT, TOTAL, USED, Lengths
from .row import Row


class TextSlots:
    """Text of every layer, row and KV head; a *place* is a slot counted from the text's start.

    A row's places 0 to ``kept`` are in use during a step: ``kept`` tokens and the one in writing.
    After the step either one token per head is evicted, whose place the next token takes, or the
    text grows by a place. Scores exist only where some row evicts.

    Attributes:
        kept, room: those of ``Lengths``.
        start: ``[layers, rows]`` pool slots where text begins.
        write: ``[layers, rows, kv_heads]`` where the next token goes, ``slot * kv_heads + head``.
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
        slot = self.start + torch.tensor(self.kept, device=device)
        self.write = slot[..., None] * kv_heads + torch.arange(kv_heads, device=device)
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
        return self.slots(r) - self.start[:, r, None]

    def slots(self, r: int) -> Tensor:
        """``[layers, kv_heads]``: pool slots of row ``r``'s next token."""
        return self.write[:, r] // self.write.shape[-1]

    def grow(self, layers: slice) -> None:
        """The next tokens go behind the last; for rows that never evict."""
        self.write[layers].add_(self.write.shape[-1])

    def plan(
        self,
        layers: slice,
        logits: Tensor,
        lse: Tensor,
        first: Tensor,
        words: Tensor,
        error: Tensor,
    ) -> Callable[[], None]:
        """The call that credits a step's attention and finds places for the next tokens.

        Args:
            layers: whose text it is.
            logits: ``[layers * rows, heads, max]`` of the step over its lists; ``lse`` beside it.
            first: ``[layers, rows]`` int32, where text begins in the lists.
            words: ``[WORDS, rows]`` int32, see ``Lengths``.
            error: see ``ranking``.
        """
        state = self.scores[layers], self.positions[layers], self.write[layers]
        return ranking.plan_age(
            logits,
            lse,
            first.view(-1),
            self.start[layers].view(-1),
            *(words[word] for word in (USED, TOTAL, RECENT, POSITION)),
            *(tensor.flatten(0, 1) for tensor in state),
            error=error,
        )
