"""From the tensor names found on disk to the names of our own modules.

LLaVA checkpoints come in four layouts that differ in their prefixes, and in little else:

1. hub, written by transformers 4: ``language_model.model.*``, ``language_model.lm_head.*``,
   ``vision_tower.vision_model.*``, ``multi_modal_projector.linear_{1,2}.*``, ``image_newline``
2. hub, written by transformers 5: the same, but ``vision_tower.*``
3. a state dict by module names: ``model.language_model.*``, ``lm_head.*``,
   ``model.vision_tower.*`` or ``model.vision_tower.vision_model.*``,
   ``model.multi_modal_projector.*``, ``model.image_newline``
4. the original repository: ``model.*``, ``lm_head.*``, ``model.mm_projector.{0,2}.*``,
   ``model.vision_tower.vision_tower.vision_model.*``, ``model.image_newline``

So a name is translated in two steps: its prefix says which module of the model it belongs to, and a
table per module says what the rest is called here.
"""

import re
from collections.abc import Callable, Mapping

# A name on disk to ours; to several of ours where the rows of a fused tensor are shared out among
# them; to None if the tensor is known to be unused; to "" if nothing is known about it.
Rename = Callable[[str], str | tuple[str, ...] | None]


def target_names(renamed: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """What a ``Rename`` gave, as a tuple: empty for an unused tensor."""
    if renamed is None:
        return ()
    return (renamed,) if isinstance(renamed, str) else renamed


# The first pattern that fits wins: the bare "model." of the original layout must come last.
_PREFIXES = (
    (re.compile(r"(model\.)?(vision_tower\.){1,2}(vision_model\.)?"), "vision"),
    (re.compile(r"(model\.)?multi_modal_projector\.|model\.mm_projector\."), "projector"),
    (re.compile(r"(model\.)?(?=image_newline$)"), ""),
    (re.compile(r"(language_model\.)?(?=lm_head\.)"), "decoder"),
    (re.compile(r"language_model\.model\.|model\.language_model\.|model\."), "decoder"),
)

# What the rest of a name, without its last word or as a whole, is called in our modules.
_PROJECTOR = {"weight": "linear_1.weight", "bias": "linear_1.bias"}  # where it is one layer
_PROJECTOR |= {f"linear_{n}": f"linear_{n}" for n in (1, 2)}
_PROJECTOR |= {str(2 * n - 2): f"linear_{n}" for n in range(1, 10)}  # with GELUs numbered between
_CLIP = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "patch_embedding",
    "embeddings.position_embedding": "position_embedding",
    "pre_layrnorm": "pre_norm",  # the typo is in every published file
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.out_proj": "out_proj",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}
DECODER = {
    "embed_tokens": "embed",
    "norm": "norm",
    "lm_head": "head",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "o_proj",
    "mlp.gate_proj": "gate_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "down_proj",
}

# Known to be unused: buffers that old releases stored and every model computes for itself, and
# what a complete CLIP has beside its vision tower.
_COMPUTED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|embeddings\.position_ids)")
_CLIP_TEXT = re.compile(r"text_model\..*|(text|visual)_projection\.weight|logit_(scale|bias)")

_LAYER = re.compile(r"(?:encoder\.)?layers\.(0|[1-9]\d*)\.(.*)")


def llava_names(vision_layers: int, image_newline: bool = False) -> Rename:
    """Build the translation of tensor names for a LLaVA in any of the four layouts.

    Args:
        vision_layers: how many layers of the vision tower are used; the later ones are known to be
            unused. A tower of 24 layers with ``vision_feature_layer`` -2 uses 23.
        image_newline: whether the model has this tensor (LLaVA-1.6); otherwise it is unused.

    Returns:
        A function from a name on disk to our name, to None if the tensor is known to be unused, or
        to "" if nothing is known about it.

    >>> llava_names(23)("language_model.model.layers.3.mlp.up_proj.weight")
    'decoder.layers.3.up_proj.weight'
    """

    def rename(name: str) -> str | None:
        if _COMPUTED.fullmatch(name):
            return None
        owner, rest = _split(name)
        if rest == "image_newline":
            return rest if image_newline else None
        if owner == "vision":
            ours = _tower(rest, vision_layers)
        else:
            ours = translate(rest, {"decoder": DECODER, "projector": _PROJECTOR}.get(owner, {}))
        return f"{owner}.{ours}" if ours else ours

    return rename


def clip_names(vision_layers: int) -> Rename:
    """Build the translation for a CLIP folder, to the names inside our vision tower.

    For checkpoints that leave the tower to a folder of its own (``mm_vision_tower``). Arguments and
    result are those of ``llava_names``; CLIP's text model is known to be unused. SigLIP's names are
    the same.

    >>> clip_names(23)("vision_model.encoder.layers.22.mlp.fc1.bias")
    'layers.22.fc1.bias'
    """

    def rename(name: str) -> str | None:
        if _COMPUTED.fullmatch(name) or _CLIP_TEXT.fullmatch(name):
            return None
        return _tower(name.removeprefix("vision_model."), vision_layers)

    return rename


def _split(name: str) -> tuple[str, str]:
    """The module of the model a name belongs to ("" if none), and the rest of the name."""
    for pattern, owner in _PREFIXES:
        if found := pattern.match(name):
            return owner, name[found.end() :]
    return "", name


def _tower(rest: str, vision_layers: int) -> str | None:
    """A name inside the vision tower; layers after the last used one are dropped, its norm, and
    SigLIP's pooling head.
    """
    layer = _LAYER.fullmatch(rest)
    if rest.startswith(("post_layernorm.", "head.")) or (layer and int(layer[1]) >= vision_layers):
        return None
    return translate(rest, _CLIP)


def translate(rest: str, table: Mapping[str, str]) -> str:
    """Look a name up in its owner's table, inside its layer if it has one; "" if it is unknown."""
    prefix = ""
    if layer := _LAYER.fullmatch(rest):
        prefix, rest = f"layers.{layer[1]}.", layer[2]
    if rest in table:
        return prefix + table[rest]
    module, _, leaf = rest.rpartition(".")
    return f"{prefix}{table[module]}.{leaf}" if module in table else ""
