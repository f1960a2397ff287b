"""--check: a whole folder passes, and every kind of damage is named with exit code 4."""

import hashlib
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.app.cli import main
from engine.app.doctor import Examination, blob_name, has_its_hash
from tests.checkpoints import Shape, edit_json

WEIGHTS = "model.safetensors"

NAMES = ["config", "tokenizer", "template", "hashes", "headers", "formats", "shapes", "values"]


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint(Shape(kv_heads=2)), tmp_path / "model"))


def as_snapshot(folder: Path, repo: Path) -> Path:
    """The folder as the hub's cache lays it out."""
    snapshot, blobs = repo / "snapshots" / ("a" * 40), repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        data = path.read_bytes()
        large = path.suffix == ".safetensors"
        git = hashlib.sha1(b"blob %d\0" % len(data) + data)
        name = (hashlib.sha256(data) if large else git).hexdigest()
        (blobs / name).write_bytes(data)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    return snapshot


def test_a_whole_folder_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--model", str(folder)]) == 0
    said = capsys.readouterr().out
    for word in ("Python ", f"torch {version('torch')}", "backend: ", "device: ", "peak memory"):
        assert word in said
    for check in (
        "config",
        "tokenizer",
        "template",
        "hashes",
        "headers",
        "formats",
        "shapes",
        "values",
    ):
        assert f"{check}: ok - " in said
    tensors = len(load_file(folder / WEIGHTS))
    assert f"{tensors} tensors, all numbers finite" in said
    assert "FAILED" not in said


def test_json_is_one_object_with_every_check(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--check", "--model", str(folder), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    found = json.loads(lines[0])
    assert found["model"] == str(folder)
    assert [check["name"] for check in found["checks"]] == NAMES
    assert all(check["ok"] and check["text"] for check in found["checks"])
    assert found["failed"] == 0
    assert found["packages"]["torch"] == version("torch")
    assert found["backend"]["name"] in ("cpu", "cuda", "torch")
    assert found["devices"]
    assert found["peak_bytes"] > 10**7
    (folder / WEIGHTS).write_bytes(b"")
    assert main(["--check", "--model", str(folder), "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    (failed,) = (check for check in found["checks"] if not check["ok"])
    assert failed["name"] == "headers"
    assert "is empty (0 bytes)" in failed["text"]
    assert failed["hint"]
    assert found["failed"] == 1


def test_without_a_model_the_machine_is_described(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.app.doctor.TINY", tmp_path)
    assert main(["--check"]) == 0
    assert "backend: " in capsys.readouterr().out


def test_a_missing_folder_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--check", "--model", str(tmp_path / "nothing" / "here" / "x")]) == 4
    assert "does not exist" in capsys.readouterr().err


def damaged(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The failed checks of a folder, by name."""
    assert main(["--check", "--model", str(folder), "--quiet"]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert any("failed" in line for line in lines[-1:])
    found = dict(line.split(": FAILED - ") for line in lines if ": FAILED - " in line)
    assert found
    return found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_that_is_none_is_found(
    folder: Path, capsys: pytest.CaptureFixture[str], value: float, dtype: torch.dtype
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    name = sorted(tensors)[7]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / WEIGHTS)
    assert f"NaN or infinity in {name} (1)" in damaged(folder, capsys)["values"]


def test_numbers_beyond_the_first_piece_are_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("engine.app.doctor.CHUNK", 64)
    tensors = load_file(folder / WEIGHTS)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[[0, 100, -1]] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    assert f"{name} (3)" in damaged(folder, capsys)["values"]


def test_a_wrong_shape_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / WEIGHTS)
    found = damaged(folder, capsys)
    assert set(found) == {"shapes"}
    assert "1 mis-shaped" in found["shapes"]
    assert name in found["shapes"]


def test_a_cut_file_is_named_with_its_bytes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])
    assert f"{len(data) - 100:,} bytes" in damaged(folder, capsys)["headers"]


@pytest.mark.parametrize("flags", [[], ["--json"], ["--quiet"]])
def test_damage_is_an_error_on_stderr_too(
    flags: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a log that has stderr alone."""
    (folder / WEIGHTS).write_bytes(b"")
    assert main(["--check", "--model", str(folder), *flags]) == 4
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: {folder}: 1 of the checks failed, the first is headers"
    assert hint.startswith("hint: ")


def test_one_damage_does_not_hide_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "unknown"}))
    (folder / "tokenizer.json").write_text("{")
    (folder / WEIGHTS).write_bytes(b"")
    assert {"config", "headers"} <= set(damaged(folder, capsys))


def test_a_snapshot_is_compared_with_its_blobs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = as_snapshot(folder, tmp_path / "models--a--b")
    count = len(list(folder.iterdir()))
    assert main(["--check", "--model", str(snapshot)]) == 0
    assert f"hashes: ok - {count} files" in capsys.readouterr().out
    for name in (WEIGHTS, "tokenizer.json"):
        blob = (snapshot / name).resolve()
        whole = blob.read_bytes()
        blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert f"{name}: the content is not" in damaged(snapshot, capsys)["hashes"]
        blob.write_bytes(whole)
    assert has_its_hash(snapshot / WEIGHTS)


def test_only_links_into_blobs_have_a_hash(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder / WEIGHTS)
    assert blob_name(folder / WEIGHTS) == blob_name(tmp_path / "link") == ""


def test_a_terminal_gets_no_control_characters_of_a_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "\x1b[2J\u202e"}))
    assert not all(finding.ok for finding in Examination(folder, quiet=True).run())
    assert main(["--check", "--model", str(folder), "--quiet"]) == 4
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", "\0\1", "{", "{}", '{"chat_template": 5}', None])
def test_a_damaged_template_is_damage(
    folder: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    for path in folder.glob("chat_template.*"):
        path.unlink()
    if content is None:
        (folder / "chat_template.json").mkdir()
    else:
        (folder / "chat_template.json").write_text(content)
    assert "chat_template.json" in damaged(folder, capsys)["template"]


def test_warnings_are_named_where_a_folder_is_called_whole(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jinja2")
    (folder / "chat_template.jinja").write_text("ASSISTANT {% for %}")
    assert main(["--check", "--model", str(folder), "--quiet"]) == 0
    assert capsys.readouterr().out.endswith("whole, with a warning of its template\n")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
            "--temperature 0.7 --",
        ),
        ({"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.05}, "--repetition-pen"),
        ({"do_sample": True, "temperature": "hot", "top_k": 0, "repetition_penalty": 1.0}, None),
    ],
)
def test_how_answers_are_drawn_elsewhere_is_said(
    values: dict[str, object], says: str | None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(folder / "generation_config.json", **values)
    assert main(["--check", "--model", str(folder), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert (f"published with {says}" if says else "tokens\n") in out
    assert ("published with" in out) is (says is not None)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_a_format_that_there_is_not_is_a_warning(
    key: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for named, warned in (("float7", True), (5, True), ("float16", False), (None, False)):
        edit_json(folder / "config.json", **{key: named})
        assert main(["--check", "--model", str(folder), "--quiet"]) == 0
        out = capsys.readouterr().out
        assert (f"dtype: WARNING - {key} of config.json is {named!r}" in out) is warned
        assert ("with a warning of its" in out) is warned


def test_end_tokens_that_no_answer_can_have_are_damage(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 1000000000}')
    assert "end token 1000000000 is none of the model's" in damaged(folder, capsys)["config"]
