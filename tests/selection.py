"""The eviction rule in its plainest form, to hold the operators against."""

from torch import Tensor


def lightest(scores: Tensor, positions: Tensor, recent: int) -> Tensor:
    """The token to evict: the least attended outside the ``recent`` latest, the youngest if tied.

    ``scores`` and ``positions`` are ``[..., n]`` with ``recent < n``; returns ``[...]`` indices.
    Empty places carry position -1 and score inf.
    """
    if recent:
        oldest_recent = positions.topk(recent, dim=-1).values[..., -1:]
        scores = scores.masked_fill(positions >= oldest_recent, float("inf"))
    lowest = scores.amin(-1, keepdim=True)
    return positions.masked_fill(scores > lowest, -1).argmax(-1)
