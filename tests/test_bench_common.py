"""What measurements share: the summary is right, and seeded checkpoints are real ones."""

import json
from pathlib import Path

import pytest
import torch

from bench.common import paired_ratio, peak_rss, rss, summary, write_report
from bench.seeded import PRESETS, tensor_shapes, write_seeded_llava
from engine.models.llava import Llava, parse_hub
from weights.checkpoint import Checkpoint, load_weights, read_json
from weights.names import llava_names


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
    assert record["versions"]["torch"] == torch.__version__
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


def test_seeded_checkpoint_is_what_transformers_loads(tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    folder = write_seeded_llava(tmp_path, "tiny-test")
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16


def test_the_large_preset_has_the_size_it_claims() -> None:
    sizes = {name: torch.Size(size).numel() for name, size in tensor_shapes(PRESETS["1b"])}
    decoder = sum(n for name, n in sizes.items() if name.startswith("language_model"))
    assert decoder == pytest.approx(1.0e9, rel=0.01)
    assert 2.0e9 < 2 * sum(sizes.values()) < 2.2e9
