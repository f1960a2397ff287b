"""How far long work has come: frames that are decoded and encoded, tokens that are read.

Whoever wants to know listens around the work, and the work tells; nobody in between passes anything
on. Without a listener telling costs nothing.

>>> with listening(lambda what, done, total: print(what, done, "of", total)):
...     tell("frames decoded", 3, 32)
frames decoded 3 of 32
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]  # what is counted, how many are done, of how many

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """``listener`` hears of what is done inside the block, in this thread."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(what: str, done: int, total: int) -> None:
    """Say that ``done`` of ``total`` are done."""
    listener = _listener.get()
    if listener is not None:
        listener(what, done, total)
