"""From the tensor names of Qwen-VL checkpoints to the names of our own modules.

The files follow the remote code: the decoder is ``transformer.*`` in GPT-2's words, the vision
tower ``transformer.visual.*`` in open_clip's. Two tensors are fused: a layer's ``c_attn`` holds the
rows of q, k and v one after the other, and so does ``in_proj`` of the resampler's attention.
(``in_proj`` of a vision layer is packed head by head instead, so it stays one tensor here.)
"""

import re
from collections.abc import Mapping

from .names import Rename

_QKV = ("q_proj", "k_proj", "v_proj")

_DECODER: Mapping[str, str | tuple[str, ...]] = {
    "ln_1": "attn_norm",
    "attn.c_attn": _QKV,
    "attn.c_proj": "o_proj",
    "ln_2": "mlp_norm",
    "mlp.w1": "up_proj",
    "mlp.w2": "gate_proj",  # the activated one: c_proj(w1(x) * silu(w2(x)))
    "mlp.c_proj": "down_proj",
}
_VISION_LAYER = {
    "ln_1": "norm1",
    "attn.in_proj": "in_proj",
    "attn.out_proj": "out_proj",
    "ln_2": "norm2",
    "mlp.c_fc": "fc1",
    "mlp.c_proj": "fc2",
}
_MODULES: Mapping[str, str | tuple[str, ...]] = {
    "transformer.wte": "decoder.embed",
    "transformer.ln_f": "decoder.norm",
    "lm_head": "decoder.head",
    "transformer.visual.conv1": "vision.patch_embedding",
    "transformer.visual.ln_pre": "vision.pre_norm",
    "transformer.visual.ln_post": "vision.post_norm",
    "transformer.visual.attn_pool.kv_proj": "vision.resampler.kv_proj",
    "transformer.visual.attn_pool.ln_kv": "vision.resampler.kv_norm",
    "transformer.visual.attn_pool.ln_q": "vision.resampler.q_norm",
    "transformer.visual.attn_pool.attn.out_proj": "vision.resampler.out_proj",
}
_RESAMPLER = tuple(f"vision.resampler.{name}" for name in _QKV)
# Parameters that are no module's weight or bias.
_PARAMETERS: Mapping[str, str | tuple[str, ...]] = {
    "transformer.visual.positional_embedding": "vision.positions",
    "transformer.visual.proj": "vision.proj",
    "transformer.visual.attn_pool.query": "vision.resampler.query",
    "transformer.visual.attn_pool.pos_embed": "vision.resampler.positions",
    "transformer.visual.attn_pool.attn.in_proj_weight": tuple(f"{n}.weight" for n in _RESAMPLER),
    "transformer.visual.attn_pool.attn.in_proj_bias": tuple(f"{n}.bias" for n in _RESAMPLER),
}

# Buffers that some copies store and every model computes for itself.
_COMPUTED = re.compile(r"transformer\.(h\.\d+\.attn\.)?(rotary_emb\.inv_freq|logn_tensor|bias)")
_LAYER = re.compile(
    r"transformer\.(h|visual\.transformer\.resblocks)\.(0|[1-9]\d*)\.(.+)\.(weight|bias)"
)


def qwen_names() -> Rename:
    """Build the translation of tensor names for Qwen-VL and Qwen-VL-Chat; see ``Rename``.

    >>> qwen_names()("transformer.h.3.mlp.w1.weight")
    'decoder.layers.3.up_proj.weight'
    """

    def rename(name: str) -> str | tuple[str, ...] | None:
        if _COMPUTED.fullmatch(name):
            return None
        if name in _PARAMETERS:
            return _PARAMETERS[name]
        if found := _LAYER.fullmatch(name):
            kind, number, rest, leaf = found.groups()
            table, ours = (_DECODER, "decoder") if kind == "h" else (_VISION_LAYER, "vision")
            return _spelled(table.get(rest), f"{ours}.layers.{number}.", leaf)
        module, _, leaf = name.rpartition(".")
        return _spelled(_MODULES.get(module), "", leaf)

    return rename


def _spelled(module: str | tuple[str, ...] | None, prefix: str, leaf: str) -> str | tuple[str, ...]:
    """The full name of a module's leaf; "" for an unknown module."""
    if isinstance(module, tuple):
        return tuple(f"{prefix}{name}.{leaf}" for name in module)
    return f"{prefix}{module}.{leaf}" if module else ""
