"""The thread that owns the engine: it takes requests, and tells each asker what comes of it.

Everything of torch happens here, one step after the other; the other side only puts tickets into a
queue and is called back. A round is a picture through the vision tower, a slice of a prompt, or a
decode step of all rows, so that a running answer never waits for more than one of the former.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from threading import Condition, Event, Thread
from time import monotonic
from typing import Any

from PIL import Image

from ..engine import Engine
from ..errors import CapacityError, ContextError
from ..options import make_options
from ..pictures.encoded import EncodedImage
from ..result import Likeliest, Result
from ..running.generation import Answer, result_of
from ..running.scheduler import Event as SchedulerEvent
from ..running.scheduler import Job, Over, Said, Scheduler
from .metrics import Metrics
from .prefixes import Prefixes
from .refusal import RefusalError, refusal_of
from .request import Asking
from .watching import Watching

Scores = list[tuple[int, float, Likeliest]]


@dataclass(frozen=True)
class Piece:
    """Text of one of the answers, and the scores of its tokens where they are wanted."""

    choice: int
    text: str
    scores: Scores = field(default_factory=list)


@dataclass(frozen=True)
class Finished:
    """One of the answers is complete.

    ``scores`` are those that no piece has told, ``cached`` how many tokens of the prompt were there
    already.
    """

    choice: int
    result: Result
    scores: Scores = field(default_factory=list)
    cached: int = 0


@dataclass(frozen=True)
class Watched:
    """What a client sees of its request's cache, see ``Watching``."""

    value: dict[str, Any]


News = Piece | Finished | Watched | RefusalError


@dataclass(eq=False)
class Ticket:
    """A request in the engine's hands.

    Attributes:
        asking: what is asked.
        images: its pictures, decoded.
        tell: is called in the engine's thread with whatever comes of it.
        deadline: of ``monotonic``; what is not over by then is given up.
        asker: whose request it is; nothing that is stored is shared with others.
        cancel: set by whoever wants no more of it.
        arrived: when it came.
    """

    asking: Asking
    images: list[Image.Image]
    tell: Callable[[News], None]
    deadline: float
    asker: str = ""
    cancel: Event = field(default_factory=Event)
    arrived: float = field(default_factory=monotonic)
    encoded: list[EncodedImage] = field(default_factory=list)
    jobs: dict[Job, int] = field(default_factory=dict)
    told: dict[int, int] = field(default_factory=dict)  # by choice, tokens whose scores are out
    last: dict[int, float] = field(default_factory=dict)  # by choice, when a token came
    left: int = 0
    read: tuple[int, int] = (0, 0)  # tokens of the prompt, and image tokens among them
    cached: int = 0  # tokens of the prompt that were there already
    watching: Watching | None = None


