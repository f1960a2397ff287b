"""All four layouts, and the published lists, name exactly the tensors of our model."""

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.checkpoint.names import clip_names, llava_names
from engine.models.llava import Llava, parse_hub, parse_original

REFERENCE = Path(
    os.environ.get("AVL_REFERENCE_DATA", Path(__file__).parents[2] / "shared" / "data")
)
PUBLISHED = REFERENCE / "llava-1.5-7b-hf"

VISION_ON_DISK = [
    "layer_norm1",
    "layer_norm2",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
]
DECODER_ON_DISK = [
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


def tower_on_disk(layers: int) -> list[str]:
    """What a CLIP vision tower stores, without any prefix."""
    embeddings = ["class_embedding", "patch_embedding.weight", "position_embedding.weight"]
    modules = ["pre_layrnorm", "post_layernorm"]
    modules += [f"encoder.layers.{n}.{part}" for n in range(layers) for part in VISION_ON_DISK]
    names = [f"embeddings.{name}" for name in embeddings]
    return names + [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]


def decoder_on_disk(layers: int) -> list[str]:
    """What a Llama stores, without any prefix and without its head."""
    parts = [f"layers.{n}.{part}.weight" for n in range(layers) for part in DECODER_ON_DISK]
    return ["embed_tokens.weight", "norm.weight", *parts]


def layout(tower: str, projector: tuple[str, str], decoder: str, head: str) -> list[str]:
    """All names of a LLaVA of 3 vision and 2 decoder layers, with the prefixes of one layout."""
    return [
        *(tower + name for name in tower_on_disk(3)),
        *(f"{linear}.{leaf}" for linear in projector for leaf in ("weight", "bias")),
        *(decoder + name for name in decoder_on_disk(2)),
        head,
    ]


HUB = ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
MODULES = ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2")
ORIGINAL = ("model.mm_projector.0", "model.mm_projector.2")
HUB_DECODER = ("language_model.model.", "language_model.lm_head.weight")
MODULE_DECODER = ("model.language_model.", "lm_head.weight")
LAYOUTS = {
    "hub, transformers 4": layout("vision_tower.vision_model.", HUB, *HUB_DECODER),
    "hub, transformers 5": layout("vision_tower.", HUB, *HUB_DECODER),
    "module names 4": layout("model.vision_tower.vision_model.", MODULES, *MODULE_DECODER),
    "module names 5": layout("model.vision_tower.", MODULES, *MODULE_DECODER),
    "original": layout(
        "model.vision_tower.vision_tower.vision_model.", ORIGINAL, "model.", "lm_head.weight"
    ),
}

CONFIG = {
    "model_type": "llava",
    "image_token_index": 60,
    "text_config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
}


def meta_llava(config: dict[str, object]) -> Llava:
    with torch.device("meta"):
        return Llava(parse_hub(config))


def split_names(
    names: Iterable[str], rename: Callable[[str], str | None]
) -> tuple[list[str], set[str]]:
    """Our names in the order of `names`, and which of `names` are known to be unused."""
    ours = {name: rename(name) for name in names}
    return (
        [new for new in ours.values() if new is not None],
        {old for old, new in ours.items() if new is None},
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_names_each_parameter_once(name: str) -> None:
    found, unused = split_names(LAYOUTS[name], llava_names(2))
    assert sorted(found) == sorted(meta_llava(CONFIG).state_dict())
    assert all(re.search(r"layers\.2\.|post_layernorm", old) for old in unused)
    assert len(unused) == 2 * len(VISION_ON_DISK) + 2


def test_names_that_transformers_writes_are_known(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    oracle = LlavaForConditionalGeneration(LlavaConfig(**CONFIG))  # type: ignore[arg-type]
    oracle.save_pretrained(tmp_path)
    expected = sorted(meta_llava(CONFIG).state_dict())
    stored = load_file(tmp_path / "model.safetensors")
    for tensors in (stored, oracle.state_dict()):
        found, _ = split_names(tensors, llava_names(2))
        assert sorted(found) == expected
    # The same tensor whichever way it is called.
    by_module = {llava_names(2)(name): tensor for name, tensor in oracle.state_dict().items()}
    for name, tensor in stored.items():
        if (ours := llava_names(2)(name)) is not None:
            assert torch.equal(tensor, by_module[ours])


def test_shapes_fit_what_transformers_writes() -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    with torch.device("meta"):
        oracle = LlavaForConditionalGeneration(LlavaConfig(**CONFIG))  # type: ignore[arg-type]
    ours = meta_llava(CONFIG).state_dict()
    for name, tensor in oracle.state_dict().items():
        if (new := llava_names(2)(name)) is not None:
            assert ours[new].shape == tensor.shape, name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.vision_tower.vision_model.embeddings.class_embedding", "vision.class_embedding"),
        ("vision_tower.pre_layrnorm.bias", "vision.pre_norm.bias"),
        (
            "vision_tower.encoder.layers.22.self_attn.out_proj.bias",
            "vision.layers.22.out_proj.bias",
        ),
        ("model.mm_projector.0.weight", "projector.linear_1.weight"),
        ("model.mm_projector.2.bias", "projector.linear_2.bias"),
        ("model.layers.31.self_attn.q_proj.bias", "decoder.layers.31.q_proj.bias"),  # Qwen2
        ("model.layers.0.post_attention_layernorm.weight", "decoder.layers.0.mlp_norm.weight"),
        ("model.norm.weight", "decoder.norm.weight"),
        ("lm_head.weight", "decoder.head.weight"),
        # Known to be unused.
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("language_model.model.rotary_emb.inv_freq", None),
        ("vision_tower.vision_model.embeddings.position_ids", None),
        ("vision_tower.vision_model.post_layernorm.bias", None),
        ("vision_tower.vision_model.encoder.layers.23.mlp.fc1.bias", None),
        ("model.image_newline", None),
        ("image_newline", None),
        # Unknown.
        ("model.mm_projector.1.weight", ""),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv.x", ""),
        ("model.layers.x.mlp.up_proj.weight", ""),
        ("model.layers.01.mlp.up_proj.weight", ""),
        ("decoder.norm.weight", ""),
        ("vision.pre_norm.weight", ""),
        ("vision_tower.text_model.final_layer_norm.weight", ""),
        ("cross_attn.q_proj.weight", ""),
        ("lm_head", ""),
        ("model.", ""),
        ("", ""),
    ],
)
def test_single_names(name: str, expected: str | None) -> None:
    assert llava_names(23)(name) == expected


def test_image_newline_is_a_parameter_of_the_models_that_have_it() -> None:
    rename = llava_names(23, image_newline=True)
    assert rename("image_newline") == rename("model.image_newline") == "image_newline"


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_a_clip_folder_names_the_tower(prefix: str) -> None:
    complete = [prefix + name for name in tower_on_disk(3)]
    complete += ["text_model.encoder.layers.0.mlp.fc1.weight", "logit_scale"]
    complete += ["text_projection.weight", "visual_projection.weight"]
    complete += ["text_model.embeddings.position_ids", prefix + "embeddings.position_ids"]
    found, _ = split_names(complete, clip_names(2))
    assert sorted(found) == sorted(meta_llava(CONFIG).vision.state_dict())


def size(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


# A CLIP layer that is stored but not used, and the norm behind it (hidden 1024, MLP 4096).
UNUSED_7B = 4 * (1024 * 1024 + 1024) + 4 * 1024 + 2 * 4096 * 1024 + 4096 + 1024 + 2 * 1024


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="published metadata is not on this machine")
def test_published_7b_names_each_parameter_once_and_leaves_none_over() -> None:
    index = json.loads((PUBLISHED / "model.safetensors.index.json").read_text())
    names = list(index["weight_map"])
    assert len(names) == 686
    llava = meta_llava(json.loads((PUBLISHED / "config.json").read_text()))
    found, unused = split_names(names, llava_names(llava.config.vision.used_layers))
    assert sorted(found) == sorted(llava.state_dict())
    assert unused == {
        *(f"vision_tower.vision_model.post_layernorm.{leaf}" for leaf in ("weight", "bias")),
        *(
            f"vision_tower.vision_model.encoder.layers.23.{part}.{leaf}"
            for part in VISION_ON_DISK
            for leaf in ("weight", "bias")
        ),
    }
    # The index states all bytes (fp16), hence the shapes are right as well.
    assert 2 * (size(llava) + UNUSED_7B) == index["metadata"]["total_size"]


def test_original_7b_has_the_published_size() -> None:
    config = {"mm_vision_tower": "clip", "vocab_size": 32000, "model_type": "llava"}
    tower = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    tower |= {"intermediate_size": 4096, "patch_size": 14, "image_size": 336}
    with torch.device("meta"):
        llava = Llava(parse_original(config, tower))
    inv_freq = [f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(32)]
    projector = [f"{linear}.{leaf}" for linear in ORIGINAL for leaf in ("weight", "bias")]
    names = [f"model.{name}" for name in decoder_on_disk(32)]
    names += [*inv_freq, *projector, "lm_head.weight"]
    found, unused = split_names(names, llava_names(23))
    without_tower = [name for name in llava.state_dict() if not name.startswith("vision.")]
    assert sorted(found) == sorted(without_tower)
    assert unused == set(inv_freq)
    # 13,518,798,848 bytes are in its published index: fp16, and 32 x 64 inv_freq in fp32.
    assert 2 * (size(llava) - size(llava.vision)) + 32 * 64 * 4 == 13_518_798_848
