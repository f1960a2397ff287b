"""Native calls recorded while they are made, to be made again at once; see ``running.taped``."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from .native import load

Thing = TypeVar("Thing")


class Tape:
    """Native calls of one thread on a CPU, recorded while they are made, to be made again at once.

    ``run`` repeats them on the same addresses; what they read must be put where they read it, and
    be held by whoever does so: the tape holds what recorded calls have allocated (``alive``). Torch
    operations are not recorded: whoever records must see to it that none was needed.
    """

    def __init__(self) -> None:
        module, problem = load()
        if module is None:
            raise RuntimeError(problem)
        self._tape = module.Tape()
        self._alive: list[object] = []

    @contextmanager
    def record(self) -> Iterator[None]:
        """A block whose native calls are recorded while they are made."""
        _recording.alive = self._alive
        self._tape.start()
        try:
            yield
        finally:
            self._tape.stop()
            _recording.alive = None

    def run(self) -> None:
        """Make the calls again."""
        self._tape.run()


class _Recording(threading.local):
    alive: list[object] | None = None


_recording = _Recording()


def recording() -> bool:
    """Whether this thread's native calls are being recorded."""
    return _recording.alive is not None


def alive(thing: Thing) -> Thing:
    """``thing``, which the tape that is being recorded, if any, keeps alive."""
    if _recording.alive is not None:
        _recording.alive.append(thing)
    return thing
