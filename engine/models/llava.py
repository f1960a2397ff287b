"""LLaVA-1.5 (Liu et al. 2023): CLIP patch features, a two-layer projector, a language decoder.

Two published families of files: the hub layout (``llava-hf/*``, nested configs) and the original
layout (``liuhaotian/*``, a flat Llama config whose vision tower is a folder or model of its own).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.config import ConfigReader
from ..pictures.preprocess import Pixels
from .clip import ClipConfig, ClipVision
from .decoder import Decoder, DecoderConfig
from .matrix import Linear
from .siglip import SiglipVision, parse_siglip
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
    leaves them out (original layout); otherwise it is None. ``siglip`` is whether the tower is a
    SigLIP, else a CLIP.
    """

    decoder: DecoderConfig
    vision: ClipConfig
    image_token: int
    vision_tower: str | None
    end_tokens: tuple[int, ...]
    siglip: bool = False


def parse_hub(config: Mapping[str, Any]) -> LlavaConfig:
    """Read the nested config.json of ``llava-hf/*`` and of transformers' save_pretrained."""
    top = ConfigReader(config, "config.json")
    top.text("projector_hidden_act", "gelu", ("gelu",))
    siglip = top.section("vision_config").values.get("model_type") == "siglip_vision_model"
    # SigLIP has no class token that could be left out.
    strategy = "full" if siglip else "default"
    top.text("vision_feature_select_strategy", "default", (strategy,))
    parse = parse_siglip if siglip else ClipConfig.parse
    if isinstance(config.get("vision_feature_layer"), list):
        raise top.unsupported("vision_feature_layer", "names several layers; one is supported")
    feature_layer = top.integer("vision_feature_layer", -2, low=-1000, high=1000)
    decoder = DecoderConfig.parse(top.section("text_config"))
    image_key = "image_token_id" if "image_token_id" in config else "image_token_index"
    return LlavaConfig(
        decoder=decoder,
        vision=parse(top.section("vision_config"), feature_layer),
        siglip=siglip,
        image_token=top.integer(image_key, 32000, low=0, high=decoder.vocab - 1),
        vision_tower=None,
        end_tokens=top.section("text_config").tokens("eos_token_id", ()),
    )


def parse_original(config: Mapping[str, Any], vision_config: Mapping[str, Any]) -> LlavaConfig:
    """Read the flat config.json of ``liuhaotian/llava-v1.5-*`` and its tower's configuration.

    The image id is never looked up in a table of this layout (its vocabulary ends before it): it
    only marks places in a prompt, so that it is the first id beyond the vocabulary.
    """
    top = ConfigReader(config, "config.json")
    top.text("mm_projector_type", "mlp2x_gelu", ("mlp2x_gelu",))
    top.text("mm_vision_select_feature", "patch", ("patch",))
    feature_layer = top.integer("mm_vision_select_layer", -2, low=-1000, high=1000)
    kind = DECODERS[top.text("model_type", "llava", tuple(DECODERS))]
    decoder = DecoderConfig.parse(ConfigReader({**config, "model_type": kind}, "config.json"))
    return LlavaConfig(
        decoder=decoder,
        vision=ClipConfig.parse(ConfigReader(vision_config, "vision config"), feature_layer),
        image_token=decoder.vocab,
        vision_tower=top.text("mm_vision_tower"),
        end_tokens=top.tokens("eos_token_id", ()),
    )


class Projector(nn.Module):
    """Two linear layers with an exact GELU between: vision width to decoder width."""

    def __init__(self, vision: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = Linear(vision, hidden)
        self.linear_2 = Linear(hidden, hidden)

    def forward(self, features: Tensor) -> Tensor:
        """``[..., vision]`` to ``[..., hidden]``."""
        return self.linear_2(F.gelu(self.linear_1(features)))


class Llava(VisionLanguageModel):
    """The joined model; the engine embeds a prompt with it and then runs ``decoder``."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.image_token = config.image_token
        self.vision = (SiglipVision if config.siglip else ClipVision)(config.vision)
        self.projector = Projector(config.vision.hidden, config.decoder.hidden)
        self.decoder = Decoder(config.decoder)

    def image_tokens(self, pixels: Pixels) -> int:
        """Tokens that a picture takes in the sequence: 576 at 336 px and 14 px patches."""
        return self.config.vision.patches * len(pixels.tiles)

    def encode(self, pictures: Sequence[Pixels]) -> list[Tensor]:
        """Image tokens ``[image tokens, hidden]`` of every picture."""
        return [tiles.flatten(0, 1) for tiles in self.tile_features(pictures)]

    def tile_features(self, pictures: Sequence[Pixels]) -> Sequence[Tensor]:
        """Features ``[tiles, patches, hidden]`` of every picture.

        The tiles of all pictures pass the tower as one batch, or as a few where one would take more
        than ``VISION_BYTES`` of memory.
        """
        weight = self.projector.linear_1.weight
        tiles = torch.cat([picture.tiles for picture in pictures])
        most = self.config.vision.tiles_within(VISION_BYTES, weight.dtype.itemsize)
        batches = [batch.to(weight.device, weight.dtype) for batch in tiles.split(most)]
        features = torch.cat([self.projector(self.vision(batch)) for batch in batches])
        return features.split([len(picture.tiles) for picture in pictures])
