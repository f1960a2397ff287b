"""What measurements share: the summary is right, and seeded checkpoints are real ones."""

import argparse
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import beside, qwen_checkpoint, seeded_qwen, subject
from bench.batch import Plan, throughput
from bench.common import ROOT, paired_ratio, peak_rss, rss, summary, write_report
from bench.seeded import CANVASES, PRESETS, tensor_shapes, write_seeded_llava
from bench.seeded_qwen import write_seeded_qwen
from engine.checkpoint.names import llava_names
from engine.checkpoint.tensors import Checkpoint, load_weights, read_json
from engine.engine import Engine
from engine.models.llava import Llava, parse_hub
from engine.pictures.anyres import grid_of


def test_paired_ratio_is_not_moved_by_what_slows_both() -> None:
    slow = [1.0, 5.0, 1.0, 9.0, 2.0]
    result = paired_ratio([0.5 * x for x in slow], slow)
    assert result == {"ratio": 0.5, "low": 0.5, "high": 0.5}
    noisy = paired_ratio([1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 2.0, 2.0, 2.0, 2.0])
    assert noisy["ratio"] == 1.5
    assert 0.5 <= noisy["low"] < 1.5 < noisy["high"] <= 2.5
    with pytest.raises(ValueError, match="longer"):
        paired_ratio([1.0], [1.0, 2.0])


def test_summary_of_eleven_values() -> None:
    assert summary([float(x) for x in range(10, -1, -1)]) == {"median": 5, "p10": 1, "p90": 9}


def test_report_says_where_the_numbers_come_from(tmp_path: Path) -> None:
    rows = [{"side": "ours", "seconds": 1.23456}, {"side": "theirs", "seconds": 2.0}]
    path = write_report("speed", {"dtype": "bfloat16"}, rows, ["A note."], tmp_path)
    record = json.loads(path.read_text())
    assert record["rows"] == rows
    assert record["settings"] == {"dtype": "bfloat16"}
    assert record["commit"]
    assert record["machine"]["cpu"]
    assert record["versions"]["torch"] == version("torch")
    table = path.with_suffix(".md").read_text()
    assert "| side | seconds |\n| --- | --- |\n| ours | 1.235 |\n| theirs | 2 |" in table
    assert "A note." in table


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_stays_after_memory_is_given_back() -> None:
    before = rss()
    block = bytearray(b"x" * 50_000_000)
    assert rss() > before + 45e6
    del block
    assert peak_rss() > before + 45e6


def test_seeded_checkpoint_is_the_same_every_time_and_fills_our_model(tmp_path: Path) -> None:
    one = write_seeded_llava(tmp_path / "one", "tiny-test")
    two = write_seeded_llava(tmp_path / "two", "tiny-test")
    config = parse_hub(read_json(one / "config.json"))
    with torch.device("meta"):
        llava = Llava(config)
    with Checkpoint.open(one) as a, Checkpoint.open(two) as b:
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.equal(a.read(name), b.read(name)) for name in a.tensors)
        load_weights(llava, a, llava_names(config.vision.used_layers))
    marker = one / "model.safetensors.index.json"
    changed = marker.stat().st_mtime_ns
    write_seeded_llava(one, "tiny-test")
    assert marker.stat().st_mtime_ns == changed  # written once


