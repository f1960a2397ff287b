"""Greedy answers of the training form, many pages at once, over a plain key-value cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.data import PREFIX, page_pixels
from training.model import Cache, TinyLlava
from training.page import GRID, Page

END = 2  # </s>
PATCHES = GRID * GRID


@dataclass
class _Row:
    """One question under way."""

    prompt: list[int]
    answer: list[int]
    done: bool = False


def _prompt(question: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(f"\n{question} ASSISTANT:", add_special_tokens=False).ids


def _features(model: TinyLlava, pages: list[Page], device: torch.device) -> Tensor:
    every = list(range(PATCHES))
    pixels = torch.stack([torch.from_numpy(page_pixels(p, every)) for p in pages]).to(device)
    index = torch.arange(PATCHES, device=device).expand(len(pages), -1)
    return model.project(model.vision(pixels, index))


def _prefill(
    model: TinyLlava, pages: list[Page], prompts: list[list[int]], tokenizer: Tokenizer
) -> tuple[Tensor, Cache, Tensor]:
    """Scores after each prompt, the cache, and which cache slots are real `[B, slots]`."""
    device = model.head.weight.device
    before = torch.tensor(tokenizer.encode(PREFIX).ids, device=device)
    longest = max(map(len, prompts))
    text = torch.zeros(len(pages), longest, dtype=torch.long, device=device)
    for row, ids in enumerate(prompts):
        text[row, : len(ids)] = torch.tensor(ids, device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    embed = model.decoder.embed
    picture = _features(model, pages, device).float()
    x = torch.cat([embed(before).expand(len(pages), -1, -1), picture, embed(text)], 1)
    start = len(before) + PATCHES
    order = torch.arange(x.shape[1], device=device)
    real = order[None] < (start + lengths)[:, None]
    mask = (order[:, None] >= order[None])[None, None] & real[:, None, None]
    states, _, cache = model.decoder(x, order.expand(len(pages), -1), mask)
    last = states[torch.arange(len(pages), device=device), start + lengths - 1]
    return model.head(last), cache, real


@torch.no_grad()
def greedy(
    model: TinyLlava, pages: list[Page], questions: list[str], tokenizer: Tokenizer, limit: int
) -> list[str]:
    """The answer to one question per page, at most `limit` tokens each."""
    rows = [_Row(_prompt(q, tokenizer), []) for q in questions]
    scores, cache, real = _prefill(model, pages, [r.prompt for r in rows], tokenizer)
    position = real.sum(1)
    for _ in range(limit):
        chosen = scores.float().argmax(-1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.done = row.done or token == END
            if not row.done:
                row.answer.append(token)
        if all(row.done for row in rows):
            break
        real = torch.cat([real, torch.ones_like(real[:, :1])], 1)
        x = model.decoder.embed(chosen)[:, None]
        states, _, cache = model.decoder(x, position[:, None], real[:, None, None], cache)
        scores, position = model.head(states[:, 0]), position + 1
    return [tokenizer.decode(row.answer).strip() for row in rows]
