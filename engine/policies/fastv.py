"""FastV: after a few layers, half of the image tokens go no further (Chen et al., ECCV 2024).

The score is the attention of the last prompt token in the layer before the cut, averaged over
heads. Dropped tokens leave the hidden states, so later layers neither compute nor store them; the
layers before the cut keep everything. Positions of the others stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .cut import without_the_least
from .policy import Policy, check_count, check_layer, check_share

if TYPE_CHECKING:
    from torch import Tensor

    from .layout import Layout
    from .received import Received


@dataclass(frozen=True)
class FastV(Policy):
    """Before layer ``layer`` (counted from 0) drop ``drop`` of each picture's tokens (K and R)."""

    name: ClassVar[str] = "fastv"

    layer: int = 2
    drop: float = 0.5

    def __post_init__(self) -> None:
        check_count(self, "layer", low=1)
        check_share(self, "drop")

    def check_depth(self, layers: int, cross_layers: int = 0) -> None:
        """Where tokens are dropped before a layer, it must be there."""
        if self.drop:
            check_layer(self, self.layer, layers)

    def narrow(self, layer: int, layout: Layout, received: Received) -> Tensor | None:
        """Keep round(I * (1 - R)) tokens of every new picture."""
        if layer + 1 != self.layer or self.drop == 0:
            return None
        return without_the_least(layout, received, lambda size: round(size * (1 - self.drop)))
