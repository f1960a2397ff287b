"""Bad model folders, rows 24 to 36 of the table of bad inputs: exit code 4, the file is named.

A refusal leaves the folder as it was. The reasons of each reader are tested beside it; here the
whole program answers.
"""

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.engine import Engine
from engine.errors import CheckpointError
from tests.asking import Ask, refused
from tests.checkpoints import Shape, edit_json, hub_config, write_json, write_llava

SMALL = Shape(layers=2, vision_layers=2, context=400)
HTML = b"<!DOCTYPE html><html><body>Not found</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint; tests damage a copy."""
    return write_llava(tmp_path_factory.mktemp("good") / "model", SMALL)


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


# -- 25: what a weight file may be ----------------------------------------------------------------


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ONE = header(a=entry())
FILES: dict[str, tuple[bytes, str]] = {
    "row25-empty": (b"", "is empty (0 bytes)"),
    "row25-one byte": (b"\x10", "truncated"),
    "row25-seven bytes": (b"\x10\0\0\0\0\0\0", "truncated"),
    "row25-LFS pointer": (POINTER, "is a Git LFS pointer"),
    "row25-web page": (HTML, "is a web page, not weights"),
    "row25-header cut": (ONE[:30], "truncated: it has 30 of at least"),
    "row25-cut by one byte": (ONE + bytes(7), f"truncated: it has {len(ONE) + 7}"),
    "row25-cut by half": (ONE + bytes(4), f"truncated: it has {len(ONE) + 4}"),
    "row25-one byte more": (ONE + bytes(9), "has trailing bytes"),
    "row25-2^63 length": (struct.pack("<Q", 2**63) + bytes(100), "not a safetensors file"),
    "row25-200 MB length": (struct.pack("<Q", 200_000_000) + b"{}", "not a safetensors file"),
    "row25-zeros": (bytes(4096), "a download never filled"),
    "row25-overlap": (header(a=entry(), b=entry(offsets=(4, 12))) + bytes(12), "'b'"),
    "row25-hole": (header(a=entry(offsets=(8, 16))) + bytes(16), "leaves a hole"),
    "row25-mismatch": (header(a=entry(shape=(3,))) + bytes(8), "needs 12 bytes"),
    "row25-overflow": (header(a=entry(shape=(2**62, 2**62))) + bytes(8), "for its shape"),
    "row25-duplicate key": (struct.pack("<Q", 15) + b'{"a":{},"a":{}}' + bytes(8), "duplicate key"),
    "row30-unknown dtype": (header(a=entry("Q4")) + bytes(8), "dtype 'Q4'"),
    "row30-fp8": (header(a=entry("F8_E4M3", (8,))) + bytes(8), "dtype 'F8_E4M3'"),
}


@pytest.mark.parametrize("row", FILES)
def test_bad_weight_file(row: str, ask: Ask, folder: Path) -> None:
    content, words = FILES[row]
    (folder / WEIGHTS).write_bytes(content)
    refused(ask("--prompt", "Hi", "--model", folder), 4, WEIGHTS, words)


