"""Llama-3.2-Vision against transformers and against its description, number by number."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, MllamaForConditionalGeneration

from engine.engine import Engine
from engine.prompts.prompt import Prompt
from tests.checkpoints import edit_json
from tests.mllama_checkpoint import DEFAULT, MllamaShape, draw, mllama_config, write_mllama
from tests.mllama_reference import MllamaReference, Seen
from tests.noise import noise
from tests.oracle import Oracle

PICTURE = {"type": "image"}
# Which canvas a picture of a size takes, in tiles of 56 px.
SIZES = {
    (1, 1): (50, 50),
    (1, 2): (100, 40),
    (1, 3): (160, 50),
    (1, 4): (220, 40),
    (2, 1): (40, 100),
    (2, 2): (100, 90),
    (3, 1): (50, 160),
    (4, 1): (40, 400),
}
# What is done of two accounts: by default as the weights were trained, else as transformers does.
AS_TRAINED, AS_TRANSFORMERS = (False, False), (True, True)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def turn(role: str, *content: dict[str, str] | str) -> dict[str, Any]:
    return {"role": role, "content": [text(c) if isinstance(c, str) else c for c in content]}


ASK = "What is this picture?"
# Name -> (messages, sizes of the pictures).
REQUESTS: dict[str, tuple[list[dict[str, Any]], list[tuple[int, int]]]] = {
    **{
        f"{rows} x {columns} tiles": ([turn("user", PICTURE, ASK)], [size])
        for (rows, columns), size in SIZES.items()
    },
    "no picture": ([turn("user", ASK)], []),
    "picture after text": ([turn("user", "Look at this:", PICTURE)], [(60, 30)]),
    "two side by side": ([turn("user", PICTURE, PICTURE, ASK)], [(100, 40), (30, 30)]),
    "two apart": ([turn("user", PICTURE, "or", PICTURE, ASK)], [(100, 40), (50, 130)]),
    "three": ([turn("user", PICTURE, "or", PICTURE, PICTURE, ASK)], [(9, 9), (90, 90), (1, 1)]),
    "turns": (
        [
            turn("user", PICTURE, ASK),
            turn("assistant", "A red car 你好."),
            turn("user", "And what is that?", PICTURE),
            turn("assistant", "Two."),
            turn("user", "Sure?"),
        ],
        [(100, 75), (64, 99)],
    ),
}


class MllamaOracle(Oracle):
    """A Llama-3.2-Vision of transformers."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = MllamaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        ).eval()
        self.model.generation_config.eos_token_id = None
        self.processor = AutoProcessor.from_pretrained(folder)

    def inputs(
        self, messages: Sequence[dict[str, Any]] | str, images: Sequence[Image.Image]
    ) -> dict[str, torch.Tensor]:
        """A rendered text begins with BOS: the tokenizer must not add another."""
        rendered = messages
        if not isinstance(messages, str):
            rendered = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        more = {"add_special_tokens": False, "return_tensors": "pt"}
        return dict(self.processor(text=rendered, images=list(images) or None, **more))


def write(folder: Path, after: bool, blind: bool, layout: str = "hub") -> Path:
    """A checkpoint that says which account of either rule is its own."""
    write_mllama(folder, DEFAULT, layout)
    config = mllama_config(DEFAULT)
    vision = config["vision_config"] | {"features_after_layer": after}
    words = config["text_config"] | {"blind_tokens_attend": blind}
    edit_json(folder / "config.json", vision_config=vision, text_config=words)
    return folder


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Engine]:
    @functools.cache
    def made(after: bool = False, blind: bool = False, layout: str = "hub") -> Engine:
        folder = write(tmp_path_factory.mktemp("mllama") / "m", after, blind, layout)
        return Engine.load(folder, device="cpu", dtype="float32", cache="full")

    return made


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> MllamaOracle:
    return MllamaOracle(write_mllama(tmp_path_factory.mktemp("mllama") / "oracle"))


@functools.cache
def reference_of(after: bool, blind: bool, shape: MllamaShape = DEFAULT) -> MllamaReference:
    return MllamaReference(shape, draw(shape), after=after, blind=blind)


