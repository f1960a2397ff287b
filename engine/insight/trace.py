"""Collects what the cache shows into vectors by position, which the measures here are taken of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.observe import Observed


@dataclass(frozen=True)
class Moment:
    """One layer after one pass.

    Attributes:
        step: 0 for a prefill, then the decode step within the turn.
        query: position of the token that looked.
        attention: ``[query + 1]`` fp32, what each position got, mean over heads; positions that
            were not attended got 0. Sums to 1.
        tiers: ``[image tokens]`` uint8, see ``cache.observe``.
        text: ``[1 or kv_heads, t]`` positions kept of the evictable text, ascending.
        bytes, bits: what the layer stores, see ``cache.observe``.
    """

    step: int
    query: int
    attention: Tensor
    tiers: Tensor
    text: Tensor
    bytes: int
    bits: Tensor


class Trace:
    """An observer that keeps everything, on the CPU.

    ``passes[p][layer]`` is the Moment of pass p: the prefill, then every decode step, and so on
    through later turns. ``image_spans`` are the pictures' positions, ``prompt_ends`` how many
    tokens had been seen after each turn's prompt. A pass takes 4 bytes x tokens seen x layers.
    """

    def __init__(self, *, across: bool = False) -> None:
        """``across``: of cross layers, and of no others: features stand for tokens, so that a query
        and ``prompt_ends`` are how many of these there are.
        """
        self.across = across
        self.passes: list[list[Moment]] = []
        self.image_spans: tuple[tuple[int, int], ...] = ()
        self.prompt_ends: list[int] = []

    def observe(self, seen: Observed) -> None:
        """See ``Observer.observe``."""
        if seen.across != self.across:
            return
        if seen.layer == 0:
            self.passes.append([])
            self.image_spans = seen.image_spans
            if seen.step == 0:
                self.prompt_ends.append(seen.query + 1)
        self.passes[-1].append(
            Moment(
                step=seen.step,
                query=seen.query,
                attention=by_position(seen.weights, seen.positions, seen.query + 1).cpu(),
                tiers=seen.tiers.cpu(),
                text=seen.text.sort().values.cpu(),
                bytes=seen.bytes,
                bits=seen.bits.cpu(),
            )
        )

    def image_attention(self, number: int, layer: int) -> Tensor:
        """Attention on the image tokens in pass ``number``: ``[image tokens]``, pictures in order.

        Pictures of later turns count from the pass that brought them.
        """
        attention = self.passes[number][layer].attention
        pictures = [
            attention[start:end] for start, end in self.image_spans if end <= len(attention)
        ]
        return torch.cat(pictures) if pictures else attention.new_empty(0)


def by_position(weights: Tensor, positions: Tensor, length: int) -> Tensor:
    """Head-mean attention by position: ``[length]``.

    Args:
        weights: ``[heads, n]``.
        positions: ``[1 or kv_heads, n]``; query heads ``h // (heads // kv_heads)`` share a row.
        length: positions in all.

    >>> by_position(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[0, 2]]), 3).tolist()
    [0.625, 0.0, 0.375]
    """
    groups = weights.unflatten(0, (len(positions), -1)).sum(1)
    total = torch.zeros(length, dtype=weights.dtype, device=weights.device)
    for places, got in zip(positions, groups, strict=True):
        total.index_add_(0, places, got)
    return total / len(weights)
