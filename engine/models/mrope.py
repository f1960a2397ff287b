"""Rotary embedding over time, rows and columns (M-RoPE, Qwen2-VL, arXiv 2409.12191).

A text token has one coordinate on all three axes, the cells of a picture have its beginning as
time, and their own row and column behind that; text behind a picture goes on after the larger of
its sides. The slices of a video share their beginning, and have their own times behind it; text
goes on after the largest of all coordinates. So a token's coordinate falls behind its number, by as
much as pictures have more cells than rows or columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..ops.rotary import Tables, turned
from .decoder import Grid, Rotation

TIME, ROW, COLUMN = 0, 1, 2
# Of a picture, or a slice, in the rotary state: its first token's number, its rows and columns, its
# time since the beginning, and by how much text behind it goes on (0: another slice follows).
_WORDS = 5
_AT_ONCE = 4096  # tokens, each beside every picture and slice


def _words_of(grid: Grid, start: int) -> Iterator[int]:
    """Words of the rotary state, if the first token has the number ``start``."""
    for number, time in enumerate(grid.times):
        last = number == len(grid.times) - 1
        advance = max(grid.rows, grid.columns, time + 1) if last else 0
        first = start + number * grid.rows * grid.columns
        yield from (first, grid.rows, grid.columns, time, advance)


def blocked(sections: Sequence[int]) -> list[int]:
    """The axis of each frequency, one section behind the other (Qwen2-VL, Qwen2.5-VL).

    >>> blocked([1, 2, 1])
    [0, 1, 1, 2]
    """
    return [axis for axis, count in enumerate(sections) for _ in range(count)]


def interleaved(sections: Sequence[int]) -> list[int]:
    """Rows and columns at every third frequency, time at the others (Qwen3-VL).

    >>> interleaved([3, 2, 1])
    [0, 1, 2, 0, 1, 0]
    """
    axes = [TIME] * sum(sections)
    for axis in (ROW, COLUMN):
        for i in range(axis, min(3 * sections[axis], len(axes)), 3):
            axes[i] = axis
    return axes


class MRotation(Rotation):
    """Angles by three coordinates; the rotary state holds a sequence's pictures.

    >>> rotation = MRotation(8, 1e4, "cpu", [TIME, ROW, COLUMN, TIME])
    >>> state = rotation.begin(9, spans=[(2, 8)], grids=[Grid(2, 3)])
    >>> rotation.coordinates(torch.arange(9), state[None]).T.tolist()
    [[0, 1, 2, 2, 2, 2, 2, 2, 5], [0, 1, 2, 2, 2, 3, 3, 3, 5], [0, 1, 2, 3, 4, 2, 3, 4, 5]]
    """

    def __init__(
        self, head_dim: int, theta: float, device: torch.device | str, axes: Sequence[int]
    ) -> None:
        """``axes``: of each of the ``head_dim / 2`` frequencies."""
        super().__init__(head_dim, theta, device)
        self.axes = torch.tensor(axes, device=device)

    def begin(
        self,
        tokens: int,
        past: Tensor | None = None,
        spans: Sequence[tuple[int, int]] = (),
        grids: Sequence[Grid] = (),
    ) -> Tensor:
        """See ``Rotation.begin``: the pictures of earlier turns, and this one's behind them."""
        both = zip(spans, grids, strict=True)
        words = [word for (start, _), grid in both for word in _words_of(grid, start)]
        device = self.frequencies.device
        new = torch.tensor(words, dtype=torch.int64, device=device)
        return new if past is None else torch.cat([past, new])

    def coordinates(self, positions: Tensor, rotary: Tensor) -> Tensor:
        """Time, row and column ``[tokens, 3]`` int64 of tokens with these numbers ``[tokens]``;
        ``rotary [1 or tokens, words]``.
        """
        words = rotary.unflatten(-1, (-1, _WORDS)).unbind(-1)  # [1 or tokens, n] each
        start, rows, columns, time, advance = words
        number = positions[:, None]
        size = rows * columns
        past, inside = number >= start + size, (number >= start) & (number < start + size)
        behind = torch.where(past, advance - size, 0).sum(-1)
        cell = torch.where(inside, number - start, 0)
        width = columns.clamp(min=1)
        # In a picture a token's number goes back to the beginning, and then its row and column on.
        row, column = (each.sum(-1) for each in (cell // width, cell % width))
        begin = positions + behind - cell.sum(-1)
        now = begin + torch.where(inside, time, 0).sum(-1)
        return torch.stack([now, begin + row, begin + column], -1)

    def tables(self, positions: Tensor, rotary: Tensor, dtype: torch.dtype) -> Tables:
        """See ``Rotation.tables``."""
        few = positions.split(_AT_ONCE) if len(rotary) == 1 else [positions]
        coordinates = torch.cat([self.coordinates(some, rotary) for some in few]).float()
        return turned(coordinates[:, self.axes] * self.frequencies, dtype)
