"""How large the tensors of a decode state are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from torch import Tensor

from .row import Row

# Lists and places are rounded up to multiples of this, so that most rows that come later fit.
ROUNDED = 128


# Tensors, and their dimension that counts rows; what is larger adds to the end of the list.
Group: TypeAlias = tuple[Sequence[Tensor], int]


class Sizes(NamedTuple):
    """What rows that are decoded together take at most.

    Attributes:
        rows: rows.
        slots: of the longest list.
        places: of the longest text, the token in writing among them.
        pictures: whose core is ranked again.
        evicting: 1 where some row evicts text, else 0: scores are kept.
        rotary: words of a row's rotary state.
        sifting: 1 where some row leaves values unread, else 0.
        formats: of the cache, with the slots of the longest list in each.
    """

    rows: int = 0
    slots: int = 0
    places: int = 0
    pictures: int = 0
    evicting: int = 0
    rotary: int = 0
    sifting: int = 0
    formats: Mapping[str, int] = MappingProxyType({})

    @classmethod
    def of(cls, row: Row) -> Sizes:
        """A single row's."""
        budget = row.policy.text_budget(*row.text.lengths())
        return cls(
            rows=1,
            slots=_rounded(max(stored.extent.size for stored in row.layers)),
            places=_rounded(max(stored.text_slots for stored in row.layers) + 1),
            pictures=len(row.image_spans) if _ranked(row) else 0,
            evicting=int(budget is not None),
            rotary=len(row.rotary),
            sifting=int(row.policy.leaves_out() > 0),
            formats=_formats(row),
        )

    @property
    def width(self) -> int:
        """Slots of a row's lists in all tiers together."""
        return self.slots + sum(self.formats.values())

    @property
    def tiers(self) -> list[tuple[str, slice]]:
        """Formats and where their lists lie behind the plain one."""
        ends = accumulate(self.formats.values(), initial=self.slots)
        parts = zip(self.formats, pairwise(ends), strict=True)
        return [(name, slice(*part)) for name, part in parts]

    def covers(self, other: Sizes) -> bool:
        """Whether nothing of ``other`` is larger."""
        numbers = zip(self[:-1], other[:-1], strict=True)
        return all(mine >= theirs for mine, theirs in numbers) and all(
            self.formats.get(name, 0) >= slots for name, slots in other.formats.items()
        )

    def covering(self, other: Sizes) -> Sizes:
        """What covers both; where rows must be added, they are doubled."""
        rows = self.rows if self.rows >= other.rows else max(2 * self.rows, other.rows)
        formats = dict(self.formats)
        for name, slots in other.formats.items():
            formats[name] = max(slots, formats.get(name, 0))
        largest = map(max, self[:-1], other[:-1])
        return Sizes._make([*largest, formats])._replace(rows=rows)


def _ranked(row: Row) -> bool:
    """Whether some of a row's image tokens may be core and others not."""
    tokens = sum(end - start for start, end in row.image_spans)
    return tokens > 0 and any(stored.core is not None for stored in row.layers)


def _formats(row: Row) -> dict[str, int]:
    """Formats of a row's parts, and slots that a list in each takes."""
    most: dict[str, int] = {}
    for stored in row.layers:
        mine: dict[str, int] = {}
        for part in stored.parts:
            mine[part.format] = mine.get(part.format, 0) + part.tokens
        for name, tokens in mine.items():
            most[name] = max(most.get(name, 0), _rounded(tokens))
    return most


def _rounded(count: int) -> int:
    """``count``, or somewhat more.

    >>> _rounded(100), _rounded(128), _rounded(129)
    (128, 128, 256)
    """
    return -(-count // ROUNDED) * ROUNDED


def carry(before: Sequence[Group], after: Sequence[Group]) -> None:
    """Copy what lay in tensors into larger ones: of every group the first as many."""
    for (old, _), (new, _) in zip(before, after, strict=True):
        for into, held in zip(new, old, strict=False):
            into[tuple(slice(size) for size in held.shape)] = held
