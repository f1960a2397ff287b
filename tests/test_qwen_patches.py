"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL beside transformers: pixels, prompts, logits, answers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from engine.engine import Engine
from engine.errors import CheckpointError, ImageError, OptionError
from engine.insight.panels import panels_of
from engine.loading.families import recognise
from engine.ops import native, products
from engine.pictures.patches import Cells, packed, unpacked
from engine.prompts.messages import parse_messages
from engine.prompts.prompt import build_prompt
from engine.result import Result, Timings
from engine.running.stepping import Stepper, Stepping
from engine.running.turn import make_pools, prefill
from tests.checkpoints import edit_json
from tests.noise import noise
from tests.qwen_patches_checkpoint import (
    KINDS,
    make_config,
    make_model,
    preprocessor,
    template,
    tokenizer,
    write_qwen_patches,
)

TOLERANCE = 2e-4
PICTURE, TEXT = {"type": "image"}, "What is in the picture?"


def turn(role: str, *content: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return {"role": role, "content": parts}


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[tuple[int, int]]]] = {
    "one": ([turn("user", PICTURE, TEXT)], [(120, 90)]),
    "wide": ([turn("user", PICTURE, TEXT)], [(400, 40)]),
    "small": ([turn("user", PICTURE, TEXT)], [(20, 30)]),
    "two": ([turn("user", PICTURE, "and", PICTURE, TEXT)], [(90, 120), (200, 60)]),
    "none": ([turn("user", "Who are you?")], []),
    "system": ([turn("system", "Be brief."), turn("user", PICTURE, TEXT)], [(64, 64)]),
    "later": (
        [
            turn("user", PICTURE, TEXT),
            turn("assistant", "A cat."),
            turn("user", "And that?", PICTURE),
            turn("assistant", "A dog."),
            turn("user", "Sure?"),
        ],
        [(100, 60), (60, 150)],
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Engine, Any, Any]]:
    """An engine, transformers' model and its picture processor."""

    @functools.cache
    def make(kind: str) -> tuple[Engine, Any, Any]:
        folder = write_qwen_patches(tmp_path_factory.mktemp(kind) / "m", kind)
        engine = Engine.load(folder, device="cpu", dtype="float32", cache="full")
        return engine, make_model(kind), processor(kind)

    return make


def processor(kind: str) -> Any:
    given = {k: v for k, v in preprocessor(kind).items() if k != "image_processor_type"}
    if "min_pixels" in given:
        limits = {"shortest_edge": given.pop("min_pixels"), "longest_edge": given.pop("max_pixels")}
        given["size"] = limits
    return Qwen2VLImageProcessorPil(**given)


