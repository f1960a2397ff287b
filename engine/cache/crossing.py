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
        extents: each layer's; its slots are the features, in order.
        whole: how many features a token saw before any were dropped.
    """

    blind: ClassVar[int] = 0  # see ``Sight``

    source: ref[Tensor]
    extents: tuple[Extent, ...]
    whole: int

    @property
    def seen(self) -> int:
        """How many features each layer holds."""
        return self.extents[0].size

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' keys and values."""
        return sum(extent.size * extent.pool.slot_bytes for extent in self.extents)

    @property
    def nbytes_whole(self) -> int:
        """The same with all features."""
        return self.nbytes * self.whole // self.seen

    def pair(self, layer: int, project: Project) -> Pair:
        """A layer's keys and values, where they lie."""
        extent = self.extents[layer]
        pool, slots = extent.pool, slice(extent.start, extent.start + extent.size)
        assert isinstance(pool, Pool), "features are plain numbers"
        return pool.k[slots], pool.v[slots]

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

    def find(self, sight: Sight) -> CrossStored | None:
        """What a row holds of these very features, if that is all that is attended of them."""
        for stored in list(self._known):
            if stored.extents[0].held and stored.source() is sight.features and not sight.blind:
                return stored
        return None

    def has(self, sights: Sequence[Sight], *, trims: bool = False) -> bool:
        """Whether there is room for what a turn with these pictures will hold; where its policy
        ``trims``, nothing of it is another's.
        """
        fresh = [sight.seen for sight in lasting(sights) if trims or self.find(sight) is None]
        return all(_has_all(pool, fresh) for pool in self.pools)


def _has_all(pool: Pool, sizes: Iterable[int]) -> bool:
    """Whether extents of these sizes can be taken now."""
    if pool.limit is None:
        return True
    taken: list[Extent] = []
    try:
        for size in sizes:
            if not pool.has(size):
                return False
            taken.append(pool.take(size))
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
