"""Watches an answer for the attention page: a trace, with every head of one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.observe import Observed
from .trace import Trace

SINK_FACTOR = 10.0
SINK_PASSES = 4


class Recorder(Trace):
    """A Trace that also keeps ``heads[p] [heads, image tokens]`` of ``head_layer`` in pass p."""

    def __init__(self, head_layer: int, *, across: bool = False) -> None:
        super().__init__(across=across)
        self.head_layer = head_layer
        self.heads: list[Tensor] = []

    def observe(self, seen: Observed) -> None:
        """See ``Observer.observe``."""
        super().observe(seen)
        if seen.across == self.across and seen.layer == self.head_layer:
            self.heads.append(image_heads(seen).cpu())


def image_heads(seen: Observed) -> Tensor:
    """What each head gave each image token: ``[heads, image tokens]`` fp32, 0 where not attended.

    With two heads that share one row of positions [0, 2], weights [[0.75, 0.25], [0.5, 0.5]] and a
    picture at positions 1 to 3: [[0, 0.25], [0, 0.5]].
    """
    heads = len(seen.weights)
    positions = seen.positions.repeat_interleave(heads // len(seen.positions), 0)
    total = seen.weights.new_zeros(heads, seen.query + 1).float()
    total.scatter_add_(1, positions, seen.weights.float())
    pictures = [total[:, start:end] for start, end in seen.image_spans]
    return torch.cat(pictures, 1) if pictures else total[:, :0]


def find_sinks(attention: Tensor) -> list[int]:
    """Image tokens that are attended whatever is said, by ``attention [passes, image tokens]``.

    Those whose median over the passes is above SINK_FACTOR times the mean token's. A simple sign,
    by attention alone (the literature looks at hidden states); with fewer than SINK_PASSES passes
    nothing can be told, and none is named.
    """
    if len(attention) < SINK_PASSES or attention.shape[1] == 0:
        return []
    relative = attention / attention.mean(1, keepdim=True).clamp_min(1e-12)
    found = relative.median(0).values > SINK_FACTOR
    return [int(token) for token in found.nonzero()[:, 0]]
