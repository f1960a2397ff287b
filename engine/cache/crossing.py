"""What cross-attention layers hold of pictures: keys and values of their features.

A picture that is looked at so takes no columns of the sequence. Every cross layer has a pool of its
own, and in it an extent for each picture, written once and only read afterwards: rows that ask
about the same picture share it. What the layers have in common is which features they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias
from weakref import WeakSet, ref

from torch import Tensor

from ..errors import CapacityError
from ..policies.policy import Policy
from .pool import Extent, Pool

# Keys and values [features, kv_heads, head_dim], and what makes them of [features, hidden].
Pair: TypeAlias = tuple[Tensor, Tensor]
Project: TypeAlias = Callable[[Tensor], Pair]


@dataclass(frozen=True, eq=False)
class Sight:
    """A picture that a turn's tokens see.

    Attributes:
        place: number of its token in the turn; it and later ones see the picture.
        features: ``[n, hidden]``.
        seen: how many of them, the first ones, a token attends that sees the picture.
        blind: how many a token attends that sees none; nothing is cached for it.
    """

    place: int
    features: Tensor
    seen: int
    blind: int = 0


@dataclass(frozen=True, eq=False)
class CrossStored:
    """Keys and values of one picture's features, for all cross layers.

    Attributes:
        source: the features that they were computed from, while anybody has them.
        format: that they are written in, or PLAIN.
        extents: each layer's; its first slots are the features, in order.
        totals: ``[layers, kv_heads, head_dim]`` fp32, the sums of each layer's values.
        numbers: ``[seen]`` ascending, which features of the picture each layer holds.
        whole: how many a token saw before any were dropped.
        full_bytes: bytes of a feature in all layers, written in plain numbers.
    """

    blind: ClassVar[int] = 0  # see ``Sight``

    source: ref[Tensor]
    format: str
    extents: tuple[Extent, ...]
    totals: Tensor
    numbers: Tensor
    whole: int
    full_bytes: int

    @property
    def seen(self) -> int:
        """How many features each layer holds."""
        return len(self.numbers)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' keys and values."""
        return sum(self.seen * extent.pool.slot_bytes for extent in self.extents)

    @property
    def nbytes_whole(self) -> int:
        """The same with all features in plain numbers."""
        return self.whole * self.full_bytes

    def pair(self, layer: int, project: Project) -> Pair:
        """A layer's keys and values; plain ones where they lie."""
        extent = self.extents[layer]
        return extent.pool.read(extent, self.seen)

    def hold(self) -> None:
        """One holder more."""
        for extent in self.extents:
            extent.share()

    def kept(self) -> CrossStored:
        """What a row holds after a pass."""
        return self

    def give(self) -> None:
        """Give it back; the last holder's frees the slots."""
        for extent in self.extents:
            extent.give()


class CrossPools:
    """The pools of all cross layers, and the pictures that lie in them."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self.pools = pools
        self._known: WeakSet[CrossStored] = WeakSet()

    def know(self, stored: CrossStored) -> CrossStored:
        """Later rows may ask about this picture too."""
        self._known.add(stored)
        return stored

    def find(self, sight: Sight, policy: Policy) -> CrossStored | None:
        """What a row holds of these very features, written as ``policy`` has it, if that is all
        that is attended of them.
        """
        if policy.trims or sight.blind:
            return None
        for stored in list(self._known):
            held, same = stored.extents[0].held, stored.source() is sight.features
            if held and same and stored.format == policy.feature_format():
                return stored
        return None

    def has(self, sights: Sequence[Sight], policy: Policy) -> bool:
        """Whether there is room for what a turn with these pictures will hold."""
        fresh = [sight.seen for sight in lasting(sights) if self.find(sight, policy) is None]
        return all(_has_all(pool, policy.feature_format(), fresh) for pool in self.pools)


def _has_all(pool: Pool, format_: str, sizes: Iterable[int]) -> bool:
    """Whether extents of these sizes can be taken now."""
    if pool.limit is None:
        return True
    taken: list[Extent] = []
    try:
        for size in sizes:
            taken.append(pool.holding(format_).take(size))
    except CapacityError:
        return False
    finally:
        for extent in taken:
            extent.give()
    return True


def groups(places: Sequence[int], before: int = 0) -> list[tuple[int, slice]]:
    """From which token on which pictures are seen: those of the last run of places.

    A token sees the pictures whose places stand directly one behind the other before it, up to
    itself; of earlier pictures it sees nothing (Meta's ``create_vision_mask``). ``before`` pictures
    of earlier turns are seen by the tokens in front of the first place.

    >>> groups([3, 4, 9], before=1)
    [(0, slice(0, 1, None)), (3, slice(1, 2, None)), (4, slice(1, 3, None)), (9, slice(3, 4, None))]
    """
    found, first = [(0, slice(0, before))], 0
    for number, place in enumerate(places):
        if number and places[number - 1] + 1 < place:
            first = number
        found.append((place, slice(before + first, before + number + 1)))
    return found


def lasting(sights: Sequence[Sight]) -> Sequence[Sight]:
    """Those that tokens behind the turn will see."""
    return sights[groups([sight.place for sight in sights])[-1][1]]
