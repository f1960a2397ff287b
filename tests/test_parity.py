"""The model against transformers, number by number, on seeded checkpoints of every layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from engine.engine import Engine
from engine.errors import CheckpointError
from engine.loading.families import Wishes, recognise
from engine.prompts.prompt import STYLES, build_prompt, parse_messages, raw_prompt
from tests.checkpoints import (
    DEFAULT,
    HUB_VOCAB,
    IMAGE_TOKEN,
    LAYOUTS,
    PIECES,
    Shape,
    draw,
    edit_json,
    save,
    spelled,
    text_config,
    write_llava,
    write_original_with_tower,
)
from tests.noise import noise
from tests.oracle import Oracle

SHAPES = {
    "llama-mha": Shape(),
    "llama-gqa": Shape(kv_heads=2),
    "mistral": Shape(family="mistral", kv_heads=1, seed=2),
    "qwen2": Shape(family="qwen2", kv_heads=2, seed=3),
    "llama-336": Shape(image=336, kv_heads=2, layers=2, seed=4),
}
PICTURE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def turn(role: str, *content: dict[str, str]) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


ASK = text("What is in this image?")
# Name -> (messages, sizes of the pictures).
REQUESTS: dict[str, tuple[list[dict[str, Any]], list[tuple[int, int]]]] = {
    "no picture": ([turn("user", text("Hello world, what's a car?"))], []),
    "one": ([turn("user", PICTURE, ASK)], [(56, 56)]),
    "wide": ([turn("user", PICTURE, ASK)], [(427, 61)]),
    "tall": ([turn("user", PICTURE, ASK)], [(33, 401)]),
    "one pixel": ([turn("user", PICTURE, ASK)], [(1, 1)]),
    "two": ([turn("user", PICTURE, PICTURE, ASK)], [(91, 57), (56, 83)]),
    "turns": (
        [
            turn("system", text("A chat of a human and an assistant.")),
            turn("user", PICTURE, ASK),
            turn("assistant", text("A red car 你好.")),
            turn("user", text("And here?"), PICTURE),
        ],
        [(100, 75), (64, 99)],
    ),
}


@pytest.fixture(scope="session")
def oracle(checkpoint: Callable[..., Path]) -> Callable[..., Oracle]:
    made: dict[Any, Oracle] = {}

    def of(shape: Shape = DEFAULT, dtype: torch.dtype = torch.float32) -> Oracle:
        if (shape, dtype) not in made:
            made[shape, dtype] = Oracle(checkpoint(shape), dtype)
        return made[shape, dtype]

    return of


def pictures(sizes: list[tuple[int, int]]) -> list[Image.Image]:
    return [noise(*size, seed=number) for number, size in enumerate(sizes)]


def prompt_ids(engine: Engine, messages: Any, counts: list[int]) -> list[int]:
    parsed = parse_messages(messages, len(counts))
    return build_prompt(parsed, "llava-hf", engine.tokenizer, IMAGE_TOKEN, counts).token_ids


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("shape_name", SHAPES)
def test_ids_logits_and_greedy_tokens_equal_transformers(
    shape_name: str,
    request_name: str,
    engine_of: Callable[..., Engine],
    oracle: Callable[..., Oracle],
) -> None:
    shape, (messages, sizes) = SHAPES[shape_name], REQUESTS[request_name]
    if shape.image == 336:
        sizes = [(5 * width, 5 * height) for width, height in sizes]
    engine, reference, images = engine_of(shape), oracle(shape), pictures(sizes)
    inputs = reference.inputs(messages, images)
    counts = [shape.image_tokens] * len(images)
    assert prompt_ids(engine, messages, counts) == inputs["input_ids"][0].tolist()
    expected = reference.logits(inputs)
    assert 1.5 < expected.std() < 2.5  # the tolerance below is meant for this scale
    torch.testing.assert_close(engine.logits(messages, images), expected, rtol=0, atol=2e-5)
    result = engine.generate(messages, images, max_new_tokens=16, ignore_eos=True)
    assert result.token_ids == reference.greedy(inputs, 16)
    assert result.prompt_tokens == inputs["input_ids"].shape[1]
    assert result.image_tokens == shape.image_tokens * len(images)


@pytest.mark.parametrize("size", [(56, 56), (427, 61), (33, 401), (1, 1), (57, 56), (333, 500)])
def test_pixels_equal_transformers(
    size: tuple[int, int], oracle: Callable[..., Oracle], checkpoint: Callable[..., Path]
) -> None:
    image = noise(*size)
    processor = recognise(checkpoint(Shape())).processor
    expected = oracle().inputs([turn("user", PICTURE, ASK)], [image])["pixel_values"][0]
    assert torch.equal(processor(image), expected)


@pytest.mark.parametrize(
    ("dtype", "most", "mean"), [("float16", 0.06, 0.006), ("bfloat16", 0.5, 0.05)]
)
@pytest.mark.parametrize("shape_name", ["llama-gqa", "qwen2", "llama-336"])
def test_half_precision_stays_near_transformers(
    shape_name: str,
    dtype: str,
    most: float,
    mean: float,
    engine_of: Callable[..., Engine],
    oracle: Callable[..., Oracle],
) -> None:
    shape, (messages, sizes) = SHAPES[shape_name], REQUESTS["turns"]
    engine, images = engine_of(shape, "hub", dtype), pictures(sizes)
    reference = oracle(shape, getattr(torch, dtype))
    ours = engine.logits(messages, images)
    same = reference.logits(reference.inputs(messages, images))
    exact = oracle(shape).logits(oracle(shape).inputs(messages, images))
    # Against the same dtype, and (rounding that both share would hide there) against fp32.
    for expected in (same, exact):
        error = (ours - expected).abs()
        assert error.max() < most
        assert error.mean() < mean
    # Not less exact than transformers in this dtype, beyond chance.
    assert (ours - exact).abs().mean() < 1.2 * (same - exact).abs().mean()


# The original layout's flat configuration is a Llama's: no qwen2 there.
@pytest.mark.parametrize(
    ("shape_name", "layout"),
    [("llama-gqa", name) for name in LAYOUTS]
    + [("qwen2", name) for name in LAYOUTS if name != "original"],
)
def test_every_layout_is_the_same_model(
    shape_name: str,
    layout: str,
    engine_of: Callable[..., Engine],
    oracle: Callable[..., Oracle],
) -> None:
    shape = SHAPES[shape_name]
    image, prompt = noise(77, 77), "USER: <image>\nWhat is this? ASSISTANT:"
    engine, reference = engine_of(shape, layout), oracle(shape)
    inputs = reference.inputs(prompt, [image])
    got, expected = engine.logits(prompt, [image], raw=True), reference.logits(inputs)
    assert got.shape[1] == (PIECES if layout == "original" else expected.shape[1])
    torch.testing.assert_close(got, expected[:, : got.shape[1]], rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [(56, 56), (427, 61), (33, 401), (90, 91)])
def test_original_layout_pads_to_square_and_uses_its_own_template(
    size: tuple[int, int], engine_of: Callable[..., Engine], oracle: Callable[..., Oracle]
) -> None:
    engine, reference = engine_of(Shape(), "original"), oracle()
    image = noise(*size)
    side = max(size)
    square = Image.new("RGB", (side, side), (122, 116, 104))  # CLIP's mean colour
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    rendered = (
        "A chat between a curious human and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the human's questions. "
        "USER: <image>\nWhat is this? ASSISTANT:"
    )
    inputs = reference.inputs(rendered, [square])
    got, expected = engine.logits("What is this?", [image]), reference.logits(inputs)
    torch.testing.assert_close(got, expected[:, :PIECES], rtol=0, atol=2e-5)


@pytest.mark.parametrize("place", ["inside", "beside", "absolute"])
def test_original_layout_takes_its_tower_from_the_folder_it_names(
    place: str, tmp_path: Path, engine_of: Callable[..., Engine]
) -> None:
    shape = Shape()
    folder = tmp_path / "model"
    tower = {"inside": None, "beside": folder / "clip" / "large", "absolute": tmp_path / "clip"}
    write_original_with_tower(folder, shape, tower[place])
    engine = Engine.load(folder, device="cpu", dtype="float32", cache="full")
    expected = engine_of(shape, "original").logits("What is this?", [noise(80, 50)])
    assert torch.equal(engine.logits("What is this?", [noise(80, 50)]), expected)


def test_tower_inside_the_checkpoint_wins_over_the_named_one(
    tmp_path: Path, engine_of: Callable[..., Engine]
) -> None:
    shape = Shape()
    write_original_with_tower(tmp_path, shape)
    inside = draw(Shape(seed=9))
    changed = {key: inside[key] if key[0] == "vision" else t for key, t in draw(shape).items()}
    save(spelled(changed, "original"), tmp_path)
    got = Engine.load(tmp_path, device="cpu", dtype="float32").logits("Hello", [noise(56, 56)])
    expected = engine_of(shape, "original").logits("Hello", [noise(56, 56)])
    assert (got - expected).abs().max() > 0.1


def test_marks_around_pictures_are_what_the_original_code_adds(tmp_path: Path) -> None:
    """The vocabulary is longer by the tokens, whether or not the tokenizer's files name them."""
    write_llava(tmp_path, Shape(), "original")
    edit_json(tmp_path / "config.json", mm_use_im_patch_token=True, mm_use_im_start_end=True)
    engine = Engine.load(tmp_path, device="cpu", cache="full")
    prompt = engine.render("Hi", [noise(56, 56)])
    assert "USER: <im_start><image><im_end>\nHi" in prompt.text
    tokens = ("<im_patch>", "<im_start>", "<im_end>")
    ids = [engine.tokenizer.token_id(token) for token in tokens]
    assert ids == [PIECES, PIECES + 1, PIECES + 2]
    (picture,) = (segment for segment in prompt.segments if segment.kind == "image")
    assert prompt.token_ids[picture.start - 1] == ids[1]
    assert prompt.token_ids[picture.end] == ids[2]
    with pytest.raises(CheckpointError, match=f"token {PIECES + 2} .*<im_end>.* have {PIECES}"):
        engine.generate("Hi", [noise(56, 56)], max_new_tokens=1)
    grown, full = spelled(draw(Shape()), "original"), spelled(draw(Shape()), "hub")
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        grown[table] = full[f"language_model.{table}"]
    save(grown, tmp_path)
    edit_json(tmp_path / "config.json", vocab_size=HUB_VOCAB)
    engine = Engine.load(tmp_path, device="cpu", cache="full")
    assert engine.generate("Hi", [noise(56, 56)], max_new_tokens=1).token_ids


