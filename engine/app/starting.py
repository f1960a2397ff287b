"""Importing torch: it takes a third of a second, much memory, and is not ready to be disturbed.

An interrupt that Python turns into an exception in there is swallowed now and then, or ends the
process by way of C++; it is kept until all is imported. What the system refuses in there is said.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import CapacityError, OptionError

_LEAST = 700 << 20  # bytes of addresses that torch takes; with less it may end the process


def import_engine() -> None:
    """Import what takes torch, once.

    Raises CapacityError if it does not fit into memory, OptionError without a working directory,
    where a library of torch's would end the process.
    """
    if "torch" in sys.modules:
        return
    limit = _most_memory()
    if limit is not None and limit < _LEAST:
        raise _too_little(limit)
    try:
        os.getcwd()
    except FileNotFoundError:
        raise OptionError("the working directory was removed", hint="go to another (cd)") from None
    gc.disable()  # all that torch makes while it is imported stays: searching it costs a tenth
    try:
        with interrupts_kept():
            from .. import engine  # noqa: F401
    except ModuleNotFoundError:
        raise
    except (ImportError, MemoryError, OSError):  # which of them depends on the library
        if limit is None:
            raise
        raise _too_little(limit) from None
    finally:
        gc.freeze()
        gc.enable()


def _most_memory() -> int | None:
    """Bytes of addresses that this process may have; None: any number."""
    try:
        import resource
    except ImportError:  # not a system with limits
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _too_little(limit: int) -> CapacityError:
    return CapacityError(
        f"out of memory: torch does not fit into the {limit / 1e6:,.0f} MB that this process may "
        "have",
        hint="raise the limit (ulimit -v)",
    )


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Ctrl-C only leaves a mark meanwhile; KeyboardInterrupt is raised at the end."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # somebody else sees to it, or it is ignored
        return
    pressed: list[int] = []
    try:
        signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    except ValueError:  # not in the main thread, which is the one that is interrupted
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt
