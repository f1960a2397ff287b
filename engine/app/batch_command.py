"""``--batch``: a file of requests answered into another, with a progress bar on stderr."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..files import check_target
from ..pictures.remote import is_address
from ..pictures.video import Video
from .answers import read_answers
from .batch_file import BatchRun
from .inputs import (
    load_engine,
    open_pictures,
    open_videos,
    opener,
    picture_path,
    read_options,
    read_prompt,
)
from .job import Job
from .modes import SHOWN
from .noise import Noise
from .reading import STDIN
from .terminal import complain, say

if TYPE_CHECKING:
    from ..running.batch import Failure

STDOUT = "-"


def answer_file(flags: argparse.Namespace) -> int:
    """Answer all requests; returns the exit code, that of the first request that failed."""
    for name in ("rows", "workers"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise OptionError(f"--{name} is {getattr(flags, name)}", hint="use 1 or more")
    target = _target(flags)
    show_video = partial(Video, max_pixels=flags.max_pixels)
    open_named = opener(flags)
    if flags.ray is not None:
        if target is None:
            raise OptionError("--ray writes its answers to a file", hint="add --output FILE")
        from .spread import cloud_opener

        open_named = cloud_opener(open_named, flags.max_pixels)
    job = Job.read(flags.batch, _defaults(flags), open_named, show_video)
    if target is not None:
        check_target("--output", target, inputs=[flags.batch])
        read_answers(target, len(job), lambda number: {"request": job.digest(number)})
    noise = Noise(flags, open_pictures(flags))
    open_videos(flags)
    if flags.ray is None:
        run = BatchRun(load_engine(flags, noise), job, min(flags.rows, len(job)))
        _answer(run, target, flags.quiet)
    else:
        from .cluster import connected
        from .spread import SpreadRun

        with connected(flags.ray, "data"):
            run = SpreadRun(flags, job)
            _answer(run, target, flags.quiet)
    if target is not None:
        say(f"{target}\n")
    return _report(run.failures, len(job))


def _answer(run: BatchRun, target: Path | None, quiet: bool) -> None:
    """Write or print all answers, with a bar on stderr."""
    from tqdm import tqdm

    hidden = quiet or None  # None: shown on a terminal only
    with tqdm(total=len(run.job), unit="request", disable=hidden) as bar:
        for done in run.to_stdout() if target is None else run.into(target):
            bar.update(done - bar.n)


def _defaults(flags: argparse.Namespace) -> dict[str, Any]:
    """What stands for keys that a request lacks."""
    if STDIN in (flags.prompt, *flags.image):
        raise OptionError("--batch takes no - for --prompt or --image", hint="name a file")
    defaults: dict[str, Any] = {**read_options(flags), "raw": flags.raw}
    if flags.prompt is not None:
        defaults["prompt"] = read_prompt(flags.prompt)
    if flags.system is not None:
        defaults["system"] = flags.system
    if flags.image:
        names = map(picture_path, flags.image)
        defaults["images"] = [name if is_address(name) else os.path.abspath(name) for name in names]
    shown = {key: getattr(flags, key) for key in SHOWN}
    defaults |= {key: value for key, value in shown.items() if value != getattr(Video, key)}
    if flags.video:
        defaults["videos"] = [os.path.abspath(picture_path(name)) for name in flags.video]
    return defaults


def _target(flags: argparse.Namespace) -> Path | None:
    """Where answers go; None is stdout."""
    if flags.output is None and flags.batch != STDIN:
        return Path(flags.batch).with_suffix(".answers.jsonl")
    return None if flags.output in (None, STDOUT) else Path(flags.output)


def _report(failures: list[Failure], requests: int) -> int:
    if not failures:
        return 0
    first, count = min(failures, key=lambda failure: failure.index), len(failures)
    complain(
        f"{count} of {requests} requests failed, the first at index {first.index}: {first.error}",
        hint=f"{first.error.hint}; the same command tries again what failed",
    )
    return first.error.exit_code
