"""How an answer ends, what is streamed, and what is refused before any work is done."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.engine import Engine
from engine.errors import CapacityError, CheckpointError, OptionError
from engine.result import Result
from engine.running.generation import StopTexts
from tests.checkpoints import DEFAULT, Shape, draw, edit_json, save, spelled, write_llava
from tests.noise import noise

SHAPE = Shape(kv_heads=2)


@pytest.fixture
def engine(engine_of: Callable[..., Engine]) -> Engine:
    return engine_of(SHAPE)


# -- an engine that says what the test wants ------------------------------------------------------


def scripted(engine: Engine, monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """Make the model prefer ``ids`` one after the other, then </s>; all else runs as ever."""
    left: Iterator[int] = iter([*ids, *[2] * 100])
    decoder = engine.model.decoder

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        scores = torch.zeros(*hidden.shape[:-1], decoder.config.vocab)
        scores[..., next(left)] = 5.0
        return scores

    monkeypatch.setattr(decoder.head, "forward", logits)


def ids_of(engine: Engine, text: str) -> list[int]:
    return engine.tokenizer.encode(text)


def streamed(engine: Engine, *args: Any, **options: Any) -> tuple[list[str], Result]:
    *pieces, result = engine.stream(*args, **options)
    assert isinstance(result, Result)
    assert all(isinstance(piece, str) and piece for piece in pieces)
    assert "".join(map(str, pieces)) == result.text
    return [str(piece) for piece in pieces], result


# -- ends -----------------------------------------------------------------------------------------


def test_end_token_ends_the_answer_and_is_left_out(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(engine, "the red car")
    scripted(engine, monkeypatch, ids)
    pieces, result = streamed(engine, "What?")
    assert (result.text, result.token_ids, result.finish_reason) == ("the red car", ids, "stop")
    assert len(pieces) > 1
    assert result.timings.steps == len(ids)  # the end token is sampled after the last of them


def test_end_token_as_the_first_token_gives_an_empty_answer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(engine, monkeypatch, [])
    pieces, result = streamed(engine, "What?", [noise(60, 60)])
    assert (pieces, result.text, result.token_ids) == ([], "", [])
    assert result.finish_reason == "stop"
    assert result.timings.steps == 0
    assert result.cache.image_tokens == 16


def test_every_configured_end_token_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llava(tmp_path, DEFAULT)
    edit_json(tmp_path / "generation_config.json", eos_token_id=[2, 300])
    engine = Engine.load(tmp_path, device="cpu", cache="full")
    scripted(engine, monkeypatch, [290, 291, 300, 292])
    assert engine.generate("What?").token_ids == [290, 291]


def test_ignore_eos_goes_on_to_the_limit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_of(engine, "the car")
    scripted(engine, monkeypatch, ids)
    result = engine.generate("What?", max_new_tokens=len(ids) + 3, ignore_eos=True)
    assert result.token_ids == [*ids, 2, 2, 2]
    assert (result.text, result.finish_reason) == ("the car", "length")


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_max_new_tokens_is_exact(
    limit: int, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(engine, "the red car is in the picture here")
    scripted(engine, monkeypatch, ids)
    _, result = streamed(engine, "What?", max_new_tokens=limit)
    assert (result.token_ids, result.finish_reason) == (ids[:limit], "length")
    assert result.timings.steps == limit - 1
    assert result.text == engine.tokenizer.decode(ids[:limit])


def test_a_character_cut_by_the_limit_is_shown_as_the_tokenizer_decodes_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(engine, "a 🚗")
    assert len(ids) > 4  # the car is four byte tokens
    scripted(engine, monkeypatch, ids)
    pieces, whole = streamed(engine, "What?")
    assert whole.text == "a 🚗"
    assert pieces[-1].endswith("🚗")
    scripted(engine, monkeypatch, ids)
    _, cut = streamed(engine, "What?", max_new_tokens=len(ids) - 1)
    assert cut.text == engine.tokenizer.decode(ids[:-1])


# -- stop texts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["car"], "the red "),
        (["d c"], "the re"),  # across a token boundary
        (["e red", "car"], "th"),  # the earliest counts, not the first listed
        (["car", "ca"], "the red "),
        (["the"], ""),
        (["x", "the red carp"], "the red car is"),  # held back, then shown after all
        (["is "], "the red car is"),  # held back to the end
    ],
)
def test_stop_texts_cut_the_answer(
    stop: list[str], text: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(engine, "the red car is")
    scripted(engine, monkeypatch, ids)
    pieces, result = streamed(engine, "What?", stop=stop)
    assert result.text == text
    assert result.finish_reason == "stop"
    assert result.token_ids == ids[: len(result.token_ids)]
    assert not any(word in "".join(pieces) for word in stop)


def test_tokens_after_a_stop_text_are_not_computed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(engine, "the red car is in the picture")
    scripted(engine, monkeypatch, ids)
    result = engine.generate("What?", stop=["red"])
    assert len(result.token_ids) < len(ids)
    assert engine.tokenizer.decode(result.token_ids).endswith("red")


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=3), max_size=12),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_texts_by_definition(pieces: list[str], stop: list[str]) -> None:
    """Shown: the text before the earliest stop text of the shortest prefix that holds one."""
    stops, shown, read = StopTexts(stop), "", ""
    for piece in pieces:
        shown += stops.push(piece)
        read += piece
        found = [read.find(word) for word in stop if word in read]
        assert stops.found == bool(found)
        if found:
            assert shown == read[: min(found)]
            return
        assert read == shown + stops.held
        # What is held back could still become a stop text; nothing else is held.
        assert not stops.held or any(word.startswith(stops.held) for word in stop)
    assert read == shown + stops.held


# -- refusals -------------------------------------------------------------------------------------


def test_context_is_checked_before_prefill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(DEFAULT, context=60)
    engine = Engine.load(write_llava(tmp_path, shape), device="cpu", cache="full")
    prompt = engine.generate("Hi", [noise(9, 9)], max_new_tokens=1).prompt_tokens
    assert engine.generate("Hi", [noise(9, 9)], max_new_tokens=60 - prompt, ignore_eos=True)

    def never(*_: object) -> None:
        pytest.fail("the decoder ran")

    monkeypatch.setattr(engine.model.decoder, "forward", never)
    with pytest.raises(CapacityError) as caught:
        engine.generate("Hi", [noise(9, 9)], max_new_tokens=61 - prompt)
    assert str(caught.value) == (
        f"prompt {prompt} tokens (16 image) + {61 - prompt} requested exceed the model's context "
        "of 60"
    )
    assert caught.value.exit_code == 5
    assert "max_new_tokens" in caught.value.hint


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [("decoder", "norm.weight"), ("projector", "linear_2.bias")])
def test_weights_that_are_not_finite_are_refused(
    part: tuple[str, str], bad: float, tmp_path: Path
) -> None:
    write_llava(tmp_path, DEFAULT)
    tensors = draw(DEFAULT)
    tensors[part][5] = bad
    save(spelled(tensors, "hub"), tmp_path)
    engine = Engine.load(tmp_path, device="cpu")
    with pytest.raises(CheckpointError, match="not finite") as caught:
        engine.generate("What?", [noise(56, 56)])
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -4}, "max_new_tokens is -4"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ["a", ""]}, "stop text is empty"),
    ],
)
def test_options_out_of_range_are_refused_when_asked(
    options: dict[str, Any], named: str, engine: Engine
) -> None:
    with pytest.raises(OptionError, match=named) as caught:
        engine.stream("What?", **options)  # before the first piece is asked for
    assert caught.value.exit_code == 2
    assert caught.value.hint


# -- the same again -------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["full", "avl"])
def test_the_same_request_gives_the_same_answer(
    cache: str, engine_of: Callable[..., Engine]
) -> None:
    engine = engine_of(SHAPE, "hub", "float32", cache)
    for options in ({}, {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "seed": 5}):
        asked = dict(max_new_tokens=24, ignore_eos=True, **options)
        first = engine.generate("What is this?", [noise(60, 60)], **asked)
        second = engine.generate("What is this?", [noise(60, 60)], **asked)
        assert (first.text, first.token_ids) == (second.text, second.token_ids)
        assert first.cache == second.cache
    other = engine.generate("What is this?", [noise(60, 60)], **(asked | {"seed": 6}))
    assert other.token_ids != first.token_ids


def test_sampled_tokens_follow_the_models_distribution(engine: Engine) -> None:
    """The first token of many seeds against softmax of ``logits``, temperature applied."""
    last = engine.logits("What is this?")[-1]
    expected = (last / 0.5).softmax(-1)
    ids = [
        engine.generate(
            "What is this?", max_new_tokens=1, temperature=0.5, seed=seed, ignore_eos=True
        ).token_ids[0]
        for seed in range(300)
    ]
    top = int(expected.argmax())
    share, seen = float(expected[top]), ids.count(top) / 300
    assert abs(seen - share) < 5 * (share * (1 - share) / 300) ** 0.5
    assert len(set(ids)) > 3
