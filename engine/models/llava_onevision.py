"""LLaVA-OneVision (Li et al. 2024): LLaVA-1.6 over SigLIP and Qwen2, with many more canvases.

A picture alone in its prompt is cut into tiles; where their patches would be more than those of
nine tiles, the joined grid is shrunk. Several pictures in one prompt are one padded square each,
and one newline token behind it. Published in the hub layout (``llava-hf/llava-onevision-*``) and in
the original one (``lmms-lab/llava-onevision-*``). Videos are not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.config import ConfigReader
from ..pictures.anyres import Canvas, Grid, grid_of, read_pinpoints
from ..pictures.preprocess import Pixels
from .llava import LlavaConfig, parse_hub
from .llava_next import LlavaNext, check_square


class LlavaOneVision(LlavaNext):
    """A LLaVA-1.6 whose tiles are joined to a grid of ``most`` tiles' patches or so."""

    def __init__(self, config: LlavaConfig, pinpoints: tuple[Canvas, ...], most: int) -> None:
        super().__init__(config, pinpoints)
        self.most = most

    def grid(self, pixels: Pixels) -> Grid:
        """How a picture that is tiled is laid out."""
        vision = self.config.vision
        return grid_of(pixels.size, self.pinpoints, vision.image, vision.grid, self.most)

    def image_tokens(self, pixels: Pixels) -> int:
        """Tokens that a picture takes: up to 8,765 alone, 730 beside others as published."""
        if len(pixels.tiles) == 1:
            return self.config.vision.patches + 1
        return self.grid(pixels).tokens

    def _join(self, features: Tensor, grid: Grid) -> Tensor:
        if len(features) == 1:
            return torch.cat([features[0], self.image_newline[None]])
        return super()._join(features, grid)

    def _inside(self, tiles: Tensor, grid: Grid) -> Tensor:
        inside = super()._inside(tiles, grid)
        if grid.shrunk is None:
            return inside
        image = inside.permute(2, 0, 1)[None]
        return F.interpolate(image, grid.shrunk, mode="bilinear")[0].permute(1, 2, 0)


def parse_onevision_hub(config: Mapping[str, Any]) -> tuple[LlavaConfig, tuple[Canvas, ...], int]:
    """Read config.json of ``llava-hf/llava-onevision-*``: shape, canvases, most tiles' patches."""
    text, usual = dict(config.get("text_config") or {}), {"vision_feature_select_strategy": "full"}
    text.setdefault("model_type", "qwen2")
    tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings") or False
    own = {"text_config": {**text, "tie_word_embeddings": tied}}
    vision = {"vision_config": _PUBLISHED | dict(config.get("vision_config") or {})}
    numbers = {"vision_feature_layer": -1, "image_token_index": 151646}
    given = {key: value for key, value in config.items() if value is not None}
    parsed = parse_hub({**usual, **numbers, **given, **own, **vision})
    check_square(parsed.vision, "vision_feature_select_strategy")
    top = ConfigReader(config, "config.json")
    tile = parsed.vision.image
    pinpoints = all_pinpoints(tile)
    if config.get("image_grid_pinpoints") is not None:
        pinpoints = read_pinpoints(config, "config.json", tile, width_first=False)
    return parsed, pinpoints, most_tiles(top, "vision_aspect_ratio", "anyres_max_9")


# What transformers' LlavaOnevisionConfig says of the tower where a file is silent.
_PUBLISHED = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "patch_size": 14,
    "image_size": 384,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
}


def all_pinpoints(tile: int) -> tuple[Canvas, ...]:
    """The published canvases: one to six tiles high and wide."""
    sides = range(tile, 7 * tile, tile)
    return tuple((height, width) for height in sides for width in sides)


def most_tiles(top: ConfigReader, key: str, default: str) -> int:
    """The number in "anyres_max_9"."""
    found = re.fullmatch(r"anyres_max_([1-9]\d?)", kind := top.text(key, default))
    if found is None:
        raise top.unsupported(key, f"is {kind!r:.40}; such as 'anyres_max_9' is supported")
    return int(found[1])
