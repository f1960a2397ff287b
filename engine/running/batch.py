"""Many requests at once: a finished one's place goes to the next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import EngineError, OptionError
from ..naming import told
from ..options import OptionValues, as_number, is_iterable, make_options
from ..pictures.encoded import Picture, listed
from ..prompts.messages import Messages
from ..result import Result
from .asked import Asked
from .generation import result_of
from .scheduler import Event, Job, Over
from .videos import VideoSource, listed_videos


@dataclass(frozen=True)
class Request:
    """One question of a batch: the arguments of ``Engine.generate``."""

    prompt: Messages
    images: Sequence[Picture] = ()
    raw: bool = False
    options: OptionValues = field(default_factory=OptionValues)
    videos: Sequence[VideoSource] = ()

    @classmethod
    def parse(cls, value: Request | Mapping[str, Any]) -> Request:
        """A request from a mapping {prompt, images, videos, raw, max_new_tokens, ...}.

        Raises OptionError naming what is missing or unknown.
        """
        if isinstance(value, Request):
            return value
        if not isinstance(value, Mapping):
            raise OptionError(
                f"a request is {type(value).__name__}", hint='write {"prompt": "...", "images": []}'
            )
        rest = dict(value)
        if "prompt" not in rest:
            raise OptionError("a request has no prompt", hint='add "prompt": "..."')
        prompt, images = rest.pop("prompt"), rest.pop("images", ())
        raw, videos = rest.pop("raw", False), listed_videos(rest.pop("videos", ()))
        unknown = rest.keys() - OptionValues.__annotations__.keys()
        if unknown:
            known = ", ".join(["prompt", "images", "videos", "raw", *OptionValues.__annotations__])
            raise OptionError(
                f"a request has unknown keys: {', '.join(sorted(unknown))}", hint=f"known: {known}"
            )
        options = OptionValues(**rest)  # type: ignore[typeddict-item]
        return cls(prompt, listed(images), raw, options, videos)


@dataclass(frozen=True)
class Failure:
    """A request that could not be answered; the others go on."""

    index: int
    error: EngineError


def _failure(error: Exception) -> EngineError:
    """What a request failed of, in our words where they are known."""
    if isinstance(error, EngineError):
        return error
    reason = (str(error).splitlines() or [""])[0][:200]
    return EngineError(f"unexpected {type(error).__name__}: {reason}")


def generate_batch(
    engine: Asked, requests: Iterable[Request | Mapping[str, Any]], rows: int = 8
) -> Iterator[Result | Failure]:
    """Answer ``requests``, ``rows`` at a time; yields each result as soon as it is done.

    ``Result.index`` and ``Failure.index`` say which request it belongs to, counted from 0.

    Raises CapacityError if memory runs out while the rows are decoded: none of them can go on.
    """
    if as_number("rows", rows, int) < 1:
        raise OptionError(f"rows is {rows}", hint="use 1 or more")
    if not is_iterable(requests):
        raise OptionError(f"requests are {told(requests)}", hint='write [{"prompt": "..."}]')
    scheduler, numbers = engine.scheduler(rows), dict[Job, int]()
    for index, request in enumerate(requests):
        try:
            numbers[scheduler.submit(job_of(engine, request))] = index
        except Exception as error:
            yield Failure(index, _failure(error))
        while not scheduler.places:
            yield from _results(scheduler.step(), numbers)
    while not scheduler.idle:
        yield from _results(scheduler.step(), numbers)


def job_of(engine: Asked, value: Request | Mapping[str, Any]) -> Job:
    """A request's job; raises what is wrong with it."""
    request = Request.parse(value)
    options = make_options(**request.options)
    prompt, images = engine.with_videos(
        request.prompt, request.images, request.videos, raw=request.raw
    )
    return engine.job(prompt, images, options, raw=request.raw)


def _results(events: Iterable[Event], numbers: dict[Job, int]) -> Iterator[Result | Failure]:
    """What of the events is the end of a request."""
    for event in events:
        if not isinstance(event, Over):
            continue
        index, failed = numbers.pop(event.job), event.job.failed
        yield Failure(index, _failure(failed)) if failed else replace(result_of(event), index=index)
