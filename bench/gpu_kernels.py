"""The kernels of a decode step as benchmark cells: attention, policy, fused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench import kernels, predict
from bench.gpu_cells import Contestant, Device, KernelCell
from bench.gpu_timing import Call
from bench.policy_calls import Stored, policy_calls
from bench.predict import SEVEN, Shape
from engine.ops.few_bits import quantise
from engine.ops.products import Weight, few_rows, gemv, many_rows

# Inputs are rotated over this many bytes, so that the L2 cache (60 MB on an H200) does not help.
ROTATED = 1 << 30
# Goals of the mean of a K-cycle / all, by rows and tokens.
CYCLE_GOALS = {(1, 2880): 0.65, (8, 2880): 0.45, (32, 2880): 0.40}


def rotation(read: float) -> int:
    """How many sets of inputs of ``read`` bytes to rotate over."""
    return max(4, min(64, int(ROTATED // read)))


def attention_cell(rows: int, tokens: int, quick: bool = False) -> KernelCell:
    """One layer's attention of LLaVA-7B: over all tokens, over A-VL's, by slicing, by SDPA."""
    token = rows * SEVEN.layer_kv
    core, secondary = int(kernels.CORE * tokens), int(kernels.SECONDARY * tokens)
    every = kernels.EVERY
    lists = [core] * (every - 1) + [secondary]
    cycle = sum(predict.attention(n * token) for n in lists) / every
    whole, part = tokens * token, core * token
    goal = CYCLE_GOALS.get((rows, tokens))
    contestants = {
        "ours, all": Contestant(predict.attention(whole), whole),
        "sdpa, all": Contestant(predict.sdpa(whole), whole),
        "ours, core in place": Contestant(predict.attention(part), part),
        f"ours, mean of {every} steps": Contestant(cycle, sum(lists) / every * token, every, goal),
        "slice core, then sdpa": Contestant(predict.slice_then_multiply(part), part),
    }
    turns = 2 if quick else rotation(whole)

    def make(on: Device) -> dict[str, Call]:
        calls, _ = kernels.contestants(rows, tokens, on.dtype, on.device.type, turns)
        return calls

    key = f"attention, {rows} x {tokens} tokens"
    return KernelCell(key, contestants, make, turns, 3 if quick else 21)


def policy_cell(rows: int, image: int, text: int, shape: Shape, quick: bool = False) -> KernelCell:
    """The policy launch for all layers at once: a new core, and one text token per head evicted."""
    problems, stored = shape.layers * rows, int(predict.SECONDARY * image)
    width = stored + text
    all_logits = 4 * problems * shape.heads * stored
    of_text = 4 * problems * shape.heads * text
    contestants = {
        "rank": Contestant(predict.rank(problems, all_logits), all_logits),
        "age": Contestant(predict.age(problems * shape.kv_heads), of_text),
    }
    turns = 2 if quick else rotation(4 * problems * shape.heads * width)

    def make(on: Device) -> dict[str, Call]:
        cached = Stored(problems, shape.heads, shape.kv_heads, 0, stored, text)
        core = int(predict.CORE * image)
        sets = [policy_calls(cached, core, on.device) for _ in range(turns)]
        return {name: (lambda turn, n=name: sets[turn][n]()) for name in contestants}

    return KernelCell(f"policy launch, {rows} rows", contestants, make, turns, 3 if quick else 21)


def product_cell(rows: int, shape: Shape, quick: bool = False) -> KernelCell:
    """An MLP's first product: torch's in 16 bits, ours of weights in few bits."""
    size = shape.hidden * shape.mlp
    read = {"torch, bf16": 2 * size, "ours, q8": size + 4 * shape.mlp, "ours, q4": size * 5 // 8}
    turns = 2 if quick else rotation(read["ours, q4"])

    def make(on: Device) -> dict[str, Call]:
        x = torch.randn(rows, shape.hidden, device=on.device, dtype=on.dtype)
        weight = torch.randn(shape.mlp, shape.hidden, device=on.device, dtype=on.dtype)
        sets: dict[str, list[Weight]] = {"torch, bf16": [weight.clone() for _ in range(turns)]}
        for name in ("q8", "q4"):
            few = quantise(weight, name)
            sets[f"ours, {name}"] = [replace(few, codes=few.codes.clone()) for _ in range(turns)]

        def call(turn: int, weights: list[Weight]) -> Tensor:
            if few_rows(x, weights[turn]):
                return gemv(x, (weights[turn], None))[0]
            return many_rows(x, weights[turn], None)

        return {name: partial(call, weights=weights) for name, weights in sets.items()}

    contestants = {
        name: Contestant(predict.stream(bytes_), bytes_, goal=goal)
        for (name, bytes_), goal in zip(read.items(), (None, 0.6, 0.45), strict=True)
    }
    key = f"product, {rows} x {shape.hidden} -> {shape.mlp}"
    return KernelCell(key, contestants, make, turns, 3 if quick else 21)
