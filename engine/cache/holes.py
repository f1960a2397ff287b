"""Which parts of a stretch are free."""

from __future__ import annotations


class Holes:
    """Free parts of a stretch of numbers from 0 on, ``(start, end)`` in order; none touch.

    >>> holes = Holes(10)
    >>> holes.take(4), holes.take(8), holes.free
    (0, None, [(4, 10)])
    >>> holes.add(0, 4)
    >>> holes.free
    [(0, 10)]
    """

    def __init__(self, size: int = 0) -> None:
        self.free: list[tuple[int, int]] = [(0, size)] if size else []

    def take(self, size: int, *, last: bool = False) -> int | None:
        """Where ``size`` begin that are taken now, of the first hole or at the end of the last that
        is large enough; None without one.
        """
        for start, end in reversed(self.free) if last else self.free:
            if end - start >= size:
                at = end - size if last else start
                self.remove(at, size)
                return at
        return None

    def add(self, start: int, size: int) -> None:
        """Make free what was taken; neighbouring holes join."""
        joined: list[tuple[int, int]] = []
        for hole in sorted([*self.free, (start, start + size)]):
            if hole[0] == hole[1]:
                continue
            if joined and joined[-1][1] == hole[0]:
                joined[-1] = (joined[-1][0], hole[1])
            else:
                joined.append(hole)
        self.free = joined

    def remove(self, start: int, size: int) -> None:
        """Take this part, which lies within a hole."""
        found = []
        for hole in self.free:
            if hole[0] <= start and start + size <= hole[1]:
                found += [(hole[0], start), (start + size, hole[1])]
            else:
                found.append(hole)
        self.free = [hole for hole in found if hole[0] < hole[1]]

    def tail(self, end: int) -> int:
        """How much is free right before ``end``."""
        return end - self.free[-1][0] if self.free and self.free[-1][1] == end else 0
