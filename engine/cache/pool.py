"""One layer's storage: pools of slots, of which sequences own extents.

Plain numbers lie in the layer's ``Pool``; what is written in few bits in a ``PagedPool`` of its
own for every format, which grows by itself or, where a layer may take only so many bytes, lies in
the very memory that the plain pool has claimed.
"""

from __future__ import annotations

from typing import Protocol
from weakref import WeakSet, proxy

import torch
from torch import Tensor

from ..errors import CapacityError
from ..ops.pages import PAGE, Pages
from ..options import parse_bits
from ..policies.policy import PLAIN
from .holes import Holes


class Holder(Protocol):
    """Holds what was made for tensors where they lie."""

    def void(self) -> None:
        """The tensors are about to move: let go of them."""


class Pool:
    """K and V of one layer, ``[slots, kv_heads, head_dim]``: a token's heads lie side by side.

    Token-major rows make a gather of few tokens read long runs (1.4 times faster than head-major on
    CPU). Extents are handed out first fit. A pool with a ``limit`` claims its slots once and never
    moves; another grows where no hole is large enough: its first extent as it is, then by half of
    what there is at least, so that growing costs no more than writing has.

    Attributes:
        key_bits: keys in formats have at least so many, whatever a policy asks for.
        holders: whoever has planned work on ``k`` and ``v``: is told before they move.
        holes: free slots; of a pool with a limit first those of keys, then those of values.
        paged: the pools of formats that were asked for, by name.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        limit: int | None = None,
        key_bits: int = 0,
    ) -> None:
        self.limit, self.key_bits = limit, key_bits
        self.holders: WeakSet[Holder] = WeakSet()
        self.claimed = torch.empty(2, limit or 0, kv_heads, head_dim, dtype=dtype, device=device)
        self.k, self.v = self.claimed.unbind()
        self.holes = Holes(2 * (limit or 0))
        self.paged: dict[str, PagedPool] = {}

    @property
    def plain(self) -> Pool:
        """This one: see ``PagedPool``."""
        return self

    @property
    def slots(self) -> int:
        """Slots that exist."""
        return len(self.k)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a token's keys and values."""
        return 2 * self.k.shape[1] * self.k.shape[2] * self.k.element_size()

    def holding(self, format_: str) -> Pool | PagedPool:
        """The pool of a format, or this one for PLAIN."""
        return self if format_ == PLAIN else self.of(format_)

    def of(self, format_: str) -> PagedPool:
        """The layer's pool of a format; its keys have as many bits as they need here."""
        keys, values = parse_bits(format_)
        name = f"k{max(keys, self.key_bits)}v{values}"
        if name not in self.paged:
            self.paged[name] = PagedPool(self, name)
        return self.paged[name]

    def has(self, size: int, paged: dict[str, int] | None = None) -> bool:
        """Whether extents of ``size`` slots, and as many of formats, can be taken now."""
        if self.limit is None:
            return True
        taken: list[Extent] = []
        try:
            taken.append(self.take(size))
            for name, tokens in (
                paged or {}
            ).items():  # one by one: a failure gives back the others
                taken.append(self.of(name).take(tokens))
        except CapacityError:
            return False
        finally:
            for extent in taken:
                extent.give()
        return True

    def take(self, size: int) -> Extent:
        """Reserve ``size`` consecutive slots; CapacityError where a limit leaves no such hole."""
        if self.limit is None:
            return Extent(self, self._take_or_grow(size), size)
        start = self._pair(self.limit, size)
        if start is None:
            raise full(size, self.limit)
        self.holes.remove(start, size)
        self.holes.remove(self.limit + start, size)
        return Extent(self, start, size)

    def free(self, start: int, size: int) -> None:
        """Make an extent's slots a hole."""
        self.holes.add(start, size)
        if self.limit is not None:
            self.holes.add(self.limit + start, size)

    def write(self, extent: Extent, k: Tensor, v: Tensor) -> None:
        """Fill an extent with ``k, v [tokens, kv_heads, head_dim]``."""
        for numbers, new in ((self.k, k), (self.v, v)):
            numbers[extent.start : extent.start + len(new)] = new

    def read(self, extent: Extent, tokens: int) -> tuple[Tensor, Tensor]:
        """The first ``tokens`` of what ``write`` has written, where they lie."""
        slots = slice(extent.start, extent.start + tokens)
        return self.k[slots], self.v[slots]

    def _pair(self, limit: int, size: int) -> int | None:
        """Where ``size`` slots begin that are free for keys and for values."""
        keys = [(start, min(end, limit)) for start, end in self.holes.free if start < limit]
        values = [(max(start - limit, 0), end - limit) for start, end in self.holes.free]
        for start, end in keys:
            for other, stop in values:
                at = max(start, other)
                if min(end, stop) - at >= size:
                    return at
        return None if size or limit else 0

    def _take_or_grow(self, size: int) -> int:
        found = self.holes.take(size)
        if found is not None:
            return found
        extra = max(size - self.holes.tail(self.slots), self.slots // 2)
        for holder in list(self.holders):
            holder.void()
        # Both or neither: where memory runs out in between, the pool is still what it was.
        k, v = extended(self.k, extra), extended(self.v, extra)
        self.holes.add(self.slots, extra)
        self.k, self.v = k, v
        found = self.holes.take(size)
        return 0 if found is None else found


class PagedPool:
    """Keys and values of one layer in few bits, ``data [pages, bytes]`` uint8; see ``Pages``.

    An extent takes whole pages. Attributes are those of ``Pool``; ``plain`` is the layer's.
    """

    def __init__(self, plain: Pool, format_: str) -> None:
        k = plain.k
        self.layout = Pages.of(format_, k.shape[1], k.shape[2], k.dtype)
        self.holders: WeakSet[Holder] = WeakSet()
        self.holes = Holes()
        self.plain: Pool = proxy(plain)  # which holds this
        self._claims: dict[int, tuple[int, int]] = {}
        self.data = torch.empty(0, self.layout.nbytes, dtype=torch.uint8, device=k.device)
        if plain.limit is not None:
            flat = plain.claimed.view(torch.uint8).flatten()
            pages = len(flat) // self.layout.nbytes
            self.data = flat[: pages * self.layout.nbytes].view(pages, -1)

    @property
    def slots(self) -> int:
        """Slots that exist."""
        return len(self.data) * PAGE

    @property
    def slot_bytes(self) -> int:
        """Bytes of a token's keys and values."""
        return self.layout.nbytes // PAGE

    def take(self, size: int) -> Extent:
        """See ``Pool.take``."""
        pages = -(-size // PAGE)
        first = self._take_or_grow(pages) if self.plain.limit is None else self._claim(pages)
        return Extent(self, first * PAGE, pages * PAGE)

    def free(self, start: int, size: int) -> None:
        """See ``Pool.free``."""
        if self.plain.limit is None:
            self.holes.add(start // PAGE, size // PAGE)
        elif size:
            self.plain.holes.add(*self._claims.pop(start // PAGE))

    def write(self, extent: Extent, k: Tensor, v: Tensor) -> None:
        """See ``Pool.write``."""
        if extent.size:
            first = extent.start // PAGE
            self.data[first : first + extent.size // PAGE] = self.layout.pack(k, v)

    def read(self, extent: Extent, tokens: int) -> tuple[Tensor, Tensor]:
        """See ``Pool.read``: float32."""
        first = extent.start // PAGE
        k, v = self.layout.unpack(self.data[first : first + extent.size // PAGE])
        return k[:tokens], v[:tokens]

    def _claim(self, pages: int) -> int:
        """Pages of what the plain pool has claimed; they begin at a multiple of their own size."""
        if not pages:
            return 0
        plain, size = self.plain, self.layout.nbytes
        unit = plain.slot_bytes // 2
        units = -(-((pages + 1) * size - 1) // unit)
        start = plain.holes.take(units, last=True)
        if start is None:
            raise full(pages * PAGE, 2 * (plain.limit or 0) * unit // size * PAGE)
        first = -(-start * unit // size)
        self._claims[first] = (start, units)
        return first

    def _take_or_grow(self, pages: int) -> int:
        found = self.holes.take(pages)
        if found is not None:
            return found
        there = len(self.data)
        extra = max(pages - self.holes.tail(there), there // 2)
        for holder in list(self.holders):
            holder.void()
        self.data = extended(self.data, extra)
        self.holes.add(there, extra)
        found = self.holes.take(pages)
        return 0 if found is None else found


class Extent:
    """Consecutive slots of a pool, held by one sequence, or by several that only read them."""

    def __init__(self, pool: Pool | PagedPool, start: int, size: int) -> None:
        self.pool, self.start, self.size = pool, start, size
        self._holders = 1

    @property
    def held(self) -> bool:
        """Whether anybody holds it."""
        return self._holders > 0

    def share(self) -> Extent:
        """The extent for one more holder."""
        self._holders += 1
        return self

    def give(self) -> None:
        """Give it back; the last holder's frees the slots."""
        assert self._holders > 0, "an extent is given back once by each holder"
        self._holders -= 1
        if not self._holders:
            self.pool.free(self.start, self.size)


def full(size: int, slots: int) -> CapacityError:
    """The error for ``size`` slots where there is no such hole among ``slots``."""
    return CapacityError(
        f"no {size:,} consecutive slots are free in a pool of {slots:,}",
        hint="wait until other requests are over, or give a larger cache budget",
    )


def extended(old: Tensor, extra: int) -> Tensor:
    """A copy of ``old`` with ``extra`` uninitialised slots behind it."""
    new = old.new_empty(len(old) + extra, *old.shape[1:])
    new[: len(old)] = old
    return new
