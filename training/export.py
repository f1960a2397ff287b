"""Write the trained model in the published on-disk layout of LLaVA-1.5 (llava-hf)."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from training.model import MEAN, STD, ModelConfig, TinyLlava
from training.page import PATCH, SIZE
from training.tokenizer import SPECIALS, build

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tensors(model: TinyLlava) -> dict[str, Tensor]:
    """Published names -> tensors; fused matrices are split, patches become a convolution."""
    c, v = model.config, model.vision
    tower = "vision_tower.vision_model."
    conv = v.patch.weight.view(c.vision_dim, 3, PATCH, PATCH)
    out = {
        f"{tower}embeddings.class_embedding": v.class_token,
        f"{tower}embeddings.patch_embedding.weight": conv,
        f"{tower}embeddings.position_embedding.weight": v.position,
        "multi_modal_projector.linear_1.weight": model.linear_1.weight,
        "multi_modal_projector.linear_1.bias": model.linear_1.bias,
        "multi_modal_projector.linear_2.weight": model.linear_2.weight,
        "multi_modal_projector.linear_2.bias": model.linear_2.bias,
        "language_model.model.embed_tokens.weight": model.decoder.embed.weight,
        "language_model.model.norm.weight": model.decoder.norm.weight,
        "language_model.lm_head.weight": model.head.weight,
    }
    for kind in ("weight", "bias"):
        out[f"{tower}pre_layrnorm.{kind}"] = getattr(v.pre_norm, kind)
        # On disk in every published tower, used by none: the features are taken before it.
        start = torch.ones if kind == "weight" else torch.zeros
        out[f"{tower}post_layernorm.{kind}"] = start(c.vision_dim)
    for i, block in enumerate(v.blocks):
        name = f"{tower}encoder.layers.{i}."
        for kind in ("weight", "bias"):
            parts = getattr(block.qkv, kind).chunk(3)
            for letter, part in zip("qkv", parts, strict=True):
                out[f"{name}self_attn.{letter}_proj.{kind}"] = part
            out[f"{name}self_attn.out_proj.{kind}"] = getattr(block.out, kind)
            out[f"{name}layer_norm1.{kind}"] = getattr(block.norm1, kind)
            out[f"{name}layer_norm2.{kind}"] = getattr(block.norm2, kind)
            out[f"{name}mlp.fc1.{kind}"] = getattr(block.fc1, kind)
            out[f"{name}mlp.fc2.{kind}"] = getattr(block.fc2, kind)
    for i, block in enumerate(model.decoder.blocks):
        name = f"language_model.model.layers.{i}."
        for letter, part in zip("qkv", block.qkv.weight.chunk(3), strict=True):
            out[f"{name}self_attn.{letter}_proj.weight"] = part
        gate, up = block.gate_up.weight.chunk(2)
        out[f"{name}self_attn.o_proj.weight"] = block.out.weight
        out[f"{name}mlp.gate_proj.weight"] = gate
        out[f"{name}mlp.up_proj.weight"] = up
        out[f"{name}mlp.down_proj.weight"] = block.down.weight
        out[f"{name}input_layernorm.weight"] = block.norm1.weight
        out[f"{name}post_attention_layernorm.weight"] = block.norm2.weight
    return out


def load_tensors(model: TinyLlava, found: dict[str, Tensor]) -> None:
    """The way back: fill the training form from published tensors."""
    with torch.no_grad():
        for name, target in tensors(model).items():
            if "post_layernorm" not in name:
                target.copy_(found[name].float().view_as(target))


def config_json(c: ModelConfig, image_id: int) -> dict[str, Any]:
    text = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": c.dim,
        "intermediate_size": c.mlp,
        "max_position_embeddings": 4096,
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "num_key_value_heads": c.heads,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": c.vocab,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "hidden_size": c.vision_dim,
        "image_size": SIZE,
        "intermediate_size": c.vision_mlp,
        "num_attention_heads": c.vision_heads,
        "num_hidden_layers": c.vision_layers,
        "patch_size": PATCH,
        "projection_dim": c.vision_dim,
    }
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": image_id,
        "pad_token_id": image_id + 1,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": vision,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "vocab_size": c.vocab,
    }


def _token_files(image_id: int) -> dict[str, Any]:
    names = [*SPECIALS, "<image>", "<pad>"]
    ids = [0, 1, 2, image_id, image_id + 1]
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(i): {"content": n, **plain, "special": True} for i, n in zip(ids, names, strict=True)
    }
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": None,
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"image_token": "<image>"},
        "image_token": "<image>",
        "legacy": False,
        "model_max_length": 4096,
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "LlamaTokenizer",
        **roles,
    }
    return {
        "added_tokens.json": {"<image>": image_id, "<pad>": image_id + 1},
        "special_tokens_map.json": {k: {"content": v, **plain} for k, v in roles.items()},
        "tokenizer_config.json": tokenizer,
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }


def _picture_files() -> dict[str, Any]:
    picture = {
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(STD),
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": SIZE},
    }
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": PATCH,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    return {"preprocessor_config.json": picture, "processor_config.json": processor}


def write_checkpoint(
    folder: Path,
    files: dict[str, Any],
    tokenizer: dict[str, Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Write a folder: ``files`` by name, the tokenizer, and the weights, replaced in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    text = json.dumps(tokenizer, indent=1, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    data = {k: v.detach().to("cpu", dtype).contiguous().clone() for k, v in tensors.items()}
    save_file(data, folder / "model.part", metadata={"format": "pt"})
    (folder / "model.part").chmod(0o644)
    os.replace(folder / "model.part", folder / "model.safetensors")


def export(model: TinyLlava, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write all files of the checkpoint; the weights are replaced in one step."""
    tokenizer = build()
    image_id = len(tokenizer["model"]["vocab"])
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": image_id + 1}
    files = {
        "config.json": config_json(model.config, image_id),
        "generation_config.json": {"_from_model_config": True, **generation},
        **_token_files(image_id),
        **_picture_files(),
    }
    write_checkpoint(folder, files, tokenizer, tensors(model), dtype)


def mean_weights(checkpoints: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The model's weights, averaged over checkpoints of one plan's last stage (Wortsman 2022)."""
    states = [torch.load(path, map_location="cpu")["trainee"] for path in checkpoints]
    names = [name for name in states[0] if name.startswith("model.")]
    return {
        name.removeprefix("model."): torch.stack([s[name].float() for s in states]).mean(0)
        for name in names
    }


def main() -> None:
    """`python -m training.export runs/tiny/checkpoint.pt weights/tiny`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="+", help="several are averaged")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    weights = mean_weights(args.checkpoint)
    model = TinyLlava(ModelConfig(vocab=weights["head.weight"].shape[0]))
    model.load_state_dict(weights)
    export(model, args.folder)


if __name__ == "__main__":
    main()
