"""Attention over keys and values in few bits as benchmark cells: all of them, or values chosen."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench import predict
from bench.formats import PEAKED, SKIP
from bench.gpu_cells import Contestant, Device, KernelCell
from bench.gpu_kernels import rotation
from bench.gpu_timing import Call
from bench.predict import SEVEN
from engine.ops.attention import AttentionPlan, Tier
from engine.ops.native import Scratch, Sifting
from engine.ops.pages import Pages

FORMATS = ("k8v8", "k4v4", "k2v2")
CHOSEN = 0.01  # values that are read of logits as PEAKED as these; more, and it shows in the time
# Goals of the time / that of 16 bits, where reading is what takes it.
GOALS = {"k8v8": 0.60, "k4v4": 0.42}
MANY_BYTES = 3e8


def format_cell(rows: int, tokens: int, quick: bool = False) -> KernelCell:
    """One layer's attention of LLaVA-7B over all tokens, in few bits beside 16."""
    count = rows * tokens
    whole = float(count * SEVEN.layer_kv)
    contestants = {"16 bits": Contestant(predict.attention(whole), whole)}
    for name in FORMATS:
        pages = pages_of(name)
        keys, values = (float(count * side.token_bytes) for side in (pages.key, pages.value))
        goal = GOALS.get(name) if whole > MANY_BYTES else None
        read, chosen = keys + values, keys + CHOSEN * values
        contestants[name] = Contestant(predict.attention(read), read, goal=goal)
        contestants[f"{name}, {SKIP:.0%} left out"] = Contestant(predict.sifted(chosen), chosen)
    turns = 2 if quick else rotation(whole)

    def make(on: Device) -> dict[str, Call]:
        return calls(rows, tokens, on, turns)

    key = f"attention in few bits, {rows} x {tokens} tokens"
    return KernelCell(key, contestants, make, turns, 3 if quick else 21)


def pages_of(name: str) -> Pages:
    """Pages of a 7B."""
    return Pages.of(name, SEVEN.kv_heads, SEVEN.head_dim, torch.bfloat16)


def calls(rows: int, tokens: int, on: Device, turns: int) -> dict[str, Call]:
    """The contestants' calls: each rotates over copies of its pool, ``turns`` of them."""
    made = {"device": on.device, "dtype": on.dtype}
    q = PEAKED * torch.randn(rows, SEVEN.heads, SEVEN.head_dim, **made)
    k, v = torch.randn(2, rows * tokens, SEVEN.kv_heads, SEVEN.head_dim, **made)
    slots = torch.arange(rows * tokens, dtype=torch.int32, device=on.device).view(rows, 1, tokens)
    plain = [Tier(k.clone(), v.clone(), slots) for _ in range(turns)]
    found: dict[str, Call] = {"16 bits": rotated(q, plain)}
    mean = v.view(rows, tokens, *v.shape[1:]).float().mean(1)
    for name in FORMATS:
        pages = pages_of(name)
        packed = pages.pack(k, v)
        pools = [pages.sides(packed.clone()) for _ in range(turns)]
        whole = partial(Tier, slots=slots, pages=pages)
        found[name] = rotated(q, [whole(*pool) for pool in pools])
        most = torch.full((rows,), SKIP, device=on.device)
        spent = torch.zeros(rows, SEVEN.kv_heads, 2, device=on.device)
        sifts = partial(whole, sifting=Sifting(most, mean, spent))
        found[f"{name}, {SKIP:.0%} left out"] = rotated(q, [sifts(*pool) for pool in pools])
    return found


def rotated(q: Tensor, tiers: list[Tier]) -> Call:
    """A call over one of the tiers in turn."""
    scratch = Scratch()
    plans = [AttentionPlan(q, [tier], scratch=scratch) for tier in tiers]
    return lambda turn: plans[turn % len(plans)].run()
