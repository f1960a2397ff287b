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
from .pool import PagedPool, Pool
from .row import Row, Stored
from .slot_lists import CORE, FULL, SlotLists
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


def show_look(row: Row, weights: Sequence[Sequence[Tensor]]) -> None:
    """Tell the row's observer of a prefill's cross layers: ``weights [heads, features]`` are what
    the last token gave to each picture that it sees, layer by layer.
    """
    across = row.across()
    for layer, (stored, given) in enumerate(zip(across.layers, weights, strict=True)):
        positions = torch.cat([part.positions for part in stored.parts], 1)
        _show_across(across, layer, 0, torch.cat(list(given), 1), positions)


def _show_across(
    across: Row,
    layer: int,
    step: int,
    weights: Tensor,
    positions: Tensor,
    core: Tensor | None = None,
) -> None:
    """``weights [heads, n]`` on features at ``positions [1, n]``; ``core`` are positions too, those
    of the prefill if it is None.
    """
    stored = across.layers[layer]
    held, pool = stored.whole_layout().positions, stored.extent.pool.plain
    core = stored.core_positions() if core is None else core
    assert across.observer is not None
    across.observer.observe(
        Observed(
            layer=layer,
            step=step,
            query=stored.layout.seen,
            weights=weights.cpu().clone(),  # what lies where is known on the host
            positions=positions,
            tiers=tiers_of(across.image_spans, held, core),
            image_spans=tuple(across.image_spans),
            text=held[:, :0],
            bytes=stored.nbytes(pool, 0),
            bits=bits_of(across, stored, held, pool),
            across=True,
        )
    )


def show_step_across(
    across: Row,
    r: int,
    step: int,
    lists: SlotLists,
    scores: tuple[Tensor, Tensor],
    seen: Sequence[Attended],
) -> None:
    """Tell the observer of row ``r`` of cross layers' ``lists``, which ``across`` is, of a closed
    step; ``scores`` are as in ``show_step``, and ``seen`` what it attended.
    """
    logits, lse = scores
    for layer, stored in enumerate(across.layers):
        weights = (logits[layer, r] - lse[layer, r][:, None]).exp()[:, seen[layer].entries]
        core = None
        if stored.core is not None:
            found = [mine for _, mine in lists.listed_parts(stored, layer, r, CORE)]
            core = torch.cat(found)
        _show_across(across, layer, step, weights, seen[layer].positions, core)


def attended_across(across: Row, r: int, lists: SlotLists, kind: int) -> list[Attended]:
    """See ``attended``: the same of cross layers."""
    found = []
    for layer, stored in enumerate(across.layers):
        parts = list(lists.listed_parts(stored, layer, r, kind))
        entries = [torch.arange(start, start + len(mine)) for start, mine in parts]
        positions = torch.cat([mine for _, mine in parts])[None]
        found.append(Attended(positions, torch.cat(entries)))
    return found


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
        chosen = state.core if kind == CORE else FULL
        for start, mine in state.lists.listed_parts(stored, layer, r, chosen):
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
        written = part.extent.pool
        named = parse_bits(written.layout.name) if isinstance(written, PagedPool) else (16, 16)
        own = [8 * pool.k.element_size() if n == 16 else n for n in named]
        bits[mine] = sum(own)
    return bits.to(torch.uint8)


def _beside(left: Tensor, right: Tensor) -> Tensor:
    """Positions joined; either may be shared by the heads."""
    heads = max(len(left), len(right))
    return torch.cat([left.expand(heads, -1), right.expand(heads, -1)], 1)
