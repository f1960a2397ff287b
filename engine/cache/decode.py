"""Decoding: one token of every row per step, over the slots that the policy has chosen.

A *list* names the pool slots that a row attends in a step: the full list (every stored slot) or the
core list (fixed, core image and text slots). Lists, scores and write places of all layers and
rows lie in a few tensors, so that the work between steps is a few operations and no loop over
layers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CapacityError
from ..ops.fused import Destination
from .core_lists import CoreRuns
from .lengths import ATTENDS_CORE, POSITION, RERANKS, WORDS, Lengths
from .pool import Pool
from .row import Row, Stored
from .showing import attended_positions, show_step
from .slot_lists import CORE, FULL, MIXED, SPARE, SlotLists, rounded
from .streams import InOrder, Side
from .text_slots import TextSlots
from .views import DecodeView, EdgeView


class StepPlan(NamedTuple):
    """What a step's launches are given, fixed before its first layer."""

    buffer: int  # which of two holds the words
    kind: int  # which lists are attended
    reranks: bool  # whether some row's core is ranked again
    scores: bool  # whether logits are wanted
    core: int  # CORE or SPARE: which of them serves in this step
    next_core: int  # ... and in the next


class Decoding:
    """The decode state of some rows: what each step writes, attends, ranks and evicts.

    Run the decoder on the next tokens with this object as its step, then call ``advance``. The
    order within a step: write, attend, accumulate, then evict one text token per head - or
    extend, when the budget grew. The last two are *selection*; ``side`` says where it runs.

    35 fixed + 576 image + 22 text tokens under S45 C30 T70 (floor 20): the full list holds
    35 + 259 + 20 = 314 slots, the core list 35 + 172 + 20 = 227, each plus the token being written.

    Attributes:
        positions: ``[rows]`` int64 positions of the tokens that the next step processes.
        opening: ``[rows]``, see ``Step``.
        lengths: what follows from lengths alone, and ``seen`` and ``evicts`` of them.
        kinds: for each row which list the coming step attends.
        lists: ``[kinds, layers, rows, max]`` int32 pool slots, see ``SlotLists``.
        text: the evictable text.
        parts: the layers that are selected together.
        logits, lse: per layer what the last step left, None unless it was asked for.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        rows: list[Row],
        side: Side | None = None,
        *,
        static: bool = False,
    ) -> None:
        """``static``: shapes leave room, so that other rows may take these rows' place."""
        self.pools, self.rows, self.static = pools, rows, static
        self.device, self.kv_heads = pools[0].k.device, pools[0].k.shape[1]
        self._observed = [r for r, row in enumerate(rows) if row.observer is not None]
        # An observer reads every step before it is closed: nothing may still be running then.
        self.side: Side = InOrder() if self._observed or side is None else side
        self.lengths = Lengths(rows)
        self.opening = torch.tensor([row.opening for row in rows], device=self.device)
        self.parts = self._divide(len(pools))
        places = max(self.lengths.room) + 1
        places = rounded(places) if static else places
        self.text = TextSlots(rows, self.lengths, self.kv_heads, places, self.device)
        self._lists = SlotLists(pools, rows, spare=self.side.per_layer, static=static)
        self.lists = self._lists.slots
        self._runs = self._core_runs()
        # In turns: the last step's selection may still be reading its words.
        self._words = torch.zeros(2, WORDS, len(rows), dtype=torch.int32, device=self.device)
        self._selections: dict[tuple[int, StepPlan], list[Callable[[], object]]] = {}
        self._error = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.views = [self._view(layer) for layer in range(len(pools))]
        self.logits: list[Tensor | None] = [None] * len(pools)
        self.lse: list[Tensor | None] = [None] * len(pools)
        self._scores: list[tuple[Tensor, Tensor]] = []
        self._part_scores: list[tuple[Tensor, Tensor]] = []
        self._core, self._buffer = CORE, 0
        self._watched: dict[int, list[Tensor]] = {}
        self._prepare()

    @property
    def seen(self) -> list[int]:
        """See ``Lengths``."""
        return self.lengths.seen

    @property
    def evicts(self) -> list[bool]:
        """See ``Lengths``."""
        return self.lengths.evicts

    @property
    def shared(self) -> list[list[list[int]]]:
        """See ``SlotLists``."""
        return self._lists.shared

    @property
    def kind(self) -> tuple[int, bool]:
        """Which lists the coming step attends, and whether it leaves scores behind."""
        return self._plan.kind, self._plan.scores

    @property
    def tiered(self) -> bool:
        """Whether some row has a core tier."""
        return bool(self._runs)

    # -- one step ---------------------------------------------------------------------------------

    def view(self, layer: int) -> DecodeView:
        """See ``Step.view``."""
        return self.views[layer]

    def narrow(self, layer: int) -> Tensor | None:
        """Decoding never narrows."""
        return None

    def arrive(self, part: int) -> None:
        """Before a part's first layer: its last selection must be done; complete its lists."""
        if self._overfull:
            raise no_slot(self._overfull[0])
        layers, plan = self.parts[part], self._plan
        wanted = plan.reranks or self.text.evicts
        self.side.begin(part, partial(self._select, part, plan) if wanted else None)
        self._lists.complete(plan.kind, layers, plan.core, self._words[plan.buffer])

    def destination(self, layer: int) -> Destination:
        """Where the rows' new token goes, in every step."""
        pool = self.pools[layer]
        return Destination(pool.k, pool.v, self.text.write[layer].flatten(), self._error)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attend the step's lists, the rows' new token among them."""
        attention = self._lists.attention[self._plan.kind][layer]
        if not self._plan.scores:
            return attention(q, None)
        if not self._scores:
            self._make_scores(q.shape[1])
        return attention(q, self._scores[layer])

    def leave(self, part: int) -> None:
        """Behind a part's last attention: start its selection."""
        if not self.text.evicts:
            self.text.grow(self.parts[part])
        self._watched = {r: attended_positions(self, r) for r in self._observed}
        self.side.start(part)

    def _select(self, part: int, plan: StepPlan) -> None:
        """Rank the images and age the text of a part's layers by the weights of a step."""
        if (part, plan) not in self._selections:
            self._selections[part, plan] = list(self._plan_selection(part, plan))
        for work in self._selections[part, plan]:
            work()

    def _plan_selection(self, part: int, plan: StepPlan) -> Iterator[Callable[[], object]]:
        """The calls of ``_select``: all that a plan names stays where it is."""
        layers, scores, error = self.parts[part], self._part_scores[part], self._error
        words, lists = self._words[plan.buffer], self.lists[:, layers]
        following = lists[plan.next_core]
        if plan.core != plan.next_core:
            yield partial(following.copy_, lists[plan.core])
        for run in self._runs if plan.reranks else ():
            yield run.plan(*scores, lists[FULL], following, words[RERANKS], error)
        if self.text.evicts:
            first = self._lists.first[plan.kind, layers]
            yield self.text.plan(layers, *scores, first, words, error)

    def advance(self) -> None:
        """Close the step and set up the next one."""
        self.account()
        self._core = self._plan.next_core
        for r, positions in self._watched.items():
            show_step(self, r, positions)
        self._prepare()

    def account(self) -> None:
        """Count a step that has been done."""
        lengths = self.lengths
        for r, (row, kind) in enumerate(zip(self.rows, lengths.kinds(), strict=True)):
            attended = self._lists.mean_shared[kind][r] + lengths.kept[r] + 1
            row.attended_share.append(attended / (lengths.seen[r] + 1))
            row.step += 1
        lengths.advance()

    def _prepare(self) -> None:
        """Plan the coming step: the lists that are attended, and what is selected behind it."""
        words = self.lengths.words()
        self.kinds = words[ATTENDS_CORE]
        self._overfull = self.lengths.overfull()
        kind = self.kinds[0] if len(set(self.kinds)) == 1 else MIXED
        values = torch.tensor(words, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        self.plan(values, kind, any(words[RERANKS]))

    def plan(self, words: Tensor, kind: int, reranks: bool) -> None:
        """Plan the coming step from its ``words [WORDS, rows]``; nothing is read by the host.

        ``kind``: the list that all rows attend, or MIXED, which is right for any.
        """
        self._buffer = 1 - self._buffer
        mine = self._words[self._buffer].copy_(words, non_blocking=True)
        self.positions = mine[POSITION].long()
        reranks = reranks and self.tiered
        core = self._core
        following = CORE + SPARE - core if reranks and self.side.per_layer else core
        scores = reranks or self.text.evicts or bool(self._observed)
        kind = core if kind == CORE else kind
        self._plan = StepPlan(self._buffer, kind, reranks, scores, core, following)

    # -- packing rows into tensors ----------------------------------------------------------------

    def _divide(self, layers: int) -> list[slice]:
        """The layers of each part."""
        size = 1 if self.side.per_layer else layers
        return [slice(start, start + size) for start in range(0, layers, size)]

    def _view(self, layer: int) -> DecodeView:
        part = layer // self.parts[0].stop
        edges = self.parts[part].start, self.parts[part].stop - 1
        return EdgeView(self, layer, part) if layer in edges else DecodeView(self, layer)

    def _make_scores(self, heads: int) -> None:
        """Buffers for the logits of all layers, once they are wanted."""
        _, layers, rows, longest = self.lists.shape
        logits = torch.empty(layers, rows, heads, longest, device=self.device)
        lse = torch.empty(layers, rows, heads, device=self.device)
        self._scores = list(zip(logits, lse, strict=True))
        self._part_scores = [(logits[p].flatten(0, 1), lse[p].flatten(0, 1)) for p in self.parts]
        self.logits, self.lse = list(logits), list(lse)

    def _core_runs(self) -> list[CoreRuns]:
        """What re-ranking rewrites, picture by picture; nothing where no row has a core tier."""
        tiered = [row for row in self.rows if any(s.core is not None for s in row.layers)]
        pictures = max((len(row.image_spans) for row in tiered), default=0)
        return [CoreRuns(self.rows, n, self.device) for n in range(pictures)]

    def adopt(self, other: Decoding) -> None:
        """Take over the rows of ``other``, see ``fits``; every tensor stays where it is."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.zero_()
            mine[tuple(slice(size) for size in theirs.shape)] = theirs
        self.rows, self.lengths = other.rows, other.lengths
        self._lists.follow(other._lists)
        self.text.follow(self.lengths)
        self._prepare()

    def fits(self, other: Decoding) -> bool:
        """Whether the rows of ``other``, as many, could be adopted: nothing of theirs is larger."""
        mine, theirs = (
            [size for tensor in decoding._tensors() for size in tensor.shape]
            for decoding in (self, other)
        )
        return len(mine) == len(theirs) and all(map(operator.ge, mine, theirs))

    def _tensors(self) -> list[Tensor]:
        """All on the device that differs from rows to rows."""
        runs = [tensor for run in self._runs for tensor in run.tensors()]
        return [self.opening, self.lists, self._lists.first, *self.text.tensors(), *runs]

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
        listed = self.lists[self._core, layer, r, : self.shared[CORE][r][layer]].long()
        listed -= stored.start
        return listed[stored.layout.image_of[listed] >= 0]

    # -- back to rows -----------------------------------------------------------------------------

    def settle(self, r: int) -> Row:
        """Write row ``r``'s state back, its text slots closed up, so that a turn can follow."""
        self.side.join()
        if self.device.type == "cuda" and int(self._error):
            raise ValueError("decoding: an entry, a count or a place is out of range")
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
        slots, heads = self.text.slots(r), torch.arange(self.kv_heads, device=self.device)
        for layer, pool in enumerate(self.pools):
            end = (
                self.rows[r].layers[layer].layout.text_start
                + self.rows[r].layers[layer].start
                + last
            )
            for store in (pool.k, pool.v):
                store[slots[layer], heads] = store[end].clone()

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


def no_slot(row: int) -> CapacityError:
    """The error of a row that shall take more tokens than it was promised room for."""
    return CapacityError(
        f"row {row} of the cache has no free slot for another token",
        hint="reserve more with new_tokens when it is prefilled",
    )
