"""Small Llama-3.2-Visions with seeded random weights, in both published layouts of names."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from bench.byte_level import llama3
from tests.checkpoints import save, write_json

# In the order of the published vocabulary; <|image|> is the first id behind it.
SPECIALS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)
IMAGE = "<|image|>"
# The published template, but for its tools.
TEMPLATE = (
    "{{- bos_token }}\n"
    "{%- if not date_string is defined %}\n"
    "    {%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}\n"
    "    {%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}\n"
    "{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system_message = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}{%- set system_message = '' %}{%- endif %}\n"
    "{%- set ns = namespace(has_images=false) %}\n"
    "{%- for message in messages %}{%- for content in message['content'] %}\n"
    "    {%- if content['type'] == 'image' %}{%- set ns.has_images = true %}{%- endif %}\n"
    "{%- endfor %}{%- endfor %}\n"
    "{%- if ns.has_images and not system_message == '' %}\n"
    "    {{- raise_exception('Prompting with images is incompatible with system messages.') }}\n"
    "{%- endif %}\n"
    "{%- if not ns.has_images %}\n"
    "    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n"
    "    {{- 'Cutting Knowledge Date: December 2023\\n' }}\n"
    "    {{- 'Today Date: ' + date_string + '\\n\\n' }}\n"
    "    {{- system_message }}\n"
    "    {{- '<|eot_id|>' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\n"
    "    {%- if message['content'] is string %}{{- message['content'] }}\n"
    "    {%- else %}{%- for content in message['content'] %}\n"
    "        {%- if content['type'] == 'image' %}{{- '<|image|>' }}\n"
    "        {%- elif content['type'] == 'text' %}{{- content['text'] }}{%- endif %}\n"
    "    {%- endfor %}{%- endif %}\n"
    "    {{- '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    "{%- endif %}\n"
)


@dataclass(frozen=True)
class MllamaShape:
    """Sizes of a test model: tiles of 56 px are 4 x 4 patches and a class token."""

    hidden: int = 64
    layers: int = 7
    cross: tuple[int, ...] = (1, 4)
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 96
    vision_hidden: int = 32
    vision_layers: int = 4
    global_layers: int = 2
    vision_heads: int = 2
    vision_mlp: int = 64
    states: tuple[int, ...] = (2, 0, 3)  # published ones ascend; their order is theirs to say
    image: int = 56
    patch: int = 14
    context: int = 4096
    seed: int = 41

    @property
    def tile_features(self) -> int:
        return (self.image // self.patch) ** 2 + 1

    @property
    def width(self) -> int:
        return self.vision_hidden * (1 + len(self.states))


DEFAULT = MllamaShape()
CANVASES = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))


def mllama_tokenizer() -> Tokenizer:
    """A trained byte-level BPE with Llama 3's special tokens; it puts BOS in front."""
    words = "system user assistant Cutting Knowledge Date Today December What is this picture?"
    return llama3(words, 320, [*SPECIALS, IMAGE])


VOCAB = mllama_tokenizer().token_to_id(IMAGE)


# -- tensors --------------------------------------------------------------------------------------


def draw(shape: MllamaShape) -> dict[tuple[str, str], Tensor]:
    """All tensors in fp32, by (part, name within the part)."""
    generator = torch.Generator().manual_seed(shape.seed)

    def normal(size: tuple[int, ...], std: float) -> Tensor:
        return torch.empty(size).normal_(0, std, generator=generator)

    tensors = {}
    for part, name, size in _sizes(shape):
        if "gate" in name.rpartition(".")[2]:
            value = 0.6 + normal(size, 0.2)
        elif "norm" in name and name.endswith("weight"):
            value = 1 + normal(size, 0.1)
        elif len(size) == 1:
            value = normal(size, 0.1)
        elif "embed" in name:
            value = normal(size, 1.0 if len(size) == 2 else 1 / math.sqrt(math.prod(size[1:])))
        else:
            gain = {"q_proj": 1.6, "k_proj": 1.6, "weight": 2.0}  # of the head, just "weight"
            scale = gain.get(name.removesuffix(".weight").rpartition(".")[2], 1.0)
            value = normal(size, scale / math.sqrt(size[1]))
        tensors[part, name] = value
    return tensors


Sizes = Iterator[tuple[str, str, tuple[int, ...]]]


def _sizes(shape: MllamaShape) -> Sizes:
    hidden = shape.hidden
    yield from (("vision", name, size) for name, size in _tower_sizes(shape))
    yield "projector", "weight", (hidden, shape.width)
    yield "projector", "bias", (hidden,)
    yield "decoder", "embed_tokens.weight", (VOCAB + 8, hidden)
    for n in range(shape.layers):
        yield from _layer_sizes(shape, f"layers.{n}", n in shape.cross)
    yield "decoder", "norm.weight", (hidden,)
    yield "head", "weight", (VOCAB, hidden)


def _layer_sizes(shape: MllamaShape, layer: str, cross: bool) -> Sizes:
    hidden, head_dim = shape.hidden, shape.hidden // shape.heads
    kind, kv = "cross_attn" if cross else "self_attn", shape.kv_heads * head_dim
    for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
        yield "decoder", f"{layer}.{kind}.{name}_proj.weight", (rows, hidden)
    if cross:
        yield "decoder", f"{layer}.cross_attn.q_norm.weight", (head_dim,)
        yield "decoder", f"{layer}.cross_attn.k_norm.weight", (head_dim,)
        yield "decoder", f"{layer}.cross_attn_attn_gate", (1,)
        yield "decoder", f"{layer}.cross_attn_mlp_gate", (1,)
    yield "decoder", f"{layer}.mlp.gate_proj.weight", (shape.mlp, hidden)
    yield "decoder", f"{layer}.mlp.up_proj.weight", (shape.mlp, hidden)
    yield "decoder", f"{layer}.mlp.down_proj.weight", (hidden, shape.mlp)
    yield "decoder", f"{layer}.input_layernorm.weight", (hidden,)
    yield "decoder", f"{layer}.post_attention_layernorm.weight", (hidden,)


