"""Rows under several policies in the middle of answers, taking their decode steps in turn."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from time import perf_counter
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from bench import common
from engine.cache.pool import Pool
from engine.cache.report import CacheReport, report
from engine.cache.row import Row
from engine.models.decoder import Decoder
from engine.models.matrix import matrices
from engine.running.stepping import Stepper, Stepping

SPARE = 4  # steps before those that are measured, and room


class Cell:
    """Rows under one policy; whoever makes one says how rows are filled."""

    def __init__(self, decoder: Decoder, layers: int, rows: int) -> None:
        """``layers`` whose self-attention has pools."""
        self.decoder, self.rows = decoder, rows
        self.pools = [self.pool() for _ in range(layers)]
        # The stepper asks a model for nothing but its decoder.
        model: Any = SimpleNamespace(decoder=decoder)
        self.stepper = Stepper(model, self.pools, Stepping())

    def pool(self) -> Pool:
        """An empty one of a layer."""
        config, weight = self.decoder.config, self.decoder.norm.weight
        return Pool(config.kv_heads, config.head_dim, weight.dtype, weight.device)

    def begin(self, steps: int) -> None:
        """Fill the rows, which have room for so many steps, and take the first of them."""
        for _ in range(self.rows):
            self.stepper.join(self.filled(steps + SPARE))
        self.go_on(2)

    def filled(self, steps: int) -> Row:
        """A row with room for so many steps."""
        raise NotImplementedError

    def read(self, cache: CacheReport) -> float:
        """Bytes of keys and values that a step has read of a row."""
        raise NotImplementedError

    def go_on(self, steps: int) -> float:
        """Seconds of a step, mean of so many."""
        tokens, began = torch.zeros(self.rows, dtype=torch.int64), perf_counter()
        for _ in range(steps):
            logits = self.stepper.step(tokens)
        seconds = (perf_counter() - began) / steps
        assert logits.isfinite().all()
        return seconds

    def end(self) -> tuple[float, CacheReport]:
        """Bytes that a step has read, and what the last row held."""
        reports = [self.report(self.stepper.leave(0)) for _ in range(self.rows)]
        weights = sum(matrix.bytes_read(self.rows) for matrix in matrices(self.decoder))
        return weights + sum(map(self.read, reports)), reports[-1]

    def report(self, row: Row) -> CacheReport:
        """What a row held."""
        return report(row, self.pools)


class Measured(NamedTuple):
    """Of one policy.

    Attributes:
        ms: of a step, median of the blocks.
        ratio, interval: of a step to the first policy's, within blocks.
        limit: the ratio of the bytes that steps read.
        gb: that a step has read.
        cache: what the last row held.
    """

    ms: float
    ratio: float
    interval: str
    limit: float
    gb: float
    cache: CacheReport

    def columns(self) -> dict[str, float]:
        """What a step has read of a picture, and in all."""
        return {
            "picture stored %": round(100 * self.cache.image_stored_share, 1),
            "picture read %": round(100 * self.cache.image_read_share, 1),
            "values read %": round(100 * self.cache.values_read, 1),
            "GB read": round(self.gb, 2),
        }


def measure(cells: Mapping[str, Cell], steps: int, blocks: int) -> dict[str, Measured]:
    """So many blocks of ``steps`` steps of every cell, every other block in reverse order."""
    for cell in cells.values():
        cell.begin(steps * blocks)
    seconds: dict[str, list[float]] = {name: [] for name in cells}
    for block in common.progress(range(blocks), "blocks"):
        for name in list(cells)[:: 1 if block % 2 == 0 else -1]:
            seconds[name].append(cells[name].go_on(steps))
    ends = {name: cell.end() for name, cell in cells.items()}
    first = next(iter(cells))
    measured = {}
    for name, spent in seconds.items():
        ratio, (read, cache) = common.paired_ratio(spent, seconds[first]), ends[name]
        measured[name] = Measured(
            1e3 * statistics.median(spent),
            ratio["ratio"],
            common.interval(ratio),
            read / ends[first][0],
            read / 1e9,
            cache,
        )
    return measured
