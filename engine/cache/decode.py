"""Decoding: one token of every row per step, over the slots that the policy has chosen.

A *list* names the pool slots that a row attends in a step: the full list (every stored slot) or the
core list (fixed, core image and text slots). Lists, scores and write places of all layers and
rows lie in a few tensors, see ``State``, so that the work between steps is a few operations and no
loop over layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple
from weakref import proxy

import torch
from torch import Tensor

from ..errors import CapacityError
from ..ops.fused import Destination, rope_write
from ..ops.native import Scratch
from ..ops.ranks import ALONE, Ranks
from ..ops.rotary import Tables
from .cross_steps import CrossSteps, CrossStepView
from .lengths import ATTENDS_CORE, POSITION, RERANKS
from .listed import Listed, ListedAttention, listed_in_formats
from .packing import pack, weights_of
from .pool import Pool
from .row import Row
from .showing import Attended, attended, show_step
from .slot_lists import CORE, FULL, MIXED, SPARE
from .state import State
from .streams import InOrder, Side


class Course(NamedTuple):
    """What a step's launches are given, fixed before its first layer."""

    buffer: int  # which of two holds the words
    kind: int  # which lists are attended
    reranks: bool  # whether some row's core is ranked again
    evicts: bool  # whether some row evicts text
    scores: bool  # whether logits are wanted
    core: int  # CORE or SPARE: which of them serves in this step
    next_core: int  # ... and in the next


class Scores(NamedTuple):
    """What attention leaves behind where it is wanted, of all layers and rows, fp32."""

    logits: Tensor  # [layers, rows, heads, max]
    lse: Tensor  # [layers, rows, heads]

    def as_one_head(self) -> Scores:
        """Room for a head ``[n, 1, max]`` whose weights are the mean of all."""
        n, _, most = self.logits.shape
        return Scores(self.logits.new_empty(n, 1, most), self.lse.new_zeros(n, 1))

    def fill(self, ranks: Ranks, logits: Tensor, lse: Tensor) -> None:
        """Make it the mean of every rank's heads, which costs a message as large as one of them."""
        weights = (logits - lse[..., None]).exp()
        self.logits[:, 0] = ranks.mean(weights.transpose(0, 1)).log()


class Wiring(NamedTuple):
    """What steps of so many rows are connected to: made once, and void when tensors move."""

    views: list[DecodeView]
    attention: list[list[ListedAttention]]  # [kind][layer]
    scores: list[Scores]  # each layer's, once they are wanted


