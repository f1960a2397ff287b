"""What of a sequence's pictures is stored and what its decode steps have read, in bytes.

Where cross layers look at pictures, these are features instead of image tokens: ``Row.across``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.formats import format_of
from .pool import Pool
from .row import Row, Stored


@dataclass(frozen=True)
class PictureBytes:
    """Bytes of image tokens, all layers together.

    Attributes:
        stored: bytes by format.
        step_bytes: bytes that a step has read, mean; without a step what is stored.
        left_out, values_read: as in ``CacheReport``.
        full: bytes of an image token in the full cache.
    """

    stored: dict[str, int]
    step_bytes: float
    left_out: float
    values_read: float
    full: int

    def share(self, bytes_: float, tokens: int) -> float:
        """A share of what ``tokens`` image tokens take in the full cache."""
        return bytes_ / (self.full * tokens) if tokens else 0.0


@dataclass(frozen=True)
class _Held:
    """Image tokens that a layer holds in one format, and how many of them are core.

    Means over heads, where these hold different ones.
    """

    format: str
    packed: bool
    tokens: float
    core: float
    key: int  # bytes of a token's keys
    value: int


def picture_bytes(row: Row, pools: Sequence[Pool]) -> PictureBytes:
    """Count what ``row`` (settled) holds and has read."""
    spans = row.image_spans
    held = [list(_of_layer(*both, spans)) for both in zip(pools, row.layers, strict=True)]
    everything = [each for layer in held for each in layer]
    stored: dict[str, int] = {}
    for each in everything:
        bytes_ = round(each.tokens * (each.key + each.value))
        stored[each.format] = stored.get(each.format, 0) + bytes_
    full_steps, core_steps = row.lists
    steps = full_steps + core_steps
    left_out, values_read = _sifted(row, pools, held)
    total = 0.0
    for each in everything:
        sifted = values_read if each.packed else 1.0
        rows = full_steps * each.tokens + core_steps * each.core
        total += rows * (each.key + sifted * each.value)
    return PictureBytes(
        stored=stored,
        step_bytes=total / steps if steps else sum(stored.values()),
        left_out=left_out,
        values_read=values_read,
        full=sum(pool.slot_bytes for pool in pools),
    )


def images_among(positions: Tensor, spans: Sequence[tuple[int, int]]) -> float:
    """How many of ``positions [heads, n]`` are image tokens, mean over heads: also where a policy
    takes pictures for text.

    >>> images_among(torch.tensor([[0, 1, 2, 9], [0, 5, 6, 9]]), [(1, 4), (9, 10)])
    2.0
    """
    inside = torch.zeros_like(positions, dtype=torch.bool)
    for start, end in spans:
        inside |= (positions >= start) & (positions < end)
    return float(inside.sum()) / len(positions)


def _of_layer(pool: Pool, stored: Stored, spans: Sequence[tuple[int, int]]) -> Iterator[_Held]:
    tokens = images_among(stored.layout.positions, spans)
    core = tokens if stored.core is None else len(stored.core)
    half = pool.slot_bytes // 2
    yield _Held(format_of(pool.k.dtype).name, False, tokens, core, half, half)
    for part in stored.parts:
        tokens = int((part.image_of >= 0).sum())
        core = tokens if part.core is None else len(part.core)
        written = pool.holding(part.format)
        if isinstance(written, Pool):
            yield _Held(format_of(pool.k.dtype).name, False, tokens, core, half, half)
            continue
        pages = written.layout
        sides = pages.key.token_bytes, pages.value.token_bytes
        yield _Held(pages.name, True, tokens, core, *sides)


def _sifted(
    row: Row, pools: Sequence[Pool], held: Sequence[Sequence[_Held]]
) -> tuple[float, float]:
    """Share of attention left out, and of values read."""
    steps, kv_heads = sum(row.lists), pools[0].k.shape[1]
    if row.spent is None or not row.policy.leaves_out() or not steps:
        return 0.0, 1.0
    full_steps, core_steps = row.lists
    listed = sum(
        full_steps * each.tokens + core_steps * each.core
        for layer in held
        for each in layer
        if each.packed
    )
    if not listed:
        return 0.0, 1.0
    left, read = row.spent.sum(0).tolist()
    return left / (steps * kv_heads * len(held)), read / (listed * kv_heads)
