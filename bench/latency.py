"""Where a decode step's attention time goes as the batch grows: the paper's figure 8 and its split.

    python -m bench.latency [--device cpu|cuda] [--threads N] [--quick]

One layer of a 7B LLaVA over seeded keys and values, the same kernel for everyone:

- full: every cached token.
- compressed: only what S keeps is stored, and all of it is attended (the paper's "compression").
- slice: the core is copied out and multiplied at sparse steps, as without an operator for it.
- ours: the core is read in place at sparse steps (the paper's "operator").

All but full are means over a cycle of K steps. "policy" is the launch that ranks image tokens and
ages text after a step, for one layer's share of it. "limit" is the ratio of the bytes that must be
read to those of full: no operator that reads as fast as full's can do better. The contestants take
turns, and ratios are medians of paired ones.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import common
from bench.kernels import CORE, EVERY, HEAD_DIM, HEADS, SECONDARY, interleaved, read_bandwidth
from bench.policy_calls import Stored, policy_calls
from engine.ops.attention import AttentionPlan, Tier
from engine.ops.native import backend

# Tokens before the picture, of the picture and after it: the average sequences of the memory table.
SEQUENCES = {"LLaVA-1.5": (35, 576, 35), "LLaVA-1.6": (35, 2135, 78)}
TEXT, FLOOR = 0.70, 20
LAYERS = 32
POOL_BYTES = 1 << 29  # rotated over at least so much, so that no cache helps
Call = Callable[[int], object]


@dataclass(frozen=True)
class Case:
    """One cell of the table."""

    model: str
    batch: int
    dtype: torch.dtype
    device: str


def main() -> None:
    """Measure every sequence at every batch size, and write the table."""
    options = read_options()
    if backend().name == "torch":
        raise SystemExit(f"error: {backend().reason}\nhint: build the native module (make test)")
    torch.set_num_threads(options.threads)
    torch.manual_seed(common.SEED)
    dtype = getattr(torch, options.dtype)
    peak = read_bandwidth(options.device, options.quick)
    cells = [Case(m, b, dtype, options.device) for m in options.models for b in options.batches]
    rows = []
    for case in common.progress(cells, "cells"):
        rows += measure(case, options.turns, peak)
    settings = {
        "dtype": options.dtype,
        "seed": common.SEED,
        "device": options.device,
        "threads": options.threads,
        "turns": options.turns,
        "heads x size": f"{HEADS} x {HEAD_DIM}",
        "read GB/s": peak,
        "kernels": backend().name,
        "policy": f"S {SECONDARY:.0%}, C {CORE:.0%}, K {EVERY}, T {TEXT:.0%}",
    }
    path = common.write_report(options.name, settings, rows, [meaning()], options.out)
    print(path.with_suffix(".md").read_text())


def read_options() -> argparse.Namespace:
    parser = common.make_parser(__doc__, name="latency")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (ratios: 1 is safest)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--models", nargs="+", choices=SEQUENCES, default=list(SEQUENCES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument(
        "--quick", action="store_true", help="one sequence, few turns: a smoke test"
    )
    options = common.read_options(parser)
    if options.quick:
        options.models, options.turns = ["LLaVA-1.5"], 3
    return options


def meaning() -> str:
    """The sentences of the module's docstring that a reader of the table needs."""
    return " ".join(line.strip("- ") for line in __doc__.split("\n\n", 3)[-1].splitlines())


# -- the contestants ------------------------------------------------------------------------------


