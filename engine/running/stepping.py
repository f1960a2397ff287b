"""Decode steps of changing rows: made of recorded layers or eager, or replayed as captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.decode import Decoding
from ..cache.pool import Pool
from ..cache.row import Row
from ..cache.streams import check_form, side_for
from ..models.vision_language import VisionLanguageModel
from .graphs import CapturedStep, obstacle
from .recorded import RecordedDecoder, recordable


@dataclass(frozen=True)
class Stepping:
    """How decode steps are taken; the tokens are the same whatever is chosen.

    Attributes:
        selection: where selection runs, one of ``cache.streams.FORMS``.
        graphs: replay captured steps where that is possible; on a CPU a dry run of the same code.
    """

    selection: str = "branch"
    graphs: bool = False

    def __post_init__(self) -> None:
        check_form(self.selection)


class Stepper:
    """Decodes rows of some pools, one token of each per step.

    ``begin`` with the rows, ``step`` as often as wanted, ``settle`` before rows come or go.

    Attributes:
        eager_because: why steps are not replayed, None where they are.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        pools: Sequence[Pool],
        stepping: Stepping,
    ) -> None:
        self.model, self.pools = model, pools
        self.eager_because: str | None = None if stepping.graphs else "graphs are not asked for"
        self._graphs = stepping.graphs
        self._side = side_for(stepping.selection, pools[0].k.device)
        self._by_rows: dict[int, CapturedStep] = {}
        self._captured: CapturedStep | None = None
        self._decoding: Decoding | None = None
        self._recorded: RecordedDecoder | None = None

    @property
    def decoding(self) -> bool:
        """Whether rows are being decoded."""
        return self._decoding is not None

    def seen(self, r: int) -> int:
        """Tokens of row ``r`` so far."""
        assert self._decoding is not None, "begin comes first"
        return self._decoding.seen[r] + (self._captured.done if self._captured else 0)

    @torch.inference_mode()
    def begin(self, rows: list[Row]) -> None:
        """Take up the rows."""
        self._decoding = self._pack(rows)
        if self._graphs:
            self.eager_because = obstacle(self.model, self._decoding)
        if self._graphs and not self.eager_because:
            self._captured = self._loaded(rows, self._decoding)
            self._decoding = self._captured.decoding

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Process ``tokens [rows]`` int64; returns the next tokens' logits ``[rows, vocab]``."""
        if self._captured is not None:
            return self._captured.step(tokens).clone()
        assert self._decoding is not None, "begin comes first"
        decoder, decoding = self.model.decoder, self._decoding
        hidden = decoder.embed(tokens)
        if self._recorded is None and recordable(hidden, decoding):
            self._recorded = RecordedDecoder(decoder, decoding)
        if self._recorded:
            logits = self._recorded(hidden)
        else:
            logits = decoder.logits(decoder(hidden, decoding))
        decoding.advance()
        return logits

    @torch.inference_mode()
    def settle(self) -> list[Row]:
        """The rows with their decode state written back."""
        assert self._decoding is not None, "begin comes first"
        if self._captured is not None:
            self._captured.finish()
        rows = [self._decoding.settle(r) for r in range(len(self._decoding.rows))]
        self._decoding = self._captured = self._recorded = None
        return rows

    def _pack(self, rows: list[Row]) -> Decoding:
        return Decoding(self.pools, rows, self._side, static=self._graphs)

    def _loaded(self, rows: list[Row], decoding: Decoding) -> CapturedStep:
        """The captured step of as many rows, with these loaded; captured anew unless they fit."""
        captured = self._by_rows.pop(len(rows), None)
        if captured is not None and captured.fits(decoding):
            captured.load(decoding)
        else:
            del captured  # and with it what it holds of pools that have grown since
            captured = CapturedStep(self.model, lambda: self._pack(rows))
        self._by_rows[len(rows)] = captured
        return captured
