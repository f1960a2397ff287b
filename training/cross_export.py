"""Write the small cross-attention model in the published layout of Llama-3.2-Vision."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.cross_model import (
    CANVAS,
    SIDE,
    TILES,
    CrossConfig,
    CrossLayer,
    SelfLayer,
    TinyMllama,
)
from training.cross_tokenizer import IMAGE, NAMED, build_cross, special
from training.export import write_checkpoint
from training.model import MEAN, STD
from training.page import PATCH

CANVASES = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
TEMPLATE = (
    "{{- bos_token }}{% for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{% if message['content'] is string %}{{- message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{- '<|image|>' }}"
    "{% elif content['type'] == 'text' %}{{- content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{- '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


def tensors(model: TinyMllama) -> dict[str, Tensor]:
    """Published names -> tensors; fused matrices are split, patches become a convolution."""
    text = "language_model.model."
    out = {
        "multi_modal_projector.weight": model.linear_1.weight,
        "multi_modal_projector.bias": model.linear_1.bias,
        f"{text}embed_tokens.weight": model.embed.weight,
        f"{text}norm.weight": model.norm.weight,
        "language_model.lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.blocks):
        out |= {f"{text}layers.{i}.{name}": tensor for name, tensor in _layer(block).items()}
    return out | {f"vision_model.{name}": tensor for name, tensor in _tower(model).items()}


def _layer(block: nn.Module) -> dict[str, Tensor]:
    assert isinstance(block, SelfLayer | CrossLayer)
    kind = "cross_attn" if isinstance(block, CrossLayer) else "self_attn"
    k, v = block.kv.weight.chunk(2)
    gate, up = block.mlp.gate_up.weight.chunk(2)
    out = {
        f"{kind}.q_proj.weight": block.q.weight,
        f"{kind}.k_proj.weight": k,
        f"{kind}.v_proj.weight": v,
        f"{kind}.o_proj.weight": block.out.weight,
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": block.mlp.down.weight,
        "input_layernorm.weight": block.norm1.weight,
        "post_attention_layernorm.weight": block.mlp.norm2.weight,
    }
    if isinstance(block, CrossLayer):
        out["cross_attn.q_norm.weight"] = block.q_norm.weight
        out["cross_attn.k_norm.weight"] = block.k_norm.weight
        out["cross_attn_attn_gate"], out["cross_attn_mlp_gate"] = block.gates.split(1)
    return out


def _tower(model: TinyMllama) -> dict[str, Tensor]:
    v, dim = model.vision, model.config.vision_dim
    place = "gated_positional_embedding"
    out = {
        "patch_embedding.weight": v.patch.weight.view(dim, 3, PATCH, PATCH),
        "class_embedding": v.class_token,
        f"{place}.embedding": v.position,
        f"{place}.gate": v.places.gate,
        f"{place}.tile_embedding.weight": _of_canvas(v.places.table),
    }
    for when, table, norm in (
        ("pre", v.pre_tile, v.pre_norm),
        ("post", v.post_tile, v.post_norm),
    ):
        out[f"{when}_tile_positional_embedding.embedding.weight"] = _of_canvas(table.table)
        out[f"{when}_tile_positional_embedding.gate"] = table.gate
        out[f"layernorm_{when}.weight"], out[f"layernorm_{when}.bias"] = norm.weight, norm.bias
    for encoder, blocks in (
        ("transformer", v.blocks),
        ("global_transformer", v.global_blocks),
    ):
        for i, block in enumerate(blocks):
            out |= _tower_layer(f"{encoder}.layers.{i}.", block)
    return out


def _of_canvas(table: Tensor) -> Tensor:
    """The whole table, of which the row of the 2 x 2 canvas is known: the only one drawn."""
    flat = table.flatten()[None]
    before, behind = flat.new_zeros(CANVAS, flat.shape[1]), len(CANVASES) - CANVAS
    return torch.cat([before, flat, flat.new_zeros(behind, flat.shape[1])])


def _tower_layer(prefix: str, block: Any) -> dict[str, Tensor]:
    parts = [*block.qkv.weight.chunk(3), block.out.weight]
    out = {f"self_attn.{name}_proj.weight": part for name, part in zip("qkvo", parts, strict=True)}
    for kind in ("weight", "bias"):
        out[f"mlp.fc1.{kind}"] = getattr(block.fc1, kind)
        out[f"mlp.fc2.{kind}"] = getattr(block.fc2, kind)
        out[f"input_layernorm.{kind}"] = getattr(block.norm1, kind)
        out[f"post_attention_layernorm.{kind}"] = getattr(block.norm2, kind)
    if block.gates is not None:
        out["gate_attn"], out["gate_ffn"] = block.gates.split(1)
    return {prefix + name: tensor for name, tensor in out.items()}


def config_json(c: CrossConfig) -> dict[str, Any]:
    """config.json as published."""
    text = {
        "model_type": "mllama_text_model",
        "bos_token_id": special("<|begin_of_text|>"),
        "cross_attention_layers": list(c.cross),
        "eos_token_id": [special(f"<|{name}|>") for name in ("end_of_text", "eom_id", "eot_id")],
        "hidden_act": "silu",
        "hidden_size": c.dim,
        "intermediate_size": c.mlp,
        "max_position_embeddings": 4096,
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "num_key_value_heads": c.kv_heads,
        "pad_token_id": special("<|finetune_right_pad_id|>"),
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": c.vocab,
    }
    vision = {
        "model_type": "mllama_vision_model",
        "attention_heads": c.vision_heads,
        "hidden_act": "gelu",
        "hidden_size": c.vision_dim,
        "image_size": SIDE * PATCH,
        "intermediate_layers_indices": list(c.states),
        "intermediate_size": c.vision_mlp,
        "max_num_tiles": TILES,
        "norm_eps": 1e-5,
        "num_channels": 3,
        "num_global_layers": c.global_layers,
        "num_hidden_layers": c.vision_layers,
        "patch_size": PATCH,
        "supported_aspect_ratios": [list(canvas) for canvas in CANVASES],
        "vision_output_dim": c.width,
    }
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": special(IMAGE),
        "text_config": text,
        "torch_dtype": "bfloat16",
        "vision_config": vision,
    }


def _files(c: CrossConfig) -> dict[str, Any]:
    ends = config_json(c)["text_config"]
    generation = {key: ends[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    side = SIDE * PATCH
    return {
        "config.json": config_json(c),
        "generation_config.json": {"_from_model_config": True, **generation},
        "chat_template.json": {"chat_template": TEMPLATE},
        "tokenizer_config.json": {
            "bos_token": NAMED[0],
            "eos_token": "<|eot_id|>",
            "pad_token": "<|finetune_right_pad_id|>",
            "model_max_length": 4096,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "preprocessor_config.json": {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(MEAN),
            "image_processor_type": "MllamaImageProcessor",
            "image_std": list(STD),
            "max_image_tiles": TILES,
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": side, "width": side},
        },
    }


def export_cross(model: TinyMllama, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write all files of the checkpoint; the weights are replaced in one step."""
    write_checkpoint(folder, _files(model.config), build_cross(), tensors(model), dtype)


def main() -> None:
    """`python -m training.cross_export runs/cross/checkpoint.pt weights/cross`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    state = torch.load(args.checkpoint, map_location="cpu")["trainee"]
    model = TinyMllama(CrossConfig())
    own = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    model.load_state_dict(own)
    export_cross(model, args.folder)


if __name__ == "__main__":
    main()
