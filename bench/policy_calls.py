"""The policy launch on random weights, for benchmarks: what a step asks of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.ops import ranking


@dataclass(frozen=True)
class Stored:
    """What each of ``problems`` layers x rows stores: image tokens behind others, then text."""

    problems: int
    heads: int
    kv_heads: int
    before: int
    image: int
    text: int


def policy_calls(
    stored: Stored, core: int, device: torch.device | str
) -> dict[str, Callable[[], None]]:
    """``rank`` chooses ``core`` of the image tokens; ``age`` evicts a text token of every head."""
    problems, text = stored.problems, stored.text
    width = stored.before + stored.image + text

    def same(value: int, count: int = problems) -> Tensor:
        return torch.full((count,), value, dtype=torch.int32, device=device)

    logits = torch.randn(problems, stored.heads, width, device=device)
    lse = logits.logsumexp(-1)
    error = same(0, 1)
    slots = torch.arange(width, dtype=torch.int32, device=device).repeat(problems, 1)
    image_end = stored.before + stored.image
    run = same(stored.before), same(image_end), same(core), same(stored.before), same(1)
    places = (problems, stored.kv_heads, text + 1)
    scores = torch.rand(places, device=device)
    positions = torch.arange(text + 1, dtype=torch.int32, device=device).repeat(*places[:2], 1)
    write = torch.empty(places[:2], dtype=torch.int64, device=device)
    start = torch.zeros(problems, dtype=torch.int64, device=device)
    counts = same(text), same(text - 1), same(text // 3), same(text)
    state = scores, positions, write
    return {
        "rank": ranking.plan_rank(logits, lse, slots, slots.clone(), *run, error=error),
        "age": ranking.plan_age(logits, lse, same(image_end), start, *counts, *state, error=error),
    }
