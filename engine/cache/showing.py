"""Showing a pass to the observer that hangs on a row; without one, nothing here runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import parse_bits
from ..policies.layout import Layout
from ..policies.received import Received
from .observe import Observed, tiers_of
from .pool import Pool
from .row import Row, Stored
from .slot_lists import CORE
from .state import State


def show_prefill(
    row: Row, layer: int, layout: Layout, received: Received, stored: Stored, pool: Pool
) -> None:
    """Tell the row's observer of a prefill's layer: the last query's weights over all columns."""
    assert row.observer is not None
    kept = stored.whole_layout()
    core = stored.core_positions()
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
            bytes=stored.nbytes(pool, stored.layout.columns),
            bits=bits_of(row, stored, kept.positions, pool),
        )
    )


class Attended(NamedTuple):
    """What a row has attended of a layer.

    Attributes:
        positions: ``[1 or kv_heads, n]``.
        entries: ``[n]``, where they are among the logits.
    """

    positions: Tensor
    entries: Tensor


def attended(state: State, kind: int, r: int) -> list[Attended]:
    """For each layer what row ``r``'s step over its full or core list (``kind``) has attended.

    To be asked before the step is closed: afterwards the slots hold other tokens.
    """
    found = []
    for layer, stored in enumerate(state.rows[r].layers):
        size = state.lists.shared[kind][r][layer]
        listed = state.core if kind == CORE else kind
        slots = state.lists.slots[listed, layer, r, :size].long() - stored.start
        text = state.text_of(r, layer, state.lengths.texts[r] + 1)
        positions = _beside(stored.layout.positions[:, slots], text)
        entries = [torch.arange(positions.shape[1], device=state.device)]
        for start, mine in state.listed_parts(r, layer, core=kind == CORE):
            positions = _beside(positions, mine[None])
            entries.append(torch.arange(start, start + len(mine), device=state.device))
        found.append(Attended(positions, torch.cat(entries)))
    return found


def show_step(state: State, r: int, logits: Tensor, lse: Tensor, seen: Sequence[Attended]) -> None:
    """Tell row ``r``'s observer of a closed decode step, which has left ``logits [layers, rows,
    heads, max]`` and ``lse [layers, rows, heads]``.
    """
    row = state.rows[r]
    assert row.observer is not None
    for layer, stored in enumerate(row.layers):
        weights = (logits[layer, r] - lse[layer, r][:, None]).exp()
        text = state.text_of(r, layer, state.lengths.texts[r])
        layout = stored.whole_layout()
        shared = layout.positions[:, : layout.text_start]
        core, positions = state.core_positions(r, layer), _beside(shared, text)
        plain = stored.layout.text_start + text.shape[1]
        row.observer.observe(
            Observed(
                layer=layer,
                step=state.lengths.steps[r],
                query=state.lengths.seen[r] - 1,
                weights=weights[:, seen[layer].entries],
                positions=seen[layer].positions,
                tiers=tiers_of(row.image_spans, positions, core),
                image_spans=tuple(row.image_spans),
                text=text,
                bytes=stored.nbytes(state.pools[layer], plain),
                bits=bits_of(row, stored, positions, state.pools[layer]),
            )
        )


def bits_of(row: Row, stored: Stored, positions: Tensor, pool: Pool) -> Tensor:
    """See ``Observed.bits``; ``positions`` are those that the layer holds."""
    ranges = [torch.arange(start, end, device=positions.device) for start, end in row.image_spans]
    image = torch.cat(ranges) if ranges else positions.new_empty(0)
    plain = torch.isin(image, positions)
    bits = plain * (16 * pool.k.element_size())
    for part in stored.parts:
        mine = torch.isin(image, part.positions)
        named = parse_bits(pool.of(part.format).layout.name)
        own = [8 * pool.k.element_size() if n == 16 else n for n in named]
        bits[mine] = sum(own)
    return bits.to(torch.uint8)


def _beside(left: Tensor, right: Tensor) -> Tensor:
    """Positions joined; either may be shared by the heads."""
    heads = max(len(left), len(right))
    return torch.cat([left.expand(heads, -1), right.expand(heads, -1)], 1)
