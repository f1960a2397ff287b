"""Seconds on a device: CUDA events on a GPU, the clock on a CPU, where everything runs dry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from time import perf_counter
from typing import TypeVar

import torch

Call = Callable[[int], object]
Result = TypeVar("Result")


def laps(step: Call, count: int, device: torch.device) -> list[float]:
    """Seconds of each of ``count`` steps, started one behind the other without waiting between."""
    if device.type != "cuda":
        return _clocked(step, count)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize(device)
    marks[0].record()
    for index, mark in enumerate(marks[1:]):
        step(index)
        mark.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def _clocked(step: Call, count: int) -> list[float]:
    times = [perf_counter()]
    for index in range(count):
        step(index)
        times.append(perf_counter())
    return [b - a for a, b in pairwise(times)]


def timed(call: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What a call returns, and its seconds."""
    results: list[Result] = []
    [seconds] = laps(lambda _: results.append(call()), 1, device)
    return results[0], seconds


def burst(call: Call, turns: int, device: torch.device) -> Call:
    """One call that does ``call(0)`` to ``call(turns - 1)``; on a GPU a captured graph of them.

    Launching a kernel takes the host as long as a small kernel takes the device: only a graph
    shows what the kernel itself costs.
    """

    def loop(_: int) -> None:
        for turn in range(turns):
            call(turn)

    loop(0)
    if device.type != "cuda":
        return loop
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop(0)
    return lambda _: graph.replay()


def interleaved(
    calls: Mapping[str, Call], turns: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds per turn of every call in every round, one after the other, after a round to warm up.

    ``turns`` is how many different inputs a call rotates over: enough that no cache helps.
    """
    bursts = {name: burst(call, turns, device) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, run in bursts.items():
            spent = laps(run, 1, device)[0] / turns
            if number:
                seconds[name].append(spent)
    return seconds


def read_peak(device: torch.device, count: int) -> float:
    """Bytes per second of summing ``count`` float32 numbers and doing nothing else, best of 9."""
    data = torch.randn(count, device=device)
    return 4 * count / min(laps(lambda _: data.sum(), 9, device))


def peak_bytes(device: torch.device) -> int:
    """The most that torch has held on a GPU since ``forget_peak``; 0 on a CPU: not counted."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def forget_peak(device: torch.device) -> int:
    """Start counting the peak anew; returns what is held now."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
