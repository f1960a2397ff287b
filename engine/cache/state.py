"""The rows that are decoded together: what the steps read and write of them, in tensors that stay.

A row joins by filling in the next free index of every tensor, and leaves by the last row taking its
place; the others are not touched. Only a row that is larger than all before makes the tensors anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakSet

import torch
from torch import Tensor

from .core_lists import CoreRuns
from .cross_lists import CrossLists
from .lengths import WORDS, Lengths
from .pool import Holder, Pool
from .row import Row, Stored
from .sifted import Sifted
from .sizes import Group, Sizes, carry
from .slot_lists import CORE, SlotLists
from .text_slots import TextSlots


class State:
    """Rows of some pools.

    Attributes:
        rows: as they were when they joined; complete again once they have left.
        lengths: what follows from lengths alone.
        lists: the slots that each row attends.
        text: the evictable text.
        runs: what re-ranking rewrites.
        crossed: the features that cross layers attend.
        rotary: ``[rows, words]`` int64, see ``Step``.
        most: ``[rows]`` fp32, what a row's policy may leave out, see ``Sifting``.
        sifted: what rows leave unread.
        words: ``[2, WORDS, rows]`` int32, two steps' words in turns; zeros where there is no row.
        core: which lists serve as core, CORE or SPARE.
        sizes: how large the tensors are.
        holders: are told before any of this, or of the pools, moves.
    """

    def __init__(self, pools: Sequence[Pool], *, spare: bool) -> None:
        """``spare``: with a second core list, see ``SlotLists``."""
        self.pools, self._spare = pools, spare
        self.device, self.kv_heads = pools[0].k.device, pools[0].k.shape[1]
        self.rows: list[Row] = []
        self.lengths = Lengths()
        self.core = CORE
        self.holders: WeakSet[Holder] = WeakSet()
        for pool in pools:
            pool.holders.add(self)
        self.crossed = CrossLists(pools[0].k, self)
        self._make(Sizes())

    def _make(self, sizes: Sizes) -> None:
        self.sizes, layers = sizes, len(self.pools)
        self.lists = SlotLists(layers, sizes, self.device, spare=self._spare)
        self.text = TextSlots(layers, self.kv_heads, sizes, self.device)
        self.runs = CoreRuns(layers, sizes, self.device)
        self.rotary = torch.zeros(sizes.rows, sizes.rotary, dtype=torch.int64, device=self.device)
        self.most = torch.zeros(sizes.rows, device=self.device)
        self.sifted = Sifted(layers, sizes, self.pools[0].k)
        for pool in self.pools:
            for name in sizes.formats:
                pool.of(name).holders.add(self)
        self.words = torch.zeros(2, WORDS, sizes.rows, dtype=torch.int32, device=self.device)

    def by_row(self) -> list[tuple[Tensor, int]]:
        """All tensors, each with its dimension that counts rows."""
        groups = [*self._groups(), *self.crossed.groups()]
        return [(tensor, dim) for tensors, dim in groups for tensor in tensors]

    def _groups(self) -> list[Group]:
        """The same in lists, to the end of which larger states add; without the features."""
        lists, text = self.lists, self.text
        return [
            ([lists.first, lists.count, self.words], 2),
            ([self.runs.runs], 3),
            ([text.start, text.write, text.scores, text.positions], 1),
            ([self.rotary, self.most], 0),
            (lists.by_tier(), 2),
            (lists.counts.unbind(1), 2),
            *self.sifted.groups(),
        ]

    # -- rows come and go -------------------------------------------------------------------------

    def join(self, row: Row) -> None:
        """One row more, the last: it counts when all of it is written."""
        r = len(self.rows)
        self._write(row, r)
        self.sifted.forget(r)
        self.crossed.join(row, r, self.rows)
        self.rows.append(row)

    def rejoin(self, r: int) -> None:
        """Row ``r``, settled and changed since, goes on where it is."""
        self._write(self.rows[r], r)

    def _write(self, row: Row, r: int) -> None:
        needed = Sizes.of(row)._replace(rows=r + 1)
        if not self.sizes.covers(needed):
            self._enlarge(self.sizes.covering(needed))
        self.lengths.join(row, r)
        self.lists.join(row, r)
        self.text.join(row, r, self.lengths.texts[r], self.lengths.evicts[r])
        self.runs.join(row, r)
        self.rotary[r] = 0
        self.rotary[r, : len(row.rotary)] = row.rotary
        self.most[r] = row.policy.leaves_out()
        self.sifted.write(row, r)

    def leave(self, r: int) -> Row:
        """Row ``r`` goes, see ``settle``; the last one is row ``r`` from now on."""
        row, last = self.settle(r), len(self.rows) - 1
        for tensor, dim in self.by_row():
            if r != last:
                tensor.select(dim, r).copy_(tensor.select(dim, last))
        self.words[:, :, last] = 0
        self.rows[r] = self.rows[last]
        self.rows.pop()
        self.lengths.leave(r)
        self.lists.leave(r)
        return row

    def void(self) -> None:
        """See ``Holder``."""
        for holder in list(self.holders):
            holder.void()

    def _enlarge(self, sizes: Sizes) -> None:
        self.void()
        before, (shared, means) = self._groups(), (self.lists.shared, self.lists.mean_shared)
        self._make(sizes)
        self.lists.shared, self.lists.mean_shared = shared, means
        carry(before, self._groups())
        for r, row in enumerate(self.rows):  # which counts from where lists begin
            self.runs.join(row, r)

    # -- what lies where --------------------------------------------------------------------------

    def text_of(self, r: int, layer: int, n: int) -> Tensor:
        """Positions ``[1 or kv_heads, n]`` of row ``r``'s text, held or being written."""
        layout, held = self.rows[r].layers[layer].layout, self.lengths.texts[r]
        if not self.lengths.evicts[r]:
            old = layout.positions[:, layout.text_start :]
            new = torch.arange(layout.seen, layout.seen + n - old.shape[1], device=self.device)
            return torch.cat([old, new.expand(len(old), -1)], 1)
        places = self.text.positions[layer, r, :, : held + 1].long()
        if n > held:
            return places.clone()
        # Without the free slot, which carries the next position.
        return places[places != self.lengths.seen[r]].view(self.kv_heads, n)

    def core_positions(self, r: int, layer: int) -> Tensor | None:
        """Positions of row ``r``'s core image tokens; None without a core tier."""
        stored = self.rows[r].layers[layer]
        if stored.core is None:
            return None
        parts = zip(
            stored.parts, self.lists.core_of_parts(stored, layer, r, self.core), strict=True
        )
        found = [part.positions[0, core] for part, core in parts]
        return torch.cat([stored.layout.positions[0, self._core_slots(r, layer)], *found])

    def _core_slots(self, r: int, layer: int) -> Tensor:
        """Slots of the core image tokens, relative to the extent."""
        stored = self.rows[r].layers[layer]
        shared = self.lists.shared[CORE][r][layer]
        listed = self.lists.slots[self.core, layer, r, :shared].long() - stored.start
        return listed[stored.layout.image_of[listed] >= 0]

    # -- back to rows -----------------------------------------------------------------------------

    def settle(self, r: int) -> Row:
        """Write row ``r``'s state back, its text slots closed up, so that a turn can follow.

        No step may follow before the row has left. Interrupted, it can be done again.
        """
        row = self.rows[r]
        if self.lengths.evicts[r]:
            self._close_up(r)
        layers = [self._settled(r, layer, stored) for layer, stored in enumerate(row.layers)]
        row.layers, row.step = layers, self.lengths.steps[r]
        row.spent, row.spent_across = self.sifted.counted(r), self.crossed.sifted.counted(r)
        return row

    def _close_up(self, r: int) -> None:
        """Move each head's last text token into that head's free slot."""
        last = self.lengths.texts[r]
        if last == self.lengths.text_slots[r]:  # the extent is full, and so without a gap
            return
        free = self.text.free_places(r)
        for tensor in (self.text.scores, self.text.positions):
            state = tensor[:, r]
            state.scatter_(-1, free[..., None], state[..., last : last + 1].clone())
        slots, heads = self.text.slots(r), torch.arange(self.kv_heads, device=self.device)
        ends = self.text.start[:, r] + last
        for layer, pool in enumerate(self.pools):
            for store in (pool.k, pool.v):
                store[slots[layer], heads] = store[ends[layer]].clone()

    def _settled(self, r: int, layer: int, stored: Stored) -> Stored:
        old, n, seen = stored.layout, self.lengths.texts[r], self.lengths.seen[r]
        shared = old.positions[:, : old.text_start]
        if self.lengths.evicts[r]:  # in the order of the slots, which are closed up by now
            text = self.text.positions[layer, r, :, :n].long()
            scores: Tensor | None = self.text.scores[layer, r, :, :n].clone()
            shared = shared.expand(self.kv_heads, -1)
        else:
            text, scores = self.text_of(r, layer, n), stored.text_scores
        layout = replace(
            old,
            image_of=torch.cat([old.image_of[: old.text_start], text.new_full((n,), -1)]),
            positions=torch.cat([shared, text], 1),
            text_seen=old.text_seen + seen - old.seen,
            seen=seen,
        )
        if stored.core is None:
            return Stored(stored.extent, layout, None, scores, stored.parts)
        both = zip(stored.parts, self.lists.core_of_parts(stored, layer, r, self.core), strict=True)
        parts = tuple(replace(part, core=core) for part, core in both)
        return Stored(stored.extent, layout, self._core_slots(r, layer), scores, parts)
