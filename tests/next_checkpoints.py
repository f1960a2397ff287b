"""Small LLaVA-1.6 checkpoints with seeded random weights, in both published families of files."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests import checkpoints as plain
from tests.checkpoints import Shape

# Every text model of the published LLaVA-1.6, and of later ones, in small.
NEXT_SHAPES = {
    "vicuna": Shape(seed=21, context=8192),
    "mistral": Shape(family="mistral", kv_heads=2, seed=22, context=8192),
    "yi": Shape(hidden=56, heads=7, kv_heads=1, seed=23, context=8192),
    "qwen2": Shape(family="qwen2", hidden=56, heads=7, kv_heads=1, seed=24, context=8192),
}
BIG = Shape(family="mistral", image=336, kv_heads=2, layers=2, seed=25, context=8192)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
# The templates that the hub's files hold for these models, written in the same way.
_PICTURES = "{% for c in m.content if c.type == 'image' %}<image>\n{% endfor %}"
_TEXTS = "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}"
TEMPLATES = {
    "vicuna": plain.CHAT_TEMPLATE,
    "mistral": "{% for m in messages %}{% if m.role == 'user' %}[INST] " + _PICTURES + _TEXTS
    # The hub's file spells the end token "<\s> " here, which is a typo: it is no token.
    + " [/INST]{% else %} {{ m.content[0].text }} </s>{% endif %}{% endfor %}",
    "yi": "{% for m in messages %}<|im_start|>{{ m.role }}\n" + _PICTURES + _TEXTS
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}  # fmt: skip
TEMPLATES["qwen2"] = TEMPLATES["yi"]


def pinpoints(shape: Shape) -> list[list[int]]:
    """The published five canvases, in this shape's tiles, as (height, width)."""
    return [
        [rows * shape.image, columns * shape.image]
        for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    ]


def draw_next(shape: Shape) -> dict[tuple[str, str], Tensor]:
    """All tensors in fp32 by (part, name): those of LLaVA-1.5, and the newline."""
    generator = torch.Generator().manual_seed(1000 + shape.seed)
    newline = torch.empty(shape.hidden).normal_(0, 1 / math.sqrt(4), generator=generator)
    return {**plain.draw(shape), ("newline", "image_newline"): newline}


def spelled_next(tensors: dict[tuple[str, str], Tensor], layout: str) -> dict[str, Tensor]:
    """The same tensors under one layout's names."""
    kept = {key: value for key, value in tensors.items() if key[0] != "newline"}
    name = {"hub": "image_newline", "hub5": "image_newline"}.get(layout, "model.image_newline")
    return plain.spelled(kept, layout) | {name: tensors["newline", "image_newline"]}


def write_next(folder: Path, name: str, layout: str = "hub", shape: Shape | None = None) -> Path:
    """Write a complete checkpoint of the text model ``name`` (a key of NEXT_SHAPES)."""
    shape = shape or NEXT_SHAPES[name]
    if layout == "original":
        write_original(folder, name, shape)
    else:
        plain.write_llava(folder, shape, layout)
        (folder / "chat_template.jinja").write_text(TEMPLATES[name])
        plain.edit_json(folder / "config.json", **next_config(shape))
        plain.edit_json(folder / "preprocessor_config.json", **next_preprocessor(shape))
        plain.edit_json(folder / "processor_config.json", processor_class="LlavaNextProcessor")
    if name in ("yi", "qwen2") and layout != "original":
        _add_chatml(folder)
    plain.save(spelled_next(draw_next(shape), layout), folder)
    return folder


def next_config(shape: Shape) -> dict[str, Any]:
    """What config.json says beyond LLaVA-1.5's."""
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_grid_pinpoints": pinpoints(shape),
        "use_image_newline_parameter": True,
    }


def next_preprocessor(shape: Shape) -> dict[str, Any]:
    return {
        "image_processor_type": "LlavaNextImageProcessor",
        "image_grid_pinpoints": pinpoints(shape),
        "do_pad": True,
        "aspect_ratio_setting": "anyres",
    }


def write_original(folder: Path, name: str, shape: Shape) -> None:
    """The original layout: flat config, pinpoints as (width, height), its own tower inside."""
    plain.write_llava(folder, shape if shape.family == "llama" else replace(shape), "original")
    kinds = {
        "vicuna": "llava",
        "yi": "llava_llama",
        "mistral": "llava_mistral",
        "qwen2": "llava_qwen",
    }
    plain.edit_json(
        folder / "config.json",
        "_test_only_vision_config",
        model_type=kinds[name],
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=[[width, height] for height, width in pinpoints(shape)],
        unfreeze_mm_vision_tower=True,
        mm_vision_tower="tower",
    )
    (folder / "tower").mkdir()
    plain.write_json(folder / "tower" / "config.json", plain.vision_config(shape))


def _add_chatml(folder: Path) -> None:
    """Give the toy tokenizer ChatML's two tokens, in place of two byte pieces it never needs."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number, token in enumerate(CHATML_TOKENS):
        index = plain.HUB_VOCAB - 3 + number
        entry = {"id": index, "content": token, **flags, "special": True}
        config["added_tokens_decoder"][str(index)] = {k: v for k, v in entry.items() if k != "id"}
        if (folder / "tokenizer.json").exists():
            content = json.loads((folder / "tokenizer.json").read_text())
            content["added_tokens"].append(entry)
            plain.write_json(folder / "tokenizer.json", content)
    plain.write_json(path, config)
