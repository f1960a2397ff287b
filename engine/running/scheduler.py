"""The one loop: requests are read one by one, answered together, and leave when they are over.

A single request is a batch of one. No padding exists: every row brings its own slots, positions,
policy and step kind, so that an answer does not depend on who shares the step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from ..cache.observe import Observer
from ..cache.report import CacheReport, allocated_bytes, report
from ..cache.row import Row
from ..errors import CapacityError, OptionError
from ..loading.capacity import memory_for
from ..models.decoder import Slices
from ..models.vision_language import VisionLanguageModel
from ..naming import told
from ..policies.policy import Policy
from ..result import FinishReason, Timings
from .stepping import Stepper, Stepping
from .turn import Read, Turn, make_cross_pools, make_pools, reading

_FEWER = "try fewer rows than {}, dtype bf16, or smaller pictures; finished answers are kept"


class Chooses(Protocol):
    """What becomes of a request's logits: an answer in the making, see ``Answer``.

    Attributes:
        finish: why it is over; None while it goes on.
    """

    finish: FinishReason | None

    def choose(self, logits: Tensor) -> int:
        """The next token, from ``logits [vocab]``."""

    def take(self, token: int) -> str:
        """Add a chosen token; returns the text that is now certain."""

    def stopped(self) -> bool:
        """Whether it is over without a further token, because somebody wants it so."""


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
        turn: its tokens and pictures.
        answer: chooses its tokens, and knows when it is over.
        policy: what of it is kept and attended.
        new_tokens: how many tokens may be decoded behind the turn.
        timings: seconds, counted on.
        past: what an earlier turn has left in the scheduler's pools: the turn goes on from there.
        observer: is told of every layer of every pass.
        keeps: whether its row stays in the pools when it is over, for a later turn.
        row: what the cache holds of it, once it is read; settled when it is over.
        token: chosen, and not yet decoded.
        failed: what it failed of.
    """

    turn: Turn
    answer: Chooses
    policy: Policy
    new_tokens: int
    timings: Timings
    past: Row = field(default_factory=Row)
    observer: Observer | None = None
    keeps: bool = False
    row: Row | None = None
    token: int = 0
    failed: Exception | None = None

    @property
    def over(self) -> bool:
        """Whether no token can follow."""
        return bool(self.answer.finish or self.failed)


@dataclass(frozen=True)
class Said:
    """A further piece of a job's text."""

    job: Job
    text: str


@dataclass(frozen=True)
class Over:
    """A job is over; ``cache`` is what it held at its end, None if it failed."""

    job: Job
    cache: CacheReport | None


Event = Said | Over


