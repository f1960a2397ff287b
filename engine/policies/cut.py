"""Which image tokens the last prompt token attends most, and the cut that lets only those go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .select import top

if TYPE_CHECKING:
    from torch import Tensor

    from .layout import Layout
    from .received import Received


def best(columns: Tensor, received: Received, count: int) -> Tensor:
    """The ``count`` of ``columns`` that the last query attended most, averaged over heads."""
    last = range(received.queries - 1, received.queries)
    return columns[top(received.mean_given_by(last)[columns], count)]


def most_of_pictures(layout: Layout, share: Callable[[int], int]) -> int:
    """Columns before the text when ``share(size)`` of every new picture are kept."""
    shared = len(layout.fixed())
    for index, size in enumerate(layout.image_sizes):
        there = layout.image_columns(index)
        shared += there if index < layout.settled else min(there, share(size))
    return shared


def without_the_least(layout: Layout, received: Received, share: Callable[[int], int]) -> Tensor:
    """New tokens that go on when of each new picture only the best ``share(size)`` do (FastV's
    cut).

    Returns ascending indices into the new tokens, which are the last of ``layout``. The very last
    token always goes on, even if it is an image token: the answer begins from its hidden state.
    """
    import torch

    first_new = layout.columns - received.queries
    gone = torch.zeros(layout.columns, dtype=torch.bool, device=layout.image_of.device)
    for index in range(layout.settled, len(layout.image_sizes)):
        columns = layout.picture(index)
        gone[columns] = True
        gone[best(columns, received, share(layout.image_sizes[index]))] = False
    gone[-1] = False
    return (~gone[first_new:]).nonzero()[:, 0]
