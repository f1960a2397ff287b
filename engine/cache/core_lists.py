"""Choosing the core again while rows decode: every picture's run in the core lists is rewritten."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine import ranking
from engine.cache.policy import Policy
from engine.cache.row import Row


class CoreRuns:
    """The ``number``-th picture of every row, in the full and in the core lists of all layers.

    A picture's stored tokens are one run of the full list, its core tokens one run of the core
    list; both are as long in every layer, so that a new core is written over the old one.
    """

    def __init__(self, rows: Sequence[Row], policy: Policy, number: int, device: torch.device):
        self._runs: list[tuple[int, int]] = []
        bounds = []
        for row in rows:
            first, last, at, size = _run(row, policy, number)
            self._runs.append((at, size))
            bounds.append((first, last, size))
        layers = len(rows[0].layers)
        columns = torch.tensor(bounds, dtype=torch.int32, device=device).T
        self._first, self._last, self._keep = (column.repeat(layers) for column in columns)
        most = max(size for _, size in self._runs)
        self._out = torch.empty(layers * len(rows), most, dtype=torch.int32, device=device)
        self._out_count = torch.empty_like(self._keep)

    def choose(
        self, logits: Tensor, lse: Tensor, full: Tensor, core: Tensor, rows: Sequence[int]
    ) -> None:
        """Rewrite ``core`` for ``rows`` from the weights that a step over the full lists gave.

        ``logits [layers, rows, heads, max]`` and ``lse``; ``full`` and ``core`` int32
        ``[layers, rows, max]``.
        """
        layers, count = full.shape[:2]
        chosen = torch.zeros(count, dtype=torch.int32, device=full.device)
        chosen[list(rows)] = 1
        ranking.rank(
            logits.flatten(0, 1),
            lse.flatten(0, 1),
            self._first,
            self._last,
            self._keep * chosen.repeat(layers),
            full.flatten(0, 1),
            self._out,
            self._out_count,
        )
        best = self._out.view(layers, count, -1)
        for r in rows:
            at, size = self._runs[r]
            core[:, r, at : at + size] = best[:, r, :size]


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