def pictures(sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    return [noise(*size, seed=number) for number, size in enumerate(sizes)]


def seen(engine: Engine, prompt: Prompt, images: Sequence[Image.Image]) -> list[Seen]:
    """What the reference is told of a prompt's pictures; their canvas by the tiles they take."""
    places = [segment.start for segment in prompt.segments if segment.kind == "image"]
    canvases = {size: canvas for canvas, size in SIZES.items()}
    found = []
    for place, image in zip(places, images, strict=True):
        tiles = engine.processor.prepare(image).tiles
        found.append(Seen(place, tiles, canvases[image.size]))
    return found


# -- against transformers -------------------------------------------------------------------------


@pytest.mark.parametrize("name", REQUESTS)
def test_ids_logits_and_greedy_tokens_equal_transformers(
    name: str, engine_of: Callable[..., Engine], oracle: MllamaOracle
) -> None:
    (messages, sizes), engine = REQUESTS[name], engine_of(*AS_TRANSFORMERS)
    images = pictures(sizes)
    inputs = oracle.inputs(messages, images)
    ids = inputs["input_ids"][0].tolist()
    if images:  # without one the template writes the day
        assert engine.render(messages, images).token_ids == ids
        asked: dict[str, Any] = {"prompt": messages, "images": images}
    else:
        words = oracle.processor.apply_chat_template(messages, add_generation_prompt=True)
        asked = {"prompt": words, "images": images, "raw": True}
    expected = oracle.logits(inputs)
    assert 1.5 < expected.std() < 2.5  # the tolerance is meant for this scale
    torch.testing.assert_close(engine.logits(**asked), expected, rtol=0, atol=2e-4)
    result = engine.generate(**asked, max_new_tokens=16, ignore_eos=True)
    assert result.token_ids == oracle.greedy(inputs, 16)
    assert (result.prompt_tokens, result.image_tokens) == (len(ids), 0)


@pytest.mark.parametrize("size", [1, 5, 16])
def test_a_prompt_read_in_ranges_is_the_same(
    size: int, engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges end before, within and behind what sees a picture."""
    for account in (AS_TRAINED, AS_TRANSFORMERS):
        engine, (messages, sizes) = engine_of(*account), REQUESTS["three"]
        expected = engine.logits(messages, pictures(sizes))
        told = engine.generate(messages, pictures(sizes), max_new_tokens=6, ignore_eos=True)
        with monkeypatch.context() as patch:
            patch.setattr("engine.cache.prefill.CHUNK", size)
            got = engine.logits(messages, pictures(sizes))
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
            same = engine.generate(messages, pictures(sizes), max_new_tokens=6, ignore_eos=True)
        assert same.token_ids == told.token_ids


@pytest.mark.parametrize("name", ["<|image|><|begin_of_text|>If", "<|begin_of_text|><|image|>If"])
def test_the_beginning_of_a_text_stands_where_it_is_written(
    name: str, engine_of: Callable[..., Engine], oracle: MllamaOracle
) -> None:
    """Transformers writes it behind a picture that comes first, Meta before it."""
    engine, image = engine_of(*AS_TRANSFORMERS), noise(100, 40)
    inputs, words = oracle.inputs(name, [image]), name.replace("<|image|>", "<image>")
    ids = engine.render(words, [image], raw=True).token_ids
    assert ids == inputs["input_ids"][0].tolist()
    assert ids.count(engine.tokenizer.bos_id or -1) == 1
    got = engine.logits(words, [image], raw=True)
    torch.testing.assert_close(got, oracle.logits(inputs), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("dtype", "most", "mean"), [("float16", 0.06, 0.006), ("bfloat16", 0.5, 0.05)]
)
def test_half_precision_stays_near_float32(
    dtype: str, most: float, mean: float, tmp_path: Path, oracle: MllamaOracle
) -> None:
    folder = write(tmp_path, *AS_TRANSFORMERS)
    engine = Engine.load(folder, device="cpu", dtype=dtype, cache="full")
    messages, sizes = REQUESTS["turns"]
    images = pictures(sizes)
    exact = oracle.logits(oracle.inputs(messages, images))
    error = (engine.logits(messages, images) - exact).abs()
    assert error.max() < most
    assert error.mean() < mean
    ids = engine.generate(messages, images, max_new_tokens=4, ignore_eos=True).token_ids
    steps = engine.logits(messages, images, ids)
    assert steps.argmax(-1).tolist() == ids


def test_what_transformers_saves_is_the_same_model(
    tmp_path: Path, engine_of: Callable[..., Engine], oracle: MllamaOracle
) -> None:
    oracle.model.save_pretrained(tmp_path)
    oracle.processor.save_pretrained(tmp_path)
    engine = Engine.load(tmp_path, device="cpu", dtype="float32", cache="full")
    messages, sizes = REQUESTS["turns"]
    ours = engine.logits(messages, pictures(sizes))
    for layout in ("hub", "modules"):
        same = engine_of(*AS_TRAINED, layout).logits(messages, pictures(sizes))
        assert torch.equal(same, ours)


# -- against the description ----------------------------------------------------------------------


@pytest.mark.parametrize("account", [AS_TRAINED, (True, False), (False, True), AS_TRANSFORMERS])
@pytest.mark.parametrize("sizes", [[(160, 50)], [(100, 40), (50, 50)]], ids=len)
def test_both_accounts_of_either_rule_equal_the_description(
    sizes: list[tuple[int, int]], account: tuple[bool, bool], engine_of: Callable[..., Engine]
) -> None:
    engine, reference = engine_of(*account), reference_of(*account)
    messages = [turn("user", "This", *[PICTURE] * len(sizes), ASK, PICTURE, "or this?")]
    images = pictures([*sizes, (40, 100)])
    prompt = engine.render(messages, images)
    expected = reference.logits(prompt.token_ids, seen(engine, prompt, images))
    torch.testing.assert_close(engine.logits(messages, images), expected, rtol=0, atol=2e-4)
    for other in {AS_TRAINED, (True, False), (False, True), AS_TRANSFORMERS} - {account}:
        far = engine_of(*other).logits(messages, images)[-1]
        assert (far - expected[-1]).abs().max() > 0.1


def test_the_accounts_that_the_weights_were_trained_with_are_the_default(tmp_path: Path) -> None:
    write_mllama(tmp_path)
    engine = Engine.load(tmp_path, device="cpu", dtype="float32", cache="full")
    messages, images = [turn("user", "This", PICTURE, ASK)], pictures([(220, 40)])
    prompt = engine.render(messages, images)
    told = prompt.token_ids, seen(engine, prompt, images)
    expected = reference_of(*AS_TRAINED).logits(*told)
    torch.testing.assert_close(engine.logits(messages, images), expected, rtol=0, atol=2e-4)
    result = engine.generate(messages, images, max_new_tokens=8, ignore_eos=True)
    assert result.token_ids == reference_of(*AS_TRAINED).greedy(*told, 8)


def test_a_conversation_is_the_whole_of_it(engine_of: Callable[..., Engine]) -> None:
    """Turn by turn: text alone, a picture, more text, two pictures; the reference reads it anew."""
    engine, reference = engine_of(*AS_TRAINED), reference_of(*AS_TRAINED)
    chat, shown = engine.chat(), list[Seen]()
    for words, sizes in (("Hello", []), (ASK, [(100, 90)]), ("Sure?", []), ("And?", SIDE)):
        images, before = pictures(sizes), len(chat.token_ids)
        messages = [turn("user", *[PICTURE] * len(images), words)]
        result = chat.send(messages, images, max_new_tokens=5, ignore_eos=True)
        ids = chat.token_ids[: len(chat.token_ids) - 5]
        image = engine.model.image_token
        places = [n for n, token in enumerate(ids) if n >= before and token == image]
        both = zip(places, seen(engine, engine.render(messages, images), images), strict=True)
        shown += [Seen(place, new.tiles, new.canvas) for place, new in both]
        assert result.token_ids == reference.greedy(ids, shown, 5)
        assert result.cache.features == sum(
            17 * len(new.tiles) for new in shown[-len(sizes) or -1 :]
        )


SIDE = [(160, 50), (50, 50)]
