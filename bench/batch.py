"""Decode throughput by batch size: tokens per second per row and in all, and the bytes held.

    python -m bench.batch --model weights/tiny
    python -m bench.batch --preset 1b --dtype bfloat16 --sizes 1 2 4 8

Every policy has its own rows at every size, with different questions about one picture. They are
prefilled once; each block then goes on with everyone's answers in turn, every other block in
reverse. Only decode steps are timed; prefill is per sequence whatever the batch.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from PIL import Image

from bench import common, subject
from bench.common import interval, paired_ratio, progress, write_report
from bench.subject import QUESTION, THEIRS
from engine.cache.report import allocated_bytes
from engine.engine import Engine
from engine.models.matrix import matrices
from engine.pictures.encoded import EncodedImage
from engine.running.batch import job_of
from engine.running.scheduler import Over

Key = tuple[str, int]  # policy and batch size


@dataclass(frozen=True)
class Plan:
    """What is measured; the first policy and the first size are what others are compared with."""

    policies: Sequence[str]
    sizes: Sequence[int]
    steps: int  # in a block; whole cycles of K = 3
    blocks: int


def main() -> None:
    options = read_options()
    torch.set_num_threads(options.threads)
    folder = subject.checkpoint(options)
    given = {"device": options.device, "dtype": options.dtype, "weights": options.weights}
    engine = Engine.load(folder, offline=True, **given)
    plan = Plan(options.cache, options.sizes, options.tokens, options.blocks)
    rows, notes = throughput(engine, subject.picture(options), plan)
    settings = {
        key: getattr(options, key)
        for key in ("dtype", "weights", "threads", "tokens", "blocks", "device")
    }
    settings |= subject.about(options)
    path = write_report(options.name, settings, rows, notes, options.out)
    print(path.with_suffix(".md").read_text())


def read_options() -> argparse.Namespace:
    parser = common.make_parser(__doc__, name="batch")
    subject.add_arguments(parser)
    parser.add_argument("--cache", action="append", help="policies (default: full, avl)")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--weights", default="auto", help="as Engine.load has it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--tokens", type=int, default=30, help="decode steps: whole cycles of K = 3"
    )
    parser.add_argument("--blocks", type=int, default=5)
    options = common.read_options(parser)
    options.cache = options.cache or ["full", "avl"]
    return options


def throughput(
    engine: Engine,
    image: Image.Image,
    plan: Plan,
    theirs: Mapping[int, Callable[[], float]] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of the table, and notes under it.

    ``theirs`` give transformers' seconds per step by batch size, and are asked in every block.
    """
    encoded = engine.encode(image)
    cells = {
        (spec, size): Cell(engine.with_cache(spec), size, encoded, 2 + plan.blocks * plan.steps)
        for spec in plan.policies
        for size in progress(plan.sizes, f"sizes prefilled, {spec}")
    }
    measured: dict[Key, Callable[[], float]] = {
        key: (lambda cell=cell: cell.go_on(plan.steps)) for key, cell in cells.items()
    }
    measured |= {(THEIRS, size): call for size, call in (theirs or {}).items()}
    steps: dict[Key, list[float]] = {key: [] for key in measured}
    for block in progress(range(plan.blocks), "blocks"):
        for key in list(measured)[:: 1 if block % 2 == 0 else -1]:
            steps[key].append(measured[key]())
    ends = {key: cell.end() for key, cell in cells.items()}
    rows = [row(key, steps, plan) | memory(key, ends, plan) for key in cells]
    rows += [rate((THEIRS, size), steps) for size in theirs or {}]
    return rows, [
        f"Ratios are within blocks. Limit: the bytes that a step reads, weights and attended keys "
        f"and values, against those of {plan.policies[0]}: the ratio if a step were reading alone."
    ]


class Cell:
    """Rows under one policy in the middle of answers of ``tokens``."""

    def __init__(self, engine: Engine, size: int, image: EncodedImage, tokens: int) -> None:
        self.engine, self.size, self.scheduler = engine, size, engine.scheduler(size)
        self.over: list[Over] = []
        for index in range(size):
            request = {
                "prompt": f"{QUESTION} ({index})",
                "images": [image],
                "max_new_tokens": tokens,
                "ignore_eos": True,
            }
            job = self.scheduler.submit(job_of(engine, request))
            self.scheduler.step()
            if job.failed:
                raise job.failed
        self.scheduler.step()  # packs the rows and plans the attention

    def go_on(self, steps: int) -> float:
        """Seconds of one decode step, mean of so many."""
        began = perf_counter()
        for _ in range(steps):
            self.over += [e for e in self.scheduler.step() if isinstance(e, Over)]
        return (perf_counter() - began) / steps

    def end(self) -> dict[str, float]:
        """Bytes that the finished answers held, that a step read, and that are allocated."""
        reports = [event.cache for event in self.over if event.cache]
        attended = sum(report.used_share * report.bytes_full for report in reports)
        return {
            "used": sum(report.bytes_used for report in reports),
            "read": attended + decode_weights(self.engine, self.size),
            "allocated": allocated_bytes(self.scheduler.pools),
        }


def decode_weights(engine: Engine, rows: int) -> int:
    """Bytes of weights that a step over ``rows`` reads; a few rows of the embedding aside."""
    decoder = engine.model.decoder
    vectors = [weight for weight in decoder.layers.parameters() if weight.ndim == 1]
    read = sum(matrix.bytes_read(rows) for matrix in matrices(decoder))
    return read + sum(vector.nbytes for vector in vectors)


def rate(key: Key, steps: Mapping[Key, Sequence[float]]) -> dict[str, Any]:
    """What was measured, by itself."""
    return {
        "policy": key[0],
        "batch": key[1],
        "ms per step": 1e3 * statistics.median(steps[key]),
        "tokens/s per row": statistics.median(1 / step for step in steps[key]),
        "tokens/s in all": statistics.median(key[1] / step for step in steps[key]),
    }


def row(key: Key, steps: Mapping[Key, Sequence[float]], plan: Plan) -> dict[str, Any]:
    """A line of the table: rates, and what they are of others'."""
    spec, size = key
    first, one = (plan.policies[0], size), (spec, plan.sizes[0])
    values = rate(key, steps)
    gain = compared(key, one, steps)
    against = paired_ratio(steps[key], steps[first])
    values |= {f"x batch {one[1]}": gain["ratio"], "95 %": interval(gain)}
    values |= {f"step / {first[0]}": against["ratio"], "95 % ": interval(against)}
    if (THEIRS, size) in steps:
        beside = compared(key, (THEIRS, size), steps)
        values |= {f"x {THEIRS}": beside["ratio"], "95 %  ": interval(beside)}
    return values


def compared(key: Key, other: Key, steps: Mapping[Key, Sequence[float]]) -> dict[str, float]:
    """Tokens per second in all, of those of another."""
    mine, others = ([each[1] / step for step in steps[each]] for each in (key, other))
    return paired_ratio(mine, others)


def memory(key: Key, ends: Mapping[Key, Mapping[str, float]], plan: Plan) -> dict[str, float]:
    """The rest of the line: bytes at the end."""
    mine, first = ends[key], ends[plan.policies[0], key[1]]
    return {
        "limit": mine["read"] / first["read"],
        "KV used MB": mine["used"] / 1e6,
        "KV allocated MB": mine["allocated"] / 1e6,
    }


if __name__ == "__main__":
    main()
