"""H2O: heavy hitters and a recent window over the whole sequence, per head (Zhang et al. 2023).

The form A-VL's release compares with: budgets are shares of the tokens seen so far, so they grow; a
token's score is the attention it has received from all queries since it came, summed over the
query heads that share its keys; the lightest token outside the recent window is evicted for good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .policy import Budget, Policy, check_share
from .select import heavy_and_recent

if TYPE_CHECKING:
    from .layout import Kept, Layout
    from .received import Received


@dataclass(frozen=True)
class H2o(Policy):
    """Keep int(heavy * n) heavy hitters and the int(recent * n) latest of n tokens seen."""

    name: ClassVar[str] = "h2o"

    heavy: float = 0.125
    recent: float = 0.375

    def __post_init__(self) -> None:
        check_share(self, "heavy")
        check_share(self, "recent", high=1 - self.heavy, limit="1 - heavy")

    def retain(self, layer: int, layout: Layout, received: Received) -> Kept:
        """Every column is evictable; each head keeps its own."""
        import torch

        from .layout import Kept

        budget = self.text_budget(*layout.lengths())
        if budget is None:
            return Kept.everything(layout)
        scores = received.accumulated(received.queries)
        positions = layout.positions.expand(len(scores), -1)
        total = min(budget.total, layout.columns)
        kept = heavy_and_recent(scores, positions, total, min(budget.recent, total))
        nothing = torch.empty(0, dtype=torch.int64, device=kept.device)
        return Kept(shared=nothing, text=kept, text_scores=scores.gather(1, kept))

    def most_kept(self, layout: Layout) -> tuple[int, int]:
        """See ``Policy.most_kept``."""
        budget = self.text_budget(*layout.lengths())
        if budget is None:
            return super().most_kept(layout)
        return 0, min(budget.total, layout.columns)

    def text_budget(self, text_seen: int | None, seen: int) -> Budget | None:
        """Both shares of all tokens seen, at least one token in all."""
        if self.heavy + self.recent >= 1:
            return None
        recent = int(self.recent * seen)
        return Budget(max(1, int(self.heavy * seen) + recent), recent)
