"""The features that rows attend in cross layers, in tensors that stay.

What is done for tokens is done for features: a row attends several tiers, one for each format, in
one call; a policy may leave values unread, and may have a core that each layer ranks again by its
own weights. To the lists, pictures are the parts of a row that has no text (``Row.across``).
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor

from .core_lists import CoreRuns
from .pool import Holder, PagedPool, Pool
from .row import Row
from .sifted import Sifted
from .sizes import Group, Sizes, carry
from .slot_lists import SlotLists


class CrossLists:
    """The lists of all rows and cross layers.

    Attributes:
        pools: those of every cross layer, by format.
        sizes: how large the tensors are.
        lists, runs, sifted: as those of tokens, see ``State``; the plain lists are empty.
        sees: ``[rows]`` fp32, 1 where a row sees a picture.
        wanted: ``[rows]`` int32, 1 where the core is ranked again behind the step.
    """

    def __init__(self, like: Tensor, holder: Holder) -> None:
        """``like [slots, kv_heads, head_dim]``; ``holder`` is told before anything here moves."""
        self._like, self._holder = like[:0], ref(holder)  # which holds this
        self.pools: dict[str, Sequence[Pool | PagedPool]] = {}
        self._make(0, Sizes())

    def _make(self, layers: int, sizes: Sizes) -> None:
        self.layers, self.sizes = layers, sizes
        device = self._like.device
        self.lists = SlotLists(layers, sizes, device, spare=False)
        self.runs = CoreRuns(layers, sizes, device)
        self.sees = torch.zeros(sizes.rows, device=device)
        self.wanted = torch.zeros(sizes.rows, dtype=torch.int32, device=device)
        self.sifted = Sifted(layers, sizes, self._like)

    @property
    def holder(self) -> Holder:
        """Who is told before anything here moves."""
        found = self._holder()
        assert found is not None, "whoever holds this is there"
        return found

    @property
    def tiered(self) -> bool:
        """Whether some row has a core tier."""
        return bool(self.sizes.pictures)

    def groups(self) -> list[Group]:
        """All tensors, in lists to the end of which larger ones add, each with its dimension that
        counts rows.
        """
        if not self.layers:
            return []
        return [
            ([self.runs.runs], 3),
            ([self.sees, self.wanted], 0),
            (self.lists.by_tier(), 2),
            (self.lists.counts.unbind(1), 2),
            *self.sifted.groups(),
        ]

    def join(self, row: Row, r: int, others: Sequence[Row]) -> None:
        """Write the lists of row ``r``, which is behind the ``others``."""
        across = row.across()
        layers = max(self.layers, len(across.layers))
        if not layers:  # nobody has seen a picture so
            return
        needed = (Sizes.of(across) if row.pictures else Sizes())._replace(rows=r + 1)
        if not self.layers or not self.sizes.covers(needed):
            self._enlarge(layers, self.sizes.covering(needed), others)
        self.sees[r] = float(bool(row.pictures))
        if not row.pictures:
            self.lists.counts[..., r] = 0
            self.runs.runs[..., r] = 0
            return
        for picture in row.pictures:
            self.pools[picture.format] = [extent.pool for extent in picture.extents]
            for pool in self.pools[picture.format]:
                pool.holders.add(self.holder)
        self.lists.join(across, r)
        self.runs.join(across, r)
        self.sifted.forget(r)
        self.sifted.write(across, r)

    def _enlarge(self, layers: int, sizes: Sizes, rows: Sequence[Row]) -> None:
        self.holder.void()
        before = self.groups()
        self._make(layers, sizes)
        if before:
            carry(before, self.groups())
        for r, row in enumerate(rows):  # runs count from where lists begin
            if row.pictures:
                self.runs.join(row.across(), r)
