"""Texts that are read whole, from a file or from stdin: within a limit, and from no device.

What is no file on a disk is refused unopened: a pipe by name could be waited for without end.
"""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path

from ..errors import OptionError
from ..files import is_regular
from ..naming import display_name

STDIN = "-"
MOST_TEXT = 1_000_000  # bytes of a question; no model's context takes half as much
MOST_REQUESTS = 500_000_000  # bytes of a batch; its lines may hold pictures


def read_whole(name: str, source: str, most: int) -> bytes:
    """What a file holds, or stdin if ``source`` is "-"; ``name`` is what messages call it.

    Raises OptionError if it cannot be read, is no regular file, or has more than ``most`` bytes.
    """
    try:
        if source == STDIN:
            data = sys.stdin.buffer.read(most + 1)
        elif is_regular(source):
            with Path(source).open("rb") as file:
                data = file.read(most + 1)
        else:
            raise OptionError(
                f"{name} is not a regular file", hint="name a file, or send it to stdin (-)"
            )
    except (OSError, ValueError) as error:  # a ValueError is of a name that none can have
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"{name} cannot be read: {reason}", hint=_hint(source)) from None
    if len(data) > most:
        raise OptionError(f"{name} has more than {most:,} bytes", hint="give less at once")
    return data


def read_text(name: str, source: str) -> str:
    """A question from a file or stdin, its line ends as Python has them."""
    try:
        text = read_whole(name, source, MOST_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{name} cannot be read as text ({error})", hint="save it in UTF-8"
        ) from None
    return io.StringIO(text, newline=None).read()


def word_of(name: str, word: str) -> str:
    """A word of the command line as a text: it is UTF-8, whatever the locale takes it for."""
    try:
        return os.fsencode(word).decode()
    except UnicodeEncodeError:  # a program's word: no bytes of a shell's
        return word
    except UnicodeDecodeError:
        raise OptionError(
            f"{name} holds bytes that are not UTF-8", hint="write it in UTF-8"
        ) from None


def check_text(name: str, text: str) -> None:
    """Refuse a text that holds bytes which are no UTF-8."""
    if re.search("[\udc80-\udcff]", text):
        raise OptionError(f"{name} holds bytes that are not UTF-8", hint="write it in UTF-8")


def _hint(source: str) -> str:
    if source == STDIN:
        return "send a text in UTF-8"
    return f"check the path {display_name(source)}"
