"""The evictable text of all rows while they decode: places, scores, free slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine import ranking
from engine.cache.policy import Budget
from engine.cache.row import Row


class TextSlots:
    """Text of every layer, row and KV head; a *place* is a slot counted from the text's start.

    A row's places 0 to ``kept`` are in use during a step: ``kept`` tokens and the one in writing.
    After the step either one token per head is evicted, whose place the next token takes, or the
    text grows by a place. Scores exist only where some row evicts.

    Attributes:
        kept: text tokens that each row keeps between steps, in every head.
        start: ``[layers, rows]`` pool slots where text begins.
        write: ``[layers, rows, kv_heads]`` pool slots of the next token.
        scores: ``[layers, rows, kv_heads, places]`` fp32 attention received so far.
        positions: the same shape, int32; -1 where nothing lies.
    """

    def __init__(self, rows: Sequence[Row], kv_heads: int, evicts: bool, device: torch.device):
        layouts = [row.layers[0].layout for row in rows]
        self.kept = [layout.columns - layout.text_start for layout in layouts]
        self.room = [
            min(stored.capacity - stored.layout.text_start for stored in row.layers) for row in rows
        ]
        start = [[s.start + s.layout.text_start for s in row.layers] for row in rows]
        self.start = torch.tensor(start, device=device).T.contiguous()
        place = torch.tensor(self.kept, device=device)[:, None].expand(-1, kv_heads)
        self.write = self.start[..., None] + place
        if evicts:
            self._pack(rows, kv_heads, device)

    def _pack(self, rows: Sequence[Row], kv_heads: int, device: torch.device) -> None:
        # One more than fits: the place of the token after the last one that was promised room.
        shape = (*self.start.shape, kv_heads, max(self.room) + 1)
        self.scores = torch.zeros(shape, device=device)
        self.positions = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._victim = torch.empty(shape[:3], dtype=torch.int32, device=device)
        for r, row in enumerate(rows):
            kept = self.kept[r]
            self.positions[:, r, :, kept] = row.seen
            for layer, stored in enumerate(row.layers):
                text = stored.layout.positions[:, stored.layout.text_start :]
                self.positions[layer, r, :, :kept] = text
                if stored.text_scores is not None:
                    self.scores[layer, r, :, :kept] = stored.text_scores

    def grow(self) -> None:
        """Every row keeps the token just written; the next one goes behind it."""
        self.kept = [kept + 1 for kept in self.kept]
        self.write += 1

    def evict_or_grow(
        self,
        logits: Tensor,
        lse: Tensor,
        first: Tensor,
        budgets: Sequence[Budget | None],
        seen: Sequence[int],
    ) -> None:
        """Credit the step's attention, then find every row and head a place for the next token.

        Args:
            logits: ``[layers, rows, heads, max]`` of the step over its lists; ``lse`` beside it.
            first: ``[layers, rows]`` int32, where text begins in the lists.
            budgets: of each row after the step; None never evicts.
            seen: positions of the next tokens.
        """
        used = [kept + 1 for kept in self.kept]
        limits = [(b.total, b.recent) if b else (-1, 0) for b in budgets]
        ranking.age(
            logits.flatten(0, 1),
            lse.flatten(0, 1),
            first.flatten(),
            self._for_all_layers(used),
            self._for_all_layers([total for total, _ in limits]),
            self._for_all_layers([recent for _, recent in limits]),
            self.scores.flatten(0, 1),
            self.positions.flatten(0, 1),
            self._victim.flatten(0, 1),
        )
        behind = torch.tensor(used, device=self.start.device)[:, None]
        place = torch.where(self._victim < 0, behind, self._victim.long())
        self.kept = [
            count if not 0 <= total < count else count - 1
            for count, (total, _) in zip(used, limits, strict=True)
        ]
        self.scores.scatter_(-1, place[..., None], 0.0)
        next_positions = torch.tensor(seen, dtype=torch.int32, device=place.device)
        self.positions.scatter_(
            -1, place[..., None], next_positions[:, None, None].expand_as(place[..., None])
        )
        self.write = self.start[..., None] + place

    def _for_all_layers(self, values: Sequence[int]) -> Tensor:
        """One value per row as int32 ``[layers * rows]``."""
        row_values = torch.tensor(values, dtype=torch.int32, device=self.start.device)
        return row_values.repeat(len(self.start))

    def free_places(self, r: int) -> Tensor:
        """``[layers, kv_heads]``: row ``r``'s places of the next token."""
        return self.write[:, r] - self.start[:, r, None]
