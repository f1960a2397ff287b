"""The public surface: what requests may look like, and what comes back."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import engine as package
from engine.engine import Engine
from engine.errors import CheckpointError, EngineError, ImageError, OptionError
from engine.result import Result
from tests.checkpoints import DEFAULT, HUB_VOCAB, Shape
from tests.noise import noise

SHAPE = Shape(kv_heads=2)
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
]


@pytest.fixture
def engine(engine_of: Callable[..., Engine]) -> Engine:
    return engine_of(SHAPE)


def test_every_public_name_exists() -> None:
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = package.Motor


# -- requests -------------------------------------------------------------------------------------


def test_pictures_may_be_paths_bytes_or_pillow_images(engine: Engine, tmp_path: Path) -> None:
    image, path = noise(70, 50), tmp_path / "noise.png"
    image.save(path)
    expected = engine.logits("What?", [image])
    for given in (path, str(path), path.read_bytes(), Image.open(io.BytesIO(path.read_bytes()))):
        assert torch.equal(engine.logits("What?", [given]), expected)
        assert torch.equal(engine.logits("What?", given), expected)  # one picture without a list
    assert torch.equal(engine.logits("What?", (image,)), expected)


def test_a_text_is_one_user_turn_with_its_pictures_first(engine: Engine) -> None:
    image = noise(70, 50)
    expected = engine.logits("USER: <image>\nWhat is this? ASSISTANT:", [image], raw=True)
    assert torch.equal(engine.logits("What is this?", [image]), expected)
    assert torch.equal(engine.logits(MESSAGES, [image]), expected)


def test_pictures_fill_their_places_in_order(engine: Engine) -> None:
    one, two = noise(70, 50, seed=1), noise(70, 50, seed=2)
    there = engine.logits("Compare.", [one, two])
    back = engine.logits("Compare.", [two, one])
    assert (there - back).abs().max() > 0.1
    # Swapping both is the same conversation again: the picture in front is the first one's.
    assert torch.equal(engine.logits("Compare.", [one, two]), there)
    front = engine.logits("Compare.", [one])
    tokens = 4 + SHAPE.image_tokens  # BOS, the role and the first picture
    torch.testing.assert_close(there[:tokens], front[:tokens], rtol=0, atol=1e-5)


def test_special_tokens_in_a_users_text_are_only_text(engine: Engine) -> None:
    assert len(engine.logits("What </s> is <image> this?")) > 20
    plain, raw = "say </s>", "USER: say </s> ASSISTANT:"
    assert len(engine.logits(plain)) > len(engine.logits(raw, raw=True))


@pytest.mark.parametrize(
    ("prompt", "images", "raw", "problem"),
    [
        ("", 0, False, "prompt is empty"),
        ("  \n", 1, False, "prompt is empty"),
        ([], 0, False, "neither text nor a list"),
        ([{"role": "user"}], 0, False, "message 1 is not an object"),
        ([{"role": "robot", "content": "Hi"}], 0, False, "unknown role 'robot'"),
        (MESSAGES, 0, False, "places for 1 pictures, but 0 are given"),
        (MESSAGES, 2, False, "places for 1 pictures, but 2 are given"),
        ("<image>", 0, True, "places for 1 pictures, but 0 are given"),
        ("Hello", 1, True, "places for 0 pictures, but 1 are given"),
    ],
)
def test_wrong_prompts_are_named(
    prompt: Any, images: int, raw: bool, problem: str, engine: Engine
) -> None:
    for ask in (engine.generate, engine.logits, engine.stream):
        with pytest.raises(OptionError, match=problem) as caught:
            ask(prompt, [noise(9, 9)] * images, raw=raw)
        assert caught.value.hint


def test_a_picture_that_does_not_exist_is_named(engine: Engine) -> None:
    with pytest.raises(ImageError, match=r"none\.png") as caught:
        engine.generate("What?", ["none.png"])
    assert caught.value.exit_code == 3


# -- results --------------------------------------------------------------------------------------


def test_result_is_complete(engine: Engine) -> None:
    result = engine.generate("What?", [noise(9, 9)] * 2, max_new_tokens=5, ignore_eos=True)
    assert isinstance(result, Result)
    assert len(result.token_ids) == 5
    assert result.image_tokens == 2 * SHAPE.image_tokens
    assert result.prompt_tokens == len(engine.logits("What?", [noise(9, 9)] * 2))
    assert result.finish_reason == "length"
    timings = result.timings
    assert min(timings.load, timings.picture, timings.prefill, timings.decode) > 0
    assert timings.steps == 4
    assert timings.ttft == timings.picture + timings.prefill
    assert timings.per_token * timings.tokens_per_second == pytest.approx(1)
    # Four tokens were decoded behind the prompt: the fifth was never given to the model.
    cached = result.prompt_tokens + 4
    size = 2 * SHAPE.layers * SHAPE.kv_heads * (SHAPE.hidden // SHAPE.heads) * 4
    assert result.cache.bytes_used == result.cache.bytes_full == cached * size
    assert result.cache.bytes_allocated == (result.prompt_tokens + 5) * size
    assert result.cache.policy == "full"


def test_result_is_json(engine: Engine) -> None:
    result = engine.generate("What?", max_new_tokens=3)
    read = json.loads(json.dumps(result.as_dict()))
    assert read["token_ids"] == result.token_ids
    assert read["timings"]["ttft"] == result.timings.ttft
    assert set(read) >= {
        *("text", "token_ids", "prompt_tokens", "image_tokens", "finish_reason"),
        *("timings", "cache"),
    }


def test_default_policy_keeps_less(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(Shape(image=336, kv_heads=2, layers=2, seed=4), "hub", "float32", "avl")
    cache = engine.generate("What?", [noise(90, 90)], max_new_tokens=8, ignore_eos=True).cache
    assert cache.image_tokens == 576
    assert cache.stored.mean == int(0.45 * 576)
    assert cache.core.mean == int(0.30 * 576)
    assert cache.bytes_used < 0.6 * cache.bytes_full
    assert cache.bytes_allocated < 0.6 * cache.bytes_full


# -- logits ---------------------------------------------------------------------------------------


def test_logits_have_the_documented_shape(engine: Engine) -> None:
    rows = engine.logits("What?", [noise(9, 9)])
    assert rows.dtype == torch.float32
    assert rows.shape == (engine.generate("What?", [noise(9, 9)]).prompt_tokens, HUB_VOCAB)
    assert engine.logits("What?", continuation=[7]).shape == (1, HUB_VOCAB)
    assert engine.logits("What?", continuation=[]).shape == (0, HUB_VOCAB)


@pytest.mark.parametrize("ids", [[HUB_VOCAB], [-1], [5, 10**9, 5], ["a"], [1.5]])
def test_ids_outside_the_vocabulary_are_refused(ids: list[Any], engine: Engine) -> None:
    with pytest.raises(OptionError, match="continuation"):
        engine.logits("What?", continuation=ids)


def test_greedy_answer_is_the_argmax_of_logits(engine: Engine) -> None:
    ids = engine.generate("What?", [noise(9, 9)], max_new_tokens=8, ignore_eos=True).token_ids
    rows = engine.logits("What?", [noise(9, 9)], continuation=ids)
    assert rows.argmax(-1).tolist() == ids


# -- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"device": "tpu9"}, "unknown device 'tpu9'"),
        ({"cache": "lru"}, "unknown cache policy 'lru'"),
        ({"cache": "avl:core=2"}, "core is 2"),
        ({"style": "alpaca"}, "unknown prompt style 'alpaca'"),
    ],
)
def test_wrong_load_options_are_named(
    options: dict[str, str], named: str, checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(OptionError, match=named) as caught:
        Engine.load(checkpoint(DEFAULT), **({"device": "cpu"} | options))
    assert caught.value.hint


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_dtype_is_that_of_weights_and_cache(
    name: str, dtype: torch.dtype, checkpoint: Callable[..., Path]
) -> None:
    engine = Engine.load(checkpoint(SHAPE), device="cpu", dtype=name, cache="full")
    assert (engine.dtype, engine.device.type) == (dtype, "cpu")
    report = engine.generate("What?", max_new_tokens=2).cache
    single = Engine.load(checkpoint(SHAPE), device="cpu", dtype="fp32", cache="full")
    assert single.generate("What?", max_new_tokens=2).cache.bytes_full >= 2 * report.bytes_full - 1


def test_small_models_run_in_float32_on_a_cpu(checkpoint: Callable[..., Path]) -> None:
    stored = checkpoint(DEFAULT, "hub", torch.bfloat16)
    assert Engine.load(stored, device="cpu").dtype == torch.float32


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        Engine.load(tmp_path / "nowhere", offline=True)
    with pytest.raises(EngineError):
        Engine.load(tmp_path, offline=True)


def test_ids_of_any_whole_kind_are_taken_and_others_named(engine: Engine) -> None:
    expected = engine.logits("What?", continuation=[7, 8])
    for ids in (torch.tensor([7, 8]), (number for number in (7, 8))):
        assert torch.equal(engine.logits("What?", continuation=ids), expected)
    with pytest.raises(OptionError, match="continuation is 5"):
        engine.logits("What?", continuation=5)
    with pytest.raises(OptionError, match="observer is 5"):
        list(engine.stream("What?", observer=5))
