"""Choosing the core again while rows decode: every picture's run in the core lists is rewritten."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine import ranking
from engine.cache.lengths import RERANKS
from engine.cache.policy import Policy
from engine.cache.row import Row


class CoreRuns:
    """The ``number``-th picture of every row, in the full and in the core lists of some layers.

    A picture's stored tokens are one run of the full list, its core tokens one run of the core
    list; both are as long in every layer, so that a new core is written over the old one. The
    latest core of every row is remembered: rows that are not ranked in a step keep it.
    """

    def __init__(
        self, rows: Sequence[Row], policy: Policy, number: int, core: Tensor, most: int | None
    ) -> None:
        """``core [layers, rows, max]`` int32 holds the first core; ``most`` is at least the longest
        run, None exactly that.
        """
        layers, _, width = core.shape
        runs = [_run(row, policy, number) for row in rows]
        most = most or max(1, *(size for *_, size in runs))
        columns = torch.tensor(runs, dtype=torch.int32, device=core.device).T
        self._first, self._last, _, self._keep = (column.repeat(layers) for column in columns)
        at, size = columns[2, :, None], columns[3, :, None]
        place = torch.arange(width, device=core.device) - at
        self._inside = (place >= 0) & (place < size)
        self._place = place.clamp(0, most - 1)
        entries = (at + torch.arange(most, device=core.device)).clamp(max=width - 1)
        self._best = core.gather(2, entries.expand(layers, -1, -1)).flatten(0, 1)
        self._count = torch.empty_like(self._keep)

    def choose(
        self,
        logits: Tensor,
        lse: Tensor,
        words: Tensor,
        full: Tensor,
        core: Tensor,
        out: Tensor,
        error: Tensor,
    ) -> None:
        """Write ``out``: ``core`` with new runs, from the weights that the full lists were given.

        ``logits [layers * rows, heads, max]`` and ``lse``; ``words [WORDS, layers * rows]``, of
        which RERANKS says whose runs change; ``full``, ``core`` and ``out`` int32
        ``[layers, rows, max]``, the last two may be one.
        """
        ranking.rank(
            logits,
            lse,
            self._first,
            self._last,
            self._keep * words[RERANKS],
            full.flatten(0, 1),
            self._best,
            self._count,
            error=error,
        )
        best = self._best.unflatten(0, full.shape[:2])
        chosen = best.gather(2, self._place.expand(len(full), -1, -1))
        torch.where(self._inside, chosen, core, out=out)

    def tensors(self) -> list[Tensor]:
        """What differs from rows to rows."""
        return [self._first, self._last, self._keep, self._inside, self._place, self._best]


def _run(row: Row, policy: Policy, number: int) -> tuple[int, int, int, int]:
    """A picture's first slot, the one after its last, where its core run begins, its length."""
    stored = row.layers[0]
    layout = stored.layout
    if stored.core is None or number >= len(layout.image_sizes):
        return 0, 0, 0, 0
    slots = layout.picture(number)
    if not len(slots):
        return 0, 0, 0, 0
    first, last = int(slots[0]), int(slots[-1]) + 1
    size = min(policy.core_size(layout.image_sizes[number]), len(slots))
    before = int((layout.fixed() < first).sum()) + int((stored.core < first).sum())
    return first, last, before, size
