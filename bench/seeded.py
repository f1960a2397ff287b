"""Writes LLaVA checkpoints with seeded random weights, for measuring shapes without downloads.

They lie on disk as the published ones do (hub layout, shards with an index), and load in
transformers just as well. What such a model says is noise; how long it takes is not.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.common import SEED
from bench.toy_tokenizer import write_toy_tokenizer

SHARD_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder and its vision tower; ``tiles``: a LLaVA-1.6, whose pictures are tiles."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    image: int
    patch: int
    tiles: bool = False


PRESETS = {
    # Loads and answers in a moment; for trying a measurement out.
    "tiny-test": Shape(64, 2, 4, 2, 128, 512, 32, 2, 2, 64, 56, 14),
    # 1.00e9 decoder parameters, 2.0 GB in bf16, with a small tower but the real 576 image tokens.
    "1b": Shape(2048, 16, 16, 16, 6144, 32064, 512, 6, 8, 2048, 336, 14),
    "1.6-tiny": Shape(64, 2, 4, 2, 128, 512, 32, 2, 2, 64, 56, 14, tiles=True),
    # 0.47e9 decoder parameters; 4 query heads per KV head and an MLP of 3.5 times the width, as in
    # the Mistral variant. Keys and values of 2,200 tokens are 5 % of the weights: these dominate.
    "1.6-small": Shape(1536, 12, 12, 3, 5376, 32064, 512, 6, 8, 2048, 336, 14, tiles=True),
}
# Rows and columns of tiles in the canvases of LLaVA-1.6.
CANVASES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def write_seeded_llava(folder: Path, preset: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes the checkpoint of a preset, unless it is already there; returns the folder.

    Weights are normal with deviation 0.02, norms one, biases zero: logits stay finite and spread.
    """
    shape = PRESETS[preset]

    def write() -> None:
        write_shards(folder, tensor_shapes(shape), dtype)
        _write_configs(folder, shape, dtype)

    return write_once(folder, {"preset": asdict(shape), "dtype": str(dtype)}, write)


def write_once(folder: Path, about: dict[str, object], write: Callable[[], None]) -> Path:
    """Calls ``write`` unless ``folder`` already holds what it is ``about``; returns the folder."""
    wanted = json.dumps(about | {"seed": SEED})
    marker = folder / "seeded.json"
    if not marker.exists() or marker.read_text() != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        marker.unlink(missing_ok=True)
        write()
        marker.write_text(wanted)  # last: a folder without it is not complete
    return folder


def tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as published hub checkpoints have them."""
    yield from _tower(shape)
    if shape.tiles:
        yield "image_newline", (shape.hidden,)
    hidden, vision = shape.hidden, shape.vision_hidden
    for linear, width in (("linear_1", vision), ("linear_2", hidden)):
        yield f"multi_modal_projector.{linear}.weight", (hidden, width)
        yield f"multi_modal_projector.{linear}.bias", (hidden,)
    kv = hidden // shape.heads * shape.kv_heads
    yield "language_model.model.embed_tokens.weight", (shape.vocab, hidden)
    for n in range(shape.layers):
        layer = f"language_model.model.layers.{n}"
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            yield f"{layer}.self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{layer}.mlp.gate_proj.weight", (shape.mlp, hidden)
        yield f"{layer}.mlp.up_proj.weight", (shape.mlp, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, shape.mlp)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "language_model.model.norm.weight", (hidden,)
    yield "language_model.lm_head.weight", (shape.vocab, hidden)


def _tower(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, mlp, tower = shape.vision_hidden, shape.vision_mlp, "vision_tower.vision_model"
    patches = (shape.image // shape.patch) ** 2
    yield f"{tower}.embeddings.class_embedding", (hidden,)
    yield f"{tower}.embeddings.patch_embedding.weight", (hidden, 3, shape.patch, shape.patch)
    yield f"{tower}.embeddings.position_embedding.weight", (patches + 1, hidden)
    modules: list[tuple[str, tuple[int, ...]]] = [("pre_layrnorm", (hidden,))]
    modules.append(("post_layernorm", (hidden,)))
    for n in range(shape.vision_layers):
        layer = f"encoder.layers.{n}"
        modules += [(f"{layer}.layer_norm{i}", (hidden,)) for i in (1, 2)]
        modules += [
            (f"{layer}.self_attn.{x}_proj", (hidden, hidden)) for x in ("q", "k", "v", "out")
        ]
        modules += [(f"{layer}.mlp.fc1", (mlp, hidden)), (f"{layer}.mlp.fc2", (hidden, mlp))]
    for name, size in modules:
        yield f"{tower}.{name}.weight", size
        yield f"{tower}.{name}.bias", size[:1]


def write_shards(
    folder: Path, sizes: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype
) -> None:
    """Draws every tensor once, in the order given, and never holds two shards."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = total = 0
    for name, size in sizes:
        nbytes = math.prod(size) * dtype.itemsize
        if shards[-1] and filled + nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, size))
        filled += nbytes
        total += nbytes
    generator = torch.Generator().manual_seed(SEED)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _draw(name, size, dtype, generator) for name, size in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _draw(
    name: str, size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    if name.endswith("bias"):
        return torch.zeros(size, dtype=dtype)
    if "norm" in name or ".ln_" in name:
        return torch.ones(size, dtype=dtype)
    return torch.empty(size).normal_(0, 0.02, generator=generator).to(dtype)


def _write_configs(folder: Path, shape: Shape, dtype: torch.dtype) -> None:
    """Writes the tokenizer and the JSON files that a published folder has around its weights."""
    image_token = write_toy_tokenizer(folder) - 2
    files: dict[str, dict[str, object]] = {
        "config": _model_config(shape, dtype, image_token),
        "preprocessor_config": _picture_config(shape),
        "processor_config": {
            "processor_class": "LlavaProcessor",
            "patch_size": shape.patch,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_token": "<image>",
        },
        "generation_config": {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": image_token + 1,
        },
    }
    if shape.tiles:
        for name, changes in _next_configs(shape).items():
            files[name] |= changes
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2))


def _model_config(shape: Shape, dtype: torch.dtype, image_token: int) -> dict[str, Any]:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token,
        "pad_token_id": image_token + 1,
        "text_config": {
            "model_type": "llama",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "vocab_size": shape.vocab,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_mlp,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_heads,
            "image_size": shape.image,
            "patch_size": shape.patch,
        },
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def _picture_config(shape: Shape) -> dict[str, object]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": shape.image},
        "crop_size": {"height": shape.image, "width": shape.image},
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def _next_configs(shape: Shape) -> dict[str, dict[str, object]]:
    """What a LLaVA-1.6 says beyond or instead of that, by file."""
    canvases = [[shape.image * side for side in sides] for sides in CANVASES]
    return {
        "config": {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "model_type": "llava_next",
            "image_grid_pinpoints": canvases,
            "use_image_newline_parameter": True,
        },
        "preprocessor_config": {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": canvases,
            "do_pad": True,
        },
        "processor_config": {"processor_class": "LlavaNextProcessor"},
    }