class Scheduler:
    """Answers jobs, ``rows`` of them together, in pools that they share.

    ``submit``, then ``step`` until it is ``idle``; for a single job that is ``events``.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        stepping: Stepping,
        rows: int = 1,
        budget: int | None = None,
        slices: int | None = None,
    ) -> None:
        """``budget``: bytes of the pools, claimed at once (None: they grow as they are used);
        ``slices``: how much of a prompt is read between two decode steps, in layers and ranges of
        tokens (None: all of it).
        """
        self.model, self.rows, self.slices = model, rows, slices
        with memory_for("claiming the cache", budget or 0, model.decoder.norm.weight.device):
            self.cross = make_cross_pools(model, budget, rows)
            claimed = allocated_bytes(self.cross.pools) if self.cross else 0
            self.pools = make_pools(model, None if budget is None else budget - claimed)
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self._reading: Slices[Read] | None = None  # of the first that waits
        self._decodes = False  # whether it is the running ones' turn
        self._device = self.pools[0].k.device
        self._token_bytes = sum(pool.slot_bytes for pool in self.pools)
        self._stepper = Stepper(model, self.pools, stepping)

    @property
    def places(self) -> int:
        """How many more jobs can be taken up before one is over."""
        return self.rows - len(self.running) - len(self.waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self.running or self.waiting)

    def submit(self, job: Job) -> Job:
        """Take a job (``Engine.job``); it is read as soon as it has a place."""
        if not isinstance(job, Job):
            raise OptionError(f"job is {told(job)}", hint="use Engine.job to make one")
        self.waiting.append(job)
        return job

    def step(self) -> list[Event]:
        """Read of the next prompt where there is a place for it, else decode a token of every row;
        in turns where prompts are read in slices.

        What is wrong with one job ends that job alone. Raises CapacityError if memory runs out in
        a decode step: it cannot be taken again, for any of the rows.
        """
        self._decodes = bool(self.running) and (self._decodes or not self._readable())
        if not self._decodes:
            return self._read(self.waiting[0]) if self.waiting else []
        self._decodes = False
        return self._decode()

    def events(self, job: Job) -> Generator[Event, None, None]:
        """Answer one job, step by step; it is cancelled if nobody listens to its end."""
        self.submit(job)
        try:
            while not self.idle:
                yield from self.step()
        finally:
            self.cancel(job)

    def cancel(self, job: Job) -> None:
        """End a job wherever it is; one that is over already stays as it is."""
        if job in self.waiting:
            self._give_up(job)
        elif job in self.running:
            self._take_out(job)
            self._give(job)

    @property
    def blocked(self) -> bool:
        """Whether the next prompt has a place, but no room in the pools."""
        return bool(self.waiting) and len(self.running) < self.rows and not self._readable()

    def _readable(self) -> bool:
        """Whether the next prompt can be read now, or refused."""
        if not self.waiting or len(self.running) == self.rows:
            return False
        job = self.waiting[0]
        room = all(pool.has(*self._slots(job)) for pool in self.pools)
        return bool(self._reading) or (room and self._has_features(job))

    def _has_features(self, job: Job) -> bool:
        """Whether there is room for what cross layers see of a job's pictures."""
        if self.cross is None:
            return True
        return self.cross.has(job.turn.sights(self.model), job.policy)

    def _slots(self, job: Job) -> tuple[int, dict[str, int]]:
        """Slots that a job needs in a layer at most; none to speak of where pools grow."""
        if self.pools[0].limit is None:
            return 0, {}
        return job.turn.slots(job.policy, job.new_tokens, job.past)

    def _read(self, job: Job) -> list[Event]:
        """Some slices of a job's prefill; at their end its first token."""
        began = perf_counter()
        try:
            if self._reading is None:
                self._reading = self._opened(job)
            tokens = job.past.seen + len(job.turn.token_ids)
            with self._memory_of("reading the prompt", tokens):
                read = self._sliced(job, self._reading)
        except Exception as error:
            job.failed = error
            self._give_up(job)
            return [Over(job, None)]
        events = list(self._begun(job, read)) if read else []
        self._decodes = self.slices is not None
        job.timings.prefill += perf_counter() - began
        if job.over and not read:
            self._give_up(job)
            return [Over(job, self._report(Row(job.policy)))]
        return [*events, *self._ended()]

    def _begun(self, job: Job, read: Read) -> Iterable[Event]:
        """A job whose prompt has been read: its first token."""
        self._leave_off(job)
        job.row, logits = read
        self.running.append(job)
        return self._choose(job, logits)  # reads the logits: a GPU is done by then

    def _opened(self, job: Job) -> Slices[Read]:
        """A job's prefill, not begun; refuses what can never fit."""
        slots, packed = self._slots(job)
        # With nothing running that could give slots back.
        if not all(pool.has(slots, packed) for pool in self.pools):
            more = "".join(f" and {tokens:,} in {name}" for name, tokens in packed.items())
            new = f"{len(job.turn.token_ids):,} of the prompt, {job.new_tokens:,} to come"
            raise CapacityError(
                f"the request needs {slots:,} slots of cache in a layer{more} "
                f"({job.past.seen:,} tokens so far, {new}, under {job.policy.spec}); "
                f"there are {self.pools[0].limit:,}, some of them perhaps in use",
                hint="give fewer pictures, ask for fewer tokens, or give a larger cache budget",
            )
        if not self._has_features(job):
            assert self.cross is not None, "without cross layers there is room"
            raise CapacityError(
                "the features of the request's pictures need more slots of cache than the "
                f"{self.cross.pools[0].limit:,} of a cross layer, some of them perhaps in use",
                hint="give fewer or smaller pictures, or a larger cache budget",
            )
        given = job.policy, job.turn, job.new_tokens, job.past, job.observer
        return reading(self.model, self.pools, *given, self.cross)

    def _sliced(self, job: Job, slices: Slices[Read]) -> Read | None:
        """Read on; what it comes to, if this is the end."""
        for _ in count() if self.slices is None else range(self.slices):
            if job.answer.stopped():
                return None
            try:
                next(slices)
            except StopIteration as end:
                read: Read = end.value
                return read
        return None

    def _give_up(self, job: Job) -> None:
        """A job ends before its prompt has been read: so does its hold on what it began behind."""
        self._leave_off(job)
        if not job.keeps:
            job.past.give()

    def _leave_off(self, job: Job) -> None:
        """A job waits no longer; what was read of it, and is not complete, is as if it were not."""
        if job is self.waiting[0] and self._reading:
            self._reading.close()
            self._reading = None
        self.waiting.remove(job)

    def _decode(self) -> list[Event]:
        began, events = perf_counter(), list[Event]()
        with self._memory():
            for job in self.running[self._stepper.rows :]:
                assert job.row is not None, "what is running has been read"
                self._stepper.join(job.row)
            tokens = torch.tensor([job.token for job in self.running], device=self._device)
            logits = self._stepper.step(tokens)
        for job, scores in zip(self.running, logits, strict=True):
            events += self._choose(job, scores)
            job.timings.steps += 1
            job.timings.decode += perf_counter() - began
        return [*events, *self._ended()]

    def _memory(self) -> AbstractContextManager[None]:
        """A block that says what was needed if memory runs out in it."""
        if self.rows == 1:
            return self._memory_of("writing the answer", self._stepper.seen() + 1)
        count, needed = len(self.running), 2 * len(self.pools) * self.pools[-1].k.nbytes
        doing = f"answering {count} requests together"
        return memory_for(doing, needed, self._device, _FEWER.format(count))

    def _memory_of(self, doing: str, tokens: int) -> AbstractContextManager[None]:
        """The same for so many tokens of cache."""
        return memory_for(doing, tokens * self._token_bytes, self._device)

    def _choose(self, job: Job, logits: Tensor) -> Iterable[Event]:
        try:
            job.token = job.answer.choose(logits)
            text = job.answer.take(job.token)
        except Exception as error:
            job.failed = error
            return []
        return [Said(job, text)] if text else []

    def _ended(self) -> Iterator[Event]:
        """Take out the jobs that are over."""
        for job in [job for job in self.running if job.over]:
            row = self._take_out(job)
            cache = None if job.failed else self._report(row)
            self._give(job)
            yield Over(job, cache)

    def _report(self, row: Row) -> CacheReport:
        """What a row holds."""
        return report(row, self.pools, self.cross.pools if self.cross else ())

    def _take_out(self, job: Job) -> Row:
        """End a job; the last of those that are decoded takes its place, here as in the steps."""
        place, decoded = self.running.index(job), self._stepper.rows
        if place < decoded:
            job.row = self._stepper.leave(place)
            self.running[place] = self.running[decoded - 1]
            place = decoded - 1
        self.running.pop(place)
        assert job.row is not None, "what is running has been read"
        return job.row

    def _give(self, job: Job) -> None:
        """Give back what a job holds of the pools, unless a later turn goes on from there."""
        if job.row is not None and not job.keeps:
            job.row.give()
