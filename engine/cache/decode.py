"""Decoding: one token of every row per step, over the slots that the policy has chosen.

A *list* names the pool slots that a row attends in a step: the full list (every stored slot) or the
core list (fixed, core image and text slots). Lists, scores and write places of all layers and
rows lie in a few tensors, so that the work between steps is a few operations and no loop over
layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.cache.core_lists import CoreRuns
from engine.cache.listed import ListedAttention
from engine.cache.observe import attended_positions, show_step
from engine.cache.policy import Budget, Policy
from engine.cache.pool import Pool
from engine.cache.row import Row, Stored
from engine.cache.text_slots import TextSlots
from engine.errors import CapacityError

# The full list, the core list, and where rows differ: each row's own of the two.
FULL, CORE, MIXED = 0, 1, 2


class DecodeView:
    """A layer's view of a decode step."""

    def __init__(self, step: Decoding, layer: int) -> None:
        self.step, self.layer = step, layer

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``View.attend``; one query per row."""
        return self.step.attend(self.layer, q, k, v)


class Decoding:
    """The decode state of some rows: what each step writes, attends, ranks and evicts.

    Run the decoder on the next tokens with this object as its step, then call ``advance``. The
    order within a step: write, attend, accumulate, then evict one text token per head - or
    extend, when the budget grew.

    35 fixed + 576 image + 22 text tokens under S45 C30 T70 (floor 20): the full list holds
    35 + 259 + 20 = 314 slots, the core list 35 + 172 + 20 = 227, each plus the token being written.

    Attributes:
        positions: ``[rows]`` int64 positions of the tokens that the next step processes.
        opening: ``[rows]``, see ``Step``.
        lists: ``[3, layers, rows, max]`` int32 pool slots of the full, core and mixed lists.
        shared: ``[full or core][row][layer]``, how many slots before the text a list holds.
        text: the evictable text.
        logits, lse: per layer what the last step left, None unless it was asked for.
    """

    def __init__(self, pools: Sequence[Pool], policy: Policy, rows: list[Row]) -> None:
        self.pools, self.policy, self.rows = pools, policy, rows
        self.device, self.kv_heads = pools[0].k.device, pools[0].k.shape[1]
        self.views = [DecodeView(self, layer) for layer in range(len(pools))]
        self.seen = [row.seen for row in rows]
        self.opening = torch.tensor([row.opening for row in rows], device=self.device)
        self.evicts = [self._budget(r) is not None for r in range(len(rows))]
        self.text = TextSlots(rows, self.kv_heads, any(self.evicts), self.device)
        self._head = torch.arange(self.kv_heads, device=self.device)
        self._pack_lists()
        self._runs = self._core_runs()
        self.logits: list[Tensor | None] = [None] * len(pools)
        self.lse: list[Tensor | None] = [None] * len(pools)
        self._scores: list[tuple[Tensor, Tensor]] = []
        self._prepare()

    # -- one step ---------------------------------------------------------------------------------

    def view(self, layer: int) -> DecodeView:
        """See ``Step.view``."""
        return self.views[layer]

    def narrow(self, layer: int) -> Tensor | None:
        """Decoding never narrows."""
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the rows' new token and attend the step's lists."""
        if self._overfull:
            raise CapacityError(
                f"row {self._overfull[0]} of the cache has no free slot for another token",
                hint="reserve more with new_tokens when it is prefilled",
            )
        pool, write = self.pools[layer], self._write[layer]
        head_dim = k.shape[-1]
        pool.k.view(-1, head_dim).index_copy_(0, write, k.reshape(-1, head_dim))
        pool.v.view(-1, head_dim).index_copy_(0, write, v.reshape(-1, head_dim))
        attention = self._attention[self._kind][layer]
        if not self._scores_wanted:
            return attention(q, None)
        if not self._scores:
            self._make_scores(q.shape[1])
        return attention(q, self._scores[layer])

    def _make_scores(self, heads: int) -> None:
        """Buffers for the logits of all layers, once they are wanted."""
        _, layers, rows, longest = self.lists.shape
        self._all_logits = torch.empty(layers, rows, heads, longest, device=self.device)
        self._all_lse = torch.empty(layers, rows, heads, device=self.device)
        self._scores = list(zip(self._all_logits, self._all_lse, strict=True))
        self.logits, self.lse = list(self._all_logits), list(self._all_lse)

    def advance(self) -> None:
        """Close the step: account, rank, evict or extend, and set up the next one."""
        attended = {
            r: attended_positions(self, r) for r, row in enumerate(self.rows) if row.observer
        }
        for r, row in enumerate(self.rows):
            row.step += 1
            row.attended_share.append(self._attended[r] / (self.seen[r] + 1))
        reranked = [r for r, row in enumerate(self.rows) if self.policy.reranks(row.step)]
        for run in self._runs if reranked else ():
            run.choose(
                self._all_logits, self._all_lse, self.lists[FULL], self.lists[CORE], reranked
            )
        self.seen = [seen + 1 for seen in self.seen]
        if any(self.evicts):
            budgets = [self._budget(r) for r in range(len(self.rows))]
            self.text.evict_or_grow(
                self._all_logits, self._all_lse, self._text_first, budgets, self.seen
            )
        else:
            self.text.grow()
        for r, positions in attended.items():
            show_step(self, r, positions)
        self._prepare()

    def _prepare(self) -> None:
        """Choose every row's list, and say where the new token goes."""
        self.kinds = [CORE if self.policy.attends_core(row.step + 1) else FULL for row in self.rows]
        reranks = bool(self._runs) and any(self.policy.reranks(r.step + 1) for r in self.rows)
        watched = any(row.observer is not None for row in self.rows)
        self._scores_wanted = any(self.evicts) or reranks or watched
        self.positions = torch.tensor(self.seen, device=self.device)
        text = [kept + 1 for kept in self.text.kept]
        room = zip(self.text.kept, self.text.room, strict=True)
        self._overfull = [r for r, (kept, fits) in enumerate(room) if kept >= fits]
        self._attended = [self._mean_shared[kind][r] + text[r] for r, kind in enumerate(self.kinds)]
        self._write = (self.text.write * self.kv_heads + self._head).flatten(1)
        self._kind = self.kinds[0] if len(set(self.kinds)) == 1 else MIXED
        if self._kind == MIXED:
            for r, kind in enumerate(self.kinds):
                self.lists[MIXED][:, r] = self.lists[kind][:, r]
                self._first[MIXED][:, r] = self._first[kind][:, r]
        self._text_first = self._first[self._kind]
        in_use = torch.tensor(text, dtype=torch.int32, device=self.device)
        torch.add(self._text_first, in_use, out=self._count[self._kind])

    def _budget(self, r: int) -> Budget | None:
        layout = self.rows[r].layers[0].layout
        return self.policy.text_budget(*layout.lengths(self.seen[r] - layout.seen))

    # -- packing rows into tensors ----------------------------------------------------------------

    def _pack_lists(self) -> None:
        """Build both lists, their text tails written ahead to the end of the extents."""
        layers, rows = len(self.pools), len(self.rows)
        longest = max(stored.capacity for row in self.rows for stored in row.layers)
        lists = torch.zeros(3, layers, rows, longest, dtype=torch.int32)
        self.shared: list[list[list[int]]] = [[], []]
        for r, row in enumerate(self.rows):
            sizes: list[list[int]] = [[], []]
            for layer, stored in enumerate(row.layers):
                text = torch.arange(stored.layout.text_start, stored.capacity)
                for kind, slots in enumerate(_shared_slots(stored)):
                    sizes[kind].append(len(slots))
                    both = torch.cat([slots.cpu(), text])
                    lists[kind, layer, r, : len(both)] = both + stored.start
            self.shared[FULL].append(sizes[FULL])
            self.shared[CORE].append(sizes[CORE])
        self.lists = lists.to(self.device)
        self._mean_shared = [[sum(row) / layers for row in kind] for kind in self.shared]
        first = torch.tensor([*self.shared, self.shared[FULL]], dtype=torch.int32)
        self._first = first.transpose(1, 2).contiguous().to(self.device)
        self._count = torch.zeros_like(self._first)
        self._attention = [
            [self._listed(kind, layer) for layer in range(layers)] for kind in (FULL, CORE, MIXED)
        ]

    def _listed(self, kind: int, layer: int) -> ListedAttention:
        """The attention of one layer over one kind of list."""
        alone = kind == FULL and len(self.rows) == 1
        return ListedAttention(
            self.pools[layer],
            self.lists[kind, layer, :, None],
            self._count[kind, layer, :, None],
            self.rows[0].layers[layer].start if alone else None,
        )

    def _core_runs(self) -> list[CoreRuns]:
        """What re-ranking rewrites, picture by picture; nothing where no row has a core tier."""
        tiered = [row for row in self.rows if any(s.core is not None for s in row.layers)]
        pictures = max((len(row.image_spans) for row in tiered), default=0)
        return [CoreRuns(self.rows, self.policy, number, self.device) for number in range(pictures)]

    # -- what lies where --------------------------------------------------------------------------

    def text_of(self, r: int, layer: int, n: int) -> Tensor:
        """Positions ``[1 or kv_heads, n]`` of row ``r``'s text, kept or being written."""
        layout = self.rows[r].layers[layer].layout
        if not self.evicts[r]:
            old = layout.positions[:, layout.text_start :]
            new = torch.arange(layout.seen, layout.seen + n - old.shape[1], device=self.device)
            return torch.cat([old, new.expand(len(old), -1)], 1)
        places = self.text.positions[layer, r, :, : self.text.kept[r] + 1].long()
        if n > self.text.kept[r]:
            return places.clone()
        # Without the free slot, which carries the next position.
        return places[places != self.seen[r]].view(self.kv_heads, n)

    def core_positions(self, r: int, layer: int) -> Tensor | None:
        """Positions of row ``r``'s core image tokens; None without a core tier."""
        stored = self.rows[r].layers[layer]
        if stored.core is None:
            return None
        return stored.layout.positions[0, self._core_slots(r, layer)]

    def _core_slots(self, r: int, layer: int) -> Tensor:
        """Slots of the core image tokens, relative to the extent."""
        stored = self.rows[r].layers[layer]
        listed = self.lists[CORE][layer, r, : self.shared[CORE][r][layer]].long() - stored.start
        return listed[stored.layout.image_of[listed] >= 0]

    # -- back to rows -----------------------------------------------------------------------------

    def settle(self, r: int) -> Row:
        """Write row ``r``'s state back, its text slots closed up, so that a turn can follow."""
        row = self.rows[r]
        if self.evicts[r]:
            self._close_up(r)
        for layer, stored in enumerate(row.layers):
            self._settle_layer(r, layer, stored)
        return row

    def _close_up(self, r: int) -> None:
        """Move each head's last text token into that head's free slot."""
        last = self.text.kept[r]
        if last == self.text.room[r]:  # the extent is full, and so without a gap
            return
        free = self.text.free_places(r)
        for tensor in (self.text.scores, self.text.positions):
            state = tensor[:, r]
            state.scatter_(-1, free[..., None], state[..., last : last + 1].clone())
        heads = torch.arange(self.kv_heads, device=self.device)
        for layer, pool in enumerate(self.pools):
            end = (
                self.rows[r].layers[layer].layout.text_start
                + self.rows[r].layers[layer].start
                + last
            )
            for store in (pool.k, pool.v):
                store[self.text.write[layer, r], heads] = store[end].clone()

    def _settle_layer(self, r: int, layer: int, stored: Stored) -> None:
        old, n = stored.layout, self.text.kept[r]
        shared = old.positions[:, : old.text_start]
        if self.evicts[r]:  # in the order of the slots, which are closed up by now
            text = self.text.positions[layer, r, :, :n].long()
            stored.text_scores = self.text.scores[layer, r, :, :n].clone()
            shared = shared.expand(self.kv_heads, -1)
        else:
            text = self.text_of(r, layer, n)
        stored.layout = replace(
            old,
            image_of=torch.cat([old.image_of[: old.text_start], text.new_full((n,), -1)]),
            positions=torch.cat([shared, text], 1),
            text_seen=old.text_seen + self.seen[r] - old.seen,
            seen=self.seen[r],
        )
        if stored.core is not None:
            stored.core = self._core_slots(r, layer)


def _shared_slots(stored: Stored) -> tuple[Tensor, Tensor]:
    """Slots before the text that the full and the core list hold, relative to the extent."""
    every = torch.arange(stored.layout.text_start, device=stored.layout.image_of.device)
    if stored.core is None:
        return every, every
    return every, torch.cat([stored.layout.fixed(), stored.core]).sort().values