def test_row25_a_folder_or_a_broken_link_for_a_file(ask: Ask, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    refused(ask("--prompt", "Hi", "--model", folder), 4, f"{WEIGHTS} is a folder")
    (folder / WEIGHTS).rmdir()
    (folder / WEIGHTS).symlink_to("nowhere")
    refused(ask("--prompt", "Hi", "--model", folder), 4, f"{WEIGHTS}: No such file")
    (folder / WEIGHTS).unlink()
    refused(ask("--prompt", "Hi", "--model", folder), 4, "no .safetensors file", "config.json")


# -- 26 to 36: what a folder may lack or hold -----------------------------------------------------


def without(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / WEIGHTS
        held = load_file(path)
        change(held)
        path.unlink()
        save_file(held, path)

    return spoil


SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"


def index(**shards: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / SHARD)
        write_json(folder / "model.safetensors.index.json", {"weight_map": shards})

    return spoil


def no_index(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / OTHER)
    (folder / WEIGHTS).rename(folder / SHARD)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = hub_config(SMALL)
        content["text_config"] |= changes
        write_json(folder / "config.json", content)

    return spoil


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / name, **changes)


def another_tokenizer(folder: Path) -> None:
    """Its words have other ids than the tokens beside it say."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][-1]["id"] += 1000
    write_json(folder / "tokenizer.json", content)


def drop_seven(held: dict[str, torch.Tensor]) -> None:
    for name in sorted(held)[:7]:
        del held[name]
    held.update({f"extra{n}": torch.ones(1) for n in range(6)})


HEAD = "language_model.lm_head.weight"
FOLDERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "row26-shard missing": (index(a=SHARD, b=OTHER), ("lacks 1 of 2 shards", OTHER)),
    "row26-index missing": (no_index, (SHARD, "no model.safetensors.index.json")),
    "row26-tensor not in its shard": (index(nothing=SHARD), ("'nothing'", SHARD)),
    "row27-index walks out": (index(a="../x.safetensors"), ("../x.safetensors", "plain file")),
    "row27-absolute path": (index(a="/etc/passwd"), ("/etc/passwd", "plain file name")),
    "row28-tensor missing": (tensors(lambda t: t.pop(HEAD)), ("1 missing", "head")),
    "row28-unexpected": (tensors(lambda t: t.update(x=torch.ones(1))), ("1 unexpected", "'x'")),
    "row28-wrong shape": (
        tensors(lambda t: t.update({HEAD: torch.ones(3, 4)})),
        ("1 mis-shaped", "[3, 4]"),
    ),
    "row28-first five and the count": (
        tensors(drop_seven),
        ("7 missing", "and 2 more", "6 unexpected", "and 1 more"),
    ),
    "row30-int8": (
        tensors(lambda t: t.update({HEAD: t[HEAD].to(torch.int8)})),
        ("int8", "none in a form that is read"),
    ),
    "row31-pickles only": (pickled, ("pytorch_model.bin", "--convert")),
    "row32-invalid JSON": (replaced("config.json", b"{"), ("config.json", "invalid JSON")),
    "row32-duplicate key": (
        replaced("config.json", b'{"a": 1, "a": 2}'),
        ("config.json", "duplicate key 'a'"),
    ),
    "row32-missing key": (edited("config.json", model_type=None), ("model_type is",)),
    "row32-string": (config(hidden_size="64"), ("hidden_size", "'64'")),
    "row32-no heads": (config(num_attention_heads=0), ("num_attention_heads", "is 0")),
    "row32-negative": (config(num_hidden_layers=-2), ("num_hidden_layers", "-2")),
    "row32-too many layers": (config(num_hidden_layers=1001), ("num_hidden_layers", "1001")),
    "row32-indivisible": (config(hidden_size=66), ("hidden_size", "66")),
    "row32-unknown decoder": (config(model_type="gpt2"), ("model_type", "'gpt2'")),
    "row32-unknown model": (edited("config.json", model_type="vilt"), ("model_type", "'vilt'")),
    "row32-no config": (without("config.json"), ("config.json",)),
    "row33-no tokenizer": (without("tokenizer.json"), ("no tokenizer",)),
    "row33-damaged tokenizer": (replaced("tokenizer.json", b"[" * 9999), ("tokenizer.json",)),
    "row33-not a tokenizer": (replaced("tokenizer.json", b"{}"), ("tokenizer.json",)),
    "row33-another tokenizer": (another_tokenizer, ("tokenizer.json", "should be")),
    "row33-image token absent": (
        edited("config.json", image_token_index=10**6),
        ("image_token_index", "1000000"),
    ),
    "row36-NaN": (tensors(lambda t: t[HEAD].fill_(float("nan"))), ("not finite", "--check")),
    "row36-infinite": (tensors(lambda t: t[HEAD].fill_(float("inf"))), ("not finite", "--check")),
}


@pytest.mark.parametrize("row", FOLDERS)
def test_bad_folder(row: str, ask: Ask, folder: Path) -> None:
    spoil, words = FOLDERS[row]
    spoil(folder)
    before = sorted(os.listdir(folder))
    refused(ask("--prompt", "Hi", "--model", folder), 4, *words)
    assert sorted(os.listdir(folder)) == before


def test_row24_folder_missing_or_empty(ask: Ask, tmp_path: Path) -> None:
    asked = ask("--prompt", "Hi", "--model", tmp_path / "nowhere", "--offline")
    refused(asked, 4, str(tmp_path / "nowhere"), "does not exist", "GB")
    refused(ask("--prompt", "Hi", "--model", tmp_path), 4, str(tmp_path))
    (tmp_path / "a.safetensors").touch()
    asked = ask("--prompt", "Hi", "--model", tmp_path / "a.safetensors")
    refused(asked, 4, "is a file, a model is a folder")


def test_row29_a_tied_head_may_be_absent_but_not_different(ask: Ask, folder: Path) -> None:
    config(tie_word_embeddings=True)(folder)
    refused(ask("--prompt", "Hi", "--model", folder), 4, "lm_head", "config ties them")
    tensors(lambda t: t.pop(HEAD))(folder)
    assert ask("--prompt", "Hi", "--model", folder, "-n", "1").code == 0


@pytest.mark.parametrize("change", [-8, 8])
def test_row34_a_file_that_changes_while_it_is_loaded(
    change: int, ask: Ask, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shortened, a map of it would end the process: nothing could be said any more."""
    path, real = folder / WEIGHTS, "engine.checkpoint.tensors.fit_weights"
    size = path.stat().st_size
    from engine.checkpoint.tensors import fit_weights

    def meanwhile(*arguments: Any, **named: Any) -> Any:
        os.truncate(path, size + change)
        return fit_weights(*arguments, **named)

    monkeypatch.setattr(real, meanwhile)
    asked = ask("--prompt", "Hi", "--model", folder)
    refused(asked, 4, WEIGHTS, f"{size:,} bytes", f"{size + change:,}")


def test_row34_a_file_that_vanishes_while_it_is_loaded(
    ask: Ask, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.checkpoint.tensors import fit_weights

    def meanwhile(*arguments: Any, **named: Any) -> Any:
        (folder / WEIGHTS).unlink()
        return fit_weights(*arguments, **named)

    monkeypatch.setattr("engine.checkpoint.tensors.fit_weights", meanwhile)
    assert ask("--prompt", "Hi", "--model", folder, "-n", "1").code == 0  # it is open already


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ETIMEDOUT, errno.ESTALE])
@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_row35_no_permission_or_a_drive_that_fails(
    number: int, name: str, ask: Ask, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the system says of it, and the path; a drive may only fail after a long time."""
    real = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == name:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    refused(ask("--prompt", "Hi", "--model", folder), 4, name, os.strerror(number))


def test_the_library_raises_the_same_classes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        Engine.load(tmp_path)
    assert caught.value.exit_code == 4
    assert caught.value.hint
