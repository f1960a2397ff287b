"""Converting pickled weights: same model, nothing run, nothing half-written taken for whole."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from engine.app.cli import main
from engine.checkpoint.convert import convert, find_tower
from engine.checkpoint.folder_files import BIN_INDEX, INDEX
from engine.checkpoint.target import MARKER
from engine.checkpoint.tensors import Checkpoint
from engine.engine import Engine
from engine.errors import CheckpointError, OptionError
from tests.asking import Ask, refused
from tests.checkpoints import (
    Shape,
    draw,
    edit_json,
    save,
    spelled,
    write_json,
    write_original_with_tower,
)
from tests.noise import noise

SHAPE = Shape(layers=2)
SHARDS = ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def pickled(folder: Path, tensors: dict[str, Any], parts: int = 2, **options: Any) -> None:
    """Write tensors as the original checkpoints have them: .bin shards and their index."""
    names = list(tensors)
    weight_map = {}
    for part in range(parts):
        file = f"pytorch_model-{part + 1:05}-of-{parts:05}.bin"
        chosen = names[part::parts]
        torch.save({name: tensors[name] for name in chosen}, folder / file, **options)
        weight_map |= dict.fromkeys(chosen, file)
    write_json(folder / BIN_INDEX, {"metadata": {"total_size": 1}, "weight_map": weight_map})


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """LLaVA-1.5 as originally published: two .bin shards, and a tower in another folder."""
    folder, tower = tmp_path / "llava", tmp_path / "clip"
    write_original_with_tower(folder, SHAPE, tower)
    pickled(folder, {name: tensor.half() for name, tensor in tensors_of(folder).items()})
    torch.save(tensors_of(tower), tower / "pytorch_model.bin")
    for path in (folder, tower):
        (path / "model.safetensors").unlink()
    return folder


def load(folder: Path) -> Engine:
    return Engine.load(folder, device="cpu", dtype="float32", cache="full")


# -- the result -----------------------------------------------------------------------------------


def test_converted_model_is_the_same_model(model: Path, tmp_path: Path) -> None:
    out = convert(model, tmp_path / "out", model.parent / "clip")
    drawn = draw(SHAPE)
    half = {key: t if key[0] == "vision" else t.half().float() for key, t in drawn.items()}
    expected = tmp_path / "expected"
    write_original_with_tower(expected, SHAPE)
    tower = {f"vision_model.{n}": t for (part, n), t in drawn.items() if part == "vision"}
    save(tower, expected / "tower")
    inside = {key: value for key, value in half.items() if key[0] != "vision"}
    save(spelled(inside, "original"), expected)
    image = noise(80, 50)
    got = load(out).logits("What is this?", [image])
    assert torch.equal(got, load(expected).logits("What is this?", [image]))


def test_every_tensor_keeps_its_bytes_and_its_dtype(model: Path, tmp_path: Path) -> None:
    out = convert(model, tmp_path / "out", model.parent / "clip")
    wanted: dict[str, Tensor] = {}
    for path in model.glob("*.bin"):
        wanted |= torch.load(path, weights_only=True)
    for name, tensor in torch.load(model.parent / "clip" / "pytorch_model.bin").items():
        if name.startswith("vision_model."):
            wanted["model.vision_tower.vision_tower." + name] = tensor
    found: dict[str, Tensor] = {}
    for path in out.glob("*.safetensors"):
        found |= load_file(path)  # the format's own library reads it
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with Checkpoint.open(out) as checkpoint:
        assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in wanted.values())


def test_tower_may_be_safetensors_already(model: Path, tmp_path: Path) -> None:
    expected = load(convert(model, tmp_path / "one", model.parent / "clip"))
    second = tmp_path / "second"
    write_original_with_tower(tmp_path / "unused", SHAPE, second)
    got = load(convert(model, tmp_path / "two", second))
    image = noise(70, 70)
    assert torch.equal(got.logits("Hi", [image]), expected.logits("Hi", [image]))


def test_odd_tensors_survive(model: Path, tmp_path: Path) -> None:
    base = torch.randn(6, 5)
    odd = {
        "view": base[1:4],
        "transposed": base.T,
        "expanded": torch.ones(1).expand(3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "bf16": base.bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "same": base,
        "parameter": torch.nn.Parameter(base),
    }
    for legacy in (False, True):
        pickled(model, odd, 1, _use_new_zipfile_serialization=not legacy)
        out = convert(model, tmp_path / f"out-{legacy}")
        found = load_file(out / "model-00001-of-00001.safetensors")
        assert found.keys() == odd.keys()
        for name, tensor in odd.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor.detach()), name


# -- hostile and damaged files --------------------------------------------------------------------


class Payload:
    """Runs a command when it is unpickled by a careless reader."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(
    legacy: bool, nested: bool, model: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "ran"
    content: Any = {"a": torch.ones(2), "b": Payload(trace)} if nested else Payload(trace)
    file = model / "pytorch_model-00002-of-00002.bin"
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"00002\.bin asks to run posix\.system: refused"):
        convert(model, tmp_path / "out")
    assert not trace.exists()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    # The payload is real: a careless reader would have run it.
    torch.load(file, weights_only=False)
    assert trace.exists()


