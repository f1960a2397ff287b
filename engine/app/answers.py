"""The file of answers of a batch job: one line for each request, in order, and what each line was
made from, so that a job that was killed goes on and never over the answers of another one.

An answer's line is the same whenever and in whatever company it is computed: it holds no times. It
begins with its index and with what it was made from, by which a torn one is known as well. A
request that failed has ``{"index": 7, "from": {...}, "error": "...", "hint": "..."}``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import EngineError, OptionError
from ..files import free_name, lock, named, write_whole

if TYPE_CHECKING:
    from ..result import Result
    from ..running.batch import Failure

# Of a Result: what depends on the request alone, and what is there only where it was asked for.
FIELDS = ("text", "token_ids", "prompt_tokens", "image_tokens", "finish_reason")
ASKED = ("logprobs", "top_logprobs", "boxes")

# What an answer depends on: the digests of its request and its model, and the cache policy's spec.
Origin = Mapping[str, str]

_BEGIN = "give another --output, or move this file away to begin anew"


def answer_line(result: Result | Failure, origin: Origin) -> bytes:
    """The line of an answer or a failure, with its end."""
    from ..running.batch import Failure  # by now torch is imported, by the engine

    if isinstance(result, Failure):
        record: dict[str, Any] = error_record(result.error)
    else:
        values = result.as_dict()
        record = {key: values[key] for key in FIELDS}
        record |= {key: values[key] for key in ASKED if values[key]}
    text = json.dumps(_start(result.index, origin) | record, ensure_ascii=False)
    # A lone surrogate in a message is written as JSON's own escape of it.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _start(index: int, origin: Origin) -> dict[str, Any]:
    """What every line begins with."""
    return {"index": index, "from": dict(origin)}


def error_record(error: EngineError) -> dict[str, str]:
    """An error as JSON values."""
    return {"error": str(error), "hint": error.hint}


def failed(line: bytes) -> bool:
    """Whether a line says that its request failed."""
    return "error" in _record(line)


def read_answers(path: Path, requests: int, origin: Callable[[int], Origin]) -> list[bytes]:
    """The complete lines of a file of answers; what a killed process left of a last line is none.

    Raises OptionError, naming what differs, for all that is not of this job: more lines than
    ``requests``, and answers that were not made from ``origin(number)``.
    """
    *lines, last = _content(path).split(b"\n")
    if _record(last):
        lines.append(last)
        last = b""
    for number, line in enumerate(lines):
        record = _record(line)
        if number >= requests or record.get("index") != number:
            raise OptionError(f"{path} holds line {number + 1} of another job", hint=_BEGIN)
        wanted = {} if "error" in record else origin(number)  # a request that failed may be mended
        _compare(f"{path} line {number + 1}", record.get("from"), wanted)
    number = len(lines)
    if last and not (number < requests and _is_torn(last, number, origin(number))):
        raise OptionError(f"{path} ends with what is no answer", hint=_BEGIN)
    return [line + b"\n" for line in lines]


def _compare(place: str, found: object, expected: Origin) -> None:
    """Refuse an answer that a run of now would not give."""
    if not isinstance(found, dict):
        raise OptionError(f"{place} does not say what it was made from", hint=_BEGIN)
    differing = [key for key, value in expected.items() if found.get(key) != value]
    if differing:
        which = f": {found.get('cache')}" if differing == ["cache"] else ""
        raise OptionError(
            f"{place} was made from another {' and '.join(differing)}{which}", hint=_BEGIN
        )


@contextmanager
def reserved(path: Path, size: int | None = None) -> Iterator[IO[bytes]]:
    """The file, open to be added to, and reserved for this process.

    Raises OptionError if another process has it, or it has not ``size`` bytes (None: any).
    """
    with named(str(path)), path.open("ab") as file:  # closing it may fail as well
        mine = lock(file) and os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        if not mine or size not in (None, os.fstat(file.fileno()).st_size):
            raise OptionError(
                f"another process writes to {path}", hint="wait for it, or give another --output"
            )
        yield file


def refuse_moved(path: Path, file: IO[bytes], size: int) -> None:
    """Raise OptionError unless ``path`` still is the open ``file`` of ``size`` bytes.

    Where it was removed or replaced, its folder perhaps as well, what was answered is written anew:
    to its name if that is free, else beside it.
    """
    with suppress(FileNotFoundError):
        now = os.stat(path)
        if os.path.samestat(now, os.fstat(file.fileno())):
            if now.st_size == size:
                return
            raise OptionError(
                f"another process writes to {path}", hint="wait for it, or give another --output"
            )
    if not path.parent.exists() and os.fstat(file.fileno()).st_nlink:  # it is whole, in there
        raise OptionError(
            f"the folder of {path} was renamed while answers were written to it",
            hint="what there is of them is in it: with its new name the same command goes on",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    there = free_name(path) if path.exists() else path
    file.seek(0)
    write_whole(there, file.read())
    raise OptionError(
        f"{path} was removed or replaced while answers were written to it",
        hint=f"those that there were are in {there}: the same command with it goes on",
    )


def _content(path: Path) -> bytes:
    """What a file of answers holds; nothing if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise OptionError(f"--output {path} cannot be read: {error.strerror}") from error


def _is_torn(text: bytes, number: int, origin: Origin) -> bool:
    """Whether ``text`` may be what was written of line ``number`` when a process was killed.

    An ``origin`` of fewer keys than a line has is its beginning.
    """
    start = json.dumps(_start(number, origin), ensure_ascii=False).removesuffix("}}")
    written = start.encode("utf-8", "backslashreplace")
    return text.startswith(written) or written.startswith(text)


def _record(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