def test_a_style_decides_the_prompt_and_the_checkpoint_the_picture(
    tmp_path: Path, engine_of: Callable[..., Engine]
) -> None:
    shape, image = Shape(), noise(90, 40)
    write_llava(tmp_path, shape)
    edit_json(tmp_path / "preprocessor_config.json", do_pad=True)  # as the original layout does
    hub = Engine.load(tmp_path, device="cpu", cache="full", style="llava-v1")
    original = engine_of(shape, "original")
    plain = engine_of(shape).processor
    for style in STYLES:
        assert recognise(tmp_path, Wishes(style)).processor == original.processor != plain
    ours = hub.logits("What is this?", [image])[:, :PIECES]
    torch.testing.assert_close(ours, original.logits("What is this?", [image]), rtol=0, atol=2e-5)


def test_tied_head_is_read_from_the_embedding(tmp_path: Path) -> None:
    shape = Shape()
    write_llava(tmp_path, shape)
    tensors = draw(shape)
    tensors["decoder", "embed_tokens.weight"] = tensors.pop(("head", "weight"))
    save(spelled(tensors, "hub"), tmp_path)
    text_part = text_config(shape) | {"tie_word_embeddings": True}
    edit_json(tmp_path / "config.json", tie_word_embeddings=True, text_config=text_part)
    engine, reference = Engine.load(tmp_path, device="cpu", cache="full"), Oracle(tmp_path)
    messages, image = [turn("user", PICTURE, ASK)], noise(56, 56)
    expected = reference.logits(reference.inputs(messages, [image]))
    torch.testing.assert_close(engine.logits(messages, [image]), expected, rtol=0, atol=2e-5)