def test_a_plain_pickle_is_refused(model: Path, tmp_path: Path) -> None:
    file = model / "pytorch_model-00001-of-00002.bin"
    file.write_bytes(pickle.dumps({"a": Payload(tmp_path / "ran")}))
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.bin"):
        convert(model, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04 and nothing", "cannot be read"),
        (b"PK\x03\x04" + bytes(4000), "cannot be read"),
        (b"<html>404</html>", r"00001-of-00002\.bin"),
        ([torch.ones(1)], "no dictionary of tensors but list"),
        ({"a": 5}, "'a' is a int, not a named tensor"),
        ({5: torch.ones(1)}, "'5' is a Tensor, not a named tensor"),
        ({"a": torch.ones(1).expand(10**12)}, "'a' claims 4,000,000,000,000 bytes"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "'a' is torch.strided torch.complex64"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is torch.sparse_coo"),
    ],
)
def test_damaged_and_foreign_files_are_named(
    content: Any, complaint: str, model: Path, tmp_path: Path
) -> None:
    file = model / "pytorch_model-00001-of-00002.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=complaint):
        convert(model, tmp_path / "out")


def test_whatever_the_system_refuses_of_a_file_names_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged archive may ask for a map of no length, or reach beyond the file's end."""

    def refusing(*_: Any, **__: Any) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("engine.checkpoint.pickled.torch.load", refusing)
    with pytest.raises(CheckpointError, match=r"pytorch_model\S+\.bin cannot be read"):
        convert(model, tmp_path / "out")


def test_a_truncated_file_is_refused(model: Path, tmp_path: Path) -> None:
    file = model / "pytorch_model-00001-of-00002.bin"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.bin cannot be read"):
        convert(model, tmp_path / "out")


@pytest.mark.parametrize("name", ["../evil.bin", "/etc/passwd", "a/b.bin", "x.safetensors", 5])
def test_an_index_may_name_only_files_beside_it(name: Any, model: Path, tmp_path: Path) -> None:
    write_json(model / BIN_INDEX, {"weight_map": {"a": name}})
    with pytest.raises(CheckpointError, match=r"not a plain \.bin file"):
        convert(model, tmp_path / "out")


