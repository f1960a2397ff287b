"""Small LLaVA-1.5 checkpoints with seeded random weights, in every layout that is published.

One set of tensors is drawn per shape and then spelled in the four key schemes, so that whatever
differs between two layouts is the layout. The scales keep every part alive: attention is far from
uniform, and the logits' standard deviation is about 2, as a trained model's.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.toy_tokenizer import (
    toy_pieces,
    write_toy_config,
    write_toy_sentencepiece,
    write_toy_tokenizer,
)

# Ids of the toy tokenizer: its pieces, then <image> and <pad>; the hub layout pads the table.
PIECES = len(toy_pieces())
IMAGE_TOKEN = PIECES
HUB_VOCAB = PIECES + 5
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role | upper }}: {% endif %}"
    "{% for part in m.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a test model; 56 px pictures are 4 x 4 image tokens, 336 px ones 24 x 24."""

    family: str = "llama"
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4
    mlp: int = 96
    vision_hidden: int = 32
    vision_layers: int = 3
    vision_heads: int = 2
    vision_mlp: int = 64
    image: int = 56
    patch: int = 14
    context: int = 2048
    seed: int = 1

    @property
    def image_tokens(self) -> int:
        return (self.image // self.patch) ** 2


DEFAULT = Shape()

PREFIXES = {
    "hub": {  # transformers 4, and the published files
        "vision": "vision_tower.vision_model.",
        "projector": "multi_modal_projector.",
        "decoder": "language_model.model.",
        "head": "language_model.lm_head.",
    },
    "hub5": {  # transformers 5
        "vision": "vision_tower.",
        "projector": "multi_modal_projector.",
        "decoder": "language_model.model.",
        "head": "language_model.lm_head.",
    },
    "modules": {  # a state dict by module names
        "vision": "model.vision_tower.vision_model.",
        "projector": "model.multi_modal_projector.",
        "decoder": "model.language_model.",
        "head": "lm_head.",
    },
    "original": {  # the original repository
        "vision": "model.vision_tower.vision_tower.vision_model.",
        "projector": "model.mm_projector.",
        "decoder": "model.",
        "head": "lm_head.",
    },
}
LAYOUTS = tuple(PREFIXES)


# -- tensors --------------------------------------------------------------------------------------


def draw(shape: Shape) -> dict[tuple[str, str], Tensor]:
    """All tensors of a model in fp32, by (part, name within the part)."""
    generator = torch.Generator().manual_seed(shape.seed)

    def normal(size: tuple[int, ...], std: float) -> Tensor:
        return torch.empty(size).normal_(0, std, generator=generator)

    tensors = {}
    for part, name, size in _sizes(shape):
        if "norm" in name and name.endswith("weight"):
            value = 1 + normal(size, 0.1)
        elif len(size) == 1:
            value = normal(size, 0.1)
        elif "embed" in name:  # tokens, patches, positions
            value = normal(size, 1.0 if len(size) == 2 else 1 / math.sqrt(math.prod(size[1:])))
        else:
            gain = {"q_proj": 1.6, "k_proj": 1.6, "weight": 2.0}  # of the head, just "weight"
            scale = gain.get(name.removesuffix(".weight").rpartition(".")[2], 1.0)
            value = normal(size, scale / math.sqrt(size[1]))
        tensors[part, name] = value
    return tensors


def _sizes(shape: Shape) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    hidden, head_dim = shape.hidden, shape.hidden // shape.heads
    yield from (("vision", name, size) for name, size in _tower_sizes(shape))
    for linear, width in (("linear_1", shape.vision_hidden), ("linear_2", hidden)):
        yield "projector", f"{linear}.weight", (hidden, width)
        yield "projector", f"{linear}.bias", (hidden,)
    yield "decoder", "embed_tokens.weight", (HUB_VOCAB, hidden)
    for n in range(shape.layers):
        layer, kv = f"layers.{n}", shape.kv_heads * head_dim
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            yield "decoder", f"{layer}.self_attn.{name}_proj.weight", (rows, hidden)
            if shape.family == "qwen2" and name != "o":
                yield "decoder", f"{layer}.self_attn.{name}_proj.bias", (rows,)
        yield "decoder", f"{layer}.mlp.gate_proj.weight", (shape.mlp, hidden)
        yield "decoder", f"{layer}.mlp.up_proj.weight", (shape.mlp, hidden)
        yield "decoder", f"{layer}.mlp.down_proj.weight", (hidden, shape.mlp)
        yield "decoder", f"{layer}.input_layernorm.weight", (hidden,)
        yield "decoder", f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "decoder", "norm.weight", (hidden,)
    yield "head", "weight", (HUB_VOCAB, hidden)


def _tower_sizes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, mlp, patch = shape.vision_hidden, shape.vision_mlp, shape.patch
    yield "embeddings.class_embedding", (hidden,)
    yield "embeddings.patch_embedding.weight", (hidden, 3, patch, patch)
    yield "embeddings.position_embedding.weight", (shape.image_tokens + 1, hidden)
    modules: list[tuple[str, tuple[int, ...]]] = [
        ("pre_layrnorm", (hidden,)),
        ("post_layernorm", (hidden,)),
    ]
    for n in range(shape.vision_layers):
        layer = f"encoder.layers.{n}"
        modules += [(f"{layer}.layer_norm1", (hidden,)), (f"{layer}.layer_norm2", (hidden,))]
        for name in ("q", "k", "v", "out"):
            modules.append((f"{layer}.self_attn.{name}_proj", (hidden, hidden)))
        modules += [(f"{layer}.mlp.fc1", (mlp, hidden)), (f"{layer}.mlp.fc2", (hidden, mlp))]
    for module, size in modules:
        yield f"{module}.weight", size
        yield f"{module}.bias", size[:1]


def spelled(tensors: Mapping[tuple[str, str], Tensor], layout: str) -> dict[str, Tensor]:
    """The same tensors under one layout's names; the original one ends its tables at the pieces."""
    named = {}
    for (part, name), tensor in tensors.items():
        if layout == "original":
            name = name.replace("linear_1", "0").replace("linear_2", "2")
            tensor = tensor[:PIECES] if len(tensor) == HUB_VOCAB else tensor
        named[PREFIXES[layout][part] + name] = tensor.contiguous()
    return named


# -- folders --------------------------------------------------------------------------------------


def write_llava(
    folder: Path, shape: Shape, layout: str = "hub", dtype: torch.dtype = torch.float32
) -> Path:
    """Write a complete checkpoint; the original layout holds its tower inside, as tests may ask."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = spelled(draw(shape), layout)
    if layout == "original":
        config = original_config(shape)
        config["_test_only_vision_config"] = vision_config(shape)
        tensors |= _inverse_frequencies(shape)
        _write_original_files(folder, config)
    else:
        _write_hub_files(folder, shape)
    save({name: t.to(dtype) for name, t in tensors.items()}, folder)
    return folder


def write_original_with_tower(folder: Path, shape: Shape, tower: Path | None = None) -> Path:
    """Write the original layout as published: no tower inside, but a CLIP folder that it names."""
    tower = tower or folder / "tower"
    tower.mkdir(parents=True, exist_ok=True)
    drawn = draw(shape)
    inside = {key: value for key, value in drawn.items() if key[0] != "vision"}
    name = str(tower.relative_to(folder)) if tower.is_relative_to(folder) else str(tower)
    config = original_config(shape) | {"mm_vision_tower": name}
    _write_original_files(folder, config)
    save(spelled(inside, "original") | _inverse_frequencies(shape), folder)
    # A complete CLIP: its tower with position ids as old releases wrote, and a text half.
    vision = {f"vision_model.{n}": t for (part, n), t in drawn.items() if part == "vision"}
    vision["vision_model.embeddings.position_ids"] = torch.arange(shape.image_tokens + 1)[None]
    vision["text_model.final_layer_norm.weight"] = torch.ones(8)
    vision["logit_scale"] = torch.ones(())
    save(vision, tower)
    clip = {"model_type": "clip", "vision_config": vision_config(shape), "text_config": {}}
    write_json(tower / "config.json", clip)
    return folder


def hub_config(shape: Shape) -> dict[str, Any]:
    """config.json as ``llava-hf`` publishes it."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": IMAGE_TOKEN,
        "pad_token_id": IMAGE_TOKEN + 1,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "text_config": text_config(shape),
        "vision_config": vision_config(shape),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def text_config(shape: Shape) -> dict[str, Any]:
    config = {
        "model_type": shape.family,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "vocab_size": HUB_VOCAB,
    }
    if shape.family == "mistral":
        config |= {"sliding_window": None, "rope_theta": 1e6}
    if shape.family == "qwen2":
        config |= {"use_sliding_window": False, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
    return config


def vision_config(shape: Shape) -> dict[str, Any]:
    """As published: without activation and norm epsilon, which are defaults."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": shape.vision_hidden,
        "intermediate_size": shape.vision_mlp,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_heads,
        "image_size": shape.image,
        "patch_size": shape.patch,
        "projection_dim": 24,
        "vocab_size": 1000,
    }


def original_config(shape: Shape) -> dict[str, Any]:
    """config.json as ``liuhaotian`` publishes it: flat."""
    return text_config(shape) | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "vocab_size": PIECES,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": shape.vision_hidden,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    }


def _inverse_frequencies(shape: Shape) -> dict[str, Tensor]:
    """Buffers that the original files hold and nobody needs; wrong on purpose."""
    size = shape.hidden // shape.heads // 2
    names = (f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(shape.layers))
    return {name: torch.full((size,), 7.0) for name in names}


def _write_original_files(folder: Path, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": 2, "max_length": 4096})
    write_toy_sentencepiece(folder)
    write_toy_config(folder)
    # The published file knows no added tokens beyond the three of the pieces.
    path = folder / "tokenizer_config.json"
    named = json.loads(path.read_text())
    named["added_tokens_decoder"] = {
        key: token for key, token in named["added_tokens_decoder"].items() if int(key) < PIECES
    }
    write_json(path, named | {"pad_token": "<unk>"})


def _write_hub_files(folder: Path, shape: Shape) -> None:
    write_toy_tokenizer(folder)
    size = shape.image
    files = {
        "config.json": hub_config(shape),
        "generation_config.json": {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": IMAGE_TOKEN + 1,
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "crop_size": {"height": size, "width": size},
            "size": {"shortest_edge": size},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": shape.patch,
            "vision_feature_select_strategy": "default",
        },
    }
    for name, content in files.items():
        write_json(folder / name, content)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def save(tensors: Mapping[str, Tensor], folder: Path) -> None:
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))


def edit_json(path: Path, *drop: str, **changes: Any) -> None:
    """Set keys of a JSON file; ``drop`` names those that go."""
    content = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    write_json(path, content | changes)
