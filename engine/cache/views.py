"""What the layers see of a decode step."""

from __future__ import annotations

from typing import Protocol
from weakref import proxy

from torch import Tensor

from ..ops.fused import Destination, rope_write
from ..ops.rotary import Tables


class Stepped(Protocol):
    """The decode step that views belong to; see ``Decoding``."""

    parts: list[slice]

    def destination(self, layer: int) -> Destination:
        """Where the rows' new token goes."""

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attend the step's lists."""

    def arrive(self, part: int) -> None:
        """Before a part's first layer."""

    def leave_part(self, part: int) -> None:
        """Behind a part's last attention."""


class DecodeView:
    """A layer's view of a decode step."""

    def __init__(self, step: Stepped, layer: int) -> None:
        # Weakly: the step holds its views, and what it holds shall be freed as soon as it is.
        self.step: Stepped = proxy(step)
        self.layer, self._destination = layer, step.destination(layer)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tables: Tables) -> Tensor:
        """See ``View.attend``; one query per row."""
        queries = rope_write(q, k, v, *tables, self._destination)
        return self.step.attend(self.layer, queries)


class EdgeView(DecodeView):
    """The view of the first or last layer of a part, where selection is awaited or started."""

    def __init__(self, step: Stepped, layer: int, part: int) -> None:
        super().__init__(step, layer)
        layers = step.parts[part]
        self._part = part
        self._first, self._last = layer == layers.start, layer == layers.stop - 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tables: Tables) -> Tensor:
        """See ``View.attend``."""
        if self._first:
            self.step.arrive(self._part)
        out = super().attend(q, k, v, tables)
        if self._last:
            self.step.leave_part(self._part)
        return out
