"""What is said to the user: answers to stdout, errors to stderr, nothing that a terminal obeys."""

from __future__ import annotations

import errno
import os
import sys

INTERRUPTED = 130  # the exit code after Ctrl-C


def say(text: str) -> None:
    """Write to stdout at once; on a terminal without the control characters a model may emit."""
    if sys.stdout is None:  # started with stdout closed
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), "stdout")
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def flush() -> None:
    """Bring to stdout what is still buffered."""
    if sys.stdout is not None:
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


def escaped(text: str) -> str:
    r"""``text`` on one line: a file's name may hold a newline, or worse.

    >>> escaped("a\nb")
    'a\\nb'
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def forget_stdout() -> None:
    """Send what is still buffered nowhere: stdout cannot take it, and Python would complain."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
