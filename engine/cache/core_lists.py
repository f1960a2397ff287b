"""Choosing the core again while rows decode: every picture's run in the core lists is rewritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..ops import ranking
from .row import Row, Stored
from .sizes import Sizes


class CoreRuns:
    """Every row's pictures, in the full and in the core lists of all layers.

    A picture's stored tokens are one run of a layer's full list, its core tokens one run of the
    core list, as long after every ranking as before: a new core is written over the old one.

    Attributes:
        runs: ``[pictures, 4, layers, rows]`` int32: first slot, the one after the last, how many
            are core, and where they begin in the core list; zeros for a picture that a row does
            not have.
    """

    def __init__(self, layers: int, sizes: Sizes, device: torch.device) -> None:
        size = (sizes.pictures, 4, layers, sizes.rows)
        self._starts = {name: part.start for name, part in sizes.tiers}
        self.runs = torch.zeros(size, dtype=torch.int32, device=device)

    def join(self, row: Row, r: int) -> None:
        """Write the runs of row ``r``."""
        for number, runs in enumerate(self.runs):
            each = [_run(stored, number, self._starts) for stored in row.layers]
            runs[..., r] = torch.tensor(each, dtype=torch.int32).T

    def ranking(
        self,
        layers: slice,
        logits: Tensor,
        lse: Tensor,
        full: Tensor,
        core: Tensor,
        wanted: Tensor,
        error: Tensor,
    ) -> Iterator[Callable[[], None]]:
        """The calls, one a picture, that choose by the weights of a step over some layers' lists.

        ``logits [layers * rows, heads, max]`` and ``lse``; ``full`` and ``core`` int32
        ``[layers, rows, max]``, of which ``core`` is written; ``wanted [rows]`` int32 says whose
        runs change.
        """
        lists = full.flatten(0, 1), core.flatten(0, 1)
        for runs in self.runs:
            first, last, keep, at = (each[layers].flatten() for each in runs)
            yield ranking.plan_rank(logits, lse, *lists, first, last, keep, at, wanted, error=error)


def _run(stored: Stored, number: int, starts: Mapping[str, int]) -> tuple[int, int, int, int]:
    """A picture's first slot, the one after its last, how long its core run is, where it begins.

    All count from the beginning of a layer's lists; ``starts`` says where a format's begin.
    """
    layout = stored.layout
    if stored.core is None or number >= len(layout.image_sizes):
        return 0, 0, 0, 0
    slots = layout.picture(number)
    if len(slots):
        first, last = int(slots[0]), int(slots[-1]) + 1
        before = int((layout.fixed() < first).sum()) + _count(stored.core, 0, first)
        return first, last, _count(stored.core, first, last), before
    at = {name: [start, start] for name, start in starts.items()}  # in the full list, in the core
    for part in stored.parts:
        mine, core = (part.image_of == number).nonzero()[:, 0], part.core
        assert core is not None, "where there is a core, every part has one"
        full_at, core_at = at[part.format]
        if len(mine) and not part.minor:
            first, last = int(mine[0]), int(mine[-1]) + 1
            before = core_at + _count(core, 0, first)
            return full_at + first, full_at + last, _count(core, first, last), before
        at[part.format] = [full_at + part.tokens, core_at + len(core)]
    return 0, 0, 0, 0


def _count(numbers: Tensor, first: int, last: int) -> int:
    """How many of ``numbers`` lie from ``first`` up to ``last``, exclusive."""
    return int(((numbers >= first) & (numbers < last)).sum())
