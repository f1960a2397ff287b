"""Cache policies on a decoder that rotates by time, rows and columns, against slow references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.models.decoder import Decoder, Grid
from engine.models.mrope import MRotation, blocked, interleaved
from engine.policies.avl import Avl
from engine.policies.h2o import H2o
from tests.cache_run import CacheRun, seeded_decoder
from tests.reference_cache import ReferenceAvl, ReferenceH2o, Settings
from tests.reference_decoder import ReferenceDecoder
from tests.test_cache_avl import close, nearly_always_equal, turn

SECTIONS = (2, 3, 3)
GRIDS = {36: Grid(4, 9), 20: Grid(5, 4), 6: Grid(1, 6)}
AXES: dict[str, Callable[[tuple[int, ...]], list[int]]] = {
    "blocked": blocked,
    "interleaved": interleaved,
}


class Placed(ReferenceDecoder):
    """The slow decoder whose tokens have coordinates, counted one after the other."""

    def __init__(self, decoder: Decoder, axes: str) -> None:
        super().__init__(decoder, torch.float64)
        self.axes = axes
        self.places: list[tuple[int, int, int]] = []
        self.next = 0

    def see(self, tokens: int, spans: list[tuple[int, int]]) -> None:
        """A turn, or tokens that are decoded."""
        first = len(self.places)
        starts = {first + start: GRIDS[end - start] for start, end in spans}
        while len(self.places) < first + tokens:
            rows, columns, _ = starts.get(len(self.places), Grid(0, 0))
            begin = self.next
            for row in range(rows):
                for column in range(columns):
                    self.places.append((begin, begin + row, begin + column))
            if not rows:
                self.places.append((begin, begin, begin))
            self.next += max(rows, columns, 1)

    def _rotated(self, x: Tensor, positions: list[int]) -> Tensor:
        half = self.head_dim // 2
        x = x.view(len(x), -1, self.head_dim)
        angle = torch.zeros(len(x), half, dtype=torch.float64)
        for token, number in enumerate(positions):
            for i in range(half):
                place = self.places[number][self._axis(i)]
                angle[token, i] = place / self.config.rope_theta ** (2 * i / self.head_dim)
        turned = torch.complex(x[..., :half].double(), x[..., half:].double())
        turned = turned * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([turned.real, turned.imag], -1).to(self.dtype)

    def _axis(self, i: int) -> int:
        """As the description has it, frequency by frequency."""
        _, rows, columns = SECTIONS
        if self.axes == "blocked":
            return 0 if i < SECTIONS[0] else 1 if i < SECTIONS[0] + rows else 2
        if i % 3 == 1 and i < 3 * rows:
            return 1
        return 2 if i % 3 == 2 and i < 3 * columns else 0


class Seeing(CacheRun):
    """Tells the reference of every turn and step before it is asked about them."""

    def __init__(self, decoder: Decoder, policy: Avl | H2o, placed: Placed) -> None:
        super().__init__(decoder, policy)
        self.grids, self.placed = GRIDS, placed

    def prefill(self, hidden: Tensor, spans: list[tuple[int, int]], new_tokens: int) -> Tensor:
        self.placed.see(len(hidden), spans)
        return super().prefill(hidden, spans, new_tokens)

    def decode(self, hidden: Tensor) -> Tensor:
        self.placed.see(1, [])
        return super().decode(hidden)


def pair(axes: str, seed: int) -> tuple[Decoder, Placed]:
    decoder = seeded_decoder(seed)
    size, theta = decoder.config.head_dim, decoder.config.rope_theta
    decoder.rotation = MRotation(size, theta, "cpu", AXES[axes](SECTIONS))
    return decoder, Placed(decoder, axes)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize(
    "settings", [Settings(floor=4), Settings(core=None, floor=4), Settings(0.2, 0.13, 4, 0.5, 1)]
)
def test_avl_equals_the_slow_reference(axes: str, settings: Settings) -> None:
    decoder, placed = pair(axes, 5)
    run = Seeing(decoder, Avl(**vars(settings)), placed)
    reference = ReferenceAvl(placed, settings)
    turn(run, reference, tokens=57, spans=[(6, 42)], steps=40, seed=3)
    nearly_always_equal(reference)


@pytest.mark.parametrize("axes", AXES)
def test_pictures_of_later_turns_go_on_behind_the_earlier(axes: str) -> None:
    decoder, placed = pair(axes, 6)
    settings = Settings(floor=4)
    run = Seeing(decoder, Avl(**vars(settings)), placed)
    reference = ReferenceAvl(placed, settings)
    turn(run, reference, tokens=50, spans=[(4, 40)], steps=9, seed=3)
    turn(run, reference, tokens=40, spans=[(3, 9), (12, 32)], steps=25, seed=4)
    words = [[4, 4, 9, 0, 9], [62, 1, 6, 0, 6], [71, 5, 4, 0, 5]]
    assert run.settle().rotary.view(-1, 5).tolist() == words


def test_h2o_equals_its_slow_reference() -> None:
    decoder, placed = pair("interleaved", 7)
    run, reference = Seeing(decoder, H2o(), placed), ReferenceH2o(placed)
    from tests.cache_run import embeddings

    hidden = embeddings(57, 3, decoder.config.hidden)
    spans = [(6, 42)]
    close(run.prefill(hidden, spans, 41), reference.prefill(hidden, spans, run))
    for step in range(40):
        hidden = embeddings(1, step + 90, decoder.config.hidden)
        close(run.decode(hidden), reference.decode(hidden, run))
