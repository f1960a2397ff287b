"""Lines that are typed: edited, completed and remembered on a terminal, or read from a pipe.

On a terminal the standard library's readline edits the line, remembers what was typed and takes a
paste of many lines as one question. Between two lines of \"\"\" a question may have many lines
anywhere.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..errors import OptionError
from .reading import MOST_TEXT
from .words import ends_like_picture

FENCE = '"""'

_TAKE_PATHS = ("/image", "/save")


def read_lines(commands: Sequence[str] = ()) -> Iterator[str]:
    """The lines of stdin until its end; what stands between two lines of \"\"\" comes as one.

    On a terminal the tabulator completes ``commands``, and paths behind them.
    """
    lines = _typed_lines(commands) if sys.stdin.isatty() else _piped_lines()
    for line in lines:
        if line.strip() != FENCE:
            yield line
            continue
        block: list[str] = []
        for inner in lines:
            if inner.strip() == FENCE:
                break
            block.append(inner)
        yield "\n".join(block)


def _piped_lines() -> Iterator[str]:
    try:
        while line := sys.stdin.readline(MOST_TEXT + 1):
            if len(line) > MOST_TEXT:
                raise OptionError(
                    f"a line of stdin has more than {MOST_TEXT:,} characters",
                    hint="give less at once",
                )
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise OptionError(f"stdin is not text: {error}", hint="give questions in UTF-8") from None


def _typed_lines(commands: Sequence[str]) -> Iterator[str]:
    """Lines typed at a prompt. Ctrl-C drops the line; a second one at once leaves."""
    with _editing(commands):
        dropped = False
        while True:
            try:
                yield input("> " if sys.stdout.isatty() else "")
                dropped = False
            except EOFError:
                return
            except KeyboardInterrupt:
                if dropped:
                    raise
                dropped = True
                print("\n(Ctrl-C again or /exit leaves)", file=sys.stderr)


@contextmanager
def _editing(commands: Sequence[str]) -> Iterator[None]:
    """Line editing, and what was typed in earlier conversations, readable by the user alone."""
    try:
        import readline
    except ImportError:  # a Python without it: plain lines
        yield
        return
    readline.parse_and_bind("set enable-bracketed-paste on")
    readline.parse_and_bind("tab: complete")
    readline.set_completer_delims("")  # a path may hold any character: lines are completed whole
    readline.set_completer(
        lambda line, number: next(iter(completions(line, commands)[number:]), None)
    )
    readline.set_history_length(1000)
    path = _history_file()
    with suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)


def _history_file() -> Path:
    """Where typed lines are remembered; nowhere for a user without a home."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state if os.path.isabs(state) else os.devnull) / "avl-engine" / "history"


def completions(line: str, commands: Sequence[str]) -> list[str]:
    """What a line may go on to: a command, or a path behind one that takes a path."""
    command, space, rest = line.partition(" ")
    if not space:
        return [each for each in commands if line and each.startswith(line)]
    if command not in _TAKE_PATHS:
        return []
    found = sorted(glob.glob(glob.escape(os.path.expanduser(rest)) + "*"))
    return [f"{command} {path}{'/' if os.path.isdir(path) else ''}" for path in found]


def typed_paths(text: str) -> list[str]:
    """The paths of a line, as they are typed or as a terminal spells files dropped on it.

    Quotes, backslashes, ``~`` and ``file://`` are understood; a text that names a file as it
    stands is that file.

    >>> typed_paths("'/tmp/my car.jpg' file:///tmp/a%20b.png")
    ['/tmp/my car.jpg', '/tmp/a b.png']
    """
    if os.path.exists(text):
        return [text]
    try:
        words = shlex.split(text)
    except ValueError:  # a quote without its end
        words = [text]
    paths = [os.path.expanduser(_local(word)) for word in words]
    # Spaces are often left bare: then the line is one path, unless a word is a file.
    bare = len(paths) > 1 and not any(char in text for char in "'\"\\")
    return [os.path.expanduser(text)] if bare and not any(map(os.path.exists, paths)) else paths


def is_dropped(line: str) -> bool:
    """Whether a line is nothing but pictures, as a terminal spells files dropped on it.

    Those are files with a picture's ending or a complete path, and words that end like a picture's
    name, alone or beside a file, which are mistyped ones: no question is such a word.

    >>> is_dropped("'/tmp/my car.jpg'"), is_dropped("what is in car.jpg")
    (True, False)
    """
    text = line.strip()
    paths = typed_paths(text) if text else []
    sure = " " not in text or re.match(r"['\"~]|/\S*/|file://", text, re.I)
    return any(sure or os.path.isfile(path) for path in paths) and all(
        ends_like_picture(path) or (os.path.isabs(path) and os.path.isfile(path)) for path in paths
    )


def _local(word: str) -> str:
    """The path that a file: URL of this machine stands for."""
    url = urlsplit(word) if word.lower().startswith("file://") else None
    return unquote(url.path) if url and url.netloc in ("", "localhost") else word
