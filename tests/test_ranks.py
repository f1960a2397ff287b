"""One model over two processes beside the same in one: numbers, ids, bytes; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.qwen_checkpoint import QwenShape, write_qwen
from engine.engine import Engine
from engine.errors import OptionError
from engine.insight.trace import Trace
from engine.loading.families import Wishes, recognise
from engine.loading.loading import load
from engine.loading.splitting import split
from engine.ops.ranks import Ranks
from tests.checkpoints import Shape, write_llava
from tests.mllama_checkpoint import write_mllama
from tests.next_checkpoints import NEXT_SHAPES, write_next
from tests.qwen_patches_checkpoint import KINDS, write_qwen_patches
from tests.rank import found
from tests.test_video_models import write_longva

RAW = "USER: <image>\nWhat is this? ASSISTANT:"
FAST = [
    f"{model}-{spec}" for model in ("llava", "next", "qwen") for spec in ("full", "avl", "sift")
]
FAST += ["llava-h2o", "llava-zipvl", "llava-q8", "even-q4"]


def cases(folder: Path) -> dict[str, dict[str, Any]]:
    """By name what the processes are asked."""
    shapes = {
        "llava": write_llava(folder / "llava", Shape(context=2048)),
        "even": write_llava(folder / "even", Shape(mlp=128, seed=5)),  # halves are whole groups
        "next": write_next(folder / "next", "mistral", "hub", NEXT_SHAPES["mistral"]),
        "qwen": write_qwen(folder / "qwen", QwenShape()),
    }
    specs = {
        "full": "full",
        "avl": "avl:secondary=0.6,core=0.3,every=3,prefill=0.8,text=0.5,floor=4",
        "sift": "sift",
        "h2o": "h2o:heavy=0.2,recent=0.3",
        "zipvl": "zipvl:every=8",
        "q8": "full",
        "q4": "sift",
    }
    made = {}
    for name in FAST:
        model, _, spec = name.partition("-")
        raw = "<image>What is this?" if model == "qwen" else RAW
        case = {"folder": str(shapes[model]), "cache": specs[spec], "raw": raw, "pictures": 1}
        made[name] = case | ({"weights": spec} if spec in ("q8", "q4") else {})
    return made


def slow_cases(folder: Path) -> dict[str, dict[str, Any]]:
    """Models of other rooms: pooled tiles, three coordinates, norms of queries and keys."""
    shape = Shape(family="qwen2", kv_heads=2, seed=24, context=8192)
    made = {"longva": write_longva(folder / "longva", shape)}
    made |= {kind: write_qwen_patches(folder / kind, kind) for kind in KINDS}
    specs = "full", "avl:prefill=0.9,floor=4", "sift"
    return {
        f"{name}-{spec}": {"folder": str(path), "cache": spec, "raw": RAW, "pictures": 1}
        for name, path in made.items()
        for spec in specs
    }


def start(folder: Path, asked: list[dict[str, Any]], size: int) -> list[subprocess.Popen[str]]:
    (folder / "asked.json").write_text(json.dumps(asked))
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    processes = []
    for rank in range(size):
        files = meeting, folder / "asked.json", folder / f"found-{rank}.pt"
        command = [sys.executable, "-m", "tests.rank", str(rank), str(size), *map(str, files)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, **pipes, text=True))
    return processes


def both(folder: Path, asked: dict[str, dict[str, Any]]) -> dict[str, tuple[Any, Any, Any]]:
    """Of every case: what one process finds, and what each of two does."""
    processes = start(folder, list(asked.values()), 2)
    alone = [found(case, parallel=False) for case in asked.values()]
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    halves = [torch.load(folder / f"found-{rank}.pt") for rank in range(2)]
    return dict(zip(asked, zip(alone, *halves, strict=True), strict=True))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return both(folder, cases(folder))


@pytest.mark.parametrize("name", FAST)
def test_two_processes_say_what_one_says(name: str, answers: dict[str, Any]) -> None:
    alike(name, *answers[name])


@pytest.mark.slow(reason="a dozen models in three processes")
def test_other_models_in_two_processes(tmp_path: Path) -> None:
    for name, found_ in both(tmp_path, slow_cases(tmp_path)).items():
        alike(name, *found_)


def alike(name: str, alone: Any, first: Any, second: Any) -> None:
    """Whether two processes found what one did, and the same."""
    # Of q8 the halves of a row have scales of their own; q4's groups are the same. In a format of
    # the cache a number between two codes falls to either side.
    apart = {"q8": 0.2, "sift": 5e-3, "zipvl": 5e-3, "q4": 5e-3}
    near = {"rtol": 0, "atol": apart.get(name.rpartition("-")[2], 1e-5)}
    for key in ("logits", "decoded"):
        torch.testing.assert_close(first[key], alone[key], **near)
        assert torch.equal(first[key], second[key])  # bit for bit: they choose alike
    if not name.endswith("q8"):
        for key in ("ids", "batch", "sampled"):
            assert first[key] == alone[key]
    for key in ("ids", "batch", "sampled"):
        assert first[key] == second[key]


@pytest.mark.parametrize("name", ["llava-full", "next-avl", "qwen-full"])
def test_each_holds_its_share(name: str, answers: dict[str, Any]) -> None:
    alone, first, second = answers[name]
    assert first["bytes"] == second["bytes"]
    assert first["bytes"] * 2 == alone["bytes"]
    assert first["weights"] < 0.9 * alone["weights"]


def test_heads_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    asked = [{"folder": str(write_llava(tmp_path / "m", Shape(heads=8, kv_heads=8)))}]
    asked[0] |= {"cache": "full", "raw": RAW}
    for process in start(tmp_path, asked, 3):
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    (refused,) = torch.load(tmp_path / "found-0.pt")
    assert refused == {"refused": "3 processes cannot share 8 heads"}


def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    folder = write_llava(tmp_path / "m", Shape())
    case = {"folder": str(folder), "cache": "full", "raw": RAW, "pictures": 1}
    first, second = start(tmp_path, [case] * 200, 2)
    assert first.stdout is not None
    assert first.stdout.readline() == "answered\n"  # in the middle of the answers
    second.kill()
    second.communicate()
    began = time.monotonic()
    _, said = first.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert first.returncode != 0
    assert "another process of the model has ended" in said


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "main.py"]
    return subprocess.run([*command, *words], capture_output=True, text=True, timeout=120)


def test_the_command_line_under_torchrun_answers_once() -> None:
    asked = ["examples/car.jpg", "What colour is the car?", "--stats"]
    done = torchrun(*asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The car is red.\n"
    assert done.stderr.count("one of 2 processes, whose sums make steps eager") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--chat"], "error: 2 processes answer one question"),
        (["examples/car.jpg", "What?", "--draw-boxes", "a.png"], "answer one question"),
        (["serve"], "error: 2 processes do not serve"),
    ],
)
def test_what_processes_cannot_do_together_is_refused(words: list[str], said: str) -> None:
    """Once, or by each process: who ends first may have torchrun end the other."""
    done = torchrun(*words)
    assert done.returncode != 0
    assert done.stderr.count(said) in (1, 2)


def test_an_observer_wants_all_heads() -> None:
    engine = Engine.load()
    engine.model.decoder.ranks = Ranks(0, 2)
    with pytest.raises(OptionError, match="an observer sees all heads"):
        list(engine.stream("What?", observer=Trace()))


def test_cross_layers_are_not_split(tmp_path: Path) -> None:
    model = recognise(write_mllama(tmp_path / "m")).model
    with pytest.raises(OptionError, match="cross layers is not split"):
        split(model.decoder, Ranks(0, 2))


@pytest.mark.parametrize("rank", [0, 1])
def test_each_reads_its_rows_and_columns(rank: int, tmp_path: Path) -> None:
    """Side by side the parts are the whole, whatever the kind of cut."""
    folder = write_llava(tmp_path / "m", Shape(layers=1))
    whole = Engine.load(folder, dtype="float32").model.decoder.layers[0]
    part = load(folder, "cpu", "float32", None, "auto", Wishes(), Ranks(rank, 2))
    mine = part.family.model.decoder.layers[0]
    for name, dim in (("q_proj", 0), ("down_proj", 1), ("o_proj", 1), ("up_proj", 0)):
        expected = getattr(whole, name).weight.chunk(2, dim)[rank]
        assert torch.equal(getattr(mine, name).weight, expected)


def test_without_a_group_there_is_nothing_to_share() -> None:
    with pytest.raises(OptionError, match="there is no process group"):
        Engine.load(parallel=True)
