"""What it costs rows that are being decoded when another joins them, or one of them leaves.

    python -m bench.joining --model weights/tiny

A row joins ``--rows`` others in the middle of their answers: the time until all have their next
token, less what reading its prompt takes alone, is what joining costs them, beside the step that
they would have taken anyway. Then it leaves again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from PIL import Image

from bench import common, subject
from bench.common import progress, write_report
from bench.subject import QUESTION
from engine.engine import Engine
from engine.pictures.encoded import EncodedImage
from engine.running.batch import job_of
from engine.running.scheduler import Job, Scheduler

BUDGET = 1 << 30  # bytes of cache: pools that never grow while it is measured
LONG = 4000  # tokens of an answer that goes on through all of it


def main() -> None:
    parser = common.make_parser(__doc__, name="joining")
    subject.add_arguments(parser)
    parser.add_argument("--cache", action="append", help="policies (default: full, avl)")
    parser.add_argument("--rows", type=int, default=15)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    options = common.read_options(parser)
    torch.set_num_threads(options.threads)
    folder = subject.checkpoint(options)
    engine = Engine.load(folder, device="cpu", dtype=options.dtype, offline=True)
    image, rows = subject.picture(options), []
    for spec in options.cache or ["full", "avl"]:
        rows.append({"policy": spec} | measured(engine.with_cache(spec), image, options))
    settings = {key: getattr(options, key) for key in ("rows", "dtype", "threads", "rounds")}
    path = write_report(options.name, settings | subject.about(options), rows, [], options.out)
    print(path.with_suffix(".md").read_text())


def measured(engine: Engine, image: Image.Image, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds, in ms; ``joining / step`` is what the others pay, in steps."""
    scheduler, encoded = engine.scheduler(options.rows + 1, BUDGET), engine.encode(image)
    context = engine.model.decoder.config.context
    tokens = min(LONG, context - 200 - encoded.features.shape[0])
    for number in range(options.rows):
        submitted(engine, scheduler, encoded, f"{QUESTION} ({number})", tokens)
    found: dict[str, list[float]] = {}
    for number in progress(range(options.rounds + 2), engine.policy.name):
        times = one_round(engine, scheduler, encoded, f"{QUESTION} (and {number})")
        if number >= 2:  # the first two plan and record what all others repeat
            for name, seconds in times.items():
                found.setdefault(name, []).append(1e3 * seconds)
    medians = {name: statistics.median(times) for name, times in found.items()}
    return medians | {"joining / step": medians["joining ms"] / medians["step ms"]}


def one_round(
    engine: Engine, scheduler: Scheduler, image: EncodedImage, prompt: str
) -> dict[str, float]:
    """Seconds of a step, of reading the prompt alone, and of what joining and leaving add."""
    with timed() as step:
        for _ in range(3):  # a whole cycle of K = 3
            scheduler.step()
    alone = engine.scheduler(1, BUDGET // 16)
    with timed() as reading:
        submitted(engine, alone, image, prompt, 9)
    with timed() as joined:
        job = submitted(engine, scheduler, image, prompt, 9)
        scheduler.step()
    for _ in range(2):
        scheduler.step()
    with timed() as left:
        scheduler.cancel(job)
    return {
        "step ms": step[0] / 3,
        "prompt ms": reading[0],
        "joining ms": joined[0] - reading[0] - step[0] / 3,
        "leaving ms": left[0],
    }


@contextmanager
def timed() -> Iterator[list[float]]:
    """A block and, in the end, its seconds."""
    seconds: list[float] = []
    began = perf_counter()
    yield seconds
    seconds.append(perf_counter() - began)


def submitted(
    engine: Engine, scheduler: Scheduler, image: EncodedImage, prompt: str, tokens: int
) -> Job:
    """A job whose prompt has been read."""
    asked = {"prompt": prompt, "images": [image], "max_new_tokens": tokens, "ignore_eos": True}
    job = scheduler.submit(job_of(engine, asked))
    scheduler.step()
    if job.failed:
        raise job.failed
    return job


if __name__ == "__main__":
    main()
