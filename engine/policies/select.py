"""Scores in, index sets out: the two selections that policies are made of.

Ties are settled alike everywhere: higher score first, then the lower index (for text: the older
token).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def top(scores: Tensor, count: int) -> Tensor:
    """Ascending indices of the ``count`` highest of ``scores [..., n]``: ``[..., min(count, n)]``.

    >>> top(torch.tensor([0.1, 0.3, 0.3, 0.2]), 2).tolist()
    [1, 2]
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def heavy_and_recent(scores: Tensor, positions: Tensor, total: int, recent: int) -> Tensor:
    """Keep the ``recent`` latest tokens and the heaviest of the others, ``total`` in all (H2O).

    Args:
        scores: ``[kv_heads, n]`` fp32 attention received.
        positions: ``[kv_heads, n]`` int64, distinct within a head.
        total: tokens to keep, at most n.
        recent: how many of them are kept for being the latest.

    Returns:
        ``[kv_heads, total]`` ascending indices.

    >>> scores, positions = torch.tensor([[9.0, 1.0, 5.0, 0.0]]), torch.tensor([[0, 1, 2, 3]])
    >>> heavy_and_recent(scores, positions, total=3, recent=1).tolist()
    [[0, 2, 3]]
    """
    latest = positions.sort(dim=-1, descending=True).indices[..., :recent]
    # By position, so that among equal scores the stable sort in `top` prefers the older token.
    by_age = positions.argsort(dim=-1)
    keys = scores.scatter(-1, latest, float("inf")).gather(-1, by_age)
    return by_age.gather(-1, top(keys, total)).sort(dim=-1).values
