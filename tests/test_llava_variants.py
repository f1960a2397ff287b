"""What LLaVAs differ in beside transformers: towers, class tokens, projectors, layouts, prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from engine.engine import Engine
from engine.insight.panels import panels_of
from engine.loading.families import recognise
from engine.models.llava_onevision import LlavaOnevision
from tests import checkpoints as plain
from tests.checkpoints import Shape, edit_json, write_json
from tests.noise import noise
from tests.onevision_checkpoint import (
    TEMPLATES,
    TEXT,
    make_model,
    preprocessor,
    tokenizer,
    vision_config,
    write_onevision,
)
from tests.qwen_patches_checkpoint import scatter

TOLERANCE = 2e-4
PICTURE, QUESTION = {"type": "image"}, "What is in the picture?"


def turn(role: str, *content: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return {"role": role, "content": parts}


ASKED = [turn("user", PICTURE, QUESTION)]
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[tuple[int, int]]]] = {
    "one": (ASKED, [(120, 90)]),
    "tile": (ASKED, [(40, 44)]),
    "wide": (ASKED, [(400, 60)]),
    "tall": (ASKED, [(70, 300)]),
    "shrunk": (ASKED, [(260, 250)]),
    "two": ([turn("user", PICTURE, PICTURE, QUESTION)], [(90, 120), (200, 60)]),
    "none": ([turn("user", "Who are you?")], []),
    "system": ([turn("system", "Be brief."), *ASKED], [(64, 64)]),
    "later": (
        [
            *ASKED,
            turn("assistant", "A cat."),
            turn("user", "And?"),
            turn("assistant", "A dog."),
            turn("user", "Sure?"),
        ],
        [(100, 60)],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onevision(tmp_path_factory.mktemp("onevision") / "m")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.load(folder, device="cpu", dtype="float32", cache="full")


@pytest.fixture(scope="module")
def theirs() -> Any:
    return make_model()


@functools.cache
def process() -> Any:
    given = {k: v for k, v in preprocessor().items() if k != "image_processor_type"}
    return LlavaOnevisionImageProcessorPil(**given)


def pictures(sizes: list[tuple[int, int]]) -> list[Image.Image]:
    return [noise(*size, seed=number) for number, size in enumerate(sizes)]


def inputs(engine: Engine, messages: Any, images: list[Image.Image]) -> dict[str, Any]:
    """What transformers' model takes: our ids, its pixels."""
    ids = torch.tensor([engine.render(messages, images).token_ids])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        given |= dict(process()([images], return_tensors="pt"))
    return given


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("style", TEMPLATES)
def test_prompts_are_the_templates(tmp_path: Path, style: str, name: str) -> None:
    """Rendered by jinja and encoded as a whole, special tokens included; no BOS."""
    folder = write_onevision(tmp_path / "m", style=style)
    engine = Engine.load(folder, device="cpu")
    messages, sizes = CONVERSATIONS[name]
    rendered = jinja2.Template(TEMPLATES[style], keep_trailing_newline=True).render(
        messages=messages, add_generation_prompt=True
    )
    if style == "chatml" and name == "two":  # images first, and one line for each
        rendered = rendered.replace("<image><image>", "<image>\n<image>")
    if style == "chatml" and name != "system":  # as it was trained; this template leaves it out
        rendered = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + rendered
    prompt = engine.render(messages, pictures(sizes))
    assert prompt.text == rendered
    ids, image = tokenizer().encode(rendered).ids, engine.model.image_token
    counts = iter([s.end - s.start for s in prompt.segments if s.kind == "image"])
    assert prompt.token_ids == [
        x for token in ids for x in [token] * (next(counts) if token == image else 1)
    ]


@pytest.mark.parametrize(("layout", "tied"), [("hub", False), ("hub", True), ("original", False)])
def test_every_layout_is_the_same_model(
    engine: Engine, tmp_path: Path, layout: str, tied: bool
) -> None:
    folder = write_onevision(tmp_path / "m", layout=layout, tied=tied)
    made = Engine.load(folder, device="cpu", dtype="float32", cache="full", style="onevision")
    images = pictures([(260, 250)])
    if tied:
        with torch.inference_mode():
            expected = make_model(tied=True)(**inputs(made, ASKED, images)).logits[0]
    else:
        expected = engine.logits(ASKED, images)
    got = made.logits(ASKED, images)
    assert (got - expected).abs().max() < TOLERANCE


