"""Checkpoints: every damage is refused with the file's name, every tensor is read exactly."""

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.tensors import Checkpoint, read_json
from engine.errors import CheckpointError

INDEX = "model.safetensors.index.json"
ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"


def pack(header: object, data: bytes = b"") -> bytes:
    """A safetensors file from any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, stop: int, dtype: str = "F32", shape: object = None) -> dict[str, object]:
    shape = [(stop - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


GOOD = pack({"a": entry(0, 8), "b": entry(8, 24)}, bytes(24))
SIZE = len(GOOD)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"

DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "seven bytes": (GOOD[:7], "is truncated: it has 7 bytes"),
    "LFS pointer": (LFS, "is a Git LFS pointer"),
    "web page": (b"\n<!DOCTYPE html><html>Not found</html>", "is a web page"),
    "web page, no doctype": (b"<html><body>Rate limited", "is a web page"),
    "GGUF": (b"GGUF" + bytes(60), "is a GGUF file"),
    "pickle": (b"PK\x03\x04" + bytes(60), "zip or PyTorch"),
    "header cut": (GOOD[:40], f"is truncated: it has 40 of at least {SIZE - 24} bytes"),
    "data cut by one": (GOOD[:-1], f"is truncated: it has {SIZE - 1} bytes, .* says {SIZE}"),
    "data cut by half": (GOOD[:-12], "is truncated"),
    "one byte extra": (GOOD + b"\0", f"has trailing bytes: it has {SIZE + 1} bytes"),
    "huge length": (struct.pack("<Q", 2**63) + b"{}", "is not a safetensors file"),
    "200 MB length": (struct.pack("<Q", 200_000_000) + b"{}", "is not a safetensors file"),
    "text": (b"hello, these are not weights", "is not a safetensors file"),
    "zeros": (bytes(4096), "is not a safetensors file: it starts with zeros"),
    "not JSON": (pack(b"{oops}"), "invalid safetensors header: Expecting property name"),
    "not UTF-8": (pack(b'{"\xff": 1}'), "invalid safetensors header: .*utf-8"),
    "deep nesting": (pack(b'{"a":' * 100_000), "invalid safetensors header"),
    "NaN": (pack(b'{"a": NaN}'), "NaN is not JSON"),
    "duplicate": (pack(b'{"a": 1, "a": 1}'), "duplicate key 'a'"),
    "overlap": (pack({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "tensor 'b' overlaps"),
    "hole": (pack({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)), "'b' leaves a hole"),
    "late start": (pack({"a": entry(4, 8)}, bytes(8)), "tensor 'a' leaves a hole"),
    "backwards": (pack({"a": entry(8, 0, shape=[2])}, bytes(8)), "'a' needs 8 bytes"),
    "shape and dtype": (
        pack({"a": entry(0, 8, shape=[3])}, bytes(8)),
        "'a' needs 12 bytes .* not 8",
    ),
    "overflow": (pack({"a": entry(0, 8, shape=[2**40, 2**40])}, bytes(8)), "tensor 'a' needs"),
    "negative shape": (pack({"a": entry(0, 8, shape=[-1, -2])}, bytes(8)), "'a' has a shape"),
    "shape of booleans": (pack({"a": entry(0, 4, shape=[True])}, bytes(4)), "'a' has a shape"),
    "one offset": (pack({"a": entry(0, 8) | {"data_offsets": [0]}}, bytes(8)), "data_offsets that"),
    "no dtype": (pack({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "no proper dtype"),
    "tensor is a number": (pack({"a": 1}), "'a' has no proper dtype"),
    "made-up dtype": (pack({"a": entry(0, 8, "Q4")}, bytes(8)), "'a' has dtype 'Q4', which is"),
    "float8": (
        pack({"w": entry(0, 8, "F8_E4M3", [8])}, bytes(8)),
        "tensor 'w' has dtype 'F8_E4M3', which is not read",
    ),
    "bad metadata": (pack({"__metadata__": {"a": 1}, "b": entry(0, 8)}, bytes(8)), "invalid"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content, message = DAMAGED[name]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_the_good_file_that_the_damaged_ones_are_made_of_opens(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b"]
        assert checkpoint.total_bytes == 24


def mutate(draw: random.Random, content: bytes) -> bytes:
    """Changes, cuts, doubles or inserts a few bytes, mostly in the header."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(max(1, min(len(data), SIZE - 16)))
        kind = draw.randrange(4)
        if kind == 0 and data:
            data[at % len(data)] = draw.choice([draw.randrange(256), *b'0123456789{}[],:"-e'])
        elif kind == 1:
            del data[at : at + draw.randint(1, 8)]
        elif kind == 2:
            data[at:at] = data[at : at + draw.randint(1, 8)]
        else:
            data[at:at] = bytes(draw.choices(b'0123456789{}[],:"-e\\u', k=draw.randint(1, 3)))
    # Half of the time the length fits again, so that the JSON behind it is reached.
    if draw.random() < 0.5 and len(data) > 32:
        data[:8] = struct.pack("<Q", len(data) - 32)
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_headers_raise_nothing_but_checkpoint_errors(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    path = tmp_path / "model.safetensors"
    refused = 0
    for _ in range(500):
        path.write_bytes(mutate(draw, GOOD))
        try:
            with Checkpoint.open(tmp_path) as checkpoint:
                # What we accept, the library accepts too, with the same tensors in it.
                expected = load_file(path)
                assert checkpoint.tensors.keys() == expected.keys()
                for name, tensor in expected.items():
                    torch.testing.assert_close(checkpoint.read(name), tensor, equal_nan=True)
        except CheckpointError:
            refused += 1
    assert 300 < refused < 500


def test_mutated_index_raises_nothing_but_checkpoint_errors(tmp_path: Path) -> None:
    draw = random.Random(0)
    shards(tmp_path)
    text = (tmp_path / INDEX).read_bytes()
    refused = 0
    for _ in range(300):
        (tmp_path / INDEX).write_bytes(mutate(draw, text))
        try:
            Checkpoint.open(tmp_path).close()
        except CheckpointError:
            refused += 1
    assert refused > 150


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int8,
        torch.bool,
    ],
)
def test_read_equals_the_library(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "scalar": (),
        "none": (0, 3),
        "row": (7,),
        "odd": (3, 5, 2),
    }
    shapes["large"] = (1100, 1024)  # of many pages
    tensors = {
        name: torch.randint(0, 2, shape, generator=generator).to(dtype)
        if not dtype.is_floating_point
        else torch.randn(shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        for name, tensor in tensors.items():
            assert checkpoint.tensors[name].shape == tensor.shape
            assert torch.equal(checkpoint.read(name), tensor)
            converted = checkpoint.read(name, "cpu", torch.float32)
            assert converted.dtype == torch.float32
            assert torch.equal(converted, tensor.float())


def test_read_of_tensors_that_are_not_aligned(tmp_path: Path) -> None:
    # Legal in the format: three bytes, then floats from an odd address on.
    header = {"a": entry(0, 3, "U8", [3]), "b": entry(3, 11), "c": entry(11, 15, "BF16", [2])}
    data = b"\1\2\3" + struct.pack("<2f", 1.5, -2.5) + b"\x80\x3f\x00\xc0"
    (tmp_path / "model.safetensors").write_bytes(pack(header, data))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.read("a").tolist() == [1, 2, 3]
        assert checkpoint.read("b").tolist() == [1.5, -2.5]
        assert checkpoint.read("c", "cpu", torch.float32).tolist() == [1.0, -2.0]


def test_tensors_are_copies_that_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(2**20, dtype=torch.float32)}, path)
    with Checkpoint.open(tmp_path) as checkpoint:
        tensor = checkpoint.read("a")
    os.truncate(path, 0)  # a map of it would now end the process with SIGBUS
    tensor += 1
    assert float(tensor.sum()) == pytest.approx(2**20 * (2**20 + 1) / 2, rel=1e-3)


