"""What the cache shows to an onlooker, layer by layer: who was attended, and what is kept since.

An observer hangs on a row; without one, nothing here runs and no weights are computed for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from engine.cache.layout import Layout
from engine.cache.received import Received

if TYPE_CHECKING:
    from engine.cache.decode import Decoding
    from engine.cache.row import Row, Stored

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
        kept: tokens that the layer stores for each head after the pass.
    """

    layer: int
    step: int
    query: int
    weights: Tensor
    positions: Tensor
    tiers: Tensor
    image_spans: tuple[tuple[int, int], ...]
    text: Tensor
    kept: int


class Observer(Protocol):
    """Is told of every layer of every pass of the rows it hangs on."""

    def observe(self, seen: Observed) -> None:
        """Take note; change nothing."""


def show_prefill(row: Row, layer: int, layout: Layout, received: Received, stored: Stored) -> None:
    """Tell the row's observer of a prefill's layer: the last query's weights over all columns."""
    assert row.observer is not None
    kept = stored.layout
    core = None if stored.core is None else kept.positions[0, stored.core]
    row.observer.observe(
        Observed(
            layer=layer,
            step=0,
            query=layout.seen - 1,
            weights=received.from_last(1).clone(),
            positions=layout.positions.clone(),
            tiers=tiers_of(row.image_spans, kept.positions, core),
            image_spans=tuple(row.image_spans),
            text=kept.positions[:, kept.text_start :].clone(),
            kept=kept.columns,
        )
    )


def attended_positions(decoding: Decoding, r: int) -> list[Tensor]:
    """For each layer the positions ``[1 or kv_heads, n]`` that row ``r``'s step has attended.

    To be asked before the step is closed: afterwards the slots hold other tokens.
    """
    found = []
    for layer, stored in enumerate(decoding.rows[r].layers):
        kind = decoding.kinds[r]
        size = decoding.shared[kind][r][layer]
        slots = decoding.lists[kind][layer, r, :size].long() - stored.start
        text = decoding.text_of(r, layer, decoding.text.kept[r] + 1)
        found.append(_beside(stored.layout.positions[:, slots], text))
    return found


def show_step(decoding: Decoding, r: int, attended: list[Tensor]) -> None:
    """Tell row ``r``'s observer of a closed decode step."""
    row = decoding.rows[r]
    assert row.observer is not None
    for layer, stored in enumerate(row.layers):
        logits, lse = decoding.logits[layer], decoding.lse[layer]
        assert logits is not None
        assert lse is not None
        weights = (logits[r] - lse[r][:, None]).exp()[:, : attended[layer].shape[1]]
        text = decoding.text_of(r, layer, decoding.text.kept[r])
        shared = stored.layout.positions[:, : stored.layout.text_start]
        row.observer.observe(
            Observed(
                layer=layer,
                step=row.step,
                query=decoding.seen[r] - 1,
                weights=weights,
                positions=attended[layer],
                tiers=tiers_of(
                    row.image_spans, _beside(shared, text), decoding.core_positions(r, layer)
                ),
                image_spans=tuple(row.image_spans),
                text=text,
                kept=shared.shape[1] + text.shape[1],
            )
        )


def tiers_of(spans: list[tuple[int, int]], stored: Tensor, core: Tensor | None) -> Tensor:
    """The tier of every image token; see ``Observed.tiers``.

    >>> tiers_of([(1, 5)], torch.tensor([[0, 2, 3, 9]]), torch.tensor([3])).tolist()
    [0, 1, 2, 0]
    """
    parts = [torch.arange(start, end, device=stored.device) for start, end in spans]
    image = torch.cat(parts) if parts else stored.new_empty(0)
    tiers = torch.full_like(image, MINOR, dtype=torch.uint8)
    tiers[torch.isin(image, stored)] = CORE if core is None else SECONDARY
    if core is not None:
        tiers[torch.isin(image, core)] = CORE
    return tiers


def _beside(left: Tensor, right: Tensor) -> Tensor:
    """Positions joined; either may be shared by the heads."""
    heads = max(len(left), len(right))
    return torch.cat([left.expand(heads, -1), right.expand(heads, -1)], 1)