class Decoding:
    """The steps of some rows: what each step writes, attends, ranks and evicts.

    Rows ``join`` and ``leave`` between steps. Run the decoder on the rows' next tokens with this
    object as its step, then call ``advance``. The order within a step: write, attend, accumulate,
    then evict one text token per head - or extend, when the budget grew. The last two are
    *selection*; ``side`` says where it runs.

    35 fixed + 576 image + 22 text tokens under S45 C30 T70 (floor 20): the full list holds
    35 + 259 + 20 = 314 slots, the core list 35 + 172 + 20 = 227, each plus the token being written.

    Attributes:
        state: the rows, and what there is of them on the device.
        positions: ``[rows]`` int64 positions of the tokens that the next step processes.
        kinds: for each row which list the coming step attends.
        parts: the layers that are selected together.
        evicts: whether some row evicts text.
        looks: whether some row sees a picture through cross layers.
        scores: what the last step that wanted any has left; None before.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        rows: Sequence[Row] = (),
        side: Side | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.pools, self.ranks = pools, ranks
        self._asked: Side = side or InOrder()
        self.state = State(pools, spare=self._asked.per_layer)
        self._error = torch.zeros(1, dtype=torch.int32, device=self.state.device)
        self._scratch = Scratch()  # attention of all layers works in it, one after the other
        self._buffer, self.evicts, self.looks = 0, False, False
        self._wired: Wiring | None = None
        self._watched: dict[int, list[Attended]] = {}
        self._cross = CrossSteps(self.state, self._scratch, self._error)
        self._use(self._asked)
        self.state.holders.add(self)
        for row in rows:
            self.join(row)

    @property
    def rows(self) -> list[Row]:
        """See ``State``."""
        return self.state.rows

    @property
    def seen(self) -> list[int]:
        """See ``Lengths``."""
        return self.state.lengths.seen

    @property
    def rotary(self) -> Tensor:
        """See ``Step``."""
        return self.state.rotary[: len(self.rows)]

    @property
    def kind(self) -> tuple[int, bool, tuple[int, bool] | None]:
        """Which lists the coming step attends, whether it leaves scores behind, and the same of
        cross layers where some row sees a picture through them.
        """
        return self._course.kind, self._course.scores, self._cross.course if self.looks else None

    @property
    def tiered(self) -> bool:
        """Whether some row has a core tier."""
        return bool(self.state.sizes.pictures) or self.state.crossed.tiered

    # -- rows come and go -------------------------------------------------------------------------

    def join(self, row: Row) -> None:
        """One row more, the last; the others go on as they are."""
        self.side.join()
        self.state.join(row)
        self._changed()

    def leave(self, r: int) -> Row:
        """Row ``r`` goes, complete, so that a turn can follow; the last row takes its index."""
        self._quiet()
        row = self.state.leave(r)
        self._changed()
        return row

    def settle(self, r: int) -> Row:
        """Row ``r``, complete, as if it had left; no step may follow."""
        self._quiet()
        return self.state.settle(r)

    def _quiet(self) -> None:
        """Wait for selection, and raise what it has met."""
        self.side.join()
        if self.state.device.type == "cuda" and int(self._error):
            raise ValueError("decoding: an entry, a count or a place is out of range")

    def _changed(self) -> None:
        """Prepare the next step of other rows than the last one's."""
        self._observed = [r for r, row in enumerate(self.rows) if row.observer is not None]
        # An observer reads every step before it is closed: nothing may still be running then.
        side = InOrder() if self._observed else self._asked
        if side.per_layer != self.side.per_layer:
            self._use(side)
        self.evicts = any(self.state.lengths.evicts)
        self.looks = any(row.pictures for row in self.rows)
        self._wired = self._wirings.get(len(self.rows))
        if self.rows:
            self._prepare()

    def _use(self, side: Side) -> None:
        """Select on this side from now on."""
        self.side, layers = side, len(self.pools)
        size = 1 if side.per_layer else layers
        self.parts = [slice(start, start + size) for start in range(0, layers, size)]
        self.void()

    def void(self) -> None:
        """See ``Holder``."""
        self.side.join()
        self._wired = None
        self._cross.void()
        self._wirings: dict[int, Wiring] = {}
        self._selections: dict[tuple[int, Course], list[Callable[[], object]]] = {}
        self.scores: Scores | None = None

    # -- one step ---------------------------------------------------------------------------------

    def view(self, layer: int) -> DecodeView:
        """See ``Step.view``."""
        return (self._wired or self._wire()).views[layer]

    def cross(self, layer: int) -> CrossStepView | None:
        """See ``Step.cross``."""
        if not self.looks:
            return None
        return CrossStepView(self._cross, layer, len(self.rows))

    def chunks(self, tokens: int) -> list[slice]:
        """A step is one."""
        return [slice(None)]

    def narrow(self, layer: int) -> Tensor | None:
        """Decoding never narrows."""
        return None

    def arrive(self, part: int) -> None:
        """Before a part's first layer: its last selection must be done; complete its lists."""
        if self._overfull:
            raise no_slot(self._overfull[0])
        layers, course = self.parts[part], self._course
        wanted = course.reranks or self.evicts
        self.side.begin(part, partial(self._select, part, course) if wanted else None)
        words = self.state.words[course.buffer, :, : len(self.rows)]
        self.state.lists.complete(course.kind, layers, course.core, words)

    def destination(self, layer: int) -> Destination:
        """Where the rows' new token goes, in every step."""
        pool, write = self.pools[layer], self.state.text.write[layer, : len(self.rows)]
        return Destination(pool.k, pool.v, write.flatten(), self._error)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attend the step's lists, the rows' new token among them."""
        wired = self._wired or self._wire()
        attention = wired.attention[self._course.kind][layer]
        if not self._course.scores:
            return attention(q, None)
        if not wired.scores:
            wired.scores.extend(self._layer_scores(q.shape[1]))
        return attention(q, wired.scores[layer])

    def leave_part(self, part: int) -> None:
        """Behind a part's last attention: start its selection."""
        if not self.evicts:
            self.state.text.grow(self.parts[part])
        for r in self._observed:
            self._watched[r] = attended(self.state, self.kinds[r], r)
        self.side.start(part)

    def _select(self, part: int, course: Course) -> None:
        """Rank the images and age the text of a part's layers by the weights of a step."""
        if (part, course) not in self._selections:
            self._selections[part, course] = list(self._selection(part, course))
        for work in self._selections[part, course]:
            work()

    def _selection(self, part: int, course: Course) -> Iterator[Callable[[], object]]:
        """The calls of ``_select``, for as many rows as the tensors hold: those that are not there
        have words of zero.
        """
        assert self.scores is not None, "attention leaves scores where selection needs them"
        layers, error, state = self.parts[part], self._error, self.state
        logits, lse = (tensor[layers].flatten(0, 1) for tensor in self.scores)
        words, lists = state.words[course.buffer], state.lists.slots[:, layers]
        following = lists[course.next_core]
        if course.core != course.next_core:
            yield partial(following.copy_, lists[course.core])
        if course.reranks:
            wanted, every = words[RERANKS], Scores(logits, lse)
            if self.ranks.size > 1:
                every = every.as_one_head()
                yield partial(every.fill, self.ranks, logits, lse)
            yield from state.runs.ranking(layers, *every, lists[FULL], following, wanted, error)
        if self.evicts:
            first = state.lists.first[course.kind, layers]
            yield state.text.aging(layers, logits, lse, first, words, error)

    def advance(self) -> None:
        """Close the step and set up the next one."""
        looked = {r: self._looked(r) for r in self._observed if self.rows[r].pictures}
        self.account()
        self.rank_features()
        self.state.core = self._course.next_core
        for r in self._observed:
            assert self.scores is not None, "attention leaves scores where they are shown"
            show_step(self.state, r, *self.scores, self._watched[r])
            if r in looked:
                across = self.rows[r].across()
                self._cross.show(across, r, self.state.lengths.steps[r], looked[r])
        if self._packing:
            self._pack()
        self._prepare()

    def _looked(self, r: int) -> list[Attended]:
        """What row ``r``'s step, not closed yet, has attended of pictures in cross layers."""
        return self._cross.attended(self.rows[r].across(), r, core=bool(self.kinds[r]))

    def rank_features(self) -> None:
        """Behind a step's last layer: choose the core of what cross layers look at."""
        if self.looks:
            self._cross.rank()

    def _pack(self) -> None:
        """Store what rows have generated as their policies say."""
        self._quiet()
        assert self.scores is not None, "attention leaves scores where packing needs them"
        weights = [weights_of(self.state, r, *self.scores) for r in self._packing]
        for r, given in zip(self._packing, weights, strict=True):
            pack(self.state.settle(r), self.pools, given, self.ranks)
            self.state.rejoin(r)

    def account(self) -> None:
        """Count a step that has been done."""
        lengths, lists = self.state.lengths, self.state.lists
        for r, (row, kind) in enumerate(zip(self.rows, lengths.kinds(), strict=True)):
            listed = lists.mean_shared[kind][r] + lengths.texts[r] + 1
            row.attended_share.append(listed / (lengths.seen[r] + 1))
            row.lists[kind] += 1
        lengths.advance()

    def _prepare(self) -> None:
        """Decide the coming step: the lists that are attended, and what is selected behind it."""
        lengths = self.state.lengths
        words = lengths.words()
        self.kinds = words[ATTENDS_CORE]
        self._overfull = lengths.overfull()
        self._packing = lengths.packing()
        kind = self.kinds[0] if len(set(self.kinds)) == 1 else MIXED
        pinned = self.state.device.type == "cuda"
        values = torch.tensor(words, dtype=torch.int32, pin_memory=pinned)
        self.set_course(values, kind, any(words[RERANKS]))

    def set_course(self, words: Tensor, kind: int, reranks: bool) -> None:
        """Decide the coming step from its ``words [WORDS, rows]``; nothing is read by the host.

        ``kind``: the list that all rows attend, or MIXED, which is right for any.
        """
        self._buffer = 1 - self._buffer
        mine = self.state.words[self._buffer, :, : len(self.rows)]
        mine.copy_(words, non_blocking=True)
        self.positions = mine[POSITION].long()
        reranks = reranks and self.tiered
        core = self.state.core
        following = CORE + SPARE - core if reranks and self.side.per_layer else core
        scores = reranks or self.evicts or bool(self._observed or self._packing)
        kind = core if kind == CORE else kind
        if self.looks:
            self._cross.begin(kind, mine, scored=scores, observed=bool(self._observed))
        which = self._buffer, kind, reranks, self.evicts, scores, core, following
        self._course = Course(*which)

    # -- what a step is connected to --------------------------------------------------------------

    def _wire(self) -> Wiring:
        """Connect steps of as many rows as there are."""
        layers, kinds = range(len(self.pools)), range(len(self.state.lists.slots))
        attention = [[self._listed(kind, layer) for layer in layers] for kind in kinds]
        self._wired = Wiring([self._view(layer) for layer in layers], attention, [])
        self._wirings[len(self.rows)] = self._wired
        return self._wired

    def _listed(self, kind: int, layer: int) -> ListedAttention:
        rows, lists = slice(len(self.rows)), self.state.lists
        slots, count = lists.slots[kind, layer, rows, None], lists.count[kind, layer, rows, None]
        plain = Listed(self.pools[layer], slots[..., lists.plain], count)
        most, pool_of = self.state.most[rows], self.pools[layer].of
        tiers = [plain, *listed_in_formats(lists, self.state.sifted, kind, layer, most, pool_of)]
        lonely = kind == FULL and len(self.rows) == 1 and len(tiers) == 1
        alone = partial(_begin, self.rows, layer) if lonely else None
        return ListedAttention(tiers, alone, self._scratch)

    def _view(self, layer: int) -> DecodeView:
        part = layer // self.parts[0].stop
        edges = self.parts[part].start, self.parts[part].stop - 1
        return EdgeView(self, layer, part) if layer in edges else DecodeView(self, layer)

    def _layer_scores(self, heads: int) -> Iterator[Scores]:
        """Where the rows' attention leaves what is wanted of it, layer by layer."""
        sizes, rows = self.state.sizes, slice(len(self.rows))
        if self.scores is None:
            size = len(self.pools), sizes.rows, heads
            logits = torch.empty(*size, sizes.width, device=self.state.device)
            self.scores = Scores(logits, torch.empty(size, device=self.state.device))
        for logits, lse in zip(*self.scores, strict=True):
            yield Scores(logits[rows], lse[rows])


