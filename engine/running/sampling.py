"""Choosing the next token: greedy, or drawn with temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.fused import argmax
from ..options import Sampling


class Sampler:
    """Draws tokens for one answer with a generator of its own."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int] = ()) -> None:
        self.sampling = sampling
        self._used = set(prompt_ids)
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> int:
        """The next token id from fp32 ``logits [vocab]``."""
        if self.sampling.repetition_penalty != 1:
            logits = self._penalised(logits)
        token = self._draw(logits)
        self._used.add(token)
        return token

    def _draw(self, logits: Tensor) -> int:
        if self.sampling.temperature == 0:
            return int(argmax(logits[None]))
        probabilities = self.probabilities(logits).cpu()
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def _penalised(self, logits: Tensor) -> Tensor:
        """Scores with those of used tokens made less likely."""
        known = [token for token in self._used if token < len(logits)]
        used = torch.tensor(sorted(known), device=logits.device, dtype=torch.int64)
        scores, penalty = logits[used], self.sampling.repetition_penalty
        changed = torch.where(scores > 0, scores / penalty, scores * penalty)
        # An extreme penalty leaves the range of fp32, and infinities make no distribution.
        limit = torch.finfo(changed.dtype)
        return logits.index_copy(0, used, changed.nan_to_num(0.0, limit.max, limit.min))

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution ``choose`` draws from: ``[vocab]``, zero outside top-k and top-p."""
        # Against the largest: a tiny temperature then gives -inf for the others, never inf.
        logits = (logits - logits.max()) / max(float(self.sampling.temperature), 1e-30)
        if 0 < self.sampling.top_k < len(logits):
            lowest_kept = logits.topk(self.sampling.top_k).values[-1]
            logits = logits.masked_fill(logits < lowest_kept, float("-inf"))
        probabilities = logits.softmax(-1)
        if self.sampling.top_p < 1:
            ordered, index = probabilities.sort(descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered
            beyond = index[1:][before[1:] >= self.sampling.top_p]  # the likeliest always stays
            probabilities = probabilities.index_fill(0, beyond, 0.0)
        return probabilities / probabilities.sum()