def measure(case: Case, turns: int, peak: float) -> list[dict[str, Any]]:
    """One row per contestant: milliseconds of a step in one layer, ratios, bytes."""
    before, image, after = SEQUENCES[case.model]
    secondary, core = int(SECONDARY * image), int(CORE * image)
    text = max(FLOOR, round(TEXT * after))
    stored, sparse = before + secondary + text, before + core + text
    reads = {
        "full": float(before + image + after),
        "compressed": float(stored),
        "slice": ((EVERY - 1) * sparse + stored) / EVERY,
        "ours": ((EVERY - 1) * sparse + stored) / EVERY,
    }
    calls = attention_calls(case, before + image + after, stored, sparse)
    calls["policy"] = policy_call(case, stored, secondary, core, text)
    repeats = 20 if case.device == "cuda" else 1  # a launch is short beside waiting for the device
    spent = interleaved({n: repeated(c, repeats) for n, c in calls.items()}, turns, case.device)
    cycles = {"full": 1, "compressed": 1, "slice": EVERY, "ours": EVERY, "policy": EVERY * LAYERS}
    times = {name: [s / repeats / cycles[name] for s in seconds] for name, seconds in spent.items()}
    policy = statistics.median(times["policy"])
    rows = []
    for name, tokens in reads.items():
        ratio = common.paired_ratio(times[name], times["full"])
        median = statistics.median(times[name])
        touched = tokens * case.batch * 2 * HEADS * HEAD_DIM * case.dtype.itemsize
        chosen = name in ("slice", "ours")
        rows.append(
            {
                "model": case.model,
                "batch": case.batch,
                "what": name,
                "attention ms": 1e3 * median,
                "/ full": ratio["ratio"],
                "95 %": f"{ratio['low']:.3g}-{ratio['high']:.3g}",
                "limit": tokens / reads["full"],
                "policy ms": 1e3 * policy if chosen else 0.0,
                "MB": touched / 1e6,
                "of read peak": touched / median / 1e9 / peak,
            }
        )
    return rows


def repeated(call: Call, repeats: int) -> Call:
    """The call so many times, each with a turn of its own."""

    def run(turn: int) -> None:
        for number in range(repeats):
            call(turn * repeats + number)

    return run


def attention_calls(case: Case, tokens: int, stored: int, sparse: int) -> dict[str, Call]:
    """Full, compressed, slice and ours over pools of one layer, each row in its own extent."""
    token_bytes = 2 * HEADS * HEAD_DIM * case.dtype.itemsize
    copies = max(2, -(-POOL_BYTES // (case.batch * tokens * token_bytes)))
    shape = (case.batch * tokens, HEADS, HEAD_DIM)
    pools = [torch.randn(2, *shape, device=case.device, dtype=case.dtype) for _ in range(copies)]
    q = torch.randn(case.batch, HEADS, HEAD_DIM, device=case.device, dtype=case.dtype)
    first = torch.arange(case.batch, device=case.device)[:, None] * tokens

    def plans(listed: Tensor, sources: list[Tensor]) -> list[AttentionPlan]:
        slots = (first + listed).int()[:, None] if sources is pools else None
        return [AttentionPlan(q, [Tier(source[0], source[1], slots)]) for source in sources]

    everything = torch.arange(tokens, device=case.device)
    chosen = torch.randperm(stored, device=case.device)[:sparse].sort().values
    full, whole = plans(everything, pools), plans(everything[:stored], pools)
    core = plans(chosen, pools)
    copied = torch.empty(2, case.batch, sparse, HEADS, HEAD_DIM, device=case.device, dtype=q.dtype)
    one = torch.arange(case.batch * sparse, device=case.device).view(case.batch, 1, sparse).int()
    of_copy = AttentionPlan(q, [Tier(*copied.flatten(1, 2), one)])
    picked = (first + chosen).flatten()

    def sliced(turn: int) -> None:
        """What an engine without the operator does at a sparse step."""
        for source, target in zip(pools[turn % copies], copied, strict=True):
            torch.index_select(source, 0, picked, out=target.flatten(0, 1))
        of_copy.run()

    def cycle(sparse_step: Call) -> Call:
        def run(turn: int) -> None:
            for step in range(EVERY - 1):
                sparse_step(turn + step)
            whole[(turn + EVERY) % copies].run()

        return run

    return {
        "full": lambda turn: full[turn % copies].run(),
        "compressed": lambda turn: whole[turn % copies].run(),
        "slice": cycle(sliced),
        "ours": cycle(lambda turn: core[turn % copies].run()),
    }


def policy_call(case: Case, stored: int, secondary: int, core: int, text: int) -> Call:
    """The policy's work of a cycle for all layers: text ages at every step, one of them ranks."""
    before = stored - secondary - text
    of_rows = Stored(LAYERS * case.batch, HEADS, HEADS, before, secondary, text)
    calls = policy_calls(of_rows, core, case.device)

    def run(turn: int) -> None:
        for _ in range(EVERY):
            calls["age"]()
        calls["rank"]()

    return run


if __name__ == "__main__":
    main()
