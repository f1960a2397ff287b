"""Answers drawn as a checkpoint's generation_config.json has it, where a request says nothing."""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

from engine.app.cli import main
from engine.engine import Engine
from engine.errors import CheckpointError, OptionError
from engine.options import Sampling, make_options
from tests.checkpoints import Shape, edit_json
from tests.noise import noise
from tests.oracle import Oracle

PUBLISHED = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8}


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(copytree(checkpoint(Shape(), "hub"), tmp_path / "m"))


def drawn(engine: Engine, **options: Any) -> Sampling:
    """How a request's tokens are drawn."""
    return engine.answer(make_options(**options), [])._options.sampling


def test_what_a_request_leaves_out_is_the_checkpoints(folder: Path) -> None:
    edit_json(folder / "generation_config.json", **PUBLISHED, repetition_penalty=1.05)
    engine = Engine.load(folder, device="cpu", as_published=True)
    assert drawn(engine) == Sampling(0.7, 20, 0.8, 0, 1.05)
    assert drawn(engine, temperature=0, seed=3) == Sampling(0.0, 20, 0.8, 3, 1.05)
    assert drawn(engine, top_k=0, repetition_penalty=1.0) == Sampling(0.7, 0, 0.8, 0, 1.0)
    assert drawn(engine.with_cache("full")) == drawn(engine)
    assert drawn(Engine.load(folder, device="cpu")) == Sampling()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"do_sample": False, "top_k": 6, "repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": "hot", "top_k": None, "top_p": [1]}, {}),
        ({"do_sample": "yes", "top_k": 5}, {}),
        ({"temperature": 0.6}, {}),
    ],
)
def test_only_what_is_said_counts(
    values: dict[str, Any], expected: dict[str, float], folder: Path
) -> None:
    edit_json(folder / "generation_config.json", **values)
    found = Engine.load(folder, device="cpu", as_published=True).published
    assert found == expected


def test_numbers_out_of_range_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_json(folder / "generation_config.json", do_sample=True, top_p=1.5)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p is 1\.5"):
        Engine.load(folder, device="cpu", as_published=True)
    assert main(["--check", "--model", str(folder), "--quiet"]) == 0
    assert "top_p is 1.5): --as-published is refused" in capsys.readouterr().out
    with pytest.raises(OptionError, match="as_published is"):
        Engine.load(folder, device="cpu", as_published="no")  # type: ignore[arg-type]


def test_greedy_answers_follow_the_published_penalty_as_transformers_does(folder: Path) -> None:
    """transformers takes it from the same file, without being told."""
    edit_json(folder / "generation_config.json", repetition_penalty=1.7)
    engine = Engine.load(folder, device="cpu", dtype="float32", cache="full", as_published=True)
    image = noise(40, 40)
    oracle = Oracle(folder)
    assert oracle.model.generation_config.repetition_penalty == 1.7
    inputs = oracle.inputs(engine.render("What?", [image]).text, [image])
    ours = engine.generate("What?", [image], max_new_tokens=12, ignore_eos=True)
    assert ours.token_ids == oracle.greedy(inputs, 12)
    plain = engine.generate(
        "What?", [image], max_new_tokens=12, ignore_eos=True, repetition_penalty=1
    )
    assert plain.token_ids != ours.token_ids


def test_chats_and_batches_draw_so_too(folder: Path) -> None:
    edit_json(folder / "generation_config.json", **PUBLISHED)
    engine = Engine.load(folder, device="cpu", dtype="float32", as_published=True)
    options: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True, "seed": 5}
    expected = engine.generate("What?", temperature=0.7, top_k=20, top_p=0.8, **options)
    (batched,) = engine.generate_batch([{"prompt": "What?", **options}])
    assert batched.token_ids == expected.token_ids  # type: ignore[union-attr]
    assert engine.chat().send("What?", **options).token_ids == expected.token_ids
    assert engine.generate("What?", temperature=0, **options).token_ids != expected.token_ids
    torch.manual_seed(1)
    assert engine.generate("What?", **options).token_ids == expected.token_ids


def test_answers_of_another_draw_are_another_engines(folder: Path) -> None:
    edit_json(folder / "generation_config.json", **PUBLISHED)
    published = Engine.load(folder, device="cpu", as_published=True)
    greedy = Engine.load(folder, device="cpu")
    assert published.fingerprint() != greedy.fingerprint()
    assert published.with_cache("full").fingerprint() == published.fingerprint()


def test_the_flag_reaches_the_engine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_json(folder / "generation_config.json", **PUBLISHED)
    asked = ["What?", "--model", str(folder), "-n", "8", "--cache", "full", "--seed", "7"]
    assert main([*asked, "--quiet"]) == 0
    greedy = capsys.readouterr().out
    assert main([*asked, "--quiet", "--as-published"]) == 0
    published = capsys.readouterr().out
    flags = ["--temperature", "0.7", "--top-k", "20", "--top-p", "0.8"]
    assert main([*asked, "--quiet", *flags]) == 0
    assert capsys.readouterr().out == published != greedy
    assert main([*asked, "--as-published"]) == 0
    assert "--seed changes nothing" not in capsys.readouterr().err