@pytest.mark.parametrize("preset", ["tiny-test", "1.6-tiny"])
def test_seeded_checkpoint_is_what_transformers_loads(preset: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = write_seeded_llava(tmp_path, preset)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    options = argparse.Namespace(model=None, preset=preset, picture=None)
    image, text = subject.picture(options), f"USER: <image>\n{subject.QUESTION} ASSISTANT:"
    theirs = AutoProcessor.from_pretrained(folder)(text=text, images=[image])["input_ids"][0]
    engine = Engine.load(folder, device="cpu", style=subject.style(folder))
    assert engine.render(subject.QUESTION, [image]).token_ids == list(theirs)


def test_seeded_qwen_is_a_whole_checkpoint(tmp_path: Path) -> None:
    engine = Engine.load(write_seeded_qwen(tmp_path, "qwen-tiny"), device="cpu")
    assert engine.dtype == torch.float32  # below 2 GB on a CPU
    result = engine.generate("what", [Image.new("RGB", (20, 30))], max_new_tokens=3)
    assert result.image_tokens == 256


def test_tables_by_batch_size_compare_within_blocks(tmp_path: Path) -> None:
    engine = Engine.load(write_seeded_llava(tmp_path, "1.6-tiny"), device="cpu")
    plan = Plan(["full", "avl"], [1, 2], steps=3, blocks=3)
    theirs = {1: lambda: 2.0, 2: lambda: 4.0}
    rows, _ = throughput(engine, Image.new("RGB", (90, 30)), plan, theirs)
    cells = [(policy, size) for policy in ("full", "avl", "transformers") for size in (1, 2)]
    assert [(row["policy"], row["batch"]) for row in rows] == cells
    assert [row["ms per step"] for row in rows[-2:]] == [2000, 4000]
    for row in rows[:-2]:
        ours = row["tokens/s per row"]
        assert row["x transformers"] == pytest.approx(2 * row["batch"] * ours)
    assert (rows[0]["x batch 1"], rows[1]["step / full"]) == (1, 1)
    assert rows[3]["KV used MB"] == 2 * rows[2]["KV used MB"] < rows[1]["KV used MB"]
    assert rows[2]["limit"] < 1


@pytest.mark.parametrize(
    ("preset", "parameters"), [("1b", 1.0e9), ("1.6-small", 0.467e9), ("qwen-1b", 1.0e9)]
)
def test_the_large_presets_have_the_size_they_claim(preset: str, parameters: float) -> None:
    if preset in seeded_qwen.PRESETS:
        named = qwen_checkpoint.tensor_shapes(seeded_qwen.PRESETS[preset])
    else:
        named = tensor_shapes(PRESETS[preset])
    sizes = {name: torch.Size(size).numel() for name, size in named}
    others = ("vision_tower", "multi_modal", "image_newline", "transformer.visual")
    decoder = sum(n for name, n in sizes.items() if not name.startswith(others))
    assert decoder == pytest.approx(parameters, rel=0.01)
    assert decoder < sum(sizes.values()) < 1.1 * decoder


def test_the_picture_of_a_seeded_tiled_model_has_2182_tokens() -> None:
    options = argparse.Namespace(model=None, preset="1.6-small", picture=None)
    shape = PRESETS["1.6-small"]
    canvases = tuple((rows * shape.image, columns * shape.image) for rows, columns in CANVASES)
    image = subject.picture(options)
    grid = grid_of(image.size, canvases, shape.image, shape.image // shape.patch)
    assert grid.tokens == 2182


# Programs of bench/ that measure nothing that is kept as a report.
TOOLS = {"beside", "browser", "figures", "house", "lmms_task", "report", "tiers"}
BENCHMARKS = sorted(
    path.stem
    for path in (ROOT / "bench").glob("*.py")
    if "\ndef main(" in path.read_text()
    and path.stem not in TOOLS
    and not path.stem.startswith("gpu_")  # these write where the GPU machine wants them
)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_a_part_of_one_tool(name: str) -> None:
    """The flags, the refusal, the bar, and the report with its command come from bench.common."""
    source = (ROOT / "bench" / f"{name}.py").read_text()
    for part in ("make_parser(", "read_options(", "write_report("):
        assert part in source, f"bench/{name}.py does without common.{part})"
    assert "progress(" in source or "in_turn.measure(" in source  # which shows the bar
    assert '"seed"' in source or "subject.about(" in source


def test_a_report_is_not_overwritten_and_can_be_repeated(tmp_path: Path) -> None:
    """The refusal comes before anything is measured, and before torch is imported."""
    (tmp_path / "decode-tiny.json").write_text("{}")
    ask = [sys.executable, "-X", "importtime", "-m", "bench.decode", "--model", "weights/tiny"]
    done = subprocess.run(
        [*ask, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "decode-tiny.json is there already: add --overwrite" in done.stderr
    assert re.search(r"\| +bench.common$", done.stderr, re.MULTILINE)
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)
    assert (tmp_path / "decode-tiny.json").read_text() == "{}"


def test_a_benchmark_prints_and_writes_the_command_that_repeats_it(tmp_path: Path) -> None:
    flags = ["--sizes", "1", "--blocks", "1", "--tokens", "3", "--out", str(tmp_path)]
    ask = [sys.executable, "-m", "bench.batch", "--overwrite", *flags]
    done = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True)
    again = " ".join(["python -m bench.batch", *flags])
    record = json.loads((tmp_path / "batch.json").read_text())
    assert record["command"] == again
    assert again in done.stdout
    assert "| full | 1 |" in done.stdout
    assert "1/1" in done.stderr
    assert {"dtype", "seed"} <= set(record["settings"])


def test_two_sides_are_compared_number_by_number() -> None:
    """New over old, within each pair of runs; a number that is zero or missing is left out."""
    old = [{("a", "ms"): 2.0, ("a", "MB"): 0.0, ("b", "ms"): 5.0}] * 3
    new = [{("a", "ms"): 3.0, ("a", "MB"): 7.0}] * 3
    assert beside.table(old, new).splitlines()[2:] == ["| a | ms | 1.500 | 1.5-1.5 |"]
