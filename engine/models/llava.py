"""LLaVA-1.5 (Liu et al. 2023): CLIP patch features, a two-layer projector, a language decoder.

Two published families of files: the hub layout (``llava-hf/*``, nested configs) and the original
layout (``liuhaotian/*``, a flat Llama config whose vision tower is a folder or model of its own).
What others have trained since differs in the tower (SigLIP's), the projector's depth, or in keeping
the class token's features.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.config import ConfigReader
from ..pictures.anyres import Canvas
from ..pictures.preprocess import ImageProcessor, Pixels
from ..progress import tell
from .clip import ClipConfig, ClipVision
from .decoder import Decoder, DecoderConfig
from .matrix import Linear
from .siglip import SiglipConfig, SiglipVision
from .vision_language import VisionLanguageModel

# What the original layout calls its models, and the decoder inside.
DECODERS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}

# Memory that one batch of tiles may take inside the vision tower.
VISION_BYTES = 1 << 30


@dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA: its two halves, and the id that stands for an image token in a prompt.

    ``vision_tower`` names where the tower's weights and configuration lie when the checkpoint
    leaves them out (original layout); otherwise it is None. ``depth`` counts the projector's
    layers, ``projector_bias`` says whether they have biases.
    """

    decoder: DecoderConfig
    vision: ClipConfig
    image_token: int
    vision_tower: str | None
    end_tokens: tuple[int, ...]
    depth: int = 2
    projector_bias: bool = True


def parse_hub(config: Mapping[str, Any]) -> LlavaConfig:
    """Read the nested config.json of ``llava-hf/*`` and of transformers' save_pretrained."""
    top = ConfigReader(config, "config.json")
    top.text("projector_hidden_act", "gelu", ("gelu",))
    if isinstance(config.get("vision_feature_layer"), list):
        raise top.unsupported("vision_feature_layer", "names several layers; one is supported")
    feature_layer = top.integer("vision_feature_layer", -2, low=-1000, high=1000)
    chosen = top.text("vision_feature_select_strategy", "default", ("default", "full"))
    decoder = DecoderConfig.parse(top.section("text_config"))
    vision, dropped = top.section("vision_config"), int(chosen == "default")
    image_key = "image_token_id" if "image_token_id" in config else "image_token_index"
    return LlavaConfig(
        decoder=decoder,
        vision=_tower(vision).parse(vision, feature_layer, dropped),
        image_token=top.integer(image_key, 32000, low=0, high=decoder.vocab - 1),
        vision_tower=None,
        end_tokens=top.section("text_config").tokens("eos_token_id", ()),
        projector_bias=top.flag("multimodal_projector_bias", True),
    )


def _tower(vision: ConfigReader) -> type[ClipConfig]:
    """The kind of tower that a vision_config describes."""
    kind = str(vision.values.get("model_type"))
    return SiglipConfig if kind.startswith("siglip") else ClipConfig


def parse_original(config: Mapping[str, Any], vision_config: Mapping[str, Any]) -> LlavaConfig:
    """Read the flat config.json of ``liuhaotian/llava-v1.5-*`` and its tower's configuration.

    The image id is never looked up in a table of this layout (its vocabulary ends before it): it
    only marks places in a prompt, so that it is the first id beyond the vocabulary.
    """
    top = ConfigReader(config, "config.json")
    chosen = top.text("mm_vision_select_feature", "patch", ("patch", "cls_patch"))
    vision = ConfigReader(vision_config, "vision config")
    tower = _tower(vision)
    dropped = tower.leading if chosen == "patch" else 0
    feature_layer = top.integer("mm_vision_select_layer", -2, low=-1000, high=1000)
    kind = decoder_kind(top)
    decoder = DecoderConfig.parse(ConfigReader({**config, "model_type": kind}, "config.json"))
    return LlavaConfig(
        decoder=decoder,
        vision=tower.parse(vision, feature_layer, dropped),
        image_token=decoder.vocab,
        vision_tower=top.text("mm_vision_tower"),
        end_tokens=top.tokens("eos_token_id", ()),
        depth=_depth(top),
    )


