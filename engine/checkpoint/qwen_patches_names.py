"""From the tensor names of Qwen2-VL, Qwen2.5-VL and Qwen3-VL to the names of our own modules.

Two layouts differ in their prefixes alone:

1. Qwen2-VL and Qwen2.5-VL on the hub: ``visual.*``, ``model.*``, ``lm_head.*``
2. Qwen3-VL, and module names: ``model.visual.*``, ``model.language_model.*``, ``lm_head.*``
"""

import re

from .names import DECODER, Rename, translate

_PREFIXES = (
    (re.compile(r"(model\.)?visual\."), "vision."),
    (re.compile(r"(language_model\.)?(?=lm_head\.)"), "decoder."),
    (re.compile(r"(model\.)?language_model\.(model\.)?|model\."), "decoder."),
)
_DECODER = DECODER | {"self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}
_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "qkv",
    "attn.proj": "proj",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "mlp.linear_fc1": "fc1",
    "mlp.linear_fc2": "fc2",
    "mlp.gate_proj": "gate_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "down_proj",
}
_MERGER = {
    "ln_q": "norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "norm": "norm",
    "linear_fc1": "fc1",
    "linear_fc2": "fc2",
}
_TOWER = {"patch_embed.proj": "patches"} | {
    f"merger.{theirs}": f"merger.{ours}" for theirs, ours in _MERGER.items()
}
_BLOCKS = re.compile(r"blocks\.(?=(0|[1-9]\d*)\.)")
_DEEP = re.compile(r"deepstack_merger_list\.(0|[1-9]\d*)\.(.*)")
_COMPUTED = re.compile(r".*rotary_(pos_)?emb\.inv_freq")


def qwen_patches_names() -> Rename:
    """Build the translation of tensor names; see ``Rename``.

    >>> qwen_patches_names()("model.visual.deepstack_merger_list.1.linear_fc1.bias")
    'vision.deep_mergers.1.fc1.bias'
    """

    def rename(name: str) -> str | None:
        if _COMPUTED.fullmatch(name):
            return None
        for pattern, owner in _PREFIXES:
            if found := pattern.match(name):
                rest = name[found.end() :]
                ours = _tower(rest) if owner == "vision." else translate(rest, _DECODER)
                return f"{owner}{ours}" if ours else ""
        return ""

    return rename


def _tower(rest: str) -> str:
    if rest == "pos_embed.weight":
        return "positions"
    if deep := _DEEP.fullmatch(rest):
        ours = translate(deep[2], _MERGER)
        return f"deep_mergers.{deep[1]}.{ours}" if ours else ""
    if _BLOCKS.match(rest):
        return translate(_BLOCKS.sub("layers.", rest, count=1), _BLOCK)
    return translate(rest, _TOWER)
