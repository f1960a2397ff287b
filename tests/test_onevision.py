"""LLaVA-OneVision beside transformers: SigLIP, tiles whose grid is shrunk, several pictures."""

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
from tokenizers import Tokenizer
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from bench.byte_level import byte_level
from engine.engine import Engine
from engine.errors import CheckpointError
from engine.loading.families import recognise
from engine.models.llava_onevision import LlavaOnevision
from engine.pictures.anyres import grid_of
from engine.result import Result
from tests.checkpoints import edit_json, write_json
from tests.noise import noise

SIDE = 62  # four patches of 14, and six pixels that fill none
PINPOINTS = [[SIDE * rows, SIDE * columns] for rows in range(1, 7) for columns in range(1, 7)]
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PICTURE = {"type": "image"}


def tokenizer() -> Tokenizer:
    return byte_level("user assistant What is in the picture?", 290, SPECIALS)


def make_config() -> Any:
    made = tokenizer()
    text = {
        **{"model_type": "qwen2", "hidden_size": 56, "intermediate_size": 96},
        **{"num_hidden_layers": 3, "num_attention_heads": 7, "num_key_value_heads": 1},
        **{"vocab_size": 320, "max_position_embeddings": 8192, "rope_theta": 1e6},
        **{"eos_token_id": made.token_to_id("<|im_end|>"), "bos_token_id": None},
    }
    vision = {
        **{"model_type": "siglip_vision_model", "hidden_size": 48, "intermediate_size": 80},
        **{"num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE},
        **{"patch_size": 14, "vision_use_head": False},
    }
    return LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=made.token_to_id("<image>"),
        video_token_index=made.token_to_id("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )


def make_model() -> Any:
    model = LlavaOnevisionForConditionalGeneration(make_config()).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.7, 1.3, generator=generator)
            elif weight.dim() == 1:
                weight.normal_(0, 0.2, generator=generator)
            else:
                wide = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                deviation = wide * weight[0].numel() ** -0.5
                weight.normal_(0, 0.5 if "embed" in name else deviation, generator=generator)
    return model


def rules() -> dict[str, Any]:
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return half | {
        "size": {"height": SIDE, "width": SIDE},
        "image_grid_pinpoints": PINPOINTS,
        "resample": 3,
    }


def write(folder: Path) -> Path:
    make_model().save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer().to_str())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    kind = {"image_processor_type": "LlavaOnevisionImageProcessor", "do_pad": True}
    write_json(folder / "preprocessor_config.json", rules() | kind)
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", settings)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[Engine, Any, Any]]:
    @functools.cache
    def make() -> tuple[Engine, Any, Any]:
        folder = write(tmp_path_factory.mktemp("onevision") / "m")
        engine = Engine.load(folder, device="cpu", dtype="float32", cache="full")
        return engine, make_model(), LlavaOnevisionImageProcessorPil(**rules())

    return make


