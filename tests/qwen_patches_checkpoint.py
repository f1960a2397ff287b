"""Small Qwen2-VL, Qwen2.5-VL and Qwen3-VL checkpoints with seeded random weights, on disk as
published: the names that transformers saves are those of the hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from bench.byte_level import byte_level
from tests.checkpoints import write_json

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
# The published templates, but for tools and video.
_PARTS = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
)
_TURNS = (
    "<|im_start|>{{ message['role'] }}\n" + _PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)
KINDS: dict[str, tuple[Any, Any, str]] = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, SYSTEM),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, SYSTEM),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, ""),
}
HIDDEN = 64
TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 48, "hidden_size": HIDDEN, "mlp_ratio": 2, "depth": 3},
    "qwen2_5_vl": {
        **{"hidden_size": 48, "out_hidden_size": HIDDEN, "intermediate_size": 80, "depth": 4},
        **{"fullatt_block_indexes": [1, 3], "window_size": 112, "tokens_per_second": 2},
    },
    "qwen3_vl": {
        **{"hidden_size": 48, "out_hidden_size": HIDDEN, "intermediate_size": 80, "depth": 4},
        **{"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 36, "patch_size": 16},
    },
}
# Small pictures are what tests can run: 4 to 64 cells.
LIMITS = {"qwen3_vl": (4096, 65536)}


def template(kind: str) -> str:
    return "{% for message in messages %}" + KINDS[kind][2] + _TURNS


def tokenizer() -> Tokenizer:
    """A byte-level BPE with the published special tokens behind its vocabulary."""
    return byte_level("system user assistant You are a helpful assistant. What?", 300, SPECIALS)


def id_of(token: str) -> int:
    found = tokenizer().token_to_id(token)
    assert found is not None
    return found


def make_config(kind: str, *, tied: bool = False) -> Any:
    """As transformers has it."""
    made, _, _ = KINDS[kind]
    third = kind == "qwen3_vl"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 5e6 if third else 1e6}
    rope |= {"mrope_section": [3, 2, 3] if not third else [6, 5, 5]}
    rope |= {"mrope_interleaved": True} if third else {}
    text = TEXT | {"vocab_size": 320, "rope_parameters": rope}
    text |= {"head_dim": 32, "attention_bias": False} if third else {}
    text |= {"bos_token_id": id_of("<|endoftext|>"), "eos_token_id": id_of("<|im_end|>")}
    return made(
        text_config=text | {"tie_word_embeddings": tied},
        vision_config={"num_heads": 4} | VISION[kind],
        image_token_id=id_of("<|image_pad|>"),
        video_token_id=id_of("<|video_pad|>"),
        vision_start_token_id=id_of("<|vision_start|>"),
        vision_end_token_id=id_of("<|vision_end|>"),
        tie_word_embeddings=tied,
    )


def make_model(kind: str, *, tied: bool = False) -> Any:
    """Transformers' model with weights under which attention is far from even."""
    model = KINDS[kind][1](make_config(kind, tied=tied)).eval()
    scatter(model, len(kind))
    return model


def scatter(model: torch.nn.Module, seed: int) -> None:
    """Draw weights under which attention is far from even."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "ln_q" in name:
                weight.uniform_(0.7, 1.3, generator=generator)
            elif weight.dim() == 1:
                weight.normal_(0, 0.1, generator=generator)
            else:
                wide = 2.0 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 1.0
                deviation = wide * weight[0].numel() ** -0.5
                weight.normal_(0, 0.5 if "embed" in name else deviation, generator=generator)


def write_qwen_patches(
    folder: Path, kind: str, *, tied: bool = False, flat: bool = False, layout: str = "hub"
) -> Path:
    """Write a complete checkpoint; ``flat``: without a text_config, as Qwen2.5-VL is published."""
    make_model(kind, tied=tied).save_pretrained(folder)
    if layout == "modules":
        _rename(folder)
    if flat:
        config = json.loads((folder / "config.json").read_text())
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        kept = {key: value for key, value in text.items() if key != "model_type"}
        own = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
        write_json(folder / "config.json", kept | config | own)
    made = tokenizer()
    (folder / "tokenizer.json").write_text(made.to_str())
    (folder / "chat_template.jinja").write_text(template(kind))
    ends = [made.token_to_id("<|im_end|>"), made.token_to_id("<|endoftext|>")]
    write_json(
        folder / "generation_config.json", {"eos_token_id": ends, "repetition_penalty": 1.05}
    )
    write_json(folder / "preprocessor_config.json", preprocessor(kind))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings |= {"tokenizer_class": "Qwen2TokenizerFast", "add_bos_token": False}
    write_json(folder / "tokenizer_config.json", settings)
    return folder


def preprocessor(kind: str) -> dict[str, Any]:
    """As published: two ways to write limits of pixels."""
    common = {"merge_size": 2, "temporal_patch_size": 2, "resample": 3, "do_convert_rgb": True}
    if kind == "qwen3_vl":
        least, most = LIMITS[kind]
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        return (
            common
            | half
            | {
                "patch_size": 16,
                "size": {"shortest_edge": least, "longest_edge": most},
                "image_processor_type": "Qwen2VLImageProcessorFast",
            }
        )
    means = {"image_mean": [0.48145466, 0.4578275, 0.40821073]}
    means |= {"image_std": [0.26862954, 0.26130258, 0.27577711]}
    limits = {"min_pixels": 3136, "max_pixels": 50176}
    return (
        common
        | means
        | limits
        | {
            "patch_size": 14,
            "image_processor_type": "Qwen2VLImageProcessor",
        }
    )


def _rename(folder: Path) -> None:
    """Qwen2.5-VL under its module names, as trainers save it."""
    path = folder / "model.safetensors"
    tensors = {}
    for name, value in load_file(path).items():
        if name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model."):
            name = name.replace("model.", "model.language_model.", 1)
        tensors[name] = value
    save_file(tensors, path, metadata={"format": "pt"})
