"""A stream that exists in tests alone: its work runs at random moments that only events constrain.

The model's own stream is the test's thread. The side's work runs in another thread, but never at
the same time: at every *point* (before and after what reads or writes shared tensors) the test
hands over for as many slices as chance wants, a slice being the work up to its next point. In some
steps these are many and in others few, so that the side runs ahead or falls behind by layers.

Work is known from ``begin`` on, as it is on a device whose host has run ahead: nothing but the
event that ``start`` records keeps it from running before the attention whose weights it needs, and
nothing but the wait in ``begin`` keeps the model from going on without it. Either can be left out.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
import torch

from engine.cache.listed import ListedAttention
from engine.ops import ranking


class Operation:
    """One piece of work on the side."""

    def __init__(self, part: int, work: Callable[[], None]) -> None:
        self.part, self.work = part, work
        self.cued = self.begun = self.done = False


class Simulated:
    """A ``Side``; ``missing`` leaves out the "fork" or the "join" events from the third step on.

    ``late`` counts work that the model had to wait for, ``split`` slices that ended within work.
    """

    def __init__(self, seed: int, per_layer: bool, missing: str = "") -> None:
        self.per_layer, self._missing = per_layer, missing
        self._random, self._queue = Random(seed), deque[Operation]()
        self._steps = self.late = self.split = 0
        self._eager = 0.0
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # -- as a side --------------------------------------------------------------------------------

    def begin(self, part: int, work: Callable[[], None] | None) -> None:
        if part == 0:
            self._steps += 1
            self._eager = self._random.choice((0.05, 0.4, 0.97))
        if not self._lacks("join"):
            self.late += any(waiting.part == part for waiting in self._queue)
            while any(waiting.part == part for waiting in self._queue):
                assert self._slice(), "the model waits for what can never run"
        if work is not None:
            self._queue.append(Operation(part, work))
        self.point()

    def start(self, part: int) -> None:
        for waiting in self._queue:
            waiting.cued |= waiting.part == part
        self.point()

    def join(self) -> None:
        while self._queue:
            assert self._slice(), "settled within a step"

    # -- the scheduler ----------------------------------------------------------------------------

    def point(self) -> None:
        """A moment at which the other stream may get on."""
        if threading.current_thread() is self._thread:
            self.split += 1
            self._back.release()
            self._go.acquire()
            return
        while self._random.random() < self._eager and self._slice():
            pass

    def _lacks(self, event: str) -> bool:
        # The first steps make the buffers; without them nothing could run early.
        return self._missing == event and self._steps > 2

    def _slice(self) -> bool:
        """Let the first piece of work run up to its next point; False if it may not."""
        if not self._queue or not (self._queue[0].cued or self._lacks("fork")):
            return False
        self._go.release()
        self._back.acquire()
        if self._failed:
            raise self._failed
        if self._queue[0].done:
            self._queue.popleft()
        return True

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                self._go.acquire()
                try:
                    self._queue[0].work()
                except BaseException as error:
                    self._failed = error
                self._queue[0].done = True
                self._back.release()


@contextmanager
def points_in(side: Simulated) -> Iterator[None]:
    """Points before and after every attention, ranking and aging."""

    def pointed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            side.point()
            result = call(*args, **options)
            side.point()
            return result

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ListedAttention, "__call__", pointed(ListedAttention.__call__))
        for name in ("plan_rank", "plan_age"):
            plan = getattr(ranking, name)
            patch.setattr(ranking, name, lambda *a, plan=plan, **k: pointed(plan(*a, **k)))
        yield
