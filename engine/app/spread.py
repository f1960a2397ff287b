"""A batch job over the processes and machines of a Ray cluster; see docs/scale.md.

The job file and the answer file are those of ``--batch``. Requests go to workers by their numbers,
a few at a time; a worker is a process with an engine of its own. One that dies is replaced and its
requests are asked again; a request that takes every worker with it is an answer with an error.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from typing import Any

from ..errors import (
    CapacityError,
    CheckpointError,
    EngineError,
    ImageError,
    OptionError,
)
from ..naming import display_name
from ..pictures.image import LoadedImage, open_image
from .answers import Origin, answer_line
from .batch_file import BatchRun, made_by
from .cluster import shares
from .inputs import engine_of
from .job import Job, is_cloud

BATCHES = 8  # that a worker is given at least, so that none waits long for the last one
RETRIES = 2  # of requests whose worker died, before each is asked by itself
MOST_BYTES = 1 << 28  # of a picture in a cloud

Line = tuple[int, bytes, int]  # a request's number, its answer's line, and the exit code it means


class Worker:
    """One engine in a process of its own, which answers requests of a job by number."""

    def __init__(self, flags: argparse.Namespace, job: Job) -> None:
        self._run = BatchRun(engine_of(flags), job, flags.rows)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Ray's form of so many rows: columns."""
        self._run.failures.clear()
        lines = list(self._run.lines(map(int, batch["number"])))
        codes = {each.index: each.error.exit_code for each in self._run.failures}
        return {
            "number": [number for number, _ in lines],
            "line": [line for _, line in lines],
            "code": [codes.get(number, 0) for number, _ in lines],
        }


def made_elsewhere(flags: argparse.Namespace) -> Origin:
    """What answers will be made by, as a worker finds it."""
    return made_by(engine_of(flags))


class SpreadRun(BatchRun):
    """The requests of a job being answered by the workers of the cluster that is connected."""

    worker: type[Worker] = Worker

    def __init__(self, flags: argparse.Namespace, job: Job) -> None:
        self.job, self.failures, self._flags = job, [], flags
        self._workers, self._each = shares(flags, flags.workers)

    @functools.cached_property
    def made_by(self) -> Origin:
        """See ``BatchRun``: a worker is asked, where there are answers to compare."""
        import ray

        asked = ray.remote(**self._each)(made_elsewhere)
        found: Origin = _own(lambda: ray.get(asked.remote(self._flags)))
        return found

    def lines(self, numbers: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """See ``BatchRun``."""
        left = sorted(numbers)
        share = math.ceil(len(left) / (BATCHES * self._workers))
        for size in (min(max(1, share), 16 * self._flags.rows), 1):
            answered = set()
            for number, line, code in _own_each(self._spread(left, size)):
                answered.add(number)
                self._note(number, line, code)
                yield number, line
            left = [number for number in left if number not in answered]
        for number in left:
            yield number, self._given_up(number)

    def _given_up(self, number: int) -> bytes:
        from ..running.batch import Failure

        error = EngineError("every worker that was asked this died", hint="try it by itself")
        self.failures.append(Failure(number, error))
        return answer_line(self.failures[-1], self._origin(number))

    def _spread(self, numbers: Sequence[int], size: int) -> Iterator[Line]:
        """Answers in the order in which workers give them; those of workers that died are left
        out.
        """
        import ray

        if not numbers:
            return
        batches = math.ceil(len(numbers) / size)
        context = ray.data.DataContext.get_current()
        context.max_errored_blocks, context.enable_progress_bars = -1, False
        rows = ray.data.from_items(
            [{"number": number} for number in numbers],
            override_num_blocks=batches,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # how often to retry has no other name yet
            answered = rows.map_batches(
                self.worker,
                fn_constructor_args=(self._flags, self.job),
                batch_size=size,
                compute=ray.data.ActorPoolStrategy(size=min(self._workers, batches)),
                ray_remote_args_fn=lambda: {"max_restarts": -1, "max_task_retries": RETRIES},
                **self._each,
            )
        for row in answered.iter_rows():
            yield int(row["number"]), bytes(row["line"]), int(row["code"])

    def _note(self, number: int, line: bytes, code: int) -> None:
        from ..running.batch import Failure

        if code:
            self.failures.append(Failure(number, error_of(line, code)))


def error_of(line: bytes, code: int) -> EngineError:
    """The error that an answer's line tells of."""
    said = json.loads(line)
    kinds = (OptionError, ImageError, CheckpointError, CapacityError)
    kind = next((kind for kind in kinds if kind.exit_code == code), EngineError)
    return kind(said["error"], hint=said["hint"])


def cloud_opener(
    open_named: Callable[[str], LoadedImage], max_pixels: int
) -> Callable[[str], LoadedImage]:
    """How a picture is opened that may lie in a cloud (``s3://``, ``gs://``, ...): by fsspec, with
    what it needs for the kind of cloud installed on every machine.
    """

    def opened(name: str) -> LoadedImage:
        if not is_cloud(name):
            return open_named(name)
        import fsspec

        try:
            with fsspec.open(name, "rb") as file:
                data = file.read(MOST_BYTES)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0][:100]
            raise ImageError(f"{display_name(name)} cannot be read: {reason}") from None
        return open_image(BytesIO(data), max_pixels, name=display_name(name))

    return opened


def _own(work: Callable[[], Any]) -> Any:
    """What ``work`` comes to; an error of ours that a worker met is that error again."""
    import ray

    try:
        return work()
    except ray.exceptions.RayError as error:
        raise _ours(error) from None


def _own_each(lines: Iterator[Line]) -> Iterator[Line]:
    """The same of what is gone through."""
    end: Any = object()
    while (line := _own(lambda: next(lines, end))) is not end:
        yield line


def _ours(error: Exception) -> EngineError:
    cause = getattr(error, "cause", None)
    if isinstance(cause, EngineError):
        return cause
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
    return EngineError(f"a worker failed: {reason}", hint="run one request without --ray")