def asked(count: int, text: str = "What is in the picture?") -> list[dict[str, Any]]:
    content = [*[PICTURE] * count, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def pictures(sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    return [noise(*size, seed=number) for number, size in enumerate(sizes)]


SIZES: dict[str, list[tuple[int, int]]] = {
    "none": [],
    "one tile": [(60, 60)],
    "wide": [(300, 40)],
    "tall": [(50, 280)],
    "large": [(360, 350)],  # 36 tiles, shrunk to as many patches as nine have
    "shrunk unevenly": [(370, 250)],
    "two": [(100, 60), (64, 64)],
    "three": [(40, 90), (200, 10), (62, 62)],
}


@pytest.mark.parametrize("name", SIZES)
def test_logits_and_answers_are_transformers(made: Any, name: str) -> None:
    engine, theirs, process = made()
    images, sizes = pictures(SIZES[name]), SIZES[name]
    messages = asked(len(sizes))
    ids = torch.tensor([engine.render(messages, images).token_ids])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        made_pixels = process([images], return_tensors="pt")
        given |= {key: made_pixels[key] for key in ("pixel_values", "image_sizes")}
        given["batch_num_images"] = torch.tensor([len(images)])
    with torch.inference_mode():
        expected = theirs(**given).logits[0].float()
        answer = theirs.generate(**given, max_new_tokens=16, do_sample=False, eos_token_id=None)
    got = engine.logits(messages, images)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 2e-4
    result = engine.generate(messages, images, max_new_tokens=16, ignore_eos=True)
    assert result.token_ids == answer[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", [name for name in SIZES if SIZES[name]])
def test_pixels_are_bit_equal(made: Any, name: str) -> None:
    engine, _, process = made()
    images = pictures(SIZES[name])
    theirs = process([images], return_tensors="pt")["pixel_values"]
    prepare = engine.processor.prepare if len(images) == 1 else engine.processor.prepare_beside
    for image, expected in zip(images, theirs, strict=True):
        tiles = prepare(image).tiles
        assert torch.equal(tiles, expected[: len(tiles)])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_prompts_are_the_templates(made: Any, count: int) -> None:
    engine, *_ = made()
    images = pictures([(60, 60), (50, 90)][:count])
    messages = asked(count, "Hi?")
    messages += [{"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}]
    messages += asked(0, "Sure?")
    text = jinja2.Template(TEMPLATE).render(messages=messages, add_generation_prompt=True)
    prompt = engine.render(messages, images)
    assert prompt.text == text
    image_token = engine.model.image_token
    squeezed = [
        token
        for n, token in enumerate(prompt.token_ids)
        if token != image_token or prompt.token_ids[n - 1] != image_token or count == 2
    ]
    if count < 2:
        assert squeezed == tokenizer().encode(text).ids


# Of a picture by itself at the published sizes: 384 px, 27 patches a side, 36 canvases.
TOKENS = {
    (384, 384): 1485,
    (640, 480): 2929,
    (480, 640): 2943,
    (1024, 768): 4725,
    (1280, 720): 5967,
    (1920, 1080): 7269,
    (1240, 1754): 7353,
    (4032, 3024): 7309,
    (1000, 300): 2779,
}


@pytest.mark.parametrize("size", TOKENS)
def test_published_token_counts(size: tuple[int, int], made: Any) -> None:
    published = tuple(
        (384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)
    )
    grid = grid_of(size, published, 384, 27)
    with torch.device("meta"):
        model = LlavaOnevision(_published(), published, 9)
    rows, columns = model.shrunk(grid)
    assert 729 + rows * (columns + 1) == TOKENS[size]


@functools.cache
def _published() -> Any:
    from engine.models.llava_onevision import parse_onevision

    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
    vision |= {"num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384}
    text = {"model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14}
    text |= {"num_key_value_heads": 2, "num_hidden_layers": 24, "vocab_size": 152000}
    values = {"vision_config": vision | {"patch_size": 14}, "text_config": text}
    return parse_onevision(values | {"image_grid_pinpoints": [[384, 384]]})[0]


@pytest.mark.parametrize("spec", ["full", "avl:floor=4", "sift"])
def test_rows_of_a_batch_answer_as_alone(made: Any, spec: str) -> None:
    engine = made()[0].with_cache(spec)
    requests = [
        {"prompt": asked(len(SIZES[name])), "images": pictures(SIZES[name])}
        | {"max_new_tokens": 6 + n, "ignore_eos": True}
        for n, name in enumerate(("wide", "two", "none", "tall"))
    ]
    alone = [engine.generate(**each).token_ids for each in requests]
    done = {r.index: r for r in engine.generate_batch(requests, 4)}
    for number, expected in enumerate(alone):
        result = done[number]
        assert isinstance(result, Result), result
        assert result.token_ids == expected


def test_a_later_picture_stands_beside_the_earlier(made: Any) -> None:
    """It is one tile, as several pictures in one prompt are."""
    engine, *_ = made()
    chat = engine.chat()
    first = chat.send("What?", pictures([(300, 40)]), max_new_tokens=3, ignore_eos=True)
    second = chat.send("And that?", pictures([(300, 40)]), max_new_tokens=3, ignore_eos=True)
    assert first.image_tokens > 17
    assert second.image_tokens == 17


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_aspect_ratio": "pad"}, "vision_aspect_ratio"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
        ({"image_grid_pinpoints": [[60, 60]]}, "image_grid_pinpoints"),
    ],
)
def test_wrong_files_are_refused_by_key(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "m")
    edit_json(folder / "config.json", **changes)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llava_onevision"
    with pytest.raises(CheckpointError, match=words):
        recognise(folder)
