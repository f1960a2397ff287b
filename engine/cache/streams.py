"""Where selection runs: in the model's own order, or beside it on a second CUDA stream.

Selection ranks and ages cached tokens by the weights that a layer's attention has left. Its result
is due only when that layer attends again, in the next step, so that it may run meanwhile:

- ``branch``: one launch for all layers, forked off behind the last layer's attention. It runs
  beside the rest of the step (the last MLP, the final norm, the language head, sampling).
- ``layers``: the paper's form. Every layer's selection runs on its own, behind the layer's
  attention and beside the layers that follow, from double-buffered lists.
- ``sync``: in order, on the model's stream.

What is selected is applied at a fixed step and never when it happens to be ready: all three give
the same tokens. On a CPU every form is a plain call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from ..errors import OptionError

FORMS = ("branch", "layers", "sync")


class Side(Protocol):
    """Runs selection for the *parts* of a model: a part is a run of layers selected at once.

    Attributes:
        per_layer: whether every layer is a part; otherwise all layers together are part 0.
    """

    per_layer: bool

    def begin(self, part: int, work: Callable[[], None] | None) -> None:
        """The model comes to a part: wait for the part's last work; ``work`` will be started."""

    def start(self, part: int) -> None:
        """The part has attended: start its work, which needs all that was done until now."""

    def join(self) -> None:
        """Wait for the work of all parts."""


class InOrder:
    """Work is done when it is started, on whatever stream is current."""

    per_layer = False

    def __init__(self) -> None:
        self._work: Callable[[], None] | None = None

    def begin(self, part: int, work: Callable[[], None] | None) -> None:
        """See ``Side.begin``."""
        self._work = work

    def start(self, part: int) -> None:
        """See ``Side.start``."""
        work, self._work = self._work, None
        if work is not None:
            work()

    def join(self) -> None:
        """Nothing is ever left to wait for."""


class Beside:
    """Work on a second CUDA stream, ordered by events both ways; the host never waits.

    Inside a captured graph the same calls become a fork and a join, if every step ends with
    ``join``: a graph may not wait for what was recorded outside of it.
    """

    def __init__(self, device: torch.device, per_layer: bool) -> None:
        self.per_layer, self._device = per_layer, device
        self._stream = torch.cuda.Stream(device)
        self._work: dict[int, Callable[[], None] | None] = {}
        self._done: dict[int, torch.cuda.Event] = {}

    def begin(self, part: int, work: Callable[[], None] | None) -> None:
        """See ``Side.begin``."""
        self._wait(part)
        self._work[part] = work

    def start(self, part: int) -> None:
        """See ``Side.start``."""
        work = self._work[part]
        if work is None:
            return
        self._stream.wait_event(torch.cuda.current_stream(self._device).record_event())
        with torch.cuda.stream(self._stream):
            work()
            self._done[part] = self._stream.record_event()

    def join(self) -> None:
        """See ``Side.join``."""
        for part in list(self._done):
            self._wait(part)

    def _wait(self, part: int) -> None:
        done = self._done.pop(part, None)
        if done is not None:
            torch.cuda.current_stream(self._device).wait_event(done)
            # Only now: from here on the model's stream may use the work's tensors for others.
            self._work[part] = None


def check_form(form: str) -> None:
    """Raise OptionError for an unknown form of selection."""
    if form not in FORMS:
        raise OptionError(f"unknown selection {form!r}", hint=f"use {', '.join(FORMS)}")


def side_for(form: str, device: torch.device) -> Side:
    """The side of a form on a device."""
    if device.type != "cuda" or form == "sync":
        return InOrder()
    return Beside(device, per_layer=form == "layers")
