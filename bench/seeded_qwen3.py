"""Writes a Qwen3-VL of the published 2B's shapes with seeded random weights, names as published.

The vocabulary is a small one made in code; the model's own has room for more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from bench.byte_level import byte_level
from bench.seeded import write_once, write_shards

PRESETS = {"qwen3-vl-2b": 28, "qwen3-vl-tiny": 2}  # decoder layers
SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
TEXT = {
    "model_type": "qwen3_vl_text",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "rope_theta": 5e6,
    "rope_scaling": {
        "rope_type": "default",
        "mrope_interleaved": True,
        "mrope_section": [24, 20, 20],
    },
    "tie_word_embeddings": True,
}
VISION = {
    "model_type": "qwen3_vl",
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
    "hidden_act": "gelu_pytorch_tanh",
}


def write_seeded_qwen3(folder: Path, preset: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes the checkpoint of a preset, unless it is already there; returns the folder."""
    layers = PRESETS[preset]

    def write() -> None:
        config = write_around(folder, layers)
        write_shards(folder, tensor_shapes(config), dtype)

    return write_once(folder, {"layers": layers, "dtype": str(dtype)}, write)


def write_around(folder: Path, layers: int) -> dict[str, Any]:
    """Writes what lies around the weights, and returns config.json."""
    made = tokenizer()
    (folder / "tokenizer.json").write_text(made.to_str())
    ids = {name: made.token_to_id(name) for name in SPECIALS}
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    config: dict[str, Any] = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
        "text_config": TEXT | {"num_hidden_layers": layers, "eos_token_id": ends[0]},
        "vision_config": VISION,
    }
    files = {
        "config": config,
        "generation_config": {"eos_token_id": ends, "pad_token_id": ends[1]},
        "preprocessor_config": {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "size": {"shortest_edge": 65536, "longest_edge": 16777216},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        "tokenizer_config": {
            "tokenizer_class": "Qwen2TokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2))
    return config


def tokenizer() -> Tokenizer:
    """A byte-level BPE with the published special tokens behind its vocabulary."""
    words = (
        "system user assistant What is in this image? Describe everything that you can see in it"
    )
    return byte_level(words, 400, SPECIALS)


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as transformers, and the hub, have them."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # which is the embedding
            yield name, tuple(tensor.shape)