def decoder_kind(top: ConfigReader) -> str:
    """The decoder that an original layout names; where its model_type is only "llava", as in
    LLaVA-OneVision's files, ``architectures`` do.
    """
    kind = top.text("model_type", "llava", tuple(DECODERS))
    if kind == "llava" and "LlavaQwenForCausalLM" in (top.values.get("architectures") or ()):
        kind = "llava_qwen"
    return DECODERS[kind]


def _depth(top: ConfigReader) -> int:
    """Layers of the projector: "linear" is one, "mlp2x_gelu" two."""
    kind = top.text("mm_projector_type", "mlp2x_gelu")
    found = re.fullmatch(r"mlp([1-9])x_gelu", kind)
    if kind != "linear" and found is None:
        raise top.unsupported("mm_projector_type", f"is {kind!r:.40}; linear and mlp2x_gelu are")
    return int(found[1]) if found else 1


class Projector(nn.Module):
    """Linear layers with exact GELUs between, vision width to decoder width: two as published."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        widths = [config.vision.hidden, *[config.decoder.hidden] * config.depth]
        for number, sizes in enumerate(itertools.pairwise(widths), 1):
            self.add_module(f"linear_{number}", Linear(*sizes, bias=config.projector_bias))

    def forward(self, features: Tensor) -> Tensor:
        """``[..., vision]`` to ``[..., hidden]``."""
        first, *others = self.children()
        features = first(features)
        for layer in others:
            features = layer(F.gelu(features))
        return features


def _built(vision: ClipConfig) -> nn.Module:
    return SiglipVision(vision) if isinstance(vision, SiglipConfig) else ClipVision(vision)


class Llava(VisionLanguageModel):
    """The joined model; the engine embeds a prompt with it and then runs ``decoder``.

    ``processor`` is what makes pixels of pictures for it, and ``pinpoints`` are the canvases
    (height, width) of tiles, if it has tiles.
    """

    processor: type[ImageProcessor] = ImageProcessor
    pinpoints: tuple[Canvas, ...] = ()

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.image_token = config.image_token
        self.vision = _built(config.vision)
        self.projector = Projector(config)
        self.decoder = Decoder(config.decoder)

    def image_tokens(self, pixels: Pixels) -> int:
        """Tokens that a picture takes in the sequence: 576 at 336 px and 14 px patches."""
        return self.config.vision.features * len(pixels.tiles)

    def encode(self, pictures: Sequence[Pixels]) -> list[Tensor]:
        """Image tokens ``[image tokens, hidden]`` of every picture."""
        return [tiles.flatten(0, 1) for tiles in self.tile_features(pictures)]

    def features(self, tiles: Tensor) -> Tensor:
        """What ``tiles [tiles, 3, height, width]`` become: ``[tiles, features, hidden]``."""
        projected: Tensor = self.projector(self.vision(tiles))
        return projected

    def tile_features(
        self, pictures: Sequence[Pixels], of: Callable[[Tensor], Tensor] | None = None
    ) -> Sequence[Tensor]:
        """Features ``[tiles, features, hidden]`` of every picture, by ``of`` or by ``features``.

        The tiles of all pictures pass the tower as one batch, or as a few where one would take more
        than ``VISION_BYTES`` of memory.
        """
        if not pictures:
            return []
        weight, of = self.decoder.norm.weight, of or self.features
        tiles = torch.cat([picture.tiles for picture in pictures])
        most = self.config.vision.tiles_within(VISION_BYTES, weight.dtype.itemsize)
        found = []
        for number, batch in enumerate(tiles.split(most)):
            tell("tiles and frames encoded", number * most, len(tiles))
            found.append(of(batch.to(weight.device, weight.dtype)))
        tell("tiles and frames encoded", len(tiles), len(tiles))
        return torch.cat(found).split([len(picture.tiles) for picture in pictures])