class DecodeView:
    """A layer's view of a decode step."""

    def __init__(self, step: Decoding, layer: int) -> None:
        # Weakly: the step holds its views, and what it holds shall be freed as soon as it is.
        self.step: Decoding = proxy(step)
        self.layer, self._destination = layer, step.destination(layer)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tables: Tables) -> Tensor:
        """See ``View.attend``; one query per row."""
        queries = rope_write(q, k, v, *tables, self._destination)
        return self.step.attend(self.layer, queries)


class EdgeView(DecodeView):
    """The view of the first or last layer of a part, where selection is awaited or started."""

    def __init__(self, step: Decoding, layer: int, part: int) -> None:
        super().__init__(step, layer)
        layers = step.parts[part]
        self._part = part
        self._first, self._last = layer == layers.start, layer == layers.stop - 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tables: Tables) -> Tensor:
        """See ``View.attend``."""
        if self._first:
            self.step.arrive(self._part)
        out = super().attend(q, k, v, tables)
        if self._last:
            self.step.leave_part(self._part)
        return out


def _begin(rows: Sequence[Row], layer: int) -> int:
    """Where the extent of a row that is alone begins."""
    return rows[0].layers[layer].start


def no_slot(row: int) -> CapacityError:
    """The error of a row that shall take more tokens than it was promised slots for."""
    return CapacityError(
        f"row {row} of the cache has no free slot for another token",
        hint="reserve more with new_tokens when it is prefilled",
    )
