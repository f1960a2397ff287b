"""The file of answers of a batch job: one line for each request, in order, and what each line was
made from, so that a job that was killed goes on and never over the answers of another one.

An answer's line is the same whenever and in whatever company it is computed: it holds no times. A
request that failed has ``{"index": 7, "error": "...", "hint": "..."}``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import EngineError, OptionError
from ..files import lock

if TYPE_CHECKING:
    from ..result import Result
    from ..running.batch import Failure

# Of a Result: what depends on the request alone, and what is there only where it was asked for.
FIELDS = ("index", "text", "token_ids", "prompt_tokens", "image_tokens", "finish_reason")
ASKED = ("logprobs", "boxes")

# What an answer depends on: the digests of its request and its model, and the cache policy's spec.
Origin = Mapping[str, str]

_BEGIN = "give another --output, or move this file away to begin anew"


def answer_line(result: Result | Failure, origin: Origin) -> bytes:
    """The line of an answer or a failure, with its end."""
    from ..running.batch import Failure  # by now torch is imported, by the engine

    if isinstance(result, Failure):
        record: dict[str, Any] = {"index": result.index, **error_record(result.error)}
    else:
        values = result.as_dict()
        record = {key: values[key] for key in FIELDS}
        record |= {key: values[key] for key in ASKED if values[key]}
    text = json.dumps({**record, "from": dict(origin)}, ensure_ascii=False)
    # A lone surrogate in a message is written as JSON's own escape of it.
    return text.encode("utf-8", "backslashreplace") + b"\n"


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
    lines = _complete_lines(path)
    for number, line in enumerate(lines):
        record = _record(line)
        if number >= requests or record.get("index") != number:
            raise OptionError(f"{path} holds line {number + 1} of another job", hint=_BEGIN)
        if "error" not in record:
            _compare(f"{path} line {number + 1}", record.get("from"), origin(number))
    return lines


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
    with path.open("ab") as file:
        mine = lock(file) and os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        if not mine or size not in (None, os.fstat(file.fileno()).st_size):
            raise OptionError(
                f"another process writes to {path}", hint="wait for it, or give another --output"
            )
        yield file


def _complete_lines(path: Path) -> list[bytes]:
    """The lines of a file, with their ends; OptionError if it ends with what is no answer."""
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OptionError(f"--output {path} cannot be read: {error.strerror}") from error
    if _record(last):
        lines.append(last)
    elif not _begins_answer(last, len(lines)):
        raise OptionError(f"{path} ends with what is no answer", hint=_BEGIN)
    return [line + b"\n" for line in lines]


def _begins_answer(text: bytes, number: int) -> bool:
    """Whether ``text`` may be what was written of line ``number`` when a process was killed."""
    start = f'{{"index": {number}, "'.encode()
    return text.startswith(start) or start.startswith(text)


def _record(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
