"""Cross-attention of decode steps: every row's token over the features of the pictures it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..ops.native import Scratch
from .crossing import Project
from .lengths import RERANKS
from .listed import ListedAttention, listed_in_formats
from .row import Row
from .showing import Attended, attended_across, show_step_across
from .slot_lists import CORE, FULL, MIXED
from .state import State


class CrossSteps:
    """Cross layers' attention in the steps of some rows, planned once; void when tensors move."""

    def __init__(self, state: State, scratch: Scratch, error: Tensor) -> None:
        """``scratch`` is shared with the steps' other attention, ``error`` with their ranking."""
        self.lists, self._state, self._scratch = state.crossed, state, scratch
        self._error = error
        self._kind, self._scored = FULL, False
        self.void()

    def void(self) -> None:
        """Let go of what was made for tensors where they lie."""
        self._attention: dict[tuple[int, int, int], ListedAttention] = {}
        self._scores: tuple[Tensor, Tensor] | None = None
        self._ranking: list[Callable[[], None]] = []

    @property
    def course(self) -> tuple[int, bool]:
        """Which lists the coming step attends, and whether it leaves scores behind."""
        return self._kind, self._scored

    def begin(self, kind: int, words: Tensor, *, scored: bool, observed: bool) -> None:
        """Decide the coming step: which lists ``kind`` its rows attend by its ``words [WORDS,
        rows]``; logits are wanted where it is ``scored`` and has a core, or ``observed``.
        """
        lists, tiered = self.lists, self.lists.tiered
        self._kind = (kind if kind in (FULL, MIXED) else CORE) if tiered else FULL
        self._scored = (scored and tiered) or observed
        if self._kind == MIXED:
            lists.lists.complete(MIXED, slice(None), CORE, words)
        if self._scored:
            lists.wanted[: words.shape[1]] = words[RERANKS]

    def attended(self, across: Row, r: int, *, core: bool) -> list[Attended]:
        """What row ``r`` attends of a step over its core or full lists, before it is closed."""
        return attended_across(across, r, self.lists.lists, CORE if core else FULL)

    def show(self, across: Row, r: int, step: int, seen: Sequence[Attended]) -> None:
        """Tell row ``r``'s observer of a closed step."""
        assert self._scores is not None, "attention leaves scores where they are shown"
        show_step_across(across, r, step, self.lists.lists, self._scores, seen)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attend the features that rows see, ``q [rows, heads, head_dim]``."""
        rows, key = len(q), (self._kind, layer, len(q))
        if key not in self._attention:
            self._attention[key] = self._listed(layer, rows)
        if not self._scored:
            return self._attention[key](q, None)
        if self._scores is None:
            self._scores = self._room(q.shape[1])
            self._ranking = list(self._ranked(*self._scores))
        logits, lse = self._scores
        return self._attention[key](q, (logits[layer, :rows], lse[layer, :rows]))

    def rank(self) -> None:
        """Behind the step: let its weights choose the core of all layers, where rows want it."""
        for work in self._ranking if self._scored else ():
            work()

    def _listed(self, layer: int, rows: int) -> ListedAttention:
        crossed, most = self.lists, self._state.most[:rows]
        tiers = listed_in_formats(
            crossed.lists,
            crossed.sifted,
            self._kind,
            layer,
            most,
            lambda name: crossed.pools[name][layer],
        )
        return ListedAttention(list(tiers), scratch=self._scratch)

    def _room(self, heads: int) -> tuple[Tensor, Tensor]:
        """Where attention leaves logits and log-sum-exp, of all layers and rows."""
        crossed = self.lists
        size = crossed.layers, crossed.sizes.rows, heads
        device = crossed.sees.device
        logits = torch.zeros(*size, crossed.sizes.width, device=device)
        return logits, torch.zeros(size, device=device)

    def _ranked(self, logits: Tensor, lse: Tensor) -> Iterator[Callable[[], None]]:
        crossed, slots = self.lists, self.lists.lists.slots
        both = logits.flatten(0, 1), lse.flatten(0, 1)
        lists = slots[FULL], slots[CORE]
        yield from crossed.runs.ranking(slice(None), *both, *lists, crossed.wanted, self._error)


class CrossStepView:
    """A cross layer's view of a decode step; see ``CrossView``."""

    def __init__(self, steps: CrossSteps, layer: int, rows: int) -> None:
        self._steps, self._layer = steps, layer
        self._sees = steps.lists.sees[:rows]

    def attend(self, q: Tensor, project: Project) -> tuple[Tensor, Tensor]:
        """See ``CrossView.attend``; one query per row, and nothing is new."""
        return self._steps.attend(self._layer, q), self._sees
