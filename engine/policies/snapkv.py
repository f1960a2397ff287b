"""SnapKV: keep what the end of the prompt looks at, per head, once (Li et al., NeurIPS 2024).

The weights of the prompt's last ``window`` queries are summed, smoothed by an average over
neighbouring tokens, and the best of the tokens before the window are kept with the window itself.
Generated tokens are all kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import OptionError
from .policy import Policy, check_count, check_share
from .select import top

if TYPE_CHECKING:
    from .layout import Kept, Layout
    from .received import Received


@dataclass(frozen=True)
class SnapKv(Policy):
    """Keep ``keep`` of the prompt's tokens: the last ``window`` and the best before it.

    ``kernel`` is the width of the average, an odd number of tokens.
    """

    name: ClassVar[str] = "snapkv"

    keep: float = 0.5
    window: int = 16
    kernel: int = 5

    def __post_init__(self) -> None:
        check_share(self, "keep")
        check_count(self, "window", low=1)
        check_count(self, "kernel", low=1)
        if self.kernel % 2 == 0:
            raise OptionError(
                f"cache policy snapkv: kernel is {self.kernel}", hint="use an odd number"
            )

    def retain(self, layer: int, layout: Layout, received: Received) -> Kept:
        """Every head's own columns; a prompt that fits the budget or the window is kept whole."""
        import torch
        import torch.nn.functional as F

        from .layout import Kept

        total = int(self.keep * layout.columns)
        window = min(self.window, received.queries)
        before = layout.columns - window
        if total >= layout.columns or not before:
            return Kept.everything(layout)
        sums = received.from_last(window).unflatten(0, (received.k.shape[1], -1)).sum(1)
        smooth = F.avg_pool1d(sums[:, :before], self.kernel, stride=1, padding=self.kernel // 2)
        chosen = top(smooth, max(0, total - window))
        recent = torch.arange(before, layout.columns, device=sums.device)
        nothing = torch.empty(0, dtype=torch.int64, device=sums.device)
        text = torch.cat([chosen, recent.expand(len(sums), -1)], 1)
        return Kept(shared=nothing, text=text)

    def most_kept(self, layout: Layout) -> tuple[int, int]:
        """See ``Policy.most_kept``."""
        total, columns = int(self.keep * layout.columns), layout.columns
        if total >= columns:
            return super().most_kept(layout)
        return 0, max(total, min(self.window, columns))
