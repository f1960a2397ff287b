"""From the tensor names of Llama-3.2-Vision checkpoints to the names of our own modules.

Two layouts differ in their prefixes alone:

1. hub, the published files and what transformers saves: ``language_model.model.*``,
   ``language_model.lm_head.*``, ``vision_model.*``, ``multi_modal_projector.*``
2. a state dict by module names: ``model.language_model.*``, ``lm_head.*``,
   ``model.vision_model.*``, ``model.multi_modal_projector.*``
"""

import re

from .names import DECODER, Rename, translate

_PREFIXES = (
    (re.compile(r"(model\.)?vision_model\."), "vision."),
    (re.compile(r"(model\.)?(?=multi_modal_projector\.)"), ""),
    (re.compile(r"(language_model\.)?(?=lm_head\.)"), "decoder."),
    (re.compile(r"language_model\.model\.|model\.language_model\."), "decoder."),
)

_CROSS = {
    "cross_attn.q_proj": "q_proj",
    "cross_attn.k_proj": "k_proj",
    "cross_attn.v_proj": "v_proj",
    "cross_attn.o_proj": "o_proj",
    "cross_attn.q_norm": "q_norm",
    "cross_attn.k_norm": "k_norm",
    "cross_attn_attn_gate": "attn_gate",
    "cross_attn_mlp_gate": "mlp_gate",
}
_DECODER = DECODER | _CROSS | {"multi_modal_projector": "projector"}
_VISION = {
    "class_embedding": "class_embedding",
    "patch_embedding": "patch_embedding",
    "gated_positional_embedding.embedding": "positions",
    "gated_positional_embedding.gate": "tile_positions.gate",
    "gated_positional_embedding.tile_embedding": "tile_positions",
    "pre_tile_positional_embedding.embedding": "pre_tile",
    "pre_tile_positional_embedding.gate": "pre_tile.gate",
    "post_tile_positional_embedding.embedding": "post_tile",
    "post_tile_positional_embedding.gate": "post_tile.gate",
    "layernorm_pre": "pre_norm",
    "layernorm_post": "post_norm",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "out_proj",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "gate_attn": "attn_gate",
    "gate_ffn": "mlp_gate",
}


def mllama_names() -> Rename:
    """Build the translation of tensor names for Llama-3.2-Vision; see ``Rename``.

    >>> mllama_names()("language_model.model.layers.3.cross_attn.q_norm.weight")
    'decoder.layers.3.q_norm.weight'
    """

    def rename(name: str) -> str:
        for pattern, owner in _PREFIXES:
            if found := pattern.match(name):
                rest = name[found.end() :]
                ours = _tower(rest) if owner == "vision." else translate(rest, _DECODER)
                return f"{owner}{ours}" if ours else ""
        return ""

    return rename


def _tower(rest: str) -> str:
    """A name inside the vision tower, whose two encoders are lists of layers here."""
    for encoder, prefix in (("transformer.", ""), ("global_transformer.", "global_")):
        if rest.startswith(f"{encoder}layers."):
            ours = translate(rest.removeprefix(encoder), _VISION)
            return f"{prefix}{ours}" if ours else ""
    return "" if ".layers." in f".{rest}" else translate(rest, _VISION)
