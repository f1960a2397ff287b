"""What takes decode steps, and its plainest form: every operation started from Python."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..cache.decode import Decoding
from ..models.decoder import Decoder


class Runner(Protocol):
    """Takes steps of the rows of one ``Decoding``; the tokens are the same whichever does.

    Attributes:
        eager_because: why it starts a step's operations one by one; None where it does not.
    """

    eager_because: str | None

    def load(self) -> None:
        """Rows have come or gone: the next steps are of those that are there now."""

    def step(self, tokens: Tensor) -> Tensor:
        """Process ``tokens [rows]`` int64; returns the next tokens' logits ``[rows, vocab]``."""

    def unload(self) -> None:
        """Rows are about to come or go: all steps taken must be accounted for."""


class Eager:
    """Any model, any device, any kind of step."""

    def __init__(self, decoder: Decoder, decoding: Decoding, because: str | None = None) -> None:
        self.eager_because = because
        self._decoder, self._decoding = decoder, decoding

    def load(self) -> None:
        """Nothing is kept from step to step."""

    def step(self, tokens: Tensor) -> Tensor:
        """See ``Runner.step``."""
        decoder = self._decoder
        logits = decoder.logits(decoder(decoder.embed(tokens), self._decoding))
        self._decoding.advance()
        return logits

    def unload(self) -> None:
        """Every step is accounted for when it is done."""