class Worker:
    """Runs an engine for many askers; ``start`` it, ``submit`` tickets, ``stop`` it."""

    def __init__(
        self,
        engine: Engine,
        rows: int,
        budget: int | None,
        queue: int,
        slices: int = 1,
        shared: int = 1 << 30,
        metrics: Metrics | None = None,
    ) -> None:
        """``queue``: requests that may wait beside those that are answered; ``shared``: bytes of
        prompts' beginnings that are kept (``Prefixes``); the rest is as for ``Engine.scheduler``.
        """
        self.engine, self.metrics = engine, metrics or Metrics()
        self._rows, self._budget, self._slices, self._queue = rows, budget, slices, queue
        self._waiting: deque[Ticket] = deque()
        self._begun: list[Ticket] = []
        self._changed = Condition()
        self._closing = False
        self._shared = shared
        self._renew()
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Give up what is not over, and wait for the thread's end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def submit(self, ticket: Ticket) -> None:
        """Take a ticket, or raise RefusalError (429) where the queue is full."""
        with self._changed:
            if self._closing:
                raise RefusalError(503, "the server is going down", code="draining")
            if len(self._waiting) >= self._queue + self._scheduler.places:
                raise RefusalError(
                    429,
                    f"{len(self._waiting)} requests are waiting, no more are taken now",
                    code="queue_full",
                    headers={"retry-after": "1"},
                )
            self._waiting.append(ticket)
            self._changed.notify()

    def now(self) -> dict[str, float]:
        """What is the case at this moment."""
        scheduler = self._scheduler
        slots = sum(pool.k.nbytes + pool.v.nbytes for pool in scheduler.pools)
        return {
            "requests_running": len(scheduler.running),
            "requests_waiting": len(self._waiting) + len(scheduler.waiting),
            "cache_bytes": slots,
            "shared_bytes": self._prefixes.nbytes,
            "prefix_hits": self._prefixes.hits,
            "prefix_misses": self._prefixes.misses,
        }

    # -- in the engine's thread --------------------------------------------------------------------

    def _renew(self) -> None:
        """Begin with empty pools."""
        self._scheduler: Scheduler = self.engine.scheduler(self._rows, self._budget, self._slices)
        self._prefixes = Prefixes(self._scheduler.pools, self._shared)
        self._readings: dict[Job, bytes] = {}  # of beginnings
        self._held: dict[bytes, list[Ticket]] = {}  # until their beginning is read

    def _run(self) -> None:
        while self._wait():
            self._give_up()
            self._prepare()
            if not self._scheduler.idle:
                self._step()
        for ticket in [*self._begun, *self._waiting]:
            self._refuse(ticket, RefusalError(503, "the server is going down", code="draining"))

    def _wait(self) -> bool:
        """Sleep while there is nothing to do; whether to go on."""
        with self._changed:
            while not (self._closing or self._waiting or self._begun):
                self._changed.wait()
            return not self._closing

    def _give_up(self) -> None:
        """End what nobody waits for any more, and what has waited too long."""
        for ticket in [*self._begun, *self._waiting]:
            if ticket.cancel.is_set():
                self.metrics.count("requests_total", finish_reason="cancelled")
                self._drop(ticket)
            elif monotonic() > ticket.deadline:
                late = RefusalError(504, "the deadline of the request has passed", code="deadline")
                self._refuse(ticket, late)

    def _prepare(self) -> None:
        """Encode a picture of the next ticket, or begin its answers."""
        ticket = self._next()
        if ticket is None:
            return
        try:
            if len(ticket.encoded) < len(ticket.images):
                image = ticket.images[len(ticket.encoded)]
                beside = len(ticket.images) > 1
                ticket.encoded.append(self.engine.encode(image, ticket.asker, beside=beside))
            else:
                self._begin(ticket)
        except Exception as error:
            self._refuse(ticket, refusal_of(error))

    def _next(self) -> Ticket | None:
        """The ticket to be prepared, where there is a place for its answers."""
        if ticket := next((t for t in self._begun if not t.jobs), None):
            return ticket
        with self._changed:
            if not self._waiting:
                return None
            wanted, scheduler = self._waiting[0].asking.choices, self._scheduler
            if not scheduler.idle and scheduler.places < wanted:
                return None
            ticket = self._waiting.popleft()
        self._begun.append(ticket)
        self.metrics.observe("queue_seconds", monotonic() - ticket.arrived)
        return ticket

    def _begin(self, ticket: Ticket) -> None:
        """Hand the answers of a ticket to the scheduler."""
        asking = ticket.asking
        engine = self.engine.with_cache(asking.cache) if asking.cache else self.engine
        if asking.tiers:
            ticket.watching = Watching(engine, ticket.images)
        for choice in range(asking.choices):
            options: dict[str, Any] = dict(asking.options, cancel=ticket.cancel)
            options["seed"] = (options["seed"] + choice) % 2**63
            options |= {"logprobs": asking.logprobs, "top_logprobs": asking.top}
            options.setdefault("max_new_tokens", self._room(engine, ticket))
            made = make_options(**options)
            job = engine.job(asking.messages, ticket.encoded, made, observer=ticket.watching)
            ticket.jobs[job] = choice
            ticket.told[choice] = 0
        ticket.left = len(ticket.jobs)
        first = next(iter(ticket.jobs))
        ticket.read = len(first.turn.token_ids), first.turn.image_tokens
        self.metrics.count("prompt_tokens_total", ticket.read[0])
        self.metrics.count("image_tokens_total", ticket.read[1])
        beginning = self._prefixes.reading(first, ticket.asker)
        if beginning is None:
            self._submit(ticket)
            return
        key, reading = beginning
        self._held.setdefault(key, []).append(ticket)
        if len(self._held[key]) == 1:
            self._readings[reading] = key
            self._scheduler.submit(reading)

    def _submit(self, ticket: Ticket, *, fresh: bool = False) -> None:
        """Hand over a ticket's jobs; ``fresh``: their beginning was read for them."""
        for job in ticket.jobs:
            ticket.cached = self._prefixes.begin(job, ticket.asker, fresh=fresh)
            self._scheduler.submit(job)

    def _has_read(self, event: Over) -> None:
        """A beginning is read: those that it was read for go on."""
        key, job = self._readings.pop(event.job), event.job
        held = self._held.pop(key)
        waiting = [ticket for ticket in held if ticket in self._begun]
        if job.failed:
            for ticket in waiting:
                self._refuse(ticket, refusal_of(job.failed))
            return
        assert job.row is not None, "what has been read is a row"
        self._prefixes.put(key, job.row)
        for ticket in waiting:
            self._submit(ticket, fresh=ticket is held[0])

    def _room(self, engine: Engine, ticket: Ticket) -> int:
        """How long an answer may get where the request does not say."""
        prompt = engine.render(ticket.asking.messages, ticket.encoded)
        context = engine.model.decoder.config.context
        left = context - len(prompt.token_ids)
        if left < 1:
            message = (
                f"the prompt has {len(prompt.token_ids):,} tokens, the model takes {context:,}"
            )
            raise ContextError(message, "give fewer or smaller pictures, or a shorter text", left)
        return min(left, _UNSAID)

    def _step(self) -> None:
        scheduler = self._scheduler
        # What is kept for those that may come makes room for those that are here.
        while scheduler.blocked and self._prefixes.drop():
            pass
        try:
            events = scheduler.step()
        except CapacityError as error:  # none of the rows can go on
            lost = refusal_of(error)
            for ticket in [t for t in self._begun if t.jobs]:
                self._refuse(ticket, lost)
            self._renew()
            return
        self._show()
        self._tell(events)

    def _show(self) -> None:
        """Hand on what the step has shown to those that watch."""
        for ticket in self._begun:
            if ticket.watching and (value := ticket.watching.take()):
                ticket.tell(Watched(value))

    def _tell(self, events: Iterable[SchedulerEvent]) -> None:
        """Hand on what a step has brought."""
        for event in events:
            if event.job in self._readings:
                if isinstance(event, Over):
                    self._has_read(event)
                continue
            ticket = next((t for t in self._begun if event.job in t.jobs), None)
            if ticket is None:  # refused meanwhile
                continue
            choice = ticket.jobs[event.job]
            if isinstance(event, Said):
                self._time(ticket, choice)
                ticket.tell(Piece(choice, event.text, self._scores(ticket, event.job)))
            elif isinstance(event, Over):
                self._over(ticket, choice, event)

    def _time(self, ticket: Ticket, choice: int) -> None:
        now, before = monotonic(), ticket.last.get(choice)
        name = "time_to_first_token_seconds" if before is None else "inter_token_seconds"
        self.metrics.observe(name, now - (ticket.arrived if before is None else before))
        ticket.last[choice] = now

    def _scores(self, ticket: Ticket, job: Job) -> Scores:
        """Scores of the tokens that came since they were last told."""
        if not ticket.asking.logprobs or not isinstance(job.answer, Answer):
            return []
        choice = ticket.jobs[job]
        fresh = job.answer.scores(ticket.told[choice])
        ticket.told[choice] += len(fresh)
        return fresh

    def _over(self, ticket: Ticket, choice: int, event: Over) -> None:
        try:
            result = result_of(event)
        except Exception as error:
            self._refuse(ticket, refusal_of(error))
            return
        self.metrics.count("requests_total", finish_reason=result.finish_reason)
        self.metrics.count("generation_tokens_total", len(result.token_ids))
        prompt, image = ticket.read
        result = replace(result, prompt_tokens=prompt, image_tokens=image)
        scores = self._scores(ticket, event.job)
        ticket.tell(Finished(choice, result, scores, ticket.cached))
        ticket.left -= 1
        if not ticket.left:
            self._drop(ticket)

    def _refuse(self, ticket: Ticket, refusal: RefusalError) -> None:
        """End a ticket with an error; its other answers end as well."""
        self._drop(ticket)
        ticket.tell(refusal)

    def _drop(self, ticket: Ticket) -> None:
        for job in ticket.jobs:
            self._scheduler.cancel(job)
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
        if ticket in self._begun:
            self._begun.remove(ticket)


_UNSAID = 1024  # tokens of an answer whose request names no limit