# -- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("shape_name", SHAPES)
def test_decode_steps_equal_the_same_rows_of_a_full_pass(
    shape_name: str, images: int, engine_of: Callable[..., Engine]
) -> None:
    engine, given = engine_of(SHAPES[shape_name]), pictures([(90, 60), (60, 90)][:images])
    prompt = "USER: " + "<image>\n" * images + "What is this? ASSISTANT:"
    whole = prompt + " A red car in the image, what's the question here? 你好"
    counts = [SHAPES[shape_name].image_tokens] * images
    ids = raw_prompt(whole, engine.tokenizer, IMAGE_TOKEN, counts).token_ids
    start = len(raw_prompt(prompt, engine.tokenizer, IMAGE_TOKEN, counts).token_ids)
    assert len(ids) - start > 16
    stepwise = engine.logits(prompt, given, ids[start:], raw=True)
    expected = engine.logits(whole, given, raw=True)[start - 1 : -1]
    torch.testing.assert_close(stepwise, expected, rtol=0, atol=2e-5)


def test_continuation_may_be_text(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(Shape())
    rows = engine.logits("Hello", continuation="a car")
    ids = engine.tokenizer.encode("a car")
    assert rows.dtype == torch.float32
    assert torch.equal(rows, engine.logits("Hello", continuation=ids))
    assert len(rows) == len(ids)


def test_logits_without_a_continuation_are_exact_whatever_the_policy(
    engine_of: Callable[..., Engine],
) -> None:
    shape, messages = Shape(kv_heads=2), [turn("user", PICTURE, ASK)]
    exact = engine_of(shape).logits(messages, [noise(56, 56)])
    compressed = engine_of(shape, "hub", "float32", "avl:secondary=0.2,core=0.1,prefill=0.5")
    assert torch.equal(compressed.logits(messages, [noise(56, 56)]), exact)
