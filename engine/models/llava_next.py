"""LLaVA-1.6, also called LLaVA-NeXT (Liu et al. 2024): LLaVA with pictures of any resolution.

The same tower, projector and decoder; a picture is several tiles (``pictures.anyres``), and one
learned vector, ``image_newline``, ends every row of the joined patch grid. Published in the hub
layout (``llava-hf/llava-v1.6-*``) and in the original one (``liuhaotian/llava-v1.6-*``), whose
checkpoints hold a vision tower of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.config import ConfigReader
from ..pictures.anyres import Canvas, Grid, TileProcessor, grid_of, read_pinpoints
from ..pictures.preprocess import Pixels
from .clip import ClipConfig
from .llava import Llava, LlavaConfig, parse_hub, parse_original


class LlavaNext(Llava):
    """A LLaVA whose pictures are tiles; ``pinpoints`` are its canvases (height, width)."""

    processor = TileProcessor

    def __init__(self, config: LlavaConfig, pinpoints: tuple[Canvas, ...]) -> None:
        super().__init__(config)
        self.pinpoints = pinpoints
        self.image_newline = nn.Parameter(torch.empty(config.decoder.hidden))

    def grid(self, pixels: Pixels) -> Grid:
        """How a picture is laid out."""
        vision = self.config.vision
        return grid_of(pixels.size, self.pinpoints, vision.image, vision.grid)

    def image_tokens(self, pixels: Pixels) -> int:
        """Tokens that a picture takes in the sequence: 1,176 to 2,928 in the published models."""
        return self.grid(pixels).tokens

    def encode(self, pictures: Sequence[Pixels]) -> list[Tensor]:
        """Image tokens ``[image tokens, hidden]`` of every picture."""
        features = self.tile_features(pictures)
        return [
            self._join(tiles, self.grid(p)) for tiles, p in zip(features, pictures, strict=True)
        ]

    def _join(self, features: Tensor, grid: Grid) -> Tensor:
        """Lay ``features [1 + tiles, patches, hidden]`` out: the whole, then row after row."""
        inside = self._unpadded(features[1:], grid)
        newline = self.image_newline.expand(grid.height, 1, -1)
        return torch.cat([features[0], torch.cat([inside, newline], 1).flatten(0, 1)])

    def _unpadded(self, tiles: Tensor, grid: Grid) -> Tensor:
        """The patches of ``tiles [tiles, patches, hidden]`` as they lie beside each other, without
        the border: ``[height, width, hidden]``.
        """
        side, (rows, columns) = self.config.vision.grid, grid.tiles
        joined = tiles.view(rows, columns, side, side, -1).transpose(1, 2)
        joined = joined.reshape(rows * side, columns * side, -1)
        return joined[grid.top : grid.top + grid.height, grid.left : grid.left + grid.width]


def parse_next_hub(config: Mapping[str, Any]) -> tuple[LlavaConfig, tuple[Canvas, ...]]:
    """Read config.json of ``llava-hf/llava-v1.6-*``: shape and canvases."""
    parsed = parse_hub(config)
    check_square(parsed.vision, "vision_feature_select_strategy")
    return parsed, read_pinpoints(config, "config.json", parsed.vision.image, width_first=False)


def check_square(vision: ClipConfig, key: str) -> None:
    """Refuse a tower whose features are no grid: rows of tiles could not be joined."""
    if vision.features != vision.patches:
        raise ConfigReader({}, "config.json").unsupported(
            key, f"leaves {vision.features} features of {vision.patches} patches in a tile"
        )


def parse_next_original(
    config: Mapping[str, Any], vision_config: Mapping[str, Any]
) -> tuple[LlavaConfig, tuple[Canvas, ...]]:
    """Read config.json of ``liuhaotian/llava-v1.6-*`` and its tower's configuration."""
    top = ConfigReader(config, "config.json")
    top.text("mm_patch_merge_type", "flat", ("spatial_unpad",))
    parsed = parse_original(config, vision_config)
    check_square(parsed.vision, "mm_vision_select_feature")
    return parsed, read_pinpoints(config, "config.json", parsed.vision.image, width_first=True)
