"""LLaVA-OneVision (Li et al. 2024): LLaVA-1.6's tiles over SigLIP and Qwen2, fewer tokens of many.

A picture by itself is tiled as in LLaVA-1.6, on up to 36 canvases; where its tiles would have more
patches than nine whole ones, their grid is shrunk to as many. Of several pictures in one prompt
each is one tile, padded to a square, and one newline behind it. A video's frames are each one tile,
shrunk to half its sides, with one newline behind the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..checkpoint.config import ConfigReader
from ..pictures.anyres import Canvas, Grid, read_pinpoints
from ..pictures.preprocess import ImageProcessor, Pixels
from .llava import LlavaConfig, parse_hub
from .llava_next import check_square
from .llava_video import FramesProcessor, VideoLlava

_SLACK = 1.1  # how much longer a grid's sides may be before it is shrunk


@dataclass(frozen=True)
class OnevisionProcessor(FramesProcessor):
    """Turns a picture by itself into tiles, one of several into a single one."""

    def prepare_beside(self, image: Image.Image) -> Pixels:
        """Return ``[1, 3, size, size]``, padded to a square with the mean colour."""
        return Pixels(ImageProcessor.__call__(replace(self, mode="pad"), image)[None], image.size)


class LlavaOnevision(VideoLlava):
    """The joined model; ``tiles`` bounds the patches of a picture's grid, in whole tiles."""

    processor = OnevisionProcessor

    def __init__(self, config: LlavaConfig, pinpoints: tuple[Canvas, ...], tiles: int) -> None:
        super().__init__(config, pinpoints)
        self.tiles = tiles

    def shrunk(self, grid: Grid) -> tuple[int, int]:
        """Rows and columns of the patches that become tokens."""
        most = self.tiles * self.config.vision.patches
        ratio = math.sqrt(grid.height * grid.width / most)
        if ratio <= _SLACK:
            return grid.height, grid.width
        return int(grid.height // ratio), int(grid.width // ratio)

    def image_tokens(self, pixels: Pixels) -> int:
        """Tokens that a picture takes in the sequence: up to about 8,800 alone, 730 beside others
        in the published models.
        """
        if pixels.video:
            return self.video_tokens(len(pixels.tiles))
        if len(pixels.tiles) == 1:
            return self.config.vision.patches + 1
        rows, columns = self.shrunk(self.grid(pixels))
        return self.config.vision.patches + rows * (columns + 1)

    def video_tokens(self, frames: int) -> int:
        """196 for each frame in the published models, and a newline."""
        return frames * self._half**2 + 1

    @property
    def _half(self) -> int:
        """Half of a tile's side in patches, rounded up."""
        return (self.config.vision.grid + 1) // 2

    def encode_video(self, video: Pixels) -> Tensor:
        """Frame after frame, shrunk behind the projector, and the newline."""
        frames = self.tile_features([video], self._frames)[0].flatten(0, 1)
        return torch.cat([frames, self.image_newline[None]])

    def _frames(self, tiles: Tensor) -> Tensor:
        side, half = self.config.vision.grid, (self._half, self._half)
        grid = self.features(tiles).transpose(1, 2).unflatten(2, (side, side))
        return F.interpolate(grid, size=half, mode="bilinear").flatten(2).transpose(1, 2)

    def _join(self, features: Tensor, grid: Grid) -> Tensor:
        """Lay ``features [1 + tiles, patches, hidden]`` out: the whole, then row after row."""
        newline: Tensor = self.image_newline
        if len(features) == 1:
            return torch.cat([features[0], newline[None]])
        inside, size = self._unpadded(features[1:], grid), self.shrunk(grid)
        if size != tuple(inside.shape[:2]):
            channels = inside.permute(2, 0, 1)[None]
            inside = F.interpolate(channels, size=size, mode="bilinear")[0].permute(1, 2, 0)
        rows = torch.cat([inside, newline.expand(size[0], 1, -1)], 1)
        return torch.cat([features[0], rows.flatten(0, 1)])


def parse_onevision(config: Mapping[str, Any]) -> tuple[LlavaConfig, tuple[Canvas, ...], int]:
    """Read config.json of ``llava-hf/llava-onevision-*``: shape, canvases, tiles at most."""
    given = {key: value for key, value in config.items() if value is not None}
    nested = {key: dict(given.get(key) or {}) for key in ("text_config", "vision_config")}
    text = {"model_type": "qwen2", **nested["text_config"]}
    # As transformers has it: either place may say so.
    tied = given.get("tie_word_embeddings") or text.get("tie_word_embeddings") or False
    own = {
        "text_config": {**text, "tie_word_embeddings": tied},
        "vision_config": _TOWER | nested["vision_config"],
    }
    parsed = parse_hub({**_USUAL, **given, **own})
    check_square(parsed.vision, "vision_feature_select_strategy")
    side = parsed.vision.image
    canvases = [[side * rows, side * columns] for rows in _SIDES for columns in _SIDES]
    pinpoints = {"image_grid_pinpoints": canvases} | given
    top = ConfigReader(config, "config.json")
    return (
        parsed,
        read_pinpoints(pinpoints, "config.json", side, width_first=False),
        most_tiles(top, "vision_aspect_ratio", "anyres_max_9"),
    )


# What transformers' LlavaOnevisionConfig says where a file is silent.
_USUAL = {
    "image_token_index": 151646,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
_TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "patch_size": 14,
    "image_size": 384,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
}
_SIDES = range(1, 7)  # of a canvas, in tiles


def most_tiles(top: ConfigReader, key: str, default: str) -> int:
    """The number in "anyres_max_9"."""
    aspect = top.text(key, default)
    most = aspect.removeprefix("anyres_max_")
    if not most.isdecimal() or not 0 < int(most) < 1000:
        raise top.unsupported(key, f"is {aspect!r:.40}; anyres_max_9 is known")
    return int(most)