def test_what_cannot_be_converted_is_said(model: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is the folder that is converted"):
        convert(model, model)
    out = convert(model, tmp_path / "out", model.parent / "clip")
    with pytest.raises(CheckpointError, match="has safetensors weights already"):
        convert(out, tmp_path / "again")
    (model / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 2 files"):
        convert(model, tmp_path / "third")


def test_a_tower_is_not_replaced(model: Path, tmp_path: Path) -> None:
    own = spelled(draw(SHAPE), "original")
    pickled(model, own)
    with pytest.raises(CheckpointError, match="has a vision tower of its own"):
        convert(model, tmp_path / "out", model.parent / "clip")
    assert find_tower(model, None) is None


def test_a_folder_without_a_tower_is_no_tower(model: Path, tmp_path: Path) -> None:
    torch.save({"text_model.x": torch.ones(1)}, model.parent / "clip" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds no vision tower"):
        convert(model, tmp_path / "out", model.parent / "clip")


def test_a_tensor_in_two_shards_is_refused(model: Path, tmp_path: Path) -> None:
    first, second = sorted(model.glob("*.bin"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.bin holds .* a second time"):
        convert(model, tmp_path / "out")


# -- interrupted and resumed ----------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    pass


def interrupting(file: str, share: float) -> Callable[[str, int, int], None]:
    def progress(name: str, done: int, total: int) -> None:
        if name == file and done >= share * total:
            raise Interrupted

    return progress


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_an_interrupted_conversion_leaves_nothing_that_looks_whole(
    share: float, model: Path, tmp_path: Path
) -> None:
    out, tower = tmp_path / "out", model.parent / "clip"
    with pytest.raises(Interrupted):
        convert(model, out, tower, interrupting("pytorch_model-00002-of-00002.bin", share))
    assert {path.name for path in out.iterdir()} == {MARKER, SHARDS[0]}
    with pytest.raises(CheckpointError):
        Engine.load(out, device="cpu")
    first = (out / SHARDS[0]).stat()
    convert(model, out, tower)
    after = (out / SHARDS[0]).stat()
    assert (after.st_ino, after.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)  # kept
    assert load(out).generate("Hi", [noise(9, 9)], max_new_tokens=2).token_ids is not None


def test_every_moment_of_a_conversion_is_safe(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut at any rename: whatever has its name by then is whole."""
    out, tower, whole = tmp_path / "out", model.parent / "clip", tmp_path / "whole"
    convert(model, whole, tower)
    replace, left = Path.replace, 0

    def cut(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise Interrupted
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", cut)
    for renames in range(50):
        left = renames
        shutil.rmtree(out, ignore_errors=True)
        try:
            convert(model, out, tower)
            break
        except Interrupted:
            assert not (out / "model.safetensors.index.json").exists()
            for path in out.rglob("*.*"):
                assert path.read_bytes() == (whole / path.relative_to(out)).read_bytes()
    assert 6 < renames < 49


def test_leftovers_of_a_crash_are_written_again(model: Path, tmp_path: Path) -> None:
    out, tower = tmp_path / "out", model.parent / "clip"
    convert(model, out, tower)
    good = contents(out)
    shard = good[SHARDS[0]]
    torn = [shard[:-1], shard[:99], shard[: shard.index(b'"sha256"') + 20], b""]
    for damaged in (*torn, shard[:-1] + bytes([shard[-1] ^ 1]), None):
        (out / ".avl-0.part").write_bytes(b"half")
        if damaged is None:
            (out / SHARDS[0]).unlink()
        else:
            (out / SHARDS[0]).write_bytes(damaged)
        convert(model, out, tower)
        assert contents(out) == good


def test_shards_of_two_models_are_never_mixed(model: Path, tmp_path: Path) -> None:
    """The same names and shapes, but other values: made again, or refused where all were done."""
    out, tower, file = tmp_path / "out", model.parent / "clip", "pytorch_model-00002-of-00002.bin"
    with pytest.raises(Interrupted):
        convert(model, out, tower, interrupting(file, 0.0))
    first = model / "pytorch_model-00001-of-00002.bin"
    torch.save({k: v + 1 for k, v in torch.load(first).items()}, first)
    before = (out / SHARDS[0]).read_bytes()
    convert(model, out, tower)
    assert (out / SHARDS[0]).read_bytes() != before
    done = contents(out)
    torch.save({k: v + 1 for k, v in torch.load(first).items()}, first)
    with pytest.raises(OptionError, match=r"00001\S+ is not what the conversion writes there"):
        convert(model, out, tower)
    assert contents(out) == done


# -- what is the user's ---------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors.index.json", "notes.txt", ".hidden", SHARDS[0]]
)
def test_a_folder_that_holds_something_else_is_left_alone(
    file: str, broken: bool, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / file).write_bytes(b"mine")
    if broken:
        (model / "pytorch_model-00002-of-00002.bin").write_bytes(b"no weights")
    with pytest.raises(OptionError, match="mine holds something else already"):
        convert(model, out, model.parent / "clip")
    assert contents(out) == {file: b"mine"}


@pytest.mark.parametrize("stopped", [0.0, None])
@pytest.mark.parametrize("file", ["config.json", SHARDS[1], "notes.txt"])
def test_what_was_put_into_a_converted_folder_is_kept(
    file: str, stopped: float | None, model: Path, tmp_path: Path
) -> None:
    out, tower = tmp_path / "out", model.parent / "clip"
    if stopped is None:
        convert(model, out, tower)
    else:
        with pytest.raises(Interrupted):
            convert(model, out, tower, interrupting("pytorch_model-00002-of-00002.bin", stopped))
    (out / file).write_bytes(b"mine")
    before = contents(out)
    if file == "notes.txt":
        convert(model, out, tower)
    else:
        with pytest.raises(OptionError, match=file):
            convert(model, out, tower)
    assert {name: contents(out)[name] for name in before} == before


@pytest.mark.parametrize("file", [INDEX, "config.json", "tokenizer_config.json", "vision_tower"])
def test_a_changed_file_is_found_before_anything_is_written(
    file: str, model: Path, tmp_path: Path
) -> None:
    out, tower = tmp_path / "out", model.parent / "clip"
    convert(model, out, tower)
    if file == "vision_tower":
        shutil.rmtree(out / file)
    (out / file).write_bytes(b'{"mine": 1}')
    (out / SHARDS[1]).unlink()
    before = contents(out)
    with pytest.raises(OptionError, match=file):
        convert(model, out, tower)
    assert contents(out) == before


def test_a_resumed_conversion_that_fails_deletes_nothing(model: Path, tmp_path: Path) -> None:
    out, tower, file = tmp_path / "out", model.parent / "clip", "pytorch_model-00002-of-00002.bin"
    convert(model, out, tower)
    (out / SHARDS[1]).unlink()
    before = contents(out)
    with pytest.raises(Interrupted):
        convert(model, out, tower, interrupting(file, 0.5))
    assert contents(out) == before


@pytest.mark.parametrize("there", [False, True])
def test_a_refused_conversion_does_not_occupy_its_target(
    there: bool, model: Path, tmp_path: Path
) -> None:
    out, tower = tmp_path / "out", model.parent / "clip"
    if there:
        out.mkdir()
    with pytest.raises(Interrupted):
        convert(model, out, tower, interrupting("pytorch_model-00001-of-00002.bin", 0.0))
    assert out.exists() == there
    assert not there or not list(out.iterdir())
    (model / "pytorch_model-00002-of-00002.bin").write_bytes(b"no weights")
    with pytest.raises(CheckpointError):
        convert(model, out, tower)
    assert out.exists() == there


TARGETS = ["a file", "in a file", "in nothing", "a link to nothing", "own", "full", "no rights"]


@pytest.mark.parametrize("kind", TARGETS)
def test_an_unfit_target_is_refused_before_a_weight_is_read(
    kind: str, model: Path, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "engine.checkpoint.pickled.torch.load", lambda *_, **__: pytest.fail("read")
    )
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_bytes(b"mine")
    before = contents(tmp_path)
    names = {"a file": "file", "in a file": "file/out", "in nothing": "link/out", "full": "full"}
    names |= {"a link to nothing": "link", "own": model.name, "no rights": "out"}
    if kind == "no rights":  # whoever runs the tests may have all of them
        monkeypatch.setattr(
            Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "No"))
        )
    asked = ask("--model", model, "--convert", tmp_path / names[kind])
    monkeypatch.undo()
    refused(asked, 2, names[kind])
    assert contents(tmp_path) == before


def test_another_conversion_or_process_does_not_share_a_folder(model: Path, tmp_path: Path) -> None:
    out, tower = tmp_path / "out", model.parent / "clip"
    with pytest.raises(Interrupted):
        convert(model, out, tower, interrupting("pytorch_model-00002-of-00002.bin", 0))
    before = contents(out)
    with pytest.raises(OptionError, match="out holds another conversion"):
        convert(model, out)
    seen = []

    def second(*_: Any) -> None:
        with pytest.raises(OptionError, match="another process converts into") as caught:
            convert(model, out, tower)
        seen.append(caught.value.hint)

    assert contents(out) == before
    convert(model, out, tower, second)
    assert seen


def test_at_most_one_shard_is_in_memory(model: Path, tmp_path: Path) -> None:
    size = 32 << 20
    big = {f"t{n}": torch.zeros(size // 8, dtype=torch.float16) for n in range(8)}
    for number, name in enumerate(big):
        big[name][::1000] = number
    pickled(model, big, 4)  # 4 files of 16 MB
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from engine.checkpoint.convert import convert\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "before = peak()\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", code, str(model), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.5 * (16 << 20)
    with safe_open(tmp_path / "out" / "model-00004-of-00004.safetensors", "pt") as file:
        assert set(file.keys()) == {"t3", "t7"}


# -- the command line -----------------------------------------------------------------------------


def test_command_line_converts_with_the_tower_that_the_model_names(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(model / "config.json", mm_vision_tower=str(model.parent / "clip"))
    out = tmp_path / "out"
    assert main(["--model", str(model), "--convert", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert said.err.count("\n") == 3  # a line per file
    assert "pytorch_model-00001-of-00002.bin: 0 of 0 MB" in said.err
    image = tmp_path / "a.png"
    noise(60, 60).save(image)
    ask = ["--model", str(out), "--image", str(image), "-p", "Hi", "-n", "2", "--device", "cpu"]
    assert main(ask) == 0


def test_command_line_says_what_a_conversion_needs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--convert", str(tmp_path / "out")]) == 2
    edit_json(model / "config.json", mm_vision_tower="nobody/has-this-tower")
    command = ["--model", str(model), "--convert", str(tmp_path / "out"), "--offline"]
    assert main(command) == 4
    assert "hint: name its folder with --vision-tower" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--vision-tower", str(model.parent / "clip"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
