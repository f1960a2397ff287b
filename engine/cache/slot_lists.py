"""The lists of slots that a decode step attends: of every layer and row, in tensors that stay."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .lengths import ATTENDS_CORE, USED
from .row import Row, Stored
from .sizes import Sizes

# The full list, the core list, and where rows differ: each row's own of the two. The spare takes
# turns with the core list where selection writes one while the other is in use.
FULL, CORE, MIXED, SPARE = 0, 1, 2, 3


class SlotLists:
    """Lists of all kinds, their text tails written ahead to the end of the extents.

    A row's lists of all tiers lie one after the other: of plain numbers first, then those of every
    format.

    Attributes:
        slots: ``[kinds, layers, rows, width]`` int32 pool slots.
        first: ``[kinds, layers, rows]`` int32, how many of the plain ones come before the text.
        count: the same shape, how many of the plain ones the step attends.
        counts: ``[kinds, formats, layers, rows]`` int32, how many of every format's.
        shared: ``[full or core][row][layer]``, what ``first`` says, on the host.
        mean_shared: ``[full or core][row]``, entries before the text and in formats, mean over the
            layers.
    """

    def __init__(self, layers: int, sizes: Sizes, device: torch.device, *, spare: bool) -> None:
        """``spare``: with a second core list."""
        shape = (4 if spare else 3, layers, sizes.rows)
        self.tiers = sizes.tiers
        self.slots = torch.zeros(*shape, sizes.width, dtype=torch.int32, device=device)
        self.first = torch.zeros(shape, dtype=torch.int32, device=device)
        self.count = torch.zeros_like(self.first)
        counts = (shape[0], len(self.tiers), *shape[1:])
        self.counts = torch.zeros(counts, dtype=torch.int32, device=device)
        self.plain = slice(sizes.slots)
        self.shared: list[list[list[int]]] = [[], []]
        self.mean_shared: list[list[float]] = [[], []]

    def by_tier(self) -> list[Tensor]:
        """The lists of each tier."""
        return [self.slots[..., self.plain], *(self.slots[..., part] for _, part in self.tiers)]

    def join(self, row: Row, r: int) -> None:
        """Write the lists of row ``r``: the next one, or one that is there, anew."""
        for kind in (FULL, CORE):
            lists, first = _lists(row, kind)
            beside = [_in_format(row, name, kind) for name, _ in self.tiers]
            for same in (kind, SPARE) if kind == CORE and len(self.slots) > SPARE else (kind,):
                self.slots[same, :, r, : lists.shape[1]] = lists
                self.first[same, :, r] = torch.tensor(first, dtype=torch.int32)
                for tier, ((_, part), (slots, counts)) in enumerate(
                    zip(self.tiers, beside, strict=True)
                ):
                    self.slots[same, :, r, part.start : part.start + slots.shape[1]] = slots
                    self.counts[same, tier, :, r] = counts
            listed = sum(first) + sum(int(counts.sum()) for _, counts in beside)
            self.shared[kind][r : r + 1] = [first]
            self.mean_shared[kind][r : r + 1] = [listed / len(first)]

    def leave(self, r: int) -> None:
        """Forget row ``r`` on the host; the last one takes its place."""
        for kind in (FULL, CORE):
            shared, means = self.shared[kind], self.mean_shared[kind]
            shared[r], means[r] = shared[-1], means[-1]
            shared.pop()
            means.pop()

    def complete(self, kind: int, layers: slice, core: int, words: Tensor) -> None:
        """Say how long some layers' lists of a step are; put them together where they are MIXED.

        ``core`` is the kind that serves as core; ``words [WORDS, rows]`` those of the step.
        """
        rows = words.shape[1]
        if kind == MIXED:
            attends_core = words[ATTENDS_CORE] > 0
            each = [(self.slots, attends_core[:, None]), (self.first, attends_core)]
            each += [(counts, attends_core) for counts in self.counts.unbind(1)]
            for lists, which in each:
                mixed, full, chosen = (lists[k, layers, :rows] for k in (MIXED, FULL, core))
                torch.where(which, chosen, full, out=mixed)
        first, count = self.first[kind, layers, :rows], self.count[kind, layers, :rows]
        torch.add(first, words[USED], out=count)

    def core_of_parts(self, stored: Stored, layer: int, r: int, kind: int) -> list[Tensor]:
        """For each part of row ``r``'s ``stored`` layer which of its tokens the core list names."""
        at = {name: part.start for name, part in self.tiers}
        found = []
        for part in stored.parts:
            assert part.core is not None, "where there is a core, every part has one"
            start = at[part.format]
            at[part.format] = end = start + len(part.core)
            listed = self.slots[kind, layer, r, start:end].long()
            found.append(listed - part.extent.start)
        return found

    def listed_parts(
        self, stored: Stored, layer: int, r: int, kind: int
    ) -> Iterator[tuple[int, Tensor]]:
        """For each part where its tokens begin in a list of a kind, and their positions."""
        at = {name: part.start for name, part in self.tiers}
        cored = kind != FULL and all(part.core is not None for part in stored.parts)
        chosen = self.core_of_parts(stored, layer, r, kind) if cored else []
        for number, part in enumerate(stored.parts):
            positions = part.positions[0]
            if cored:
                positions = positions[chosen[number].to(positions.device)]
            yield at[part.format], positions
            at[part.format] += len(positions)


def _in_format(row: Row, name: str, kind: int) -> tuple[Tensor, Tensor]:
    """A row's lists in a format ``[layers, max]``, and how long each is."""
    empty = torch.empty(0, dtype=torch.int64)
    lists = []
    for stored in row.layers:
        mine = [part.listed(kind == CORE) for part in stored.parts if part.format == name]
        lists.append(torch.cat([empty, *mine]))
    counts = torch.tensor([len(list_) for list_ in lists], dtype=torch.int32)
    joined = torch.zeros(len(lists), int(counts.max()), dtype=torch.int32)
    for layer, list_ in enumerate(lists):
        joined[layer, : len(list_)] = list_
    return joined, counts


def _lists(row: Row, kind: int) -> tuple[Tensor, list[int]]:
    """A row's lists of one kind ``[layers, max]``, and how long each is before the text."""
    lists = [_list(stored, kind) for stored in row.layers]
    first = [
        len(list_) - stored.text_slots for list_, stored in zip(lists, row.layers, strict=True)
    ]
    joined = torch.zeros(len(lists), max(map(len, lists)), dtype=torch.int32)
    for layer, list_ in enumerate(lists):
        joined[layer, : len(list_)] = list_
    return joined, first


def _list(stored: Stored, kind: int) -> Tensor:
    """One layer's list, to the end of the extent."""
    layout, start = stored.layout, stored.start
    shared = torch.arange(layout.text_start)
    if kind == CORE and stored.core is not None:
        shared = torch.cat([layout.fixed(), stored.core]).sort().values.cpu()
    text = torch.arange(layout.text_start, stored.extent.size)
    return torch.cat([shared, text]) + start
