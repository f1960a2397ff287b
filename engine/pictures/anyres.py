"""Pictures of any resolution (LLaVA-1.6, Liu et al. 2024): tiles, and the tokens they become.

A picture is fitted into one of a few canvas sizes ("pinpoints"), centred on black, and cut into
tiles of the vision tower's size. The whole picture, stretched to one tile, goes first. Afterwards
the tiles' patch features are laid out as one grid, the rows or columns that show only the black
border are cut off ("unpadded"), and every row of the grid ends with a newline token.

All sizes are (width, height) for pictures and (height, width) for canvases, as published.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..checkpoint.config import ConfigReader
from ..errors import CheckpointError
from .preprocess import ImageProcessor, Pixels

# Canvases of the published LLaVA-1.6 models, (height, width).
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

Canvas = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """How one picture becomes tokens.

    Attributes:
        tiles: rows and columns of tiles, without the whole picture that goes first.
        top, left: patches cut off the tiles' patch grid at each end.
        height, width: patches that remain.
        base: tokens of the whole picture.
    """

    tiles: tuple[int, int]
    top: int
    left: int
    height: int
    width: int
    base: int

    @property
    def tokens(self) -> int:
        """Image tokens: the whole picture, the remaining patches, and a newline for each row."""
        return self.base + self.height * (self.width + 1)


def grid_of(size: tuple[int, int], pinpoints: Sequence[Canvas], tile: int, side: int) -> Grid:
    """Tell how a picture of ``size`` (width, height) is tiled; ``side`` patches along a tile.

    The only place where image tokens are counted: prompt and features both ask here. Rounding to
    seven digits follows transformers. The original code rounds down what floating point gives, so
    that a few in 100,000 sizes keep two rows or columns less there: 55 x 88, 220 x 1056, 861 x 328.

    >>> grid_of((640, 480), PINPOINTS, 336, 24).tokens   # 576 + 36 * (48 + 1)
    2340
    """
    width, height = size
    canvas = best_canvas(size, pinpoints)
    tiles = canvas[0] // tile, canvas[1] // tile
    rows, columns = tiles[0] * side, tiles[1] * side
    if width / height > columns / rows:
        filled = int(round(height * (columns / width), 7))
        top, left = (rows - filled) // 2, 0
    else:
        filled = int(round(width * (rows / height), 7))
        top, left = 0, (columns - filled) // 2
    return Grid(tiles, top, left, rows - 2 * top, columns - 2 * left, side * side)


def best_canvas(size: tuple[int, int], pinpoints: Sequence[Canvas]) -> Canvas:
    """The canvas that keeps most of the picture's pixels, then wastes least, then comes first.

    >>> best_canvas((100, 100), PINPOINTS)
    (336, 672)
    """
    width, height = size

    def worth(canvas: Canvas) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - canvas[0] * canvas[1]

    return max(pinpoints, key=worth)


def fitted_size(size: tuple[int, int], canvas: Canvas) -> tuple[int, int]:
    """(width, height) of a picture scaled into a canvas with its ratio kept, rounded up.

    >>> fitted_size((1000, 300), (336, 1008))
    (1008, 303)
    """
    width, height = size
    by_width, by_height = canvas[1] / width, canvas[0] / height
    if by_width < by_height:
        return canvas[1], min(math.ceil(height * by_width), canvas[0])
    return min(math.ceil(width * by_height), canvas[1]), canvas[0]


@dataclass(frozen=True)
class TileProcessor(ImageProcessor):
    """Turns a picture into tiles; each tile is then treated as a plain CLIP picture."""

    pinpoints: tuple[Canvas, ...] = PINPOINTS

    def prepare(self, image: Image.Image) -> Pixels:
        """Return ``[1 + tiles, 3, size, size]``: the stretched whole, then tiles row by row."""
        side = self.output_size[0]
        whole = image.resize((side, side), self.resample)
        canvas = self._on_canvas(image)
        tiles = [
            canvas.crop((left, top, left + side, top + side))
            for top in range(0, canvas.height, side)
            for left in range(0, canvas.width, side)
        ]
        return Pixels(torch.stack([self(tile) for tile in (whole, *tiles)]), image.size)

    def _on_canvas(self, image: Image.Image) -> Image.Image:
        """The picture, scaled, in the middle of a black canvas (black before normalisation)."""
        height, width = canvas = best_canvas(image.size, self.pinpoints)
        fitted = image.resize(fitted_size(image.size, canvas), self.resample)
        result = Image.new("RGB", (width, height))
        result.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
        return result


def read_pinpoints(
    config: Mapping[str, Any], where: str, tile: int, width_first: bool
) -> tuple[Canvas, ...]:
    """Read ``image_grid_pinpoints`` as (height, width) pairs; absent, the published five.

    The hub layout stores (height, width), the original layout (width, height): ``width_first``.
    Raises CheckpointError unless every canvas is whole tiles of ``tile`` pixels.
    """
    value = config.get("image_grid_pinpoints")
    if value is None:
        return PINPOINTS
    fail = ConfigReader(config, where).fail
    if not isinstance(value, list) or not value:
        raise fail("image_grid_pinpoints", "must be a list of sizes")
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise fail("image_grid_pinpoints", f"holds {pair!r:.40}, which is not two lengths")
        if not all(type(n) is int and 0 < n <= 8192 and n % tile == 0 for n in pair):
            raise fail(
                "image_grid_pinpoints", f"holds {pair!r:.40}; tiles have {tile} x {tile} pixels"
            )
    return tuple((b, a) if width_first else (a, b) for a, b in value)


def check_same(config: tuple[Canvas, ...], processor: tuple[Canvas, ...], path: str) -> None:
    """Raise CheckpointError where two files of a checkpoint name different canvases."""
    if config != processor:
        raise CheckpointError(
            f"{path}: image_grid_pinpoints differ from those of config.json",
            hint="the two files may be of different models",
        )
