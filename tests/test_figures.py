"""The drawings of bench/: tiers on a picture, and the data behind the paper's figures."""

import csv
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from bench.figures import (
    attention_figures,
    by_modality,
    mean_rows,
    quality_by_bytes,
    result_figures,
    sweep_figures,
    write_csv,
    write_points,
)
from bench.quality import SWEEPS, specs_of
from bench.tiers import COLOURS, draw, tint
from engine.cache.observe import CORE, MINOR, SECONDARY
from engine.engine import Engine
from engine.insight.panels import Panel
from engine.insight.trace import Trace
from engine.policies.specs import parse
from tests.checkpoints import Shape
from tests.noise import noise


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
    drawn, layers = attention_figures(traces, "toy"), len(traces[0].passes[0])
    lengths = {
        name: {len(values) for values in [figure.places, *figure.columns.values()]}
        for name, figure in drawn.items()
    }
    assert lengths == {
        "attention_by_modality": {5},
        "sparsity_by_layer": {layers},
        "ppci_between_layers": {layers - 1},
        "ppci_between_steps": {4},
    }
    shares = by_modality(traces)
    for step in range(5):
        assert sum(values[step] for values in shares.values()) == pytest.approx(1, abs=1e-5)
    write_csv(tmp_path / "a.csv", drawn["ppci_between_layers"])
    rows = list(csv.reader((tmp_path / "a.csv").read_text().splitlines()))
    assert rows[0] == ["later layer", "top 20%", "top 30%", "top 40%", "top 50%"]
    assert [row[0] for row in rows[1:]] == [str(layer) for layer in range(1, layers)]


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_sweep_moves_one_parameter_and_is_drawn_beside_full(sweep: str) -> None:
    for line in SWEEPS[sweep].values():
        for share, spec in line.items():
            assert getattr(parse(spec), sweep) == share
        policies = [asdict(parse(spec)) for spec in line.values()]
        same = [key for key in policies[0] if len({policy[key] for policy in policies}) == 1]
        assert set(policies[0]) - set(same) == {sweep}
    specs = ["full", *(parse(spec).spec for spec in specs_of(sweep))]
    rows = [{"task": "read", "policy": s, "right": n / 100} for n, s in enumerate(specs)]
    settings = {"pages per task": 7, "model": "toy"}
    ((name, figure),) = sweep_figures(sweep, {"settings": settings, "rows": rows})
    assert name == f"quality_{sweep}_read"
    drawn = [value for line in SWEEPS[sweep] for value in figure.columns[line]]
    assert drawn == [n / 100 for n in range(1, len(specs))]
    assert set(figure.columns.pop("full cache")) == {0.0}
    assert figure.places == sorted(figure.places)


def test_latency_is_drawn_by_batch_size_and_what_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"model": "LLaVA-1.5", "batch": batch, "what": what, "attention ms": batch * ms}
        for batch in (1, 4)
        for what, ms in (("full", 3.0), ("compressed", 2.0), ("slice", 4.0), ("ours", 1.0))
    ]
    record = {"machine": {"cpu": "abacus", "gpu": None}, "rows": rows}
    record["settings"] = {"device": "cpu", "dtype": "float32"}
    (tmp_path / "latency.json").write_text(json.dumps(record))
    (figure,) = result_figures(tmp_path).values()
    assert figure.places == [1, 4]
    assert figure.columns == {"full": [3, 12], "slice": [4, 16], "ours": [1, 4]}
    said = capsys.readouterr().out
    assert all(f"bench.quality --sweep {sweep}" in said for sweep in SWEEPS)


def test_quality_by_bytes_has_a_line_for_each_method(tmp_path: Path) -> None:
    assert quality_by_bytes(tmp_path) == {}
    specs = ["full", "sift:skip=0", "sift", "zipvl", "zipvl:format=plain,minor=freed", "h2o", "avl"]
    specs += ["avl:core=none", "avl:minor=k4v2", "sift:format=k4v2"]
    rows = [
        {
            "task": task,
            "policy": parse(spec).spec,
            "right": 1 - number / 100,
            "picture stored %": 100 - number,
            "picture read %": 50 - number,
        }
        for task in ("read", "field", "describe")
        for number, spec in enumerate(specs)
    ]
    for group, mine in (("formats", rows[:12]), ("bytes", rows[10:])):
        (tmp_path / f"quality-{group}.json").write_text(json.dumps({"rows": mine}))
    drawn = quality_by_bytes(tmp_path)
    assert list(drawn) == ["quality_by_bytes_stored", "quality_by_bytes_read"]
    pages = drawn["quality_by_bytes_read"].panels["whole pages"]
    assert pages["sift"] == [(41, 0.91), (48, 0.98)]
    assert pages["zipvl v1"] == [(47, 0.97)]
    assert pages["zipvl v2"] == [(46, 0.96)]
    assert set(pages) == {
        *("full", "few bits, all values read", "sift", "zipvl v1", "zipvl v2", "h2o", "avl"),
        *("avl, S alone", "avl in formats"),
    }
    write_points(tmp_path / "points.csv", drawn["quality_by_bytes_stored"])
    with (tmp_path / "points.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 1 + 3 * len(specs)
