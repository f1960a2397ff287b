"""Held-out scores during training, by teacher forcing in one forward pass.

An answer counts as exact when the arg-max is right at each of its tokens; greedy decoding then
gives exactly this answer, so the figure equals that of generation (on the stage's own pages).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from torch import nn

from training.data import PageMix, sample, stack

CHUNK = 16


@torch.no_grad()
def held_out(trainee: nn.Module, mix: PageMix, pages: int, first_seed: int = 0) -> dict[str, float]:
    """Exact-match share per task, token accuracy and losses on `pages` held-out pages."""
    tokenizer = mix.form.tokenizer()
    mix = replace(mix, long_share=1.0)
    found: dict[str, list[float]] = defaultdict(list)
    device = next(trainee.parameters()).device
    for start in range(0, pages, CHUNK):
        drawn = [sample(first_seed + start + i, mix, tokenizer) for i in range(CHUNK)]
        batch = {k: v.to(device) for k, v in stack([d[0] for d in drawn]).items()}
        with torch.autocast(device.type, torch.bfloat16):
            losses = trainee(batch)
        for name in ("text", "patch", "patch_right", "read", "guide"):
            found[f"loss/{name}"].append(losses[name].item())
        asked = batch["target"] >= 0
        found["token"].append((losses["right"] & asked).sum().item() / asked.sum().item())
        for row, (_, questions) in enumerate(drawn):
            segments = batch["segment"][row]
            for segment in segments[segments >= 0].unique().tolist():
                here = (segments == segment) & asked[row]
                found[questions[segment].task].append(losses["right"][row][here].all().item())
    return {name: sum(v) / len(v) for name, v in sorted(found.items())}
