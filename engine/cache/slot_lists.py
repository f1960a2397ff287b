"""The lists of slots that a decode step attends: of every layer and row, in tensors that stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .lengths import ATTENDS_CORE, USED
from .listed import ListedAttention
from .pool import Pool
from .row import Row, Stored

# The full list, the core list, and where rows differ: each row's own of the two. The spare takes
# turns with the core list where selection writes one while the other is in use.
FULL, CORE, MIXED, SPARE = 0, 1, 2, 3

# Shapes that other rows are to fit as well are rounded up to multiples of this.
ROUNDED = 128


class SlotLists:
    """Lists of all kinds, their text tails written ahead to the end of the extents.

    Attributes:
        slots: ``[kinds, layers, rows, max]`` int32 pool slots.
        first: ``[kinds, layers, rows]`` int32, how many of them come before the text.
        shared: ``[full or core][row][layer]``, the same on the host.
        mean_shared: ``[full or core][row]``, its mean over the layers.
        attention: ``[kind][layer]``, what attends a list.
    """

    def __init__(
        self, pools: Sequence[Pool], rows: Sequence[Row], *, spare: bool, static: bool
    ) -> None:
        """``spare``: with a second core list; ``static``: other rows may come to use the lists."""
        self._alone = len(rows) == 1 and not static
        self._pools, self._rows = pools, rows
        device, kinds = pools[0].k.device, 4 if spare else 3
        layers, longest = len(pools), max(s.capacity for row in rows for s in row.layers)
        width = rounded(longest) if static else longest
        slots = torch.zeros(kinds, layers, len(rows), width, dtype=torch.int32)
        self.shared = [
            [_fill(slots[k, :, r], row, k) for r, row in enumerate(rows)] for k in (0, 1)
        ]
        self.slots = slots.to(device)
        self.mean_shared = [[sum(row) / layers for row in kind] for kind in self.shared]
        first = torch.tensor([*self.shared, *self.shared][:kinds], dtype=torch.int32)
        self.first = first.transpose(1, 2).contiguous().to(device)
        self._count = torch.zeros_like(self.first)
        self.attention = [
            [self._listed(kind, layer) for layer in range(layers)] for kind in range(kinds)
        ]

    def _listed(self, kind: int, layer: int) -> ListedAttention:
        return ListedAttention(
            self._pools[layer],
            self.slots[kind, layer, :, None],
            self._count[kind, layer, :, None],
            self._rows[0].layers[layer].start if kind == FULL and self._alone else None,
        )

    def complete(self, kind: int, layers: slice, core: int, words: Tensor) -> None:
        """Say how long some layers' lists of a step are; put them together where they are MIXED.

        ``core`` is the kind that serves as core.
        """
        if kind == MIXED:
            attends_core = words[ATTENDS_CORE] > 0
            for lists, which in ((self.slots, attends_core[:, None]), (self.first, attends_core)):
                torch.where(
                    which, lists[core, layers], lists[FULL, layers], out=lists[MIXED, layers]
                )
        torch.add(self.first[kind, layers], words[USED], out=self._count[kind, layers])

    def follow(self, other: SlotLists) -> None:
        """Count as ``other`` does on the host."""
        self.shared, self.mean_shared = other.shared, other.mean_shared


def rounded(count: int) -> int:
    """``count``, or somewhat more.

    >>> rounded(100), rounded(128), rounded(129)
    (128, 128, 256)
    """
    return -(-count // ROUNDED) * ROUNDED


def _fill(slots: Tensor, row: Row, kind: int) -> list[int]:
    """Write a row's lists of one kind into ``slots [layers, max]``; returns the shared parts'
    sizes.
    """
    sizes = []
    for layer, stored in enumerate(row.layers):
        shared = _shared_slots(stored, kind).cpu()
        text = torch.arange(stored.layout.text_start, stored.capacity)
        both = torch.cat([shared, text])
        slots[layer, : len(both)] = both + stored.start
        sizes.append(len(shared))
    return sizes


def _shared_slots(stored: Stored, kind: int) -> Tensor:
    """Slots before the text that a full or a core list holds, relative to the extent."""
    if kind == FULL or stored.core is None:
        return torch.arange(stored.layout.text_start)
    return torch.cat([stored.layout.fixed(), stored.core]).sort().values
