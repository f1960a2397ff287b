"""StreamingLLM: the first tokens as attention sinks, and a window of the latest (Xiao et al. 2024).

Deviation: the original renumbers positions inside the cache, which needs keys before RoPE; here
keys are cached rotated, so positions stay what they were. For prompts within the model's context
the two differ only in the distances the model sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .policy import Budget, Policy, check_count, check_share
from .select import top

if TYPE_CHECKING:
    from .layout import Kept, Layout
    from .received import Received


@dataclass(frozen=True)
class Streaming(Policy):
    """Keep the first ``sink`` tokens and the latest ``recent`` share of the tokens seen."""

    name: ClassVar[str] = "streaming"

    sink: int = 4
    recent: float = 0.5

    def __post_init__(self) -> None:
        check_count(self, "sink")
        check_share(self, "recent")

    def retain(self, layer: int, layout: Layout, received: Received) -> Kept:
        """Sinks are fixed, everything later is evictable; no score is needed."""
        import torch

        from .layout import Kept

        budget = self.text_budget(*layout.lengths())
        if budget is None:
            return Kept.everything(layout)
        positions = layout.positions[0]
        columns = torch.arange(layout.columns, device=positions.device)
        sinks, later = columns[positions < self.sink], columns[positions >= self.sink]
        return Kept(shared=sinks, text=later[top(positions[later], budget.total)])

    def most_kept(self, layout: Layout) -> tuple[int, int]:
        """See ``Policy.most_kept``."""
        budget = self.text_budget(*layout.lengths())
        if budget is None:
            return super().most_kept(layout)
        return self.sink, min(budget.total, layout.columns)

    def text_budget(self, text_seen: int | None, seen: int) -> Budget | None:
        """The window, at least one token."""
        if self.recent == 1:
            return None
        window = max(1, int(self.recent * seen))
        return Budget(window, window)
