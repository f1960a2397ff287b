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

from engine.cache.listed import ListedAttention
from engine.cache.observe import attended_positions, show_step
from engine.cache.policy import Budget, Policy
from engine.cache.pool import Pool
from engine.cache.row import Row, Stored
from engine.cache.select import lightest, top
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
    """

    def __init__(self, pools: Sequence[Pool], policy: Policy, rows: list[Row]) -> None:
        self.pools, self.policy, self.rows = pools, policy, rows
        self.device, self.kv_heads = pools[0].k.device, pools[0].k.shape[1]
        self.views = [DecodeView(self, layer) for layer in range(len(pools))]
        first = [row.layers[0].layout for row in rows]
        self.seen = [layout.seen for layout in first]
        self.text_kept = [layout.columns - layout.text_start for layout in first]
        self.opening = torch.tensor([row.opening for row in rows], device=self.device)
        self.evicts = [self._budget(r) is not None for r in range(len(rows))]
        self._room = [
            min(stored.capacity - stored.layout.text_start for stored in row.layers) for row in rows
        ]
        # Without a picture there is no core; with one, all layers hold equally many image tokens.
        self.ranks = any(stored.core is not None for row in rows for stored in row.layers)
        self._pack_lists()
        self._pack_text()
        self.logits: list[Tensor | None] = [None] * len(pools)
        self.lse: list[Tensor | None] = [None] * len(pools)
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
        result = self._attention[self._kind][layer](q, self._weights_wanted)
        self.logits[layer], self.lse[layer] = result.logits, result.lse
        return result.out

    def advance(self) -> None:
        """Close the step: account, rank, evict or extend, and set up the next one."""
        weights = self._step_weights() if self._scores_wanted else None
        for r, row in enumerate(self.rows):
            attended = None if row.observer is None else attended_positions(self, r)
            row.step += 1
            row.attended_share.append(self._attended[r] / (self.seen[r] + 1))
            if self.ranks and weights is not None and self.policy.reranks(row.step):
                self._rerank(r, weights)
            self.seen[r] += 1
            self._make_room(r, weights)
            if attended is not None:
                show_step(self, r, attended)
        self._prepare()

    def _prepare(self) -> None:
        """Choose every row's list, and say where the new token goes."""
        kinds = [CORE if self.policy.attends_core(row.step + 1) else FULL for row in self.rows]
        self.kinds = kinds
        reranks = self.ranks and any(self.policy.reranks(row.step + 1) for row in self.rows)
        self._scores_wanted = any(self.evicts) or reranks
        watched = any(row.observer is not None for row in self.rows)
        self._weights_wanted = self._scores_wanted or watched
        self.positions = torch.tensor(self.seen, device=self.device)
        self._overfull = [r for r, kept in enumerate(self.text_kept) if kept >= self._room[r]]
        shared = [self.shared[kind][r] for r, kind in enumerate(kinds)]
        text = [kept + 1 for kept in self.text_kept]
        self._attended = [
            sum(layers) / len(layers) + t for layers, t in zip(shared, text, strict=True)
        ]
        self._list_lengths = [layers[0] + t for layers, t in zip(shared, text, strict=True)]
        heads = torch.arange(self.kv_heads, device=self.device)
        self._write = (self._write_slots * self.kv_heads + heads).flatten(1)
        self._kind = kinds[0] if len(set(kinds)) == 1 else MIXED
        if self._kind == MIXED:
            for r, kind in enumerate(kinds):
                self.lists[MIXED][:, r] = self.lists[kind][:, r]
        self._count[self._kind].copy_(torch.tensor(shared).T + torch.tensor(text))

    # -- selection --------------------------------------------------------------------------------

    def _step_weights(self) -> Tensor:
        """Softmax weights of the step over its lists: ``[layers, rows, heads, max]`` fp32."""
        logits = torch.stack([x for x in self.logits if x is not None])
        lse = torch.stack([x for x in self.lse if x is not None])
        return (logits - lse[..., None]).exp()

    def _rerank(self, r: int, weights: Tensor) -> None:
        """Choose row ``r``'s next core by head-mean weights, each picture by itself."""
        pictures = self._pictures[r]
        if not pictures:
            return
        mean = weights[:, r].mean(1)
        core = [self._fixed[r]]
        for slots, size in pictures:
            best = top(mean.gather(1, slots), size)
            core.append(slots.gather(1, best))
        chosen = torch.cat(core, 1).sort(1).values
        starts = self.lists[FULL][:, r, :1]
        self.lists[CORE][:, r, : chosen.shape[1]] = chosen + starts

    def _budget(self, r: int) -> Budget | None:
        layout = self.rows[r].layers[0].layout
        return self.policy.text_budget(*layout.lengths(self.seen[r] - layout.seen))

    def _make_room(self, r: int, weights: Tensor | None) -> None:
        """Find row ``r``'s next free slot: an evicted token's in every head, or one more."""
        kept = self.text_kept[r]
        budget = self._budget(r)
        if budget is None or weights is None:
            self.text_kept[r] = kept + 1
            self._write_slots[:, r] += 1
            return
        scores, positions = self.text_scores[:, r], self.text_positions[:, r]
        end = self._list_lengths[r]
        received = weights[:, r, :, end - kept - 1 : end]
        scores[..., : kept + 1] += received.unflatten(1, (self.kv_heads, -1)).sum(2)
        if kept + 1 > budget.total:
            free = lightest(scores[..., : kept + 1], positions[..., : kept + 1], budget.recent)
        else:
            self.text_kept[r] = kept + 1
            free = torch.full_like(self._write_slots[:, r], kept + 1)
        scores.scatter_(-1, free[..., None], 0.0)
        positions.scatter_(-1, free[..., None], self.seen[r])
        self._write_slots[:, r] = self._text_start[:, r, None] + free

    # -- packing rows into tensors ---------------------------------------------------------------

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
        self._count = torch.zeros(3, layers, rows, dtype=torch.int32, device=self.device)
        self._attention = [
            [
                ListedAttention(
                    pool,
                    self.lists[kind, layer, :, None],
                    self._count[kind, layer, :, None],
                    self.rows[0].layers[layer].start if (kind, rows) == (FULL, 1) else None,
                )
                for layer, pool in enumerate(self.pools)
            ]
            for kind in (FULL, CORE, MIXED)
        ]
        self._fixed = (
            [torch.stack([s.layout.fixed() for s in row.layers]) for row in self.rows]
            if self.ranks
            else []
        )
        self._pictures = [self._image_slots(row) for row in self.rows] if self.ranks else []

    def _image_slots(self, row: Row) -> list[tuple[Tensor, int]]:
        """For each picture its stored slots ``[layers, n]`` and its core size."""
        pictures = []
        for index, size in enumerate(row.layers[0].layout.image_sizes):
            slots = torch.stack([stored.layout.picture(index) for stored in row.layers])
            pictures.append((slots, self.policy.core_size(size)))
        return pictures

    def _pack_text(self) -> None:
        """Where text begins and the next token goes; scores and positions if text is evicted."""
        text_start = [[s.start + s.layout.text_start for s in row.layers] for row in self.rows]
        self._text_start = torch.tensor(text_start, device=self.device).T
        kept = torch.tensor(self.text_kept, device=self.device)
        self._write_slots = (self._text_start + kept)[..., None].repeat(1, 1, self.kv_heads)
        if not any(self.evicts):
            return
        # One more than fits: the place of the token after the last one that was promised room.
        shape = (len(self.pools), len(self.rows), self.kv_heads, max(self._room) + 1)
        self.text_scores = torch.zeros(shape, device=self.device)
        self.text_positions = torch.full(shape, -1, device=self.device)
        for r, row in enumerate(self.rows):
            n = self.text_kept[r]
            self.text_positions[:, r, :, n] = self.seen[r]
            for layer, stored in enumerate(row.layers):
                positions = stored.layout.positions[:, stored.layout.text_start :]
                self.text_positions[layer, r, :, :n] = positions
                if stored.text_scores is not None:
                    self.text_scores[layer, r, :, :n] = stored.text_scores

    # -- what lies where --------------------------------------------------------------------------

    def text_of(self, r: int, layer: int, n: int) -> Tensor:
        """Positions ``[1 or kv_heads, n]`` of row ``r``'s text, kept or being written."""
        layout = self.rows[r].layers[layer].layout
        if not self.evicts[r]:
            old = layout.positions[:, layout.text_start :]
            new = torch.arange(layout.seen, layout.seen + n - old.shape[1], device=self.device)
            return torch.cat([old, new.expand(len(old), -1)], 1)
        places = self.text_positions[layer, r, :, : self.text_kept[r] + 1]
        if n > self.text_kept[r]:
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
        last = self.text_kept[r]
        if last == self._room[r]:  # the extent is full, and so without a gap
            return
        free = self._write_slots[:, r] - self._text_start[:, r, None]
        for tensor in (self.text_scores, self.text_positions):
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
                store[self._write_slots[layer, r], heads] = store[end].clone()

    def _settle_layer(self, r: int, layer: int, stored: Stored) -> None:
        old, n = stored.layout, self.text_kept[r]
        shared = old.positions[:, : old.text_start]
        if self.evicts[r]:  # in the order of the slots, which are closed up by now
            text = self.text_positions[layer, r, :, :n].clone()
            stored.text_scores = self.text_scores[layer, r, :, :n].clone()
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
