"""Rotary position embedding, the 'rotate half' form (Su et al. 2021): tables, and turning by them.

The sign of the rotated half is folded into the sine, so that a rotation is
``x * cos + swap(x) * sin``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tables(NamedTuple):
    """What a step's tokens are rotated with, ``[tokens, 1, head_dim]``.

    ``scale [tokens, 1, 1]`` multiplies the rotated queries; None leaves them.
    """

    cos: Tensor
    sin: Tensor
    scale: Tensor | None = None

    def at(self, tokens: Tensor | slice) -> Tables:
        """The tables of some of the tokens."""
        scale = None if self.scale is None else self.scale[tokens]
        return Tables(self.cos[tokens], self.sin[tokens], scale)

    def blank(self, tokens: int) -> Tables:
        """Uninitialised tables like these, of so many tokens."""
        cos, sin, scale = (None if x is None else x.new_empty(tokens, *x.shape[1:]) for x in self)
        assert cos is not None
        assert sin is not None
        return Tables(cos, sin, scale)

    def copy_(self, other: Tables) -> None:
        """Write the numbers of ``other``, of as many tokens, over these."""
        for mine, new in zip(self, other, strict=True):
            if mine is not None and new is not None:
                mine.copy_(new)


def turned(angles: Tensor, dtype: torch.dtype) -> Tables:
    """Tables of the fp32 ``angles [tokens, head_dim / 2]``."""
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return Tables(torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None])


def rotated(x: Tensor, tables: Tables, queries: bool = False) -> Tensor:
    """Rotate ``x [tokens, heads, head_dim]`` by its tokens' tables; ``queries`` are scaled too."""
    turned_x = rotate(x, tables.cos, tables.sin)
    return turned_x * tables.scale if queries and tables.scale is not None else turned_x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [tokens, heads, head_dim]`` by tables of its tokens; keeps its dtype."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
