"""Random eviction of image tokens: the floor that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .cut import most_of_pictures
from .policy import Policy, check_count, check_share

if TYPE_CHECKING:
    from .layout import Kept, Layout
    from .received import Received


@dataclass(frozen=True)
class Random(Policy):
    """Store int(keep * I) random tokens of every picture, others in every layer; all text."""

    name: ClassVar[str] = "random"

    keep: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self, "keep")
        check_count(self, "seed")

    def retain(self, layer: int, layout: Layout, received: Received) -> Kept:
        """Draws from a generator of its own, so that other random numbers are not disturbed."""
        import torch

        from .layout import Kept

        generator = torch.Generator().manual_seed(self.seed * 1000 + layer)
        shared = [layout.fixed()]
        for index, size in enumerate(layout.image_sizes):
            columns = layout.picture(index)
            if index >= layout.settled:
                order = torch.randperm(len(columns), generator=generator).to(columns.device)
                columns = columns[order[: int(self.keep * size)]]
            shared.append(columns)
        return Kept(shared=torch.cat(shared).sort().values, text=layout.text())

    def most_kept(self, layout: Layout) -> tuple[int, int]:
        """See ``Policy.most_kept``."""
        shared = most_of_pictures(layout, lambda size: int(self.keep * size))
        return shared, layout.columns - layout.text_start
