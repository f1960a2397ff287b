"""Many requests at once: prefill one by one, decode together, a finished row's place goes on.

No padding exists: every row brings its own slots, positions and step kind, so that an answer does
not depend on who shares the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..cache.report import report
from ..cache.row import Row
from ..errors import EngineError, OptionError
from ..loading.capacity import memory_for
from ..options import OptionValues, make_options
from ..pictures.encoded import Picture, listed
from ..prompts.messages import Messages
from ..result import Result, Timings
from .asked import Asked
from .generation import Answer, refuse_nan
from .session import Turn, make_pools, pool_memory, prefill
from .stepping import Stepper

_FEWER = "try fewer --rows than {}, --dtype bf16, or smaller pictures; finished answers are kept"


@dataclass(frozen=True)
class Request:
    """One question of a batch: the arguments of ``Engine.generate``."""

    prompt: Messages
    images: Sequence[Picture] = ()
    raw: bool = False
    options: OptionValues = field(default_factory=OptionValues)

    @classmethod
    def parse(cls, value: Request | Mapping[str, Any]) -> Request:
        """A request from a mapping {prompt, images, raw, max_new_tokens, ...}.

        Raises OptionError naming what is missing or unknown.
        """
        if isinstance(value, Request):
            return value
        if not isinstance(value, Mapping):
            raise OptionError(
                f"a request is {type(value).__name__}", hint='write {"prompt": "...", "images": []}'
            )
        rest = dict(value)
        if "prompt" not in rest:
            raise OptionError("a request has no prompt", hint='add "prompt": "..."')
        prompt, images = rest.pop("prompt"), rest.pop("images", ())
        raw = rest.pop("raw", False)
        if not isinstance(raw, bool) or (raw and not isinstance(prompt, str)):
            raise OptionError(
                f"a request's raw is {raw!r:.40}", hint="use true (for a text prompt) or false"
            )
        unknown = rest.keys() - OptionValues.__annotations__.keys()
        if unknown:
            known = ", ".join(["prompt", "images", "raw", *OptionValues.__annotations__])
            raise OptionError(
                f"a request has unknown keys: {', '.join(sorted(unknown))}", hint=f"known: {known}"
            )
        return cls(prompt, listed(images), raw, OptionValues(**rest))  # type: ignore[typeddict-item]


@dataclass(frozen=True)
class Failure:
    """A request that could not be answered; the others go on."""

    index: int
    error: EngineError


@dataclass
class _Running:
    """A request being answered."""

    index: int
    turn: Turn
    answer: Answer
    row: Row
    timings: Timings
    token: int
    failed: EngineError | None = None

    @property
    def over(self) -> bool:
        """Whether nothing is to be decoded any more."""
        return bool(self.answer.finish or self.failed)

    def choose(self, logits: Tensor) -> None:
        """Take the next token; whatever is wrong with it is this request's own failure."""
        try:
            self.token = self.answer.choose(logits)
            self.answer.take(self.token)
        except Exception as error:
            self.failed = _failure(error)


def _failure(error: Exception) -> EngineError:
    """What a request failed of, in our words where they are known."""
    if isinstance(error, EngineError):
        return error
    reason = (str(error).splitlines() or [""])[0][:200]
    return EngineError(f"unexpected {type(error).__name__}: {reason}")


def generate_batch(
    engine: Asked, requests: Iterable[Request | Mapping[str, Any]], rows: int = 8
) -> Iterator[Result | Failure]:
    """Answer ``requests``, ``rows`` at a time; yields each result as soon as it is done.

    ``Result.index`` and ``Failure.index`` say which request it belongs to, counted from 0.

    Raises CapacityError if memory runs out while the rows are decoded: none of them can go on.
    """
    if rows < 1:
        raise OptionError(f"rows is {rows}", hint="use 1 or more")
    batch = Batch(engine)
    waiting = enumerate(requests)
    while True:
        while len(batch.running) < rows and (item := next(waiting, None)) is not None:
            failed = batch.admit(*item)
            if failed:
                yield failed
        yield from batch.finished()
        if batch.running:
            batch.step()
        elif item is None:
            return


class Batch:
    """The rows that are decoded together, in pools they share."""

    def __init__(self, engine: Asked) -> None:
        self.engine, self.model, self.policy = engine, engine.model, engine.policy
        self.pools = make_pools(self.model)
        self.running: list[_Running] = []
        self._stepper = Stepper(self.model, self.pools, self.policy, engine.stepping)

    def admit(self, index: int, request: Request | Mapping[str, Any]) -> Failure | None:
        """Prefill one more request; a bad one comes back as a Failure."""
        self._settle()
        try:
            self.running.append(self._start(index, Request.parse(request)))
        except Exception as error:
            return Failure(index, _failure(error))
        return None

    def _start(self, index: int, request: Request) -> _Running:
        try:
            options = make_options(**request.options)
        except TypeError as error:
            raise OptionError(f"a request's option has the wrong type: {error}") from error
        timings = Timings(load=self.engine.load_seconds)
        turn = self.engine.turn(request.prompt, request.images, timings, raw=request.raw)
        answer = self.engine.answer(options, turn.token_ids)
        began = perf_counter()
        with pool_memory(self.pools, "reading the prompt", len(turn.token_ids)):
            row, logits = prefill(self.model, self.pools, self.policy, turn, options.max_new_tokens)
        timings.prefill = perf_counter() - began
        running = _Running(index, turn, answer, row, timings, token=0)
        try:
            refuse_nan(logits)
            running.choose(logits)
        except EngineError as error:
            running.failed = error
        return running

    def step(self) -> None:
        """One token for every row.

        Raises CapacityError: a step that memory cut short cannot be taken again, for any of them.
        """
        count = len(self.running)
        needed = 2 * len(self.pools) * self.pools[-1].k.nbytes
        doing, hint = f"answering {count} requests together", _FEWER.format(count)
        with memory_for(doing, needed, self.engine.device, hint):
            self._step()

    def _step(self) -> None:
        began = perf_counter()
        if not self._stepper.decoding:
            self._stepper.begin([each.row for each in self.running])
        tokens = torch.tensor([each.token for each in self.running], device=self.engine.device)
        logits = self._stepper.step(tokens)
        for each, scores in zip(self.running, logits, strict=True):
            each.choose(scores)
            each.timings.steps += 1
            each.timings.decode += perf_counter() - began

    def finished(self) -> Iterator[Result | Failure]:
        """Results of the rows that are over; their slots are given back."""
        done = [each for each in self.running if each.over]
        if not done:
            return
        self._settle()
        self.running = [each for each in self.running if not each.over]
        for each in done:
            cache = report(each.row, self.pools, self.policy)
            self._free(each.row)
            if each.failed:
                yield Failure(each.index, each.failed)
                continue
            result = each.answer.result(each.turn, each.timings, cache)
            yield replace(result, index=each.index)

    def _free(self, row: Row) -> None:
        """Give a row's slots back."""
        for pool, stored in zip(self.pools, row.layers, strict=True):
            pool.give(stored.start, stored.capacity)

    def _settle(self) -> None:
        """Write the decode state back to the rows, before their number changes."""
        if self._stepper.decoding:
            for each, row in zip(self.running, self._stepper.settle(), strict=True):
                each.row = row