def test_siglip_may_lie_in_a_folder_of_its_own(engine: Engine, tmp_path: Path) -> None:
    """A complete SigLIP, with the half that reads text and the head that pools."""
    folder, tower = write_onevision(tmp_path / "m", layout="original"), tmp_path / "m" / "siglip"
    path, inside, outside = folder / "model.safetensors", {}, {}
    for name, value in load_file(path).items():
        _, prefix, rest = name.rpartition("vision_tower.vision_model.")
        (outside if prefix else inside)[f"vision_model.{rest}" if prefix else name] = value
    more = {"vision_model.head.probe": torch.ones(2), "logit_bias": torch.ones(1)}
    more["text_model.head.weight"] = torch.ones(3)
    tower.mkdir()
    plain.save(inside, folder)
    plain.save(outside | more, tower)
    edit_json(folder / "config.json", "_test_only_vision_config", mm_vision_tower="siglip")
    edit_json(folder / "config.json", image_aspect_ratio="pad")
    write_json(tower / "config.json", {"vision_config": vision_config(4)})
    made = Engine.load(folder, device="cpu", dtype="float32")
    image = noise(90, 50)
    pixels = made.processor.prepare(image)
    assert torch.equal(pixels.tiles, engine.processor.prepare_beside(image).tiles)
    with torch.inference_mode():
        expected = engine.model.encode([pixels])[0][:-1]  # without the newline
        torch.testing.assert_close(made.model.encode([pixels])[0], expected)


def test_the_original_layout_has_its_own_prompt(tmp_path: Path) -> None:
    family = recognise(write_onevision(tmp_path / "m", layout="original"))
    assert (family.style, type(family.model)) == ("chatml", LlavaOnevision)
    assert family.end_tokens == {0}


@pytest.mark.parametrize("name", ["one", "shrunk", "two"])
def test_the_attention_page_shows_each_token_once(engine: Engine, name: str) -> None:
    _, sizes = CONVERSATIONS[name]
    processor = engine.processor
    for pixels in processor.prepare_all(pictures(sizes)):
        panels = panels_of(engine.model, processor, pixels)
        shown = [token for panel in panels for token in (*panel.tokens, *panel.newlines)]
        assert sorted(shown) == list(range(engine.model.image_tokens(pixels)))


# -- published shapes ------------------------------------------------------------------------------

