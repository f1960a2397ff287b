"""Choosing the next token: greedy, or drawn with temperature, top-k and top-p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import OptionError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 is greedy (the lowest id wins a tie); 1 the model's own distribution.
        top_k: draw among the k likeliest tokens; 0 is all.
        top_p: draw among the fewest likeliest tokens whose probabilities reach p; 1 is all.
        seed: of the generator; the same seed and request give the same answer.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise OptionError(f"temperature is {self.temperature}", hint="use 0 (greedy) or more")
        if self.top_k < 0:
            raise OptionError(f"top_k is {self.top_k}", hint="use 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise OptionError(f"top_p is {self.top_p}", hint="use a value above 0 and up to 1")
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"seed is {self.seed}", hint="use 0 to 9223372036854775807")


class Sampler:
    """Draws tokens for one answer with a generator of its own."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> int:
        """The next token id from fp32 ``logits [vocab]``."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        probabilities = self.probabilities(logits).cpu()
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution ``choose`` draws from: ``[vocab]``, zero outside top-k and top-p."""
        logits = logits / self.sampling.temperature
        if 0 < self.sampling.top_k < len(logits):
            lowest_kept = logits.topk(self.sampling.top_k).values[-1]
            logits = logits.masked_fill(logits < lowest_kept, float("-inf"))
        probabilities = logits.softmax(-1)
        if self.sampling.top_p < 1:
            ordered, index = probabilities.sort(descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered
            probabilities = probabilities.index_fill(0, index[before >= self.sampling.top_p], 0.0)
        return probabilities / probabilities.sum()
