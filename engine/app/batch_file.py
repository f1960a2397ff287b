"""Batch jobs from files: one JSON request a line in, one JSON answer a line out, in order,
resumable.

See ``app.job`` for the requests and ``app.answers`` for the answers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import EngineError
from ..files import write_whole
from .answers import Origin, answer_line, failed, read_answers, refuse_moved, reserved
from .job import Job
from .terminal import say

if TYPE_CHECKING:
    from ..engine import Engine
    from ..result import Result
    from ..running.batch import Failure


def made_by(engine: Engine) -> Origin:
    """What an engine's answers depend on beside their requests."""
    return {"model": engine.fingerprint(), "cache": engine.policy.spec}


class BatchRun:
    """The requests of a job being answered.

    Attributes:
        failures: those of this run, in the order in which they were met.
    """

    def __init__(self, engine: Engine, job: Job, rows: int) -> None:
        self.engine, self.job, self.rows = engine, job, rows
        self.failures: list[Failure] = []

    @functools.cached_property
    def made_by(self) -> Origin:
        """What answers are made by: they are compared by it when a job goes on."""
        return made_by(self.engine)

    def into(self, answers: Path) -> Iterator[int]:
        """Write the answers to a file; yields how many requests have theirs so far.

        Lines that the file already holds are kept, so that a job that was killed goes on where it
        was; requests that failed are tried again.

        Raises OptionError if another process writes to the file, or it belongs to another job.
        """
        with reserved(answers):
            lines = read_answers(answers, len(self.job), self._origin)
            yield from self._try_again(lines)
            if b"".join(lines) != answers.read_bytes():
                write_whole(answers, b"".join(lines))
        done, size = len(lines), sum(map(len, lines))
        with reserved(answers, size) as out, answers.open("rb") as same:
            for line in self._in_order(done):
                out.write(line)
                out.flush()  # a line is on disk before the next one begins
                done, size = done + 1, size + len(line)
                refuse_moved(answers, same, size)
                yield done

    def to_stdout(self) -> Iterator[int]:
        """Print the answers; yields how many there are so far."""
        for done, line in enumerate(self._in_order(0), 1):
            say(line.decode())
            yield done

    def _origin(self, number: int) -> Origin:
        return {"request": self.job.digest(number), **self.made_by}

    def _try_again(self, lines: list[bytes]) -> Iterator[int]:
        """Put new lines in the place of those that say that a request failed."""
        again = [number for number, line in enumerate(lines) if failed(line)]
        done = len(lines) - len(again)
        yield done
        for number, line in self.lines(again):
            lines[number] = line
            done += 1
            yield done

    def _in_order(self, first: int) -> Iterator[bytes]:
        """The lines of the requests from ``first`` on."""
        early: dict[int, bytes] = {}
        for number, line in self.lines(range(first, len(self.job))):
            early[number] = line
            while first in early:
                yield early.pop(first)
                first += 1

    def lines(self, numbers: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """The lines of these requests, as soon as they are there."""
        for result in self._answered(numbers):
            yield result.index, answer_line(result, self._origin(result.index))

    def _answered(self, numbers: Iterable[int]) -> Iterator[Result | Failure]:
        """Results as soon as they are there, their index that in the job."""
        from ..running.batch import Failure

        asked: list[int] = []  # which request of the job the batch's are
        unready: list[Result | Failure] = []

        def requests() -> Iterator[dict[str, object]]:
            for number in numbers:
                try:
                    request = self.job.request(number)
                except EngineError as error:
                    unready.append(Failure(number, error))
                else:
                    asked.append(number)
                    yield request

        for result in self.engine.generate_batch(requests(), self.rows):
            yield from self._noted(unready)
            yield from self._noted([replace(result, index=asked[result.index])])
        yield from self._noted(unready)

    def _noted(self, results: list[Result | Failure]) -> Iterator[Result | Failure]:
        """Hand on results, failures noted, and take them out of their list."""
        from ..running.batch import Failure

        while results:
            result = results.pop(0)
            if isinstance(result, Failure):
                self.failures.append(result)
            yield result
