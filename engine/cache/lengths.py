"""What a decode step must know that follows from lengths alone: known before the step, and ahead.

Positions, how much text is kept, which list is attended and when the core is ranked again depend on
no number that the model computes. They are *words*, one value per row and step, that the host can
write down for many steps ahead; the device reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..policies.policy import Budget, Policy
from .row import Row

# The words of a step, in order: the new token's position; whether the row attends its core list;
# text tokens in use, the new one among them; how many may stay (-1: all) and how many of them for
# being recent; whether the row's core is ranked again after the step.
POSITION, ATTENDS_CORE, USED, TOTAL, RECENT, RERANKS = range(6)
WORDS = 6


class Lengths:
    """The lengths of some rows that are decoded together, step after step.

    Attributes:
        seen: tokens of each row so far, which is the position of the next one.
        kept: text tokens that each row keeps between steps, in every head.
        room: how many text tokens each row's extents hold.
        steps: decode steps that each row has done in this turn.
        evicts: whether a row evicts text.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._policies = [row.policy for row in rows]
        self._layouts = [row.layers[0].layout for row in rows]
        self.seen = [row.seen for row in rows]
        self.kept = [layout.columns - layout.text_start for layout in self._layouts]
        self.room = [
            min(stored.capacity - stored.layout.text_start for stored in row.layers) for row in rows
        ]
        self.steps = [row.step for row in rows]
        self.evicts = [self._budget(r, 0) is not None for r in range(len(rows))]
        self._known: list[tuple[int, int]] | None = None

    def ahead(self) -> Lengths:
        """A copy that may run ahead of this one."""
        other = Lengths.__new__(Lengths)
        other.__dict__ |= self.__dict__
        other.seen, other.kept, other.steps = list(self.seen), list(self.kept), list(self.steps)
        return other

    def kinds(self) -> list[int]:
        """For each row whether the coming step attends its core list (1) or its full list (0)."""
        return [int(p.attends_core(step + 1)) for p, step in self._stepping()]

    def reranks(self) -> list[int]:
        """For each row whether the coming step ranks its core again."""
        return [int(p.reranks(step + 1)) for p, step in self._stepping()]

    def _stepping(self) -> Iterable[tuple[Policy, int]]:
        return zip(self._policies, self.steps, strict=True)

    def overfull(self) -> list[int]:
        """Rows that have no slot for the coming step's token."""
        both = enumerate(zip(self.kept, self.room, strict=True))
        return [r for r, (kept, room) in both if kept >= room]

    def words(self) -> list[list[int]]:
        """The coming step's words, ``[WORDS][rows]``."""
        limits = self._limits()
        return [
            self.seen,
            self.kinds(),
            [kept + 1 for kept in self.kept],
            [total for total, _ in limits],
            [recent for _, recent in limits],
            self.reranks(),
        ]

    def advance(self) -> None:
        """The coming step is done."""
        self.kept[:] = [
            kept if 0 <= total <= kept else kept + 1
            for kept, (total, _) in zip(self.kept, self._limits(), strict=True)
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
