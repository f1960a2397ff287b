"""What a decode step must know that follows from lengths alone: known before the step, and ahead.

Positions, how much text is held, which list is attended and when the core is ranked again depend on
no number that the model computes. They are *words*, one value per row and step, that the host can
write down for many steps ahead; the device reads them.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..policies.layout import Layout
from ..policies.policy import Budget, Policy
from .row import Row

# The words of a step, in order: the new token's position; whether the row attends its core list;
# text tokens in use, the new one among them; how many may stay (-1: all) and how many of them for
# being recent; whether the row's core is ranked again after the step.
POSITION, ATTENDS_CORE, USED, TOTAL, RECENT, RERANKS = range(6)
WORDS = 6


class Lengths:
    """The lengths of the rows that are decoded together, step after step.

    Attributes:
        seen: tokens of each row so far, which is the position of the next one.
        texts: text tokens that each row holds between steps, in every head.
        text_slots: how many a row's extents have slots for.
        steps: decode steps that each row has done in this turn.
        evicts: whether a row evicts text.
    """

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.texts: list[int] = []
        self.text_slots: list[int] = []
        self.steps: list[int] = []
        self.evicts: list[bool] = []
        self._policies: list[Policy] = []
        self._layouts: list[Layout] = []
        self._known: list[tuple[int, int]] | None = None

    def join(self, row: Row, r: int) -> None:
        """Row ``r``: the next one, or one that is there, anew."""
        layout = row.text
        self._policies[r : r + 1] = [row.policy]
        self._layouts[r : r + 1] = [layout]
        self.seen[r : r + 1] = [row.seen]
        self.texts[r : r + 1] = [layout.columns - layout.text_start]
        self.text_slots[r : r + 1] = [min(stored.text_slots for stored in row.layers)]
        self.steps[r : r + 1] = [row.step]
        self.evicts[r : r + 1] = [self._budget(r, 0) is not None]
        self._known = None

    def leave(self, r: int) -> None:
        """Row ``r`` goes; the last one takes its place."""
        for values in self._each():
            values[r] = values[-1]
            values.pop()
        self._known = None

    def ahead(self) -> Lengths:
        """A copy that may run ahead of this one."""
        other = Lengths()
        for mine, theirs in zip(self._each(), other._each(), strict=True):
            theirs.extend(mine)
        return other

    def _each(self) -> tuple[list[object], ...]:
        lists = self.seen, self.texts, self.text_slots, self.steps, self.evicts
        return *lists, self._policies, self._layouts  # type: ignore[return-value]

    def kinds(self) -> list[int]:
        """For each row whether the coming step attends its core list (1) or its full list (0)."""
        return [int(p.attends_core(step + 1)) for p, step in self._stepping()]

    def reranks(self) -> list[int]:
        """For each row whether the coming step ranks its core again."""
        return [int(p.reranks(step + 1)) for p, step in self._stepping()]

    def packing(self) -> list[int]:
        """Rows whose policy packs behind the coming step."""
        stepping = enumerate(self._stepping())
        return [r for r, (p, step) in stepping if p.packs_every and not (step + 1) % p.packs_every]

    def _stepping(self) -> Iterable[tuple[Policy, int]]:
        return zip(self._policies, self.steps, strict=True)

    def overfull(self) -> list[int]:
        """Rows that have no slot for the coming step's token."""
        both = enumerate(zip(self.texts, self.text_slots, strict=True))
        return [r for r, (held, slots) in both if held >= slots]

    def words(self) -> list[list[int]]:
        """The coming step's words, ``[WORDS][rows]``."""
        limits = self._limits()
        return [
            self.seen,
            self.kinds(),
            [held + 1 for held in self.texts],
            [total for total, _ in limits],
            [recent for _, recent in limits],
            self.reranks(),
        ]

    def advance(self) -> None:
        """The coming step is done."""
        self.texts[:] = [
            held if 0 <= total <= held else held + 1
            for held, (total, _) in zip(self.texts, self._limits(), strict=True)
        ]
        self.seen[:] = [seen + 1 for seen in self.seen]
        self.steps[:] = [step + 1 for step in self.steps]
        self._known = None

    def _limits(self) -> list[tuple[int, int]]:
        """Text tokens that may stay after the coming step, and how many for being recent."""
        if not any(self.evicts):
            return [(-1, 0)] * len(self.seen)
        if self._known is None:
            budgets = [self._budget(r, 1) for r in range(len(self.seen))]
            self._known = [(b.total, b.recent) if b else (-1, 0) for b in budgets]
        return self._known

    def _budget(self, r: int, more: int) -> Budget | None:
        layout = self._layouts[r]
        return self._policies[r].text_budget(*layout.lengths(self.seen[r] - layout.seen + more))
