"""Cross-attention of decode steps: every row's token over the features of the pictures it sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .crossing import CrossStored, Project
from .listed import ListedAttention
from .pool import Holder, PagedPool, Pool
from .row import Row
from .sizes import Sizes


class CrossLists:
    """The features that rows attend, in tensors that stay.

    Attributes:
        slots: ``[cross layers, rows, width]`` int32 slots of each layer's pool.
        count: ``[rows]`` int32, how many of them are attended, in every layer.
        sees: ``[rows]`` fp32, 1 where there are any.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        size = (sizes.crossing, sizes.rows, sizes.features)
        self.slots = torch.zeros(size, dtype=torch.int32, device=device)
        self.count = torch.zeros(sizes.rows, dtype=torch.int32, device=device)
        self.sees = torch.zeros(sizes.rows, device=device)

    def join(self, row: Row, r: int) -> None:
        """Write the lists of row ``r``."""
        total = sum(picture.seen for picture in row.pictures)
        for layer, slots in enumerate(self.slots[:, r, :total] if total else ()):
            slots.copy_(torch.cat([_slots(picture, layer) for picture in row.pictures]))
        self.count[r] = total
        self.sees[r] = float(total > 0)


def _slots(picture: CrossStored, layer: int) -> Tensor:
    extent = picture.extents[layer]
    return torch.arange(extent.start, extent.start + extent.size, dtype=torch.int32)


class CrossSteps:
    """The cross layers' views of the steps of some rows, made once; void when tensors move."""

    def __init__(self) -> None:
        self.pools: Sequence[Pool | PagedPool] = ()
        self._views: dict[tuple[int, int], CrossStepView] = {}

    def know(self, row: Row, holder: Holder) -> None:
        """Take note of where a row's pictures lie; ``holder`` is told before that moves."""
        if row.pictures:
            self.pools = [extent.pool for extent in row.pictures[0].extents]
            for pool in self.pools:
                pool.holders.add(holder)

    def void(self) -> None:
        """Let go of what was made for tensors where they lie."""
        self._views.clear()

    def view(self, layer: int, rows: int, lists: CrossLists) -> CrossStepView:
        """A layer's view of steps of so many rows."""
        if (layer, rows) not in self._views:
            self._views[layer, rows] = CrossStepView(self.pools[layer], layer, rows, lists)
        return self._views[layer, rows]


class CrossStepView:
    """A cross layer's view of a decode step; see ``CrossView``."""

    def __init__(self, pool: Pool | PagedPool, layer: int, rows: int, lists: CrossLists) -> None:
        assert isinstance(pool, Pool), "features are plain numbers"
        slots, count = lists.slots[layer, :rows, None], lists.count[:rows, None]
        self._attention, self._sees = ListedAttention(pool, slots, count), lists.sees[:rows]

    def attend(self, q: Tensor, project: Project) -> tuple[Tensor, Tensor]:
        """See ``CrossView.attend``; one query per row, and nothing is new."""
        return self._attention(q, None), self._sees
