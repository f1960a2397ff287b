"""Batch jobs from files: one JSON request a line in, one JSON answer a line out, in order,
resumable.

A request line holds the arguments of ``Engine.generate``:
``{"prompt": "What is it?", "images": ["a.jpg"], "max_new_tokens": 64}``. Its answer line is the
same whenever and in whatever company it is computed: it holds no times. A bad request becomes
``{"index": 7, "error": "...", "hint": "..."}``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from engine.errors import EngineError, OptionError

if TYPE_CHECKING:
    from engine.batch import Failure
    from engine.engine import Engine
    from engine.result import Result

# Of a Result: what depends on the request alone.
FIELDS = ("index", "text", "token_ids", "prompt_tokens", "image_tokens", "finish_reason")


def run_batch(engine: Engine, requests: Path, answers: Path, rows: int) -> Iterator[int]:
    """Answer the lines of ``requests`` into ``answers``; yields how many lines are complete so far.

    Complete lines that ``answers`` already holds are kept, so that a job that was killed goes on
    where it was; a last line without its end is computed again.

    Raises OptionError if ``requests`` cannot be read or ``answers`` belongs to another job.
    """
    done = skipped = _resume(answers, count_lines(requests))
    early: dict[int, str] = {}
    # A lone surrogate in a message is written as JSON's own escape of it.
    with open(answers, "a", encoding="utf-8", errors="backslashreplace") as out:
        results = engine.generate_batch(_read(requests, skip=skipped), rows)
        yield done
        for result in results:
            early[result.index + skipped] = _line(result, result.index + skipped)
            while done in early:
                _write(out, early.pop(done))
                done += 1
            yield done


def check_job(requests: Path, answers: Path, rows: int) -> int:
    """Refuse before a model is loaded what cannot work; returns how many requests there are.

    Raises OptionError as ``run_batch`` does, and for a number of rows or a folder that cannot be.
    """
    if rows < 1:
        raise OptionError(f"--rows is {rows}", hint="use 1 or more")
    total = count_lines(requests)
    if not answers.parent.is_dir():
        raise OptionError(f"--output {answers}: no folder {answers.parent}")
    _complete_lines(answers, total)
    return total


def count_lines(path: Path) -> int:
    """Requests in a file, blank lines not counted."""
    try:
        with open(path, encoding="utf-8") as file:
            return sum(1 for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--batch {path} cannot be read: {error}") from error


def _read(path: Path, skip: int) -> Iterator[Any]:
    """Requests from line ``skip`` on; a line that is no JSON comes as its text, to be refused."""
    with open(path, encoding="utf-8") as file:
        lines = [line for line in file if line.strip()]
    for line in lines[skip:]:
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            yield line


def _resume(answers: Path, requests: int) -> int:
    """Complete lines in ``answers``; what follows them is cut off."""
    lines = _complete_lines(answers, requests)
    if answers.exists():
        os.truncate(answers, sum(map(len, lines)))
    return len(lines)


def _complete_lines(answers: Path, requests: int) -> list[bytes]:
    """The lines of ``answers`` that have their end; OptionError if they are of another job."""
    try:
        data = answers.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OptionError(f"--output {answers} cannot be read: {error.strerror}") from error
    lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
    for number, line in enumerate(lines):
        if number >= requests or _index(line) != number:
            raise OptionError(
                f"{answers} holds line {number + 1} of another job", hint="give another --output"
            )
    return lines


def _index(line: bytes) -> int | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value.get("index") if isinstance(value, dict) else None


def _line(result: Result | Failure, index: int) -> str:
    from engine.batch import Failure  # by now torch is imported, by the engine

    if isinstance(result, Failure):
        return json.dumps({"index": index, **error_record(result.error)}, ensure_ascii=False)
    values = {**result.as_dict(), "index": index}
    return json.dumps({key: values[key] for key in FIELDS}, ensure_ascii=False)


def error_record(error: EngineError) -> dict[str, str]:
    """An error as JSON values."""
    return {"error": str(error), "hint": error.hint}


def _write(out: IO[str], line: str) -> None:
    """A line is on disk before the next one begins."""
    out.write(line + "\n")
    out.flush()
