"""Decode steps of rows that come and go: replayed as captured, taped, or eager."""

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
from . import captured, taped
from .captured import Captured
from .runner import Eager, Runner
from .taped import Taped


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
    """Decodes rows of some pools, one token of each per step; rows come and go between steps."""

    def __init__(
        self, model: VisionLanguageModel, pools: Sequence[Pool], stepping: Stepping
    ) -> None:
        self._model, self._graphs = model, stepping.graphs
        self._ranks = model.decoder.ranks
        side = side_for(stepping.selection, pools[0].k.device)
        self.decoding = Decoding(pools, side=side, ranks=self._ranks)
        self._captured = Captured(model, self.decoding)
        self._taped = Taped(model.decoder, self.decoding)
        self._runner: Runner | None = None
        self.decoding.state.holders.add(self)

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.decoding.rows)

    @property
    def eager_because(self) -> str | None:
        """Why a step's operations are started one by one; None where they are not."""
        return self._loaded().eager_because

    def seen(self) -> int:
        """Tokens of all rows when they were last accounted for."""
        return sum(self.decoding.seen)

    @torch.inference_mode()
    def join(self, row: Row) -> None:
        """Take up a row: the last one from now on."""
        self._unload()
        self.decoding.join(row)

    @torch.inference_mode()
    def leave(self, r: int) -> Row:
        """Row ``r`` goes, complete; the last row takes its index."""
        self._unload()
        return self.decoding.leave(r)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Process ``tokens [rows]`` int64; returns the next tokens' logits ``[rows, vocab]``."""
        return (self._runner or self._loaded()).step(self._ranks.agree(tokens))

    def void(self) -> None:
        """See ``Holder``."""
        self._unload()

    def _unload(self) -> None:
        if self._runner is not None:
            self._runner.unload()
            self._runner = None

    def _loaded(self) -> Runner:
        """What takes the steps of the rows that are there now."""
        if self._runner is None:
            self._runner = self._chosen()
            self._runner.load()
        return self._runner

    def _chosen(self) -> Runner:
        decoder, decoding = self._model.decoder, self.decoding
        if self._ranks.size > 1:
            return Eager(decoder, decoding, "sums over processes stand between its calls")
        if self._graphs:
            because = captured.obstacle(self._model, decoding)
            return Eager(decoder, decoding, because) if because else self._captured
        because = taped.obstacle(decoder, decoding)
        return Eager(decoder, decoding, because) if because else self._taped
