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

# Limits of a process, and the bytes that torch takes of them; with less it may end the process.
_LEAST = {"RLIMIT_AS": 700 << 20, "RLIMIT_DATA": 250 << 20}


def need_folder() -> None:
    """Refuse to work without a working directory, where a library of torch's ends the process."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise OptionError("the working directory was removed", hint="go to another (cd)") from None


def import_engine() -> None:
    """Import what takes torch, once; raises CapacityError if it does not fit into memory."""
    if "torch" in sys.modules:
        return
    limits = _limits()
    if any(limits[name] < _LEAST[name] for name in limits):
        raise _too_little(limits)
    gc.disable()  # all that torch makes while it is imported stays: searching it costs a tenth
    try:
        with interrupts_kept():
            from .. import engine  # noqa: F401
    except ModuleNotFoundError:
        raise
    except (ImportError, MemoryError, OSError):  # which of them depends on the library
        if not limits:
            raise
        raise _too_little(limits) from None
    finally:
        gc.freeze()
        gc.enable()


def _limits() -> dict[str, int]:
    """The bytes that this process may have, by the limit's name; none where it may have any."""
    try:
        import resource
    except ImportError:  # not a system with limits
        return {}
    found = {name: resource.getrlimit(getattr(resource, name))[0] for name in _LEAST}
    return {name: most for name, most in found.items() if most != resource.RLIM_INFINITY}


def _too_little(limits: dict[str, int]) -> CapacityError:
    most = min(limits.values()) / 1e6
    return CapacityError(
        f"out of memory: torch does not fit into the {most:,.0f} MB that this process may have",
        hint="raise the limit (ulimit -v, ulimit -d)",
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
