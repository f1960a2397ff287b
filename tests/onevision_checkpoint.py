"""Small LLaVA-OneVision checkpoints with seeded random weights, on disk as published: the names
that transformers saves are those of the hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from tests.checkpoints import write_json
from tests.qwen_patches_checkpoint import scatter
from tests.qwen_patches_checkpoint import tokenizer as chatml

TILE, PATCH = 44, 14  # 3 x 3 patches, and 2 pixels that none of them covers
IMAGES = "{% for part in message.content if part.type == 'image' %}<image>"
# The hub's template, and the one that newer conversions have.
TEMPLATES = {
    "onevision": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    + IMAGES
    + "{% endfor %}{% for part in message.content if part.type == 'text' %}"
    "{{ '\n' + part.text }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    + IMAGES
    + "\n{% endfor %}{% for part in message.content if part.type == 'text' %}"
    "{{ part.text }}{% endfor %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}


def pinpoints(tile: int = TILE) -> list[list[int]]:
    sides = range(tile, 7 * tile, tile)
    return [[height, width] for height in sides for width in sides]


def tokenizer() -> Tokenizer:
    made = chatml()
    names = ("<image>", "<video>")
    made.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    return made


def vision_config(layers: int = 3) -> dict[str, Any]:
    sizes = {"hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 3}
    sizes |= {"image_size": TILE, "patch_size": PATCH, "num_hidden_layers": layers}
    return sizes | {"model_type": "siglip_vision_model", "vision_use_head": False}


TEXT = {
    "model_type": "qwen2",
    "hidden_size": 56,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "use_sliding_window": False,
    "vocab_size": 384,
}


def make_model(*, tied: bool = False) -> Any:
    """Transformers' model with weights under which attention is far from even."""
    config = LlavaOnevisionConfig(
        text_config={**TEXT, "tie_word_embeddings": tied},
        vision_config=vision_config(),
        image_token_index=tokenizer().token_to_id("<image>"),
        video_token_index=tokenizer().token_to_id("<video>"),
        image_grid_pinpoints=pinpoints(),
        tie_word_embeddings=tied,
    )
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    scatter(model, 31)
    return model


def write_onevision(
    folder: Path, *, tied: bool = False, style: str = "onevision", layout: str = "hub"
) -> Path:
    """Write a complete checkpoint; "original": as lmms-lab has it, with its own tower inside."""
    make_model(tied=tied).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer().to_str())
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    write_json(folder / "tokenizer_config.json", settings)
    if layout == "original":
        _to_original(folder)
        return folder
    (folder / "chat_template.jinja").write_text(TEMPLATES[style])
    write_json(folder / "preprocessor_config.json", preprocessor())
    return folder


def preprocessor(tile: int = TILE) -> dict[str, Any]:
    return {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": tile, "width": tile},
        "image_grid_pinpoints": pinpoints(tile),
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_pad": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }


_ORIGINAL = {
    "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "multi_modal_projector.linear_1": "model.mm_projector.0",
    "multi_modal_projector.linear_2": "model.mm_projector.2",
    "language_model.model.": "model.",
    "language_model.lm_head": "lm_head",
    "image_newline": "model.image_newline",
}


def _to_original(folder: Path) -> None:
    """Flat, a tower of one layer more than is used, canvases as (width, height)."""
    path, tensors = folder / "model.safetensors", {}
    for name, value in load_file(path).items():
        theirs = next(old for old in _ORIGINAL if name.startswith(old))
        tensors[name.replace(theirs, _ORIGINAL[theirs], 1)] = value
    last = "model.vision_tower.vision_tower.vision_model.encoder.layers.2."
    unused = {n.replace("layers.2", "layers.3"): t + 1 for n, t in tensors.items() if last in n}
    save_file(tensors | unused, path, metadata={"format": "pt"})
    config = TEXT | {
        "model_type": "llava",
        "architectures": ["LlavaQwenForCausalLM"],
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[width, height] for height, width in pinpoints()],
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "_test_only_vision_config": vision_config(4),
        "eos_token_id": 0,
    }
    (folder / "generation_config.json").unlink(missing_ok=True)
    write_json(folder / "config.json", config)
    kept = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", kept)
