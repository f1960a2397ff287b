"""What the cache holds of one sequence between passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..policies.layout import Layout
from ..policies.policy import Policy
from .observe import Observer
from .pool import Pool

Extent = tuple[Pool, int, int]  # of which pool, where it starts, how many slots it has


@dataclass
class Stored:
    """One layer's part of a sequence: an extent of the layer's pool and what lies in it.

    ``layout``'s columns are the extent's used slots, relative to ``start``: first the shared part
    (fixed and image tokens), from ``layout.text_start`` on the text. ``core`` and ``text_scores``
    are as in ``Kept``, with columns now meaning these slots.
    """

    start: int
    capacity: int
    layout: Layout
    core: Tensor | None
    text_scores: Tensor | None


@dataclass
class Row:
    """One sequence under its own ``policy``: rows that are decoded together may differ in it.

    ``image_spans`` are the positions of every picture's tokens; ``opening`` is how many tokens the
    first prefill had (see ``Step``); ``attended_share`` collects, for
    every decode step, the share of the tokens seen that were multiplied with (mean over layers);
    ``observer`` is told of every layer of every pass.
    """

    policy: Policy = field(default_factory=Policy)
    layers: list[Stored] = field(default_factory=list)
    image_spans: list[tuple[int, int]] = field(default_factory=list)
    opening: int = 0
    step: int = 0
    attended_share: list[float] = field(default_factory=list)
    observer: Observer | None = None

    @property
    def seen(self) -> int:
        """Tokens seen, which is also the next position."""
        return self.layers[0].layout.seen if self.layers else 0

    def extents(self, pools: Sequence[Pool]) -> list[Extent]:
        """What the sequence owns of each layer's pool."""
        pairs = zip(pools, self.layers, strict=bool(self.layers))
        return [(pool, stored.start, stored.capacity) for pool, stored in pairs]
