"""What a GPU benchmark is made of: cells, each with its predicted rows and how it is measured.

Predictions (``bench.predict``) need no device. A cell's rows are measured together, interleaved,
so that a ratio within it is paired; every row has the same columns.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from bench import predict
from bench.common import paired_ratio, summary
from bench.device_weights import DecoderOnly, seeded_model
from bench.gpu_steps import Rows, start, switched
from bench.gpu_timing import Call, forget_peak, interleaved, laps, peak_bytes
from bench.predict import GB, MS, US, Prompt, Shape, Way

COLUMNS = (
    *("cell", "what", "unit", "predicted", "measured", "p10-p90", "predicted ratio", "ratio"),
    *("95 %", "goal", "floor", "GB read", "of read peak", "notes", "failed"),
)
Row = dict[str, Any]


@dataclass
class Device:
    """Where cells are measured; ``read_peak`` in bytes per second."""

    device: torch.device
    dtype: torch.dtype
    read_peak: float

    def __post_init__(self) -> None:
        self.model = functools.cache(self._model)

    def _model(self, shape: Shape) -> DecoderOnly:
        return seeded_model(shape, self.device, self.dtype)

    def tidy(self) -> None:
        """Give back what no cell holds any more."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def free_bytes(self) -> float:
        """What can still be allocated."""
        self.tidy()
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 1e18


class Cell(Protocol):
    """Some rows of a table that are measured at once; ``key`` names them, alone in its part."""

    @property
    def key(self) -> str:
        """Its name."""

    def predicted(self) -> list[Row]:
        """The rows as far as they can be known without measuring."""

    def measured(self, on: Device) -> list[Row]:
        """What was measured, for the same rows."""


def complete(cell: Cell, rows: Iterable[Row]) -> list[Row]:
    """The rows with every column."""
    return [dict.fromkeys(COLUMNS) | {"cell": cell.key} | row for row in rows]


def merged(cell: Cell, on: Device) -> list[Row]:
    """Measure a cell: its rows, predicted and measured."""
    pairs = zip(cell.predicted(), cell.measured(on), strict=True)
    return complete(cell, [guess | found for guess, found in pairs])


def compared(mine: Sequence[float], base: Sequence[float] | None, unit: float) -> Row:
    """Columns of some seconds, shown in ``unit``; without a base they are the base."""
    spread = summary([seconds / unit for seconds in mine])
    row = {"measured": spread["median"], "p10-p90": f"{spread['p10']:.4g}-{spread['p90']:.4g}"}
    if base is None:
        return row
    pair = paired_ratio(mine, base)
    return row | {"ratio": pair["ratio"], "95 %": f"{pair['low']:.3g}-{pair['high']:.3g}"}


# -- decode steps ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounds:
    """How a step is sampled: blocks of whole K-cycles, the first ones thrown away."""

    blocks: int = 10
    warmup: int = 2
    steps: int = 30

    @property
    def total(self) -> int:
        """Steps that a contestant makes."""
        return self.steps * (self.warmup + self.blocks)

    @property
    def middle(self) -> float:
        """Tokens that are there when half of the measured steps are made."""
        return self.steps * (self.warmup + self.blocks / 2)


@dataclass(frozen=True)
class StepCell:
    """Decode steps of some contestants on one set of weights; ratios are to the first one.

    With ``per_token`` time is counted per token of the whole batch: rows may differ in number.
    """

    shape: Shape
    prompt: Prompt
    ways: tuple[Way, ...]
    rounds: Rounds
    goal: float | None = None
    per_token: bool = False

    @property
    def key(self) -> str:
        """See ``Cell.key``."""
        batches = {way.batch for way in self.ways}
        rows = f"batch {batches.pop()}" if len(batches) == 1 else "as many rows as fit"
        names = " beside ".join(way.label for way in self.ways)
        return f"{self.shape.name}, {self.prompt.image} image tokens, {rows}: {names}"

    def predicted(self) -> list[Row]:
        """See ``Cell.predicted``."""
        base = self._predicted(self.ways[0])
        return [self._guess(way, self._predicted(way), base) for way in self.ways]

    def _predicted(self, way: Way) -> float:
        spent = predict.step(self.shape, way, self.prompt, self.rounds.middle)
        return spent / self._count(way)

    def _count(self, way: Way) -> int:
        return way.batch if self.per_token else 1

    def _guess(self, way: Way, spent: float, base: float) -> Row:
        read = predict.step_bytes(self.shape, way, self.prompt, self.rounds.middle)
        first = way == self.ways[0]
        return {
            "what": f"{way.batch} x {way.label}" if self.per_token else way.label,
            "unit": "ms per token" if self.per_token else "ms per step",
            "predicted": spent / MS,
            "predicted ratio": None if first else spent / base,
            "goal": None if first else self.goal,
            "floor": read / predict.READ_PEAK / self._count(way) / MS,
            "GB read": read / GB,
        }

    def measured(self, on: Device) -> list[Row]:
        """See ``Cell.measured``."""
        samples: dict[Way, Sample] = {}
        on.model(self.shape)  # takes its memory before the rest is shared out
        together = sum(map(self._bytes, self.ways)) < on.free_bytes()
        for group in [self.ways] if together else [(way,) for way in self.ways]:
            samples |= self._sampled(group, on)
            on.tidy()
        first = samples[self.ways[0]]
        return [self._found(way, samples[way], first, on, together) for way in self.ways]

    def _bytes(self, way: Way) -> float:
        """What a contestant needs beside the weights, with room for growing and for the prefill."""
        kv = way.batch * predict.held(way.policy, self.prompt)
        at_once = way.batch if way.side != "ours" else 1
        scratch = at_once * self.prompt.read * 2 * (3 * self.shape.mlp + 6 * self.shape.hidden)
        return 1.05 * kv * self.shape.layers * self.shape.layer_kv + scratch + GB

    def _sampled(self, ways: Sequence[Way], on: Device) -> dict[Way, Sample]:
        model, rounds = on.model(self.shape), self.rounds
        samples = {way: Sample(forget_peak(on.device)) for way in ways}
        rows = {way: self._started(model, way, samples[way]) for way in ways}
        for block in range(-rounds.warmup, rounds.blocks):
            done = (block + rounds.warmup) * rounds.steps
            for way in ways if block % 2 == 0 else ways[::-1]:
                with switched(way):
                    spent = laps(lambda i: rows[way].step(done + i), rounds.steps, on.device)  # noqa: B023
                if block >= 0:
                    samples[way].blocks.append(spent)
        for sample in samples.values():
            sample.peak = peak_bytes(on.device)
        return samples

    def _started(self, model: DecoderOnly, way: Way, sample: Sample) -> Rows:
        """Prefill a contestant, and note how long it took."""
        with switched(way):
            rows = start(model, self.shape, way, self.prompt)
        sample.prefill, sample.first = rows.prefill, rows.logits.argmax(-1).tolist()
        return rows

    def _found(self, way: Way, sample: Sample, first: Sample, on: Device, together: bool) -> Row:
        mine = [x / self._count(way) for x in sample.means]
        base = [x / self._count(self.ways[0]) for x in first.means]
        read = predict.step_bytes(self.shape, way, self.prompt, self.rounds.middle)
        return compared(mine, None if way == self.ways[0] else base, MS) | {
            "of read peak": read / statistics.median(sample.means) / on.read_peak,
            "notes": sample.notes(first, together),
        }