PUBLISHED = {
    "0.5b": ((896, 24, 14, 2, 4864, 152000), True, "0.894"),
    "7b": ((3584, 28, 28, 4, 18944, 152128), False, "8.03"),
    "72b": ((8192, 80, 64, 8, 29568, 152128), False, "73.2"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(tmp_path: Path, name: str) -> None:
    """With as many parameters as the hub says, in billions."""
    sizes, tied, billions = PUBLISHED[name]
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    text = dict(zip((*keys, "intermediate_size", "vocab_size"), sizes, strict=True))
    config = {"model_type": "llava_onevision", "image_token_index": 151646}
    config |= {"text_config": {"model_type": "qwen2", "tie_word_embeddings": tied, **text}}
    write_json(tmp_path / "config.json", config)
    family = recognise(tmp_path)
    assert isinstance(family.model, LlavaOnevision)
    assert (family.model.tiles, len(family.model.pinpoints)) == (9, 36)
    assert family.processor.output_size == (384, 384)
    parameters = sum(p.numel() for p in family.model.parameters())
    shared = text["vocab_size"] * text["hidden_size"] if tied else 0
    assert f"{(parameters - shared) / 1e9:.3g}" == billions


# -- SigLIP, and other choices, under plain LLaVA --------------------------------------------------


@functools.cache
def siglip_llava(strategy: str, layer: int) -> Any:
    config = LlavaConfig(
        text_config=TEXT,
        vision_config=vision_config(),
        image_token_index=tokenizer().token_to_id("<image>"),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    model = LlavaForConditionalGeneration(config).eval()
    scatter(model, 41)
    return model


@pytest.mark.parametrize(("strategy", "layer"), [("full", -1), ("full", -2), ("default", -2)])
def test_siglip_under_llava_equals_transformers(tmp_path: Path, strategy: str, layer: int) -> None:
    model = siglip_llava(strategy, layer)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer().to_str())
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    given = {"size": {"height": 44, "width": 44}, "resample": 3}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    named = {"image_processor_type": "SiglipImageProcessor"}
    write_json(tmp_path / "preprocessor_config.json", given | named)
    engine = Engine.load(tmp_path, device="cpu", dtype="float32", cache="full")
    image = noise(90, 50)
    pixels = SiglipImageProcessorPil(**given, **half)([image], return_tensors="pt")["pixel_values"]
    assert torch.equal(engine.processor.prepare(image).tiles, pixels)
    ids = torch.tensor([engine.render(QUESTION, [image]).token_ids])
    assert (ids == engine.model.image_token).sum() == (9 if strategy == "full" else 8)
    with torch.inference_mode():
        expected = model(input_ids=ids, pixel_values=pixels).logits[0]
    assert (engine.logits(QUESTION, [image]) - expected).abs().max() < TOLERANCE


def test_a_kept_class_token_equals_transformers(
    tmp_path: Path, oracle_of: Callable[[Path], Any]
) -> None:
    folder = plain.write_llava(tmp_path / "m", Shape())
    edit_json(folder / "config.json", vision_feature_select_strategy="full")
    edit_json(folder / "processor_config.json", vision_feature_select_strategy="full")
    engine, oracle = Engine.load(folder, device="cpu", dtype="float32"), oracle_of(folder)
    given = oracle.inputs([turn("user", PICTURE, QUESTION)], [noise(80, 60)])
    prompt = engine.render(QUESTION, [noise(80, 60)])
    assert prompt.token_ids == given["input_ids"][0].tolist()
    got = engine.logits(QUESTION, [noise(80, 60)])
    assert (got - oracle.logits(given)).abs().max() < TOLERANCE
    pixels = engine.processor.prepare(noise(80, 60))
    (panel,) = panels_of(engine.model, engine.processor, pixels)
    assert (panel.tokens, panel.newlines) == (list(range(1, 17)), (0,))


@pytest.fixture
def oracle_of() -> Callable[[Path], Any]:
    from tests.oracle import Oracle

    return Oracle


@pytest.mark.parametrize(("kind", "depth"), [("linear", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)])
def test_projectors_of_other_depths(tmp_path: Path, kind: str, depth: int) -> None:
    """Against the definition: linear layers, exact GELUs between them."""
    folder, shape = plain.write_llava(tmp_path / "m", Shape(), "original"), Shape()
    edit_json(folder / "config.json", mm_projector_type=kind)
    tensors = plain.spelled(plain.draw(shape), "original")
    for name in [name for name in tensors if "mm_projector" in name]:
        del tensors[name]
    generator = torch.Generator().manual_seed(5)
    layers = []
    for number in range(depth):
        width = shape.vision_hidden if number == 0 else shape.hidden
        weight = torch.randn(shape.hidden, width, generator=generator)
        layers.append((weight, torch.randn(shape.hidden, generator=generator)))
        name = "model.mm_projector." + (f"{2 * number}." if depth > 1 else "")
        tensors |= {f"{name}weight": layers[-1][0], f"{name}bias": layers[-1][1]}
    plain.save(tensors, folder)
    projector = Engine.load(folder, device="cpu", dtype="float32").model.projector
    given = torch.randn(3, shape.vision_hidden, generator=generator)
    expected = given
    for number, (weight, bias) in enumerate(layers):
        bent = torch.nn.functional.gelu(expected) if number else expected
        expected = bent @ weight.T + bias
    torch.testing.assert_close(projector(given), expected)
