"""Choosing the core again while rows decode: every picture's run in the core lists is rewritten."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ops import ranking
from .row import Row


class CoreRuns:
    """The ``number``-th picture of every row, in the full and in the core lists of all layers.

    A picture's stored tokens are one run of the full list, its core tokens one run of the core
    list; both are as long in every layer, so that a new core is written over the old one.
    """

    def __init__(self, rows: Sequence[Row], number: int, device: torch.device) -> None:
        runs = [_run(row, number) for row in rows]
        self._runs = torch.tensor(runs, dtype=torch.int32).T.contiguous().to(device)

    def plan(
        self,
        logits: Tensor,
        lse: Tensor,
        full: Tensor,
        core: Tensor,
        wanted: Tensor,
        error: Tensor,
    ) -> Callable[[], None]:
        """The call that chooses by the weights of a step over the full lists.

        ``logits [layers * rows, heads, max]`` and ``lse``; ``full`` and ``core`` int32
        ``[layers, rows, max]``, of which ``core`` is written; ``wanted [rows]`` int32 says whose
        runs change.
        """
        first, last, keep, at = self._runs
        lists = full.flatten(0, 1), core.flatten(0, 1)
        return ranking.plan_rank(logits, lse, *lists, first, last, keep, at, wanted, error=error)

    def tensors(self) -> list[Tensor]:
        """What differs from rows to rows."""
        return [self._runs]


def _run(row: Row, number: int) -> tuple[int, int, int, int]:
    """A picture's first slot, the one after its last, how long its core run is, where it begins."""
    stored = row.layers[0]
    layout = stored.layout
    if stored.core is None or number >= len(layout.image_sizes):
        return 0, 0, 0, 0
    slots = layout.picture(number)
    if not len(slots):
        return 0, 0, 0, 0
    first, last = int(slots[0]), int(slots[-1]) + 1
    size = min(row.policy.core_size(layout.image_sizes[number]), len(slots))
    before = int((layout.fixed() < first).sum()) + int((stored.core < first).sum())
    return first, last, size, before
