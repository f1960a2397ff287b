"""What is said to the user: answers to stdout, errors to stderr, nothing that a terminal obeys."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import warnings
from contextlib import suppress
from typing import Any

from ..files import named
from ..naming import display_name

INTERRUPTED = 130  # the exit code after Ctrl-C
UNREAD = 141  # and of a pipe whose reader left: a shell's 128 + SIGPIPE
_SCREEN = 2000  # characters


class _Lossy(io.RawIOBase):
    """stderr, losing what it cannot take: nothing that is said there changes what is done."""

    def fileno(self) -> int:
        return 2

    def isatty(self) -> bool:
        return os.isatty(2)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        with suppress(OSError):
            return os.write(2, data)
        return len(data)


def prepare() -> None:
    """Make the standard streams safe to use, however this process was started.

    A closed one gets its number back, lest a file of the user's receives what is meant for it; text
    that an encoding lacks is escaped; warnings of libraries are shown, and never end the program.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest free number
    sys.stdin = sys.stdin or os.fdopen(0)
    if sys.stderr is sys.__stderr__:  # and nobody, such as a test, has put another one there
        encoding = sys.stderr.encoding if sys.stderr else None
        buffer = io.BufferedWriter(_Lossy())
        sys.stderr = io.TextIOWrapper(buffer, encoding, line_buffering=True)
    if isinstance(sys.stdin, io.TextIOWrapper):  # UTF-8 in any locale; other bytes are refused
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if any("error" in option for option in sys.warnoptions):
        warnings.simplefilter("default")


def need_stdout() -> None:
    """Find before the work is done that its result could not be said; raises OSError."""
    if sys.stdout is None:  # started with stdout closed
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), "stdout")


def say(text: str) -> None:
    """Write to stdout at once; on a terminal without the control characters a model may emit."""
    need_stdout()
    with named("stdout"):
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()


def say_json(value: Any) -> None:
    """One line of JSON on stdout, in an encoding that lacks a character by JSON's own escapes."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode((sys.stdout and sys.stdout.encoding) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    say(text + "\n")


def flush() -> None:
    """Bring to stdout what is still buffered."""
    if sys.stdout is not None:
        with named("stdout"):
            sys.stdout.flush()


def printable(text: str) -> str:
    r"""``text`` without the characters that move a cursor, change colours or turn text around.

    >>> printable("red\x1b[31m\u202e\n")
    'red[31m\n'
    """
    return "".join(char for char in text if char in "\n\t" or char.isprintable())


def complain(message: str, hint: str = "") -> None:
    """One ``error:`` line on stderr, and one ``hint:`` where there is one."""
    print(f"error: {escaped(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {escaped(hint)}", file=sys.stderr)


def lacking(error: ModuleNotFoundError) -> tuple[str, str]:
    """What to say of a package that this Python does not have, and the hint."""
    hint = "run `make demo` once and then .venv/bin/python, or `pip install .` for this Python"
    return f"the package {error.name} is not installed for {sys.executable}", hint


def escaped(text: str) -> str:
    r"""``text`` on one line of no more than a screen: a file's name may hold a newline, or worse.

    >>> escaped("a\nb")
    'a\\nb'
    """
    return display_name(text, _SCREEN)


def forget_stdout() -> None:
    """Send what is still buffered nowhere: stdout cannot take it, and Python would complain."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
