"""How large the tensors of a decode state are."""

from __future__ import annotations

from typing import NamedTuple

from .row import Row

# Lists and places are rounded up to multiples of this, so that most rows that come later fit.
ROUNDED = 128


class Sizes(NamedTuple):
    """What rows that are decoded together take at most.

    Attributes:
        rows: rows.
        slots: of the longest list.
        places: of the longest text, the token in writing among them.
        pictures: whose core is ranked again.
        evicting: 1 where some row evicts text, else 0: scores are kept.
        rotary: words of a row's rotary state.
    """

    rows: int = 0
    slots: int = 0
    places: int = 0
    pictures: int = 0
    evicting: int = 0
    rotary: int = 0

    @classmethod
    def of(cls, row: Row) -> Sizes:
        """A single row's."""
        budget = row.policy.text_budget(*row.layers[0].layout.lengths())
        return cls(
            rows=1,
            slots=_rounded(max(stored.extent.size for stored in row.layers)),
            places=_rounded(max(stored.text_slots for stored in row.layers) + 1),
            pictures=len(row.image_spans) if any(s.core is not None for s in row.layers) else 0,
            evicting=int(budget is not None),
            rotary=len(row.rotary),
        )

    def covers(self, other: Sizes) -> bool:
        """Whether nothing of ``other`` is larger."""
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))

    def covering(self, other: Sizes) -> Sizes:
        """What covers both; where rows must be added, they are doubled."""
        rows = self.rows if self.rows >= other.rows else max(2 * self.rows, other.rows)
        return Sizes(*map(max, self, other))._replace(rows=rows)


def _rounded(count: int) -> int:
    """``count``, or somewhat more.

    >>> _rounded(100), _rounded(128), _rounded(129)
    (128, 128, 256)
    """
    return -(-count // ROUNDED) * ROUNDED