def test_file_that_changes_size_while_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    with Checkpoint.open(tmp_path) as checkpoint:
        os.truncate(path, SIZE - 16)
        with pytest.raises(CheckpointError, match=f"changed .* had {SIZE} bytes, now {SIZE - 16}"):
            checkpoint.read("b")


def test_file_that_vanishes_while_open_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    with Checkpoint.open(tmp_path) as checkpoint:
        path.unlink()
        assert checkpoint.read("b").tolist() == [0.0] * 4


# Folders


def shards(folder: Path) -> dict[str, object]:
    """Writes two shards and their index; returns the index for tests to spoil."""
    save_file({"a": torch.ones(2)}, folder / ONE)
    save_file({"b": torch.zeros(3)}, folder / TWO)
    index = {"metadata": {"total_size": 20}, "weight_map": {"a": ONE, "b": TWO}}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def test_shards_are_one_set_also_through_links(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"  # as the hub cache lays them out
    blobs.mkdir()
    folder.mkdir()
    shards(blobs)
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(path)
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.read("a").tolist() == [1, 1]
        assert checkpoint.read("b").tolist() == [0, 0, 0]
        assert checkpoint.total_bytes == 20


def spoil_map(**changes: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        index = shards(folder)
        index["weight_map"] |= changes  # type: ignore[operator]
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def spoil_index(text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        shards(folder)
        (folder / INDEX).write_text(text)

    return spoil


def without(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        shards(folder)
        (folder / name).unlink()

    return spoil


def twice(folder: Path) -> None:
    shards(folder)
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, folder / TWO)


def only(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes(b"1234")

    return spoil


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard is missing": (without(TWO), f"lacks 1 of 2 shards .*: {TWO}"),
    "the index is missing": (without(INDEX), f"has shards .* but no {INDEX}"),
    "index and a shard are missing": (only(ONE), f"has shards .* but no {INDEX}"),
    "the index leaves the folder": (spoil_map(a=f"../{ONE}"), r"'\.\./model-.* not a plain file"),
    "the index is absolute": (
        spoil_map(a="/etc/x.safetensors"),
        "'/etc/x.*', which is not a plain",
    ),
    "a Windows path": (spoil_map(a="..\\x.safetensors"), "not a plain file"),
    "the folder itself": (spoil_map(a=".."), "'..', which is not a plain file"),
    "another format": (spoil_map(a="pytorch_model.bin"), "not a plain file"),
    "a name that is too long": (spoil_map(a="x" * 300 + ".safetensors"), "not a plain file name"),
    "a name no system has": (spoil_map(a="\0\ud800.safetensors"), "not a plain file name"),
    "a number for a shard": (spoil_map(a=1), "'1', which is not a plain file"),
    "a list for a shard": (spoil_map(a=["x"]), "not a plain file"),
    "listed in no shard": (spoil_map(c=ONE), f"lists tensor 'c' in {ONE}, but it is not there"),
    "listed in another shard": (spoil_map(a=TWO), f"lists tensor 'a' in {TWO}, but"),
    "in two shards": (twice, f"tensor 'a' is in two shards: {ONE} and {TWO}"),
    "index without weight_map": (spoil_index("{}"), "has no weight_map"),
    "index that is a list": (spoil_index("[]"), "invalid JSON: an object is needed"),
    "index with a duplicate": (spoil_index('{"a": 1, "a": 2}'), "duplicate key 'a'"),
    "index of another total": (
        spoil_index(
            json.dumps({"metadata": {"total_size": 999}, "weight_map": {"a": ONE, "b": TWO}})
        ),
        "says 999 bytes of tensors, the shards have 20",
    ),
    "empty": (only(), "is empty"),
    "only a config": (only("config.json"), "has no .safetensors file, only config.json"),
    "several files": (only("x.safetensors", "y.safetensors"), "has shards .x.safetensors, y"),
    "only .bin": (only("pytorch_model.bin", "config.json"), "pickled weights.*: pytorch_model.bin"),
    "only .pt": (only("a.pt"), "pickled weights, which could run code: a.pt"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_unusable_folder_is_refused_by_name(name: str, tmp_path: Path) -> None:
    prepare, message = FOLDERS[name]
    prepare(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    folder = tmp_path / "my llava"
    folder.mkdir()
    (folder / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    command = f"python main.py --model '{folder}' --convert '{folder}-safetensors'"
    assert caught.value.hint == f"convert them once: {command}"


def test_one_file_of_any_name_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "tower.safetensors").write_bytes(GOOD)
    (tmp_path / "pytorch_model.bin").touch()
    with Checkpoint.open(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b"}


def test_things_that_are_not_folders_or_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open(tmp_path / "nothing")
    path = tmp_path / "model.safetensors"
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"model.safetensors is a folder"):
        Checkpoint.open(tmp_path)
    path.rmdir()
    os.mkfifo(path)  # opening it would wait for ever
    with pytest.raises(CheckpointError, match="is not a regular file"):
        Checkpoint.open(tmp_path)
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"model.safetensors: No such file"):
        Checkpoint.open(tmp_path)
    path.unlink()
    path.write_bytes(GOOD)
    with pytest.raises(CheckpointError, match="is a file, a model is a folder"):
        Checkpoint.open(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_says_what_the_system_says(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    path.chmod(0)
    with pytest.raises(CheckpointError, match=r"model.safetensors: Permission denied"):
        Checkpoint.open(tmp_path)


def test_a_refusing_system_is_quoted_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(GOOD)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model.safetensors: Permission denied"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "invalid JSON"),
        ('{"a": 1,}', "invalid JSON"),
        ('{"a": {"b": 1, "b": 2}}', "duplicate key 'b'"),
        ('{"a": Infinity}', "Infinity is not JSON"),
        ("3", "an object is needed, this is a int"),
        ('{"a": 1' + "0" * 5000 + "}", "invalid JSON"),
        (LFS.decode(), "is a Git LFS pointer"),
    ],
)
def test_json_is_read_strictly(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    path.write_text('{"a": [1, null, "\u00e4"]}')
    assert read_json(path) == {"a": [1, None, "\u00e4"]}