@dataclass
class Sample:
    """One contestant's blocks of seconds per step, and what went with them."""

    held: int
    blocks: list[list[float]] = field(default_factory=list)
    prefill: float = 0.0
    peak: int = 0
    first: list[int] = field(default_factory=list)

    @property
    def means(self) -> list[float]:
        """Seconds per step of every block."""
        return [statistics.fmean(block) for block in self.blocks]

    def notes(self, base: Sample, together: bool) -> str:
        """What has no column: steps by kind, prefill, memory, whether the first tokens agree."""
        every = predict.EVERY
        last = statistics.median(x for block in self.blocks for x in block[every - 1 :: every])
        other = statistics.median(
            x for block in self.blocks for i, x in enumerate(block) if i % every != every - 1
        )
        agreed = sum(a == b for a, b in zip(self.first, base.first, strict=False))
        said = [f"steps {other / MS:.4g}, every third {last / MS:.4g}"]
        said += [f"prefill {self.prefill / MS:.4g} ms a row"]
        said += [f"peak {self.peak / GB:.4g} GB of all"] if self.peak else []
        said += [f"same first token {agreed}/{len(self.first)}"]
        return "; ".join(said if together else [*said, "one after the other"])


# -- kernels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """One way to compute something: predicted seconds, bytes it must move, calls per turn."""

    seconds: float
    read: float
    per_turn: int = 1
    goal: float | None = None


@dataclass(frozen=True)
class KernelCell:
    """Kernels beside each other; ratios are to the first. ``make`` gives the calls to time."""

    key: str
    contestants: Mapping[str, Contestant]
    make: Callable[[Device], Mapping[str, Call]]
    turns: int = 16
    rounds: int = 21

    def predicted(self) -> list[Row]:
        """See ``Cell.predicted``."""
        base = next(iter(self.contestants.values())).seconds
        return [
            {
                "what": name,
                "unit": "us",
                "predicted": each.seconds / US,
                "predicted ratio": each.seconds / base if number else None,
                "goal": each.goal,
                "floor": each.read / predict.READ_PEAK / US,
                "GB read": each.read / GB,
            }
            for number, (name, each) in enumerate(self.contestants.items())
        ]

    def measured(self, on: Device) -> list[Row]:
        """See ``Cell.measured``."""
        seconds = interleaved(self.make(on), self.turns, self.rounds, on.device)
        ordered = [
            [x / each.per_turn for x in seconds[name]] for name, each in self.contestants.items()
        ]
        return [
            compared(spent, ordered[0] if number else None, US)
            | {"of read peak": each.read / statistics.median(spent) / on.read_peak}
            for number, (spent, each) in enumerate(
                zip(ordered, self.contestants.values(), strict=True)
            )
        ]


# -- memory ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryCell:
    """The most memory that one sequence's prefill takes above the weights."""

    shape: Shape
    prompt: Prompt
    policy: str

    @property
    def key(self) -> str:
        """See ``Cell.key``."""
        return f"{self.shape.name}, {self.prompt.image} image tokens: prefill under {self.policy}"

    def predicted(self) -> list[Row]:
        """See ``Cell.predicted``."""
        peak = predict.prefill_peak(self.shape, self.policy, self.prompt)
        return [{"what": self.policy, "unit": "GB above the weights", "predicted": peak / GB}]

    def measured(self, on: Device) -> list[Row]:
        """See ``Cell.measured``; on a CPU torch does not count, and 0 stands there."""
        model = on.model(self.shape)
        on.tidy()
        held = forget_peak(on.device)
        start(model, self.shape, Way(policy=self.policy), self.prompt)
        return [{"measured": (peak_bytes(on.device) - held) / GB}]