def pictures(sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    return [noise(*size, seed=number) for number, size in enumerate(sizes)]


def inputs(engine: Engine, process: Any, messages: Any, images: list[Image.Image]) -> Any:
    """What transformers' model takes: our ids, its pixels."""
    ids = torch.tensor([engine.render(messages, images).token_ids])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given["mm_token_type_ids"] = (ids == engine.model.image_token).int()
    if images:
        given |= dict(process(images, return_tensors="pt"))
    return given


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_answers_are_transformers(made: Any, kind: str, name: str) -> None:
    engine, theirs, process = made(kind)
    messages, sizes = CONVERSATIONS[name]
    images = pictures(sizes)
    given = inputs(engine, process, messages, images)
    with torch.inference_mode():
        expected = theirs(**given).logits[0].float()
        answer = theirs.generate(
            **given, max_new_tokens=16, do_sample=False, eos_token_id=None, repetition_penalty=1.0
        )
    got = engine.logits(messages, images)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < TOLERANCE
    result = engine.generate(messages, images, max_new_tokens=16, ignore_eos=True)
    assert result.token_ids == answer[0, given["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_bit_equal(made: Any, kind: str) -> None:
    engine, _, process = made(kind)
    for width, height in [(640, 480), (33, 31), (500, 3), (56, 57), (224, 225), (1000, 700)]:
        image = noise(width, height)
        theirs = process([image], return_tensors="pt")
        ours = engine.processor.prepare(image)
        flat = ours.tiles[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1)
        assert torch.equal(flat, theirs["pixel_values"])
        rows, columns, _ = engine.model.grids([image.size])[0]
        assert theirs["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_are_the_templates(made: Any, kind: str, name: str) -> None:
    """Rendered by jinja and encoded as a whole, special tokens included; no BOS."""
    engine, *_ = made(kind)
    messages, sizes = CONVERSATIONS[name]
    images = pictures(sizes)
    rendered = jinja2.Template(template(kind)).render(messages=messages, add_generation_prompt=True)
    counts = [rows * columns for rows, columns, _ in engine.model.grids(sizes)]
    for count in counts:
        rendered = rendered.replace("<|image_pad|>", "<|hole|>" * count, 1)
    ids = tokenizer().encode(rendered.replace("<|hole|>", "<|image_pad|>")).ids
    assert engine.render(messages, images).token_ids == ids


# Sizes and tokens of the published limits.
TWO_AND_A_HALF, THREE = Cells(14, 2, 3136, 12845056), Cells(16, 2, 65536, 16777216)
GOLDEN = {
    (640, 480): ((644, 476), (640, 480), 391, 300),
    (1920, 1080): ((1932, 1092), (1920, 1088), 2691, 2040),
    (2480, 3508): ((2492, 3500), (2496, 3520), 11125, 8580),
    (100, 100): ((112, 112), (256, 256), 16, 64),
    (32, 200): ((28, 196), (128, 640), 7, 80),
    (8000, 6000): ((4116, 3080), (4704, 3520), 16170, 16170),
    (336, 336): ((336, 336), (320, 320), 144, 100),
    (4032, 3024): (None, None, 15552, 11844),
    (1240, 1754): (None, None, 2772, 2145),
}


@pytest.mark.parametrize("size", GOLDEN)
def test_published_sizes_and_token_counts(size: tuple[int, int]) -> None:
    *resized, second, third = GOLDEN[size]
    both = zip((TWO_AND_A_HALF, THREE), resized, (second, third), strict=True)
    for cells, expected, tokens in both:
        assert expected in (None, cells.resized(size))
        rows, columns = cells.grid(size)
        assert rows * columns == tokens


def test_a_ratio_beyond_the_published_one_is_refused(made: Any) -> None:
    engine, *_ = made("qwen3_vl")
    with pytest.raises(ImageError, match="more than 200 times"):
        engine.generate("What?", [Image.new("RGB", (2010, 10))], max_new_tokens=1)


def test_packing_is_undone() -> None:
    pixels = torch.randn(3, 56, 84)
    assert torch.equal(unpacked(packed(pixels, Cells()), (2, 3), Cells()), pixels)


# -- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen2_5_vl", {"flat": True}),
        ("qwen2_5_vl", {"layout": "modules"}),
        ("qwen2_vl", {"flat": True}),
        ("qwen2_5_vl", {"tied": True}),
        ("qwen3_vl", {"tied": True}),
    ],
)
def test_every_layout_is_the_same_model(kind: str, options: Any, tmp_path: Path) -> None:
    folder = write_qwen_patches(tmp_path / "m", kind, **options)
    engine = Engine.load(folder, device="cpu", dtype="float32", cache="full")
    theirs = make_model(kind, tied=options.get("tied", False))
    messages, sizes = CONVERSATIONS["two"]
    images = pictures(sizes)
    given = inputs(engine, processor(kind), messages, images)
    with torch.inference_mode():
        expected = theirs(**given).logits[0].float()
    assert (engine.logits(messages, images) - expected).abs().max() < TOLERANCE


def decoder(hidden: int, layers: int, heads: int, kv: int, mlp: int, vocab: int) -> dict[str, Any]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = dict(zip(names, (hidden, layers, heads, kv), strict=True))
    return sizes | {"intermediate_size": mlp, "vocab_size": vocab}


TIED = {"tie_word_embeddings": True}
SMALLER = {"hidden_size": 1024, "depth": 24, "intermediate_size": 4096}
SMALLER["deepstack_visual_indexes"] = [5, 11, 17]  # type: ignore[assignment]
# The published models, and their parameters in billions.
PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
    "Qwen2.5-VL-3B": (
        "qwen2_5_vl",
        decoder(2048, 36, 16, 2, 11008, 151936) | TIED,
        {"out_hidden_size": 2048, "hidden_size": 1280},
        3.75,
    ),
    "Qwen2.5-VL-7B": (
        "qwen2_5_vl",
        decoder(3584, 28, 28, 4, 18944, 152064),
        {"out_hidden_size": 3584, "hidden_size": 1280},
        8.29,
    ),
    "Qwen3-VL-2B": (
        "qwen3_vl",
        decoder(2048, 28, 16, 8, 6144, 151936) | TIED,
        {"out_hidden_size": 2048} | SMALLER,
        2.13,
    ),
    "Qwen3-VL-4B": (
        "qwen3_vl",
        decoder(2560, 36, 32, 8, 9728, 151936) | TIED,
        {"out_hidden_size": 2560} | SMALLER,
        4.44,
    ),
    "Qwen3-VL-8B": (
        "qwen3_vl",
        decoder(4096, 36, 32, 8, 12288, 151936),
        {"out_hidden_size": 4096},
        8.77,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_fit_name_by_name(name: str, tmp_path: Path) -> None:
    """On the meta device: what transformers' model of these sizes has, under its names, and all."""
    kind, text, vision, billions = PUBLISHED[name]
    config = make_config(kind)
    rope = dict(config.text_config.rope_parameters)
    rope["mrope_section"] = [24, 20, 20] if kind == "qwen3_vl" else [16, 24, 24]
    tied = text.get("tie_word_embeddings", False)
    values: dict[str, Any] = {"model_type": kind, "image_token_id": 151655}
    values |= {"tie_word_embeddings": tied, "vision_config": vision}
    if kind == "qwen3_vl":
        values["text_config"] = text | {"rope_scaling": rope, "rope_theta": 5e6, "head_dim": 128}
    else:
        values |= text | {"rope_scaling": {"type": "mrope", **rope}, "rope_theta": 1e6}
    (tmp_path / "config.json").write_text(json.dumps(values))
    family = recognise(tmp_path)
    made_class, model_class, _ = KINDS[kind]
    with torch.device("meta"):
        theirs = model_class(
            made_class(
                text_config=text | {"rope_parameters": rope, "head_dim": 128},
                vision_config=vision,
                tie_word_embeddings=tied,
            )
        )
    wanted = {key: tuple(value.shape) for key, value in family.model.state_dict().items()}
    if tied:
        wanted.pop("decoder.head.weight")
    found = {}
    for key, value in theirs.state_dict().items():
        if tied and key == "lm_head.weight":
            continue
        ours = family.rename(key)
        assert isinstance(ours, str), key
        found[ours] = tuple(value.shape)
    assert found == wanted
    count = sum(value.numel() for value in theirs.parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.01)


# -- the cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", ["full", "avl:floor=4,layer=3", "sift", "h2o", "zipvl:tau=0.8"])
def test_rows_of_a_batch_answer_as_alone(made: Any, kind: str, spec: str) -> None:
    """With pictures, two and none; each row counts its coordinates by its own pictures."""
    engine = made(kind)[0].with_cache(spec)
    requests = []
    for name in ("one", "two", "none", "wide"):
        messages, sizes = CONVERSATIONS[name]
        options = {"max_new_tokens": 7 + len(sizes), "ignore_eos": True}
        requests.append({"prompt": messages, "images": pictures(sizes), **options})
    alone = [engine.generate(**asked).token_ids for asked in requests]
    for rows in (2, 4):
        done = {r.index: r for r in engine.generate_batch(requests, rows)}
        for number, expected in enumerate(alone):
            result = done[number]
            assert isinstance(result, Result), result
            assert result.token_ids == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_says_what_transformers_says_of_all_of_it(made: Any, kind: str) -> None:
    """Every turn on the cache of the earlier ones, pictures in two of them."""
    engine, theirs, process = made(kind)
    chat, images = engine.chat(), []
    for number, sizes in enumerate([[(100, 60)], [], [(60, 150), (44, 44)], []]):
        new = pictures(sizes)
        images += new
        said = chat.send(f"{number}: {TEXT}", new, max_new_tokens=6, ignore_eos=True)
        ids = torch.tensor([chat.token_ids[:-6]])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        given["mm_token_type_ids"] = (ids == engine.model.image_token).int()
        given |= dict(process(images, return_tensors="pt"))
        with torch.inference_mode():
            answer = theirs.generate(
                **given,
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=None,
                repetition_penalty=1.0,
            )
        assert said.token_ids == answer[0, ids.shape[1] :].tolist()


def test_what_is_dropped_takes_its_inner_features_along(made: Any) -> None:
    """Tokens that go on after the first layer get theirs behind the second all the same."""
    engine, *_ = made("qwen3_vl")
    messages, sizes = CONVERSATIONS["one"]
    images = pictures(sizes)
    options = {"max_new_tokens": 8, "ignore_eos": True}
    full = engine.generate(messages, images, **options)
    kept = engine.with_cache("fastv:layer=1,drop=0.0").generate(messages, images, **options)
    assert kept.token_ids == full.token_ids
    dropped = engine.with_cache("fastv:layer=1,drop=0.5").generate(messages, images, **options)
    assert dropped.cache.stored.low < full.cache.stored.low


def test_pictures_may_be_limited_to_so_many_tokens(tmp_path: Path, ask: Any) -> None:
    folder = write_qwen_patches(tmp_path / "m", "qwen3_vl")
    noise(200, 150).save(tmp_path / "a.png")
    flags = ("--model", folder, "--image", tmp_path / "a.png", "-p", "What?", "-n", "1", "--json")
    counts = [
        json.loads(ask(*flags, "--quiet", *more).out)["image_tokens"]
        for more in ([], ["--max-image-tokens", "9"], ["--max-image-tokens", "1"])
    ]
    assert counts == [30, 6, 1]
    assert ask("--model", "weights/tiny", "--max-image-tokens", "9", "-p", "x").code == 2
    assert ask("--model", folder, "--max-image-tokens", "0", "-p", "x").code == 2
    checked = ask("--check", "--model", folder)
    assert "pictures of 4 to 64 tokens" in checked.out + checked.err


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_weights_in_few_bits_say_nearly_the_same(
    made: Any, kind: str, weights: str, tmp_path: Path
) -> None:
    """The decoder's layers are rounded, the tower is not."""
    engine, *_ = made(kind)
    folder = write_qwen_patches(tmp_path / "m", kind)
    few = Engine.load(folder, device="cpu", dtype="float32", cache="full", weights=weights)
    messages, sizes = CONVERSATIONS["one"]
    whole, rounded = (e.logits(messages, pictures(sizes)).log_softmax(-1) for e in (engine, few))
    divergence = (whole.exp() * (whole - rounded)).sum(-1).mean()
    assert 0 < divergence < {"q8": 0.01, "q4": 0.3}[weights]


@pytest.mark.skipif(not native.loaded(), reason="needs the native module")
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_recorded(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of queries and keys are native calls too; rows count their own coordinates."""
    monkeypatch.setattr(products, "_native_pays", lambda: True)
    folder = write_qwen_patches(tmp_path / "m", kind)
    engine = Engine.load(folder, device="cpu", dtype="bfloat16", cache="avl:floor=4")
    pools = make_pools(engine.model)
    stepper = Stepper(engine.model, pools, Stepping())
    for name in ("one", "none", "two"):
        messages, sizes = CONVERSATIONS[name]
        asked = engine.turn(messages, pictures(sizes), Timings())
        stepper.join(prefill(engine.model, pools, engine.policy, asked, 12)[0])
    for step in range(9):
        stepper.step(torch.arange(3) * 7 + step)
    assert stepper.eager_because is None
    assert all(stepper._taped._tapes.values())


def test_regions_are_read_in_each_generations_measure(made: Any) -> None:
    """Of the resized picture's pixels, or in thousandths; Qwen2-VL's are special tokens."""
    said = '[{"bbox_2d": [56, 28, 112, 84], "label": "x"}]'
    second, third = (made(kind)[0]._family.boxes for kind in ("qwen2_5_vl", "qwen3_vl"))
    assert second(said, (224, 168))[0].corners == ((56, 28), (112, 84))
    assert second(said, (448, 336))[0].corners == ((99, 56), (199, 168))  # shrunk to 252 x 168
    assert third(said, (1000, 500))[0].corners == ((56, 14), (112, 42))
    assert not made("qwen2_vl")[0].names_regions


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "where", "changes", "words"),
    [
        ("qwen3_vl", "config.json", {"model_type": "qwen3_vl_moe"}, "qwen3_vl_moe"),
        ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [9]}, "deepstack"),
        ("qwen3_vl", "vision_config", {"num_position_embeddings": 35}, "square"),
        ("qwen2_5_vl", "vision_config", {"temporal_patch_size": 3}, "temporal_patch_size"),
        ("qwen2_5_vl", "vision_config", {"window_size": 7}, "window_size"),
        ("qwen2_5_vl", "vision_config", {"out_hidden_size": 60}, "hidden_size"),
        ("qwen2_vl", "vision_config", {"num_heads": 5}, "num_heads"),
        ("qwen2_vl", "preprocessor", {"patch_size": 16}, "patch_size"),
        ("qwen2_vl", "preprocessor", {"min_pixels": 10**7}, "min_pixels"),
    ],
)
def test_wrong_files_are_refused_by_key(
    kind: str, where: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = write_qwen_patches(tmp_path / "m", kind)
    if where == "vision_config":
        vision = json.loads((folder / "config.json").read_text())["vision_config"]
        edit_json(folder / "config.json", vision_config=vision | changes)
    elif where == "preprocessor":
        edit_json(folder / "preprocessor_config.json", **changes)
    else:
        edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=words):
        recognise(folder)


def test_a_style_of_the_right_generation(made: Any) -> None:
    engine, *_ = made("qwen2_vl")
    with pytest.raises(OptionError, match="has no"):
        build_prompt(parse_messages([turn("user", "hi")], 0), "llama3", engine.tokenizer, 0, [])


@pytest.mark.parametrize("kind", KINDS)
def test_the_attention_page_shows_tokens_where_they_are(made: Any, kind: str) -> None:
    """A token for each cell, on the picture as it was resized."""
    engine, *_ = made(kind)
    image = noise(200, 120)
    pixels = engine.processor.prepare(image)
    (panel,) = panels_of(engine.model, engine.processor, pixels)
    assert (panel.rows, panel.columns) == engine.model.grids([image.size])[0][:2]
    assert panel.tokens == list(range(engine.model.image_tokens(pixels)))
    resized = image.resize(engine.processor.cells.resized(image.size), Image.Resampling.BICUBIC)
    assert panel.picture.tobytes() == resized.tobytes()
