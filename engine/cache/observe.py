"""What the cache shows to an onlooker, layer by layer: who was attended, and what is kept since."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MINOR, SECONDARY, CORE = 0, 1, 2


@dataclass(frozen=True)
class Observed:
    """One layer after one pass, all tensors settled; they may be kept, nothing overwrites them.

    Attributes:
        layer: which layer.
        step: 0 for a prefill, then the number of the decode step within the turn.
        query: position of the query token: the last one of a prompt, or the decoded one.
        weights: ``[heads, n]`` fp32 softmax weights of that query over what it attended.
        positions: ``[1 or kv_heads, n]`` int64 positions of those n tokens.
        tiers: ``[image tokens]`` uint8, MINOR, SECONDARY or CORE after the pass, in order of
            position. Without a core tier all that is stored is CORE, since it is attended at every
            step; where heads keep different tokens, one head that keeps it is enough.
        image_spans: positions (start, end) of every picture.
        text: ``[1 or kv_heads, t]`` int64 positions kept of the evictable text, unordered.
        bytes: what the layer stores after the pass.
        bits: ``[image tokens]`` uint8, bits of a number of its keys and of its values together, in
            the order of ``tiers``; 0 where it was freed.
        across: whether it is a cross layer, counted among these: its image tokens are features, all
            that it attends, a position is a number among them, and ``query`` how many they are.
    """

    layer: int
    step: int
    query: int
    weights: Tensor
    positions: Tensor
    tiers: Tensor
    image_spans: tuple[tuple[int, int], ...]
    text: Tensor
    bytes: int
    bits: Tensor
    across: bool = False


class Observer(Protocol):
    """Is told of every layer of every pass of the rows it hangs on."""

    def observe(self, seen: Observed) -> None:
        """Take note; change nothing."""


def tiers_of(spans: list[tuple[int, int]], stored: Tensor, core: Tensor | None) -> Tensor:
    """The tier of every image token; see ``Observed.tiers``.

    >>> tiers_of([(1, 5)], torch.tensor([[0, 2, 3, 9]]), torch.tensor([3])).tolist()
    [0, 1, 2, 0]
    """
    ranges = [torch.arange(start, end, device=stored.device) for start, end in spans]
    image = torch.cat(ranges) if ranges else stored.new_empty(0)
    tiers = torch.full_like(image, MINOR, dtype=torch.uint8)
    tiers[torch.isin(image, stored)] = CORE if core is None else SECONDARY
    if core is not None:
        tiers[torch.isin(image, core)] = CORE
    return tiers
