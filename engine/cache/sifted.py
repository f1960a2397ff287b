"""What rows leave unread: the means of their values, and what steps have counted, by format.

Held for the tokens and for the features of cross layers alike, in tensors that stay; see
``Sifting`` for what attention does with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.native import Sifting
from .row import Row
from .sizes import Group, Sizes


class Sifted:
    """Of some layers and rows; of no format where nobody leaves anything out.

    Attributes:
        means: ``[formats, layers, rows, kv_heads, head_dim]`` fp32, of the values in each.
        spent: ``[formats, layers, rows, kv_heads, 2]`` fp32, see ``Sifting``.
    """

    def __init__(self, layers: int, sizes: Sizes, like: Tensor) -> None:
        """``like [slots, kv_heads, head_dim]``."""
        self._formats = list(sizes.formats) if sizes.sifting else []
        _, kv_heads, head_dim = like.shape
        each = len(self._formats), layers, sizes.rows, kv_heads
        self.means = torch.zeros(*each, head_dim, device=like.device)
        self.spent = torch.zeros(*each, 2, device=like.device)

    def groups(self) -> list[Group]:
        """All tensors, see ``State.by_row``."""
        return [(self.means.unbind(), 1), (self.spent.unbind(), 1)]

    def write(self, row: Row, r: int) -> None:
        """Row ``r`` holds these values from now on."""
        for means, name in zip(self.means, self._formats, strict=True):
            means[:, r] = _means(row, name, means[:, r])

    def forget(self, r: int) -> None:
        """Of row ``r`` nothing is counted yet."""
        self.spent[:, :, r] = 0

    def of(self, tier: int, layer: int, most: Tensor) -> Sifting | None:
        """What attention may leave unread of a format: of as many rows as ``most`` speaks of."""
        if not self._formats:
            return None
        means, spent = (tensor[tier, layer, : len(most)] for tensor in (self.means, self.spent))
        return Sifting(most, means, spent)

    def counted(self, r: int) -> Tensor | None:
        """What steps have left out and read of row ``r``'s values: fp32 ``[layers, 2]``."""
        there = self._formats and r < self.spent.shape[2]
        return self.spent[:, :, r].sum((0, 2)) if there else None


def _means(row: Row, name: str, like: Tensor) -> Tensor:
    """Means ``[layers, kv_heads, head_dim]`` of a row's values in a format, zeros where none is."""
    means = torch.zeros_like(like)
    for layer, stored in enumerate(row.layers):
        mine = [part for part in stored.parts if part.format == name]
        if mine:
            total = torch.stack([part.total for part in mine]).sum(0)
            means[layer] = total / sum(part.tokens for part in mine)
    return means
