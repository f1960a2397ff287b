"""Sift: forget nothing. Keys are scanned in few bits, values are read where they matter.

Every image token is kept, its keys and values in few bits. A decode step scans all keys; a head
then reads the values of its heaviest tokens until at most ``skip`` of what the picture gets is left
out, and gives that rest to the mean of the picture's values (SparQ's compensation, arXiv
2312.04985). The choice is made anew by each head in each step, so that it is never stale, and what
is left out is bounded and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .cut import most_of_pictures
from .policy import Policy, check_bits, check_share

if TYPE_CHECKING:
    from .layout import Kept, Layout
    from .received import Received


@dataclass(frozen=True)
class Sift(Policy):
    """Pictures are written in ``format`` once their prompt is read; text stays as it is.

    Attributes:
        format: bits of keys and of values, such as k4v4 (``ops.pages``).
        skip: share of a head's attention to pictures whose values may stay unread; 0: none.
    """

    name: ClassVar[str] = "sift"

    format: str = "k4v4"
    skip: float = 0.1

    def __post_init__(self) -> None:
        check_bits(self, "format")
        check_share(self, "skip")

    @property
    def impartial(self) -> bool:
        """Nothing is chosen."""
        return True

    def retain(self, layer: int, layout: Layout, received: Received) -> Kept:
        """All columns, pictures in their format."""
        from .layout import InFormat, Kept

        images = (layout.image_of >= 0).nonzero()[:, 0]
        return Kept(layout.fixed(), layout.text(), packed=(InFormat(self.format, images),))

    def most_kept(self, layout: Layout) -> tuple[int, int]:
        """See ``Policy.most_kept``."""
        return most_of_pictures(layout, lambda size: 0), layout.columns - layout.text_start

    def most_packed(self, layout: Layout) -> dict[str, int]:
        """See ``Policy.most_packed``."""
        new = range(layout.settled, len(layout.image_sizes))
        return {self.format: sum(map(layout.image_columns, new))}

    def feature_format(self) -> str:
        """See ``Policy.feature_format``: features are what other models' image tokens are."""
        return self.format

    def leaves_out(self) -> float:
        """See ``Policy.leaves_out``."""
        return self.skip
