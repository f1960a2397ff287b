"""Showing a pass to the observer that hangs on a row; without one, nothing here runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..policies.layout import Layout
from ..policies.received import Received
from .observe import Observed, tiers_of
from .row import Row, Stored
from .text_slots import TextSlots


class Shown(Protocol):
    """What is read of a decode step; see ``Decoding``."""

    rows: list[Row]
    kinds: list[int]
    lists: Tensor
    text: TextSlots
    logits: list[Tensor | None]
    lse: list[Tensor | None]

    @property
    def shared(self) -> Sequence[list[list[int]]]:
        """``[full or core][row][layer]`` slots before the text."""

    @property
    def seen(self) -> list[int]:
        """Tokens of each row so far."""

    def text_of(self, r: int, layer: int, n: int) -> Tensor:
        """Positions of row ``r``'s text."""

    def core_positions(self, r: int, layer: int) -> Tensor | None:
        """Positions of row ``r``'s core image tokens."""


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


def attended_positions(decoding: Shown, r: int) -> list[Tensor]:
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


def show_step(decoding: Shown, r: int, attended: list[Tensor]) -> None:
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


def _beside(left: Tensor, right: Tensor) -> Tensor:
    """Positions joined; either may be shared by the heads."""
    heads = max(len(left), len(right))
    return torch.cat([left.expand(heads, -1), right.expand(heads, -1)], 1)
