"""Packing what a row has generated, where its policy does so: between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CapacityError
from ..ops.ranks import ALONE, Ranks
from ..policies.layout import Kept
from ..policies.received import ReceivedInStep
from .pool import Extent, Pool
from .prefill import stored_layout
from .row import Part, Row, Stored
from .slot_lists import FULL
from .state import State


def weights_of(state: State, r: int, logits: Tensor, lse: Tensor) -> list[Tensor]:
    """For each layer what row ``r``'s step over its full list gave to the columns that it holds:
    ``[heads, columns]`` fp32, in the order of ``Stored.whole_layout``.

    ``logits [layers, rows, heads, max]`` and ``lse [layers, rows, heads]`` are the step's.
    """
    found = []
    for layer, stored in enumerate(state.rows[r].layers):
        start = stored.layout.text_start
        text = start + state.lengths.texts[r]
        beside = [
            torch.arange(first, first + len(positions), device=logits.device)
            for first, positions in state.lists.listed_parts(stored, layer, r, FULL)
        ]
        plain = torch.arange(text, device=logits.device)
        entries = torch.cat([plain[:start], *beside, plain[start:]])
        found.append((logits[layer, r][:, entries] - lse[layer, r][:, None]).exp())
    return found


def pack(row: Row, pools: Sequence[Pool], weights: Sequence[Tensor], ranks: Ranks = ALONE) -> None:
    """Store the text of ``row`` (settled) as its policy says by the ``weights`` of a step.

    Where a pool with a limit has no room, the row stays what it is until it is asked again.
    """
    taken: list[Extent] = []
    kept, parts = [], []
    try:
        for layer, (stored, pool) in enumerate(zip(row.layers, pools, strict=True)):
            received = ReceivedInStep(weights[layer], ranks)
            kept.append(row.policy.retain(layer, stored.whole_layout(), received))
            parts.append(_parts(stored, pool, kept[-1], taken))
    except CapacityError:
        for extent in taken:
            extent.give()
        return
    both = zip(row.layers, pools, kept, parts, strict=True)
    row.layers = [_closed_up(*each) for each in both]


def _parts(stored: Stored, pool: Pool, kept: Kept, taken: list[Extent]) -> tuple[Part, ...]:
    """New parts, of the plain tokens that are kept in formats."""
    layout, parts = stored.layout, []
    for each in kept.packed:
        mine = each._replace(columns=_plain(stored, each.columns))
        if len(mine.columns):
            extent = pool.of(each.format).take(len(mine.columns))
            taken.append(extent)
            slots = mine.columns + stored.start
            parts.append(Part.written(extent, pool.k[slots], pool.v[slots], layout, mine))
    return tuple(parts)


def _closed_up(stored: Stored, pool: Pool, kept: Kept, parts: tuple[Part, ...]) -> Stored:
    """What stays plain moves to the front of the extent."""
    columns = _plain(stored, kept.shared)
    for numbers in (pool.k, pool.v):
        numbers[stored.start : stored.start + len(columns)] = numbers[columns + stored.start]
    layout = stored_layout(stored.layout, columns, columns[:0])
    return replace(stored, layout=layout, parts=(*stored.parts, *parts))


def _plain(stored: Stored, columns: Tensor) -> Tensor:
    """Those of the whole layout's columns that lie in plain slots, counted from the extent's start.

    Columns of parts, which lie before the text, stay where they are.
    """
    start = stored.layout.text_start
    packed = sum(part.tokens for part in stored.parts)
    return torch.cat([columns[columns < start], columns[columns >= start + packed] - packed])
