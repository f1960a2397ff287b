"""Which columns of a sequence are fixed, which are image tokens, and where evictable text begins.

A *column* is a place among the keys that a prefill attends over: first what earlier turns left in
the cache, then the new tokens. Columns say nothing about time; ``positions`` does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Modality of every column, and the counts that shares are taken of.

    Attributes:
        image_of: ``[columns]`` int64; the picture a column belongs to, or -1.
        positions: ``[1 or kv_heads, columns]`` int64; a column may hold different tokens per head.
        text_start: columns from here on are text after the last picture, which may be evicted.
            Everything else that is not a picture is fixed.
        image_sizes: image tokens each picture had at first (I: the base of every share).
        settled: pictures of earlier turns, whose secondary tokens are already chosen.
        text_seen: tokens seen after the last picture, evicted ones included.
        seen: tokens seen in all, evicted ones included; the next position.
        minor: ``[columns]`` bool, image tokens that earlier turns keep as minor ones; None: none.

    35 system tokens, a picture of 576 and 22 tokens of instruction: ``image_of`` is 35 times -1,
    576 times 0, 22 times -1; ``text_start`` 611, ``image_sizes`` (576,), ``text_seen`` 22, ``seen``
    633.
    """

    image_of: Tensor
    positions: Tensor
    text_start: int
    image_sizes: tuple[int, ...]
    settled: int
    text_seen: int
    seen: int
    minor: Tensor | None = None

    @classmethod
    def of_tokens(cls, count: int, spans: list[tuple[int, int]], device: torch.device) -> Layout:
        """The layout of ``count`` fresh tokens with pictures at ``spans`` (start, end)."""
        image_of = torch.full((count,), -1, dtype=torch.int64)
        for index, (start, end) in enumerate(spans):
            image_of[start:end] = index
        text_start = max((end for _, end in spans), default=0)
        return cls(
            image_of=image_of.to(device),
            positions=torch.arange(count, device=device)[None],
            text_start=text_start,
            image_sizes=tuple(end - start for start, end in spans),
            settled=0,
            text_seen=count - text_start,
            seen=count,
        )

    @property
    def columns(self) -> int:
        """Number of columns."""
        return len(self.image_of)

    def lengths(self, more: int = 0) -> tuple[int | None, int]:
        """Tokens after the last picture (None without one) and in all, ``more`` tokens from now."""
        return (self.text_seen + more if self.image_sizes else None), self.seen + more

    def picture(self, index: int) -> Tensor:
        """Ascending columns of picture ``index``."""
        return (self.image_of == index).nonzero()[:, 0]

    def image_columns(self, index: int) -> int:
        """How many columns picture ``index`` has."""
        return int((self.image_of == index).sum())

    def fixed(self) -> Tensor:
        """Ascending columns before the text that belong to no picture."""
        return (self.image_of[: self.text_start] < 0).nonzero()[:, 0]

    def text(self) -> Tensor:
        """Ascending columns of the evictable text."""
        return torch.arange(self.text_start, self.columns, device=self.image_of.device)

    def at(self, columns: Tensor) -> Layout:
        """The layout when only the ascending ``columns`` go on; counts seen stay."""
        return replace(
            self,
            image_of=self.image_of[columns],
            positions=self.positions[:, columns],
            text_start=int((columns < self.text_start).sum()),
            minor=None if self.minor is None else self.minor[columns],
        )

    def followed_by(self, turn: Layout) -> Layout:
        """This layout (of stored columns) with the tokens of a new ``turn`` appended.

        A new picture makes all earlier text fixed; without one, the text goes on.
        """
        pictures = len(self.image_sizes)
        heads = max(len(self.positions), len(turn.positions))
        positions = [x.positions.expand(heads, -1) for x in (self, turn)]
        new_picture, minor = bool(turn.image_sizes), self.minor
        return Layout(
            image_of=torch.cat([self.image_of, turn.image_of + pictures * (turn.image_of >= 0)]),
            positions=torch.cat([positions[0], positions[1] + self.seen], 1),
            text_start=self.columns + turn.text_start if new_picture else self.text_start,
            image_sizes=self.image_sizes + turn.image_sizes,
            settled=pictures,
            text_seen=turn.text_seen if new_picture else self.text_seen + turn.seen,
            seen=self.seen + turn.seen,
            minor=None if minor is None else F.pad(minor, (0, turn.columns)),
        )


class InFormat(NamedTuple):
    """Columns that are written in a format of the cache (``ops.pages``), image tokens as a rule.

    ``minor`` ones are never core.
    """

    format: str
    columns: Tensor
    minor: bool = False


@dataclass(frozen=True)
class Kept:
    """What a layer stores after a prefill, as columns of its layout.

    Attributes:
        shared: ``[n]`` ascending columns kept for all heads: fixed tokens and image tokens, and
            text that is never evicted again.
        text: ``[t]`` or ``[kv_heads, t]`` columns of the text, which may be evicted later;
            every head keeps equally many, not the same ones.
        core: ascending image columns (of those that are kept) that are attended at every step, or
            None where all image tokens are.
        text_scores: ``[kv_heads, t]`` fp32 attention received so far, where the policy evicts by
        it.
        packed: columns, none of them in ``shared`` or ``text``, that are written in formats of
            their own. What has been written so before stays as it is, whatever is said of it.
    """

    shared: Tensor
    text: Tensor
    core: Tensor | None = None
    text_scores: Tensor | None = None
    packed: tuple[InFormat, ...] = ()

    @classmethod
    def everything(cls, layout: Layout) -> Kept:
        """All columns."""
        shared = torch.arange(layout.text_start, device=layout.image_of.device)
        return cls(shared=shared, text=layout.text())
