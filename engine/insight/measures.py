"""Numbers that say how a model looks at a picture: how sparsely, how steadily, and at what.

The measures of the A-VL paper (arXiv 2409.14846): its figures 1 and 3 to 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OptionError
from ..policies.select import top
from .trace import Trace


def ppci(first: Tensor, second: Tensor, share: float) -> float:
    """p% PPCI: how much of their top p% two score vectors over the same N tokens have in common.

    ``|T1 and T2| / round(p * N)``, T the round(p * N) highest. With N = 9 and p = 30 % that is the
    top 3: {8, 6, 5} and {6, 5, 9} share two, 0.67. Raises OptionError for another length, a share
    outside (0, 1], or one so small that it names no token.
    """
    count = round(share * len(first))
    if first.shape != second.shape or first.dim() != 1:
        raise OptionError(
            f"PPCI compares scores of {len(first)} and of {len(second)} tokens",
            hint="give two vectors over the same tokens",
        )
    if not 0 < share <= 1 or count == 0:
        raise OptionError(
            f"PPCI of the top {share:g} of {len(first)} tokens has nothing to compare",
            hint="use a share in (0, 1] that is at least one token",
        )
    common = set(top(first, count).tolist()) & set(top(second, count).tolist())
    return len(common) / count


def agreement_between_layers(trace: Trace, number: int, share: float) -> Tensor:
    """PPCI of every pair of layers in pass ``number``: ``[layers, layers]`` (figure 4: row 0)."""
    layers = len(trace.passes[number])
    rows = [trace.image_attention(number, layer) for layer in range(layers)]
    return torch.tensor([[ppci(a, b, share) for b in rows] for a in rows])


def agreement_between_steps(
    trace: Trace, layer: int, share: float, first: int = 0, last: int | None = None
) -> list[float]:
    """PPCI of pass ``first`` with each later one up to ``last`` in one layer (figure 5).

    Only under a cache that attends every image token in each of them does this measure the model;
    elsewhere it measures the cache.
    """
    passes = range(first + 1, len(trace.passes) if last is None else last + 1)
    start = trace.image_attention(first, layer)
    return [ppci(start, trace.image_attention(number, layer), share) for number in passes]


def sparsity_curve(attention: Tensor) -> Tensor:
    """Share of the attention that the best 0, 1, ..., n tokens got together: ``[n + 1]``.

    ``attention [n]`` is taken by itself: the curve ends at 1 (at 0 where there is no attention).

    >>> sparsity_curve(torch.tensor([0.1, 0.3, 0.0, 0.1])).tolist()
    [0.0, 0.6000000238418579, 0.800000011920929, 1.0, 1.0]
    """
    ordered = attention.double().sort(descending=True).values
    total = ordered.sum()
    curve = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    return (curve / total if total > 0 else curve).to(attention.dtype)


def tokens_for(attention: Tensor, mass: float) -> float:
    """Smallest share of the tokens that got ``mass`` of their attention together; 0 without any.

    >>> tokens_for(torch.tensor([0.1, 0.3, 0.0, 0.1]), 0.6)
    0.25
    """
    curve = sparsity_curve(attention)
    reached = (curve >= mass - 1e-6).nonzero()
    return int(reached[0, 0]) / len(attention) if len(reached) and len(attention) else 0.0


def sparsity_per_layer(trace: Trace, number: int, mass: float) -> list[float]:
    """``tokens_for`` of the image tokens in every layer of pass ``number`` (figure 3)."""
    layers = range(len(trace.passes[number]))
    return [tokens_for(trace.image_attention(number, layer), mass) for layer in layers]


def attention_share(
    attention: Tensor, image_spans: Sequence[tuple[int, int]], prompt_end: int
) -> dict[str, float]:
    """How a query's attention divides (figure 1): system, image, instruction, output.

    Args:
        attention: ``[tokens]`` by position, as in ``Moment``.
        image_spans: positions of the pictures. Text before the last one counts as system, text
            after it as instruction; without a picture all of the prompt is instruction.
        prompt_end: tokens of the prompt; later ones are output.
    """
    kind = torch.full_like(attention, 3, dtype=torch.int64)
    kind[:prompt_end] = 2
    kind[: max((end for _, end in image_spans), default=0)] = 0
    for start, end in image_spans:
        kind[start:end] = 1
    sums = torch.zeros(4, dtype=torch.float64).index_add_(0, kind, attention.double())
    names = ("system", "image", "instruction", "output")
    return dict(zip(names, sums.tolist(), strict=True))


def share_per_layer(trace: Trace, number: int) -> list[dict[str, float]]:
    """``attention_share`` of every layer of pass ``number``; the latest prompt before it counts."""
    query = trace.passes[number][0].query
    ends = [end for end in trace.prompt_ends if end <= query + 1]
    spans = [span for span in trace.image_spans if span[1] <= query + 1]
    return [attention_share(moment.attention, spans, ends[-1]) for moment in trace.passes[number]]
