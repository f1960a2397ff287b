"""Finding a model: a folder, the hub cache, a download; the network is never used here."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from engine.checkpoint.download import RemoteFile, choose
from engine.checkpoint.hub import is_complete, resolve
from engine.checkpoint.tensors import Checkpoint
from engine.errors import CheckpointError, OptionError

NAME = "some-org/some-llava"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a network that must not be touched."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    return tmp_path / "hub"


def put_in_cache(cache: Path, commit: str, ref: str | None = "main") -> Path:
    """Lays a model out as hub clients do: blobs, links to them in a snapshot, a ref to that."""
    repo = cache / "models--some-org--some-llava"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / commit
    blobs.mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    (blobs / "00").write_text(json.dumps({"model_type": "llava"}))
    save_file({"a": torch.ones(2)}, blobs / "01")
    (snapshot / "config.json").symlink_to("../../blobs/00")
    (snapshot / "model.safetensors").symlink_to("../../blobs/01")
    if ref:
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    return snapshot


def test_a_folder_is_itself_and_nothing_is_the_embedded_model(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve() == Path(__file__).parents[1] / "weights" / "tiny"


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "/nothing", "nothing", "../a/b"])
def test_what_cannot_be_a_hub_name_is_a_missing_folder(name: str, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"folder .* does not exist") as caught:
        resolve(name)
    assert "hub name" in caught.value.hint


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file, a model is a folder") as caught:
        resolve(tmp_path / "model.safetensors")
    assert str(tmp_path) in caught.value.hint


def test_a_cached_model_is_found_without_network_and_opens(cache: Path) -> None:
    snapshot = put_in_cache(cache, "a" * 40)
    assert resolve(NAME) == snapshot
    assert resolve(NAME, offline=True) == snapshot
    with Checkpoint.open(resolve(NAME)) as checkpoint:
        assert checkpoint.read("a").tolist() == [1, 1]


def test_a_revision_is_honoured(cache: Path) -> None:
    put_in_cache(cache, "a" * 40)
    other = put_in_cache(cache, "b" * 40, ref=None)
    assert resolve(NAME, revision="b" * 40) == other
    with pytest.raises(CheckpointError, match="not in the hub cache"):
        resolve(NAME, revision="v2", offline=True)


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    for name in (tmp_path, None):
        with pytest.raises(OptionError, match="--revision v1 is of a hub model"):
            resolve(name, revision="v1")


def test_pickled_weights_are_complete_only_where_they_are_wanted(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "pytorch_model-1.bin").touch()
    assert not is_complete(tmp_path, pickled=True)
    (tmp_path / "pytorch_model-2.bin").touch()
    assert is_complete(tmp_path, pickled=True)
    assert not is_complete(tmp_path)


def test_a_cache_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("engine.checkpoint.hub.find_cached", refusing)
    with pytest.raises(CheckpointError, match=r"hub cache .* cannot be read: Perm"):
        resolve("some/model")


def test_pickles_are_chosen_only_to_be_converted() -> None:
    files = [RemoteFile(name, 1) for name in ("config.json", "pytorch_model.bin", "other.bin")]
    assert [f.name for f in choose(NAME, files, pickled=True)] == [
        "config.json",
        "pytorch_model.bin",
    ]
    better = [*files, RemoteFile("model.safetensors", 1)]
    chosen = [f.name for f in choose(NAME, better, pickled=True)]
    assert chosen == ["config.json", "model.safetensors"]
    with pytest.raises(CheckpointError, match=r"and no pytorch_model"):
        choose(NAME, files[:1], pickled=True)


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_offline_says_where_it_looked(
    by: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", by == "environment")
    with pytest.raises(CheckpointError) as caught:
        resolve(NAME, offline=by == "argument")
    message = f"{NAME} is not a folder, and is not in the hub cache {cache}"
    assert str(caught.value) == message


def test_a_cached_model_that_lacks_a_shard_is_not_used(cache: Path) -> None:
    snapshot = put_in_cache(cache, "a" * 40)
    (snapshot / "model.safetensors").unlink()
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"a": torch.ones(2)}, snapshot / weight_map["a"])
    with pytest.raises(CheckpointError, match="is only partly in the hub cache"):
        resolve(NAME, offline=True)


def names_chosen(*names: str) -> list[str]:
    return [file.name for file in choose(NAME, [RemoteFile(name, 1) for name in names])]


def test_only_the_files_we_read_are_chosen() -> None:
    chosen = names_chosen(
        *("config.json", "model.safetensors", "pytorch_model.bin", "README.md", "run.py"),
        *("onnx/model.safetensors", "tokenizer.model", "qwen.tiktoken", "chat_template.jinja"),
    )
    assert chosen == [
        *("config.json", "model.safetensors"),
        *("tokenizer.model", "qwen.tiktoken", "chat_template.jinja"),
    ]


def test_weights_are_not_chosen_twice() -> None:
    index, shard = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
    assert names_chosen("config.json", index, shard) == ["config.json", index, shard]
    assert names_chosen("model.safetensors", index, shard) == ["model.safetensors"]


def test_a_hub_model_with_pickles_only_names_the_conversion() -> None:
    with pytest.raises(CheckpointError, match=r"has no \.safetensors weights") as caught:
        names_chosen("config.json", "pytorch_model.bin")
    assert f"--model {NAME} --convert some-llava-safetensors" in caught.value.hint


def test_an_adapter_of_the_hub_is_no_model() -> None:
    with pytest.raises(CheckpointError, match="is an adapter") as caught:
        names_chosen("adapter_config.json", "adapter_model.bin", "config.json")
    assert "merge it" in caught.value.hint


@pytest.mark.parametrize("revision", ["../../etc", "a b", "\x1b[2J"])
def test_a_revision_stays_in_the_cache(revision: str, cache: Path) -> None:
    with pytest.raises(CheckpointError, match="is no revision"):
        resolve(NAME, revision=revision)


def test_a_failing_network_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no route to host\nmany\nmore lines")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(CheckpointError, match=r"could not be downloaded: no route to host$"):
        resolve(NAME)