def _tower_sizes(shape: MllamaShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, ratios, features = shape.vision_hidden, len(CANVASES) + 1, shape.tile_features
    yield "patch_embedding.weight", (hidden, 3, shape.patch, shape.patch)
    yield "class_embedding", (hidden,)
    place = "gated_positional_embedding"
    yield f"{place}.embedding", (features, hidden)
    yield f"{place}.gate", (1,)
    yield f"{place}.tile_embedding.weight", (ratios, 4 * features * hidden)
    for when in ("pre", "post"):
        yield f"{when}_tile_positional_embedding.embedding.weight", (ratios, 4 * hidden)
        yield f"{when}_tile_positional_embedding.gate", (1,)
        yield f"layernorm_{when}.weight", (hidden,)
        yield f"layernorm_{when}.bias", (hidden,)
    for n in range(shape.vision_layers):
        yield from _tower_layer(shape, f"transformer.layers.{n}")
    for n in range(shape.global_layers):
        layer = f"global_transformer.layers.{n}"
        yield from _tower_layer(shape, layer)
        yield f"{layer}.gate_attn", (1,)
        yield f"{layer}.gate_ffn", (1,)


def _tower_layer(shape: MllamaShape, layer: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, mlp = shape.vision_hidden, shape.vision_mlp
    for name in "qkvo":
        yield f"{layer}.self_attn.{name}_proj.weight", (hidden, hidden)
    for linear, rows, columns in (("fc1", mlp, hidden), ("fc2", hidden, mlp)):
        yield f"{layer}.mlp.{linear}.weight", (rows, columns)
        yield f"{layer}.mlp.{linear}.bias", (rows,)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{layer}.{norm}.weight", (hidden,)
        yield f"{layer}.{norm}.bias", (hidden,)


PREFIXES = {
    "hub": {
        "vision": "vision_model.",
        "projector": "multi_modal_projector.",
        "decoder": "language_model.model.",
        "head": "language_model.lm_head.",
    },
    "modules": {
        "vision": "model.vision_model.",
        "projector": "model.multi_modal_projector.",
        "decoder": "model.language_model.",
        "head": "lm_head.",
    },
}


# -- folders --------------------------------------------------------------------------------------


def write_mllama(folder: Path, shape: MllamaShape = DEFAULT, layout: str = "hub") -> Path:
    """Write a complete instruct checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    prefixes = PREFIXES[layout]
    save({prefixes[part] + name: t for (part, name), t in draw(shape).items()}, folder)
    tokenizer = mllama_tokenizer()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    files = {
        "config.json": mllama_config(shape),
        "generation_config.json": generation_config(tokenizer),
        "preprocessor_config.json": preprocessor_config(shape),
        "tokenizer_config.json": {
            "bos_token": SPECIALS[0],
            "eos_token": "<|eot_id|>",
            "pad_token": "<|finetune_right_pad_id|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    for name, content in files.items():
        write_json(folder / name, content)
    return folder


def mllama_config(shape: MllamaShape) -> dict[str, Any]:
    """config.json as published."""
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": VOCAB,
        "torch_dtype": "float32",
        "text_config": {
            "model_type": "mllama_text_model",
            "bos_token_id": VOCAB - len(SPECIALS),
            "cross_attention_layers": list(shape.cross),
            "eos_token_id": [VOCAB - 7, VOCAB - 3, VOCAB - 2],
            "hidden_act": "silu",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "max_position_embeddings": shape.context,
            "num_attention_heads": shape.heads,
            "num_hidden_layers": shape.layers,
            "num_key_value_heads": shape.kv_heads,
            "pad_token_id": VOCAB - 6,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 32,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "vocab_size": VOCAB,
        },
        "vision_config": {
            "model_type": "mllama_vision_model",
            "attention_heads": shape.vision_heads,
            "hidden_act": "gelu",
            "hidden_size": shape.vision_hidden,
            "image_size": shape.image,
            "intermediate_layers_indices": list(shape.states),
            "intermediate_size": shape.vision_mlp,
            "max_num_tiles": 4,
            "norm_eps": 1e-5,
            "num_channels": 3,
            "num_global_layers": shape.global_layers,
            "num_hidden_layers": shape.vision_layers,
            "patch_size": shape.patch,
            "supported_aspect_ratios": [list(canvas) for canvas in CANVASES],
            "vision_output_dim": shape.width,
        },
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """As the instruct models publish it."""
    ends = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    return {
        "bos_token_id": tokenizer.token_to_id(SPECIALS[0]),
        "do_sample": True,
        "eos_token_id": [tokenizer.token_to_id(end) for end in ends],
        "pad_token_id": tokenizer.token_to_id("<|finetune_right_pad_id|>"),
        "temperature": 0.6,
        "top_p": 0.9,
    }


def preprocessor_config(shape: MllamaShape) -> dict[str, Any]:
    """As published."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "MllamaImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_image_tiles": 4,
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": shape.image, "width": shape.image},
    }
