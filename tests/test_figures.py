"""The drawings of bench/: tiers on a picture, and the data behind the paper's figures."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from bench.figures import by_modality, figures, mean_rows, write_csv
from bench.tiers import COLOURS, draw, tint
from engine.cache.observe import CORE, MINOR, SECONDARY
from engine.engine import Engine
from engine.insight.panels import Panel
from engine.insight.trace import Trace
from tests.checkpoints import Shape
from tests.oracle import noise


def test_means_count_the_rows_that_reach_a_place() -> None:
    assert mean_rows([[1.0, 2.0, 5.0], [3.0, 4.0]]) == [2.0, 3.0, 5.0]


def test_tiers_differ_in_pattern_without_their_colours() -> None:
    grey = {tier: tint(Image.new("RGB", (20, 20), "white"), tier).convert("1") for tier in COLOURS}
    assert len({image.tobytes() for image in grey.values()}) == 3


def test_each_patch_is_tinted_in_its_own_place() -> None:
    panel = Panel("", Image.new("RGB", (28, 28), "white"), 2, 2, [0, 1, 2, 3])
    whole = draw(panel, [CORE, SECONDARY, MINOR, CORE])
    white = Image.new("RGB", (20, 20), "white")
    for number, tier in enumerate((CORE, SECONDARY, MINOR, CORE)):
        left, top = 60 + number % 2 * 20, number // 2 * 20
        patch = whole.crop((left, top, left + 20, top + 20))
        assert patch.tobytes() == tint(white, tier).tobytes()
    assert whole.crop((0, 0, 40, 40)).getcolors() == [(1600, (255, 255, 255))]


def test_figures_hold_every_layer_and_step(
    engine_of: Callable[..., Engine], tmp_path: Path
) -> None:
    engine, traces = engine_of(Shape(kv_heads=2)), []
    for steps in (3, 5):
        traces.append(Trace())
        list(
            engine.stream(
                "What?",
                [noise(70, 50)],
                observer=traces[-1],
                max_new_tokens=steps,
                ignore_eos=True,
            )
        )
    drawn, layers = figures(traces), len(traces[0].passes[0])
    lengths = {name: {len(v) for v in columns.values()} for name, (*_, columns) in drawn.items()}
    assert lengths == {
        "attention_by_modality": {5},
        "sparsity_by_layer": {layers},
        "ppci_between_layers": {layers - 1},
        "ppci_between_steps": {4},
    }
    shares = by_modality(traces)
    for step in range(5):
        assert sum(values[step] for values in shares.values()) == pytest.approx(1, abs=1e-5)
    *_, x, _, columns = drawn["ppci_between_layers"]
    write_csv(tmp_path / "a.csv", x, columns)
    rows = list(csv.reader((tmp_path / "a.csv").read_text().splitlines()))
    assert rows[0] == ["later layer", "top 20%", "top 30%", "top 40%", "top 50%"]
    assert [row[0] for row in rows[1:]] == [str(layer) for layer in range(1, layers)]
