"""What the cache holds of one sequence between passes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..policies.layout import Layout
from ..policies.policy import Policy
from .observe import Observer
from .pool import Extent


@dataclass
class Stored:
    """One layer's share of a sequence: an extent of the layer's pool and what lies in it.

    ``layout``'s columns are the extent's used slots, relative to its start: first the shared slots
    (fixed and image tokens), from ``layout.text_start`` on the text. ``core`` and ``text_scores``
    are as in ``Kept``, with columns now meaning these slots.
    """

    extent: Extent
    layout: Layout
    core: Tensor | None
    text_scores: Tensor | None

    @property
    def start(self) -> int:
        """The extent's first slot."""
        return self.extent.start

    @property
    def text_slots(self) -> int:
        """Slots for text, used or not."""
        return self.extent.size - self.layout.text_start


def no_rotary() -> Tensor:
    """The rotary state of a model whose angles follow from a token's number alone."""
    return torch.empty(0, dtype=torch.int64)


@dataclass
class Row:
    """One sequence under its own ``policy``: rows that are decoded together may differ in it.

    ``image_spans`` are the positions of every picture's tokens; ``rotary [words]`` int64 is what
    the model's rotation has made of the first prefill, see ``Step``; ``attended_share`` collects,
    for every decode step, the share of the tokens seen that were multiplied with (mean over
    layers); ``observer`` is told of every layer of every pass.
    """

    policy: Policy = field(default_factory=Policy)
    layers: list[Stored] = field(default_factory=list)
    image_spans: list[tuple[int, int]] = field(default_factory=list)
    rotary: Tensor = field(default_factory=no_rotary)
    step: int = 0
    attended_share: list[float] = field(default_factory=list)
    observer: Observer | None = None

    @property
    def seen(self) -> int:
        """Tokens seen, which is also the next position."""
        return self.layers[0].layout.seen if self.layers else 0

    def give(self) -> None:
        """Give back all that the sequence holds of the pools."""
        for stored in self.layers:
            stored.extent.give()
