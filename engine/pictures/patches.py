"""Qwen2-VL's pictures and its successors': any size, cut into patches without tiles or padding.

A picture is resized to whole cells of ``merge x merge`` patches, as near to its own size as limits
on its pixels allow; each cell becomes one image token. Patches of a cell lie one behind the other,
cells row by row. Sizes are (width, height).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from PIL import Image

from ..errors import ImageError
from .preprocess import ImageProcessor, Pixels, to_tensor

MOST_RATIO = 200  # of the longer side to the shorter: published, beyond it pictures are refused


@dataclass(frozen=True)
class Cells:
    """How pictures become cells.

    Attributes:
        patch: side of a patch in pixels.
        merge: patches along a cell's side.
        least, most: pixels of a resized picture.
    """

    patch: int = 14
    merge: int = 2
    least: int = 3136
    most: int = 12845056

    @property
    def side(self) -> int:
        """Of a cell, in pixels."""
        return self.patch * self.merge

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of whole cells for a picture; raises ImageError beyond a ratio of 200.

        Sides are rounded to the nearer number of cells, halves to the even one, unless the pixels
        would be too many (then down) or too few (then up).

        >>> Cells().resized((640, 480)), Cells(16, 2, 65536, 16777216).resized((100, 100))
        ((644, 476), (256, 256))
        """
        width, height = size
        if max(size) > MOST_RATIO * min(size):
            raise ImageError(
                f"the picture is {width} x {height}: one side is more than {MOST_RATIO} times the "
                "other",
                hint="cut it into pieces",
            )
        sides = [round(length / self.side) * self.side for length in size]
        if math.prod(sides) > self.most:
            ratio = math.sqrt(width * height / self.most)
            sides = [
                max(self.side, math.floor(length / ratio / self.side) * self.side)
                for length in size
            ]
        elif math.prod(sides) < self.least:
            ratio = math.sqrt(self.least / (width * height))
            sides = [math.ceil(length * ratio / self.side) * self.side for length in size]
        return sides[0], sides[1]

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Cells of a picture as (rows, columns): its image tokens, row by row.

        >>> Cells().grid((640, 480))
        (17, 23)
        """
        width, height = self.resized(size)
        return height // self.side, width // self.side


@dataclass(frozen=True)
class PatchProcessor(ImageProcessor):
    """Turns a picture into the patches of its cells."""

    cells: Cells = Cells()

    def limited(self, tokens: int | None) -> PatchProcessor:
        """The same with pictures of so many cells at most."""
        if tokens is None:
            return self
        most = min(self.cells.most, tokens * self.cells.side**2)
        return replace(
            self, cells=replace(self.cells, most=most, least=min(self.cells.least, most))
        )

    def prepare(self, image: Image.Image) -> Pixels:
        """Return ``[patches, 3, patch, patch]``."""
        fitted = image.resize(self.cells.resized(image.size), self.resample)
        pixels = to_tensor(fitted, self.rescale_factor, self.mean, self.std)
        return Pixels(packed(pixels, self.cells), image.size)


def packed(pixels: torch.Tensor, cells: Cells) -> torch.Tensor:
    """Patches ``[patches, 3, patch, patch]`` of ``pixels [3, height, width]``, cell by cell."""
    rows, columns = (length // cells.side for length in pixels.shape[1:])
    shape = (3, rows, cells.merge, cells.patch, columns, cells.merge, cells.patch)
    return pixels.reshape(shape).permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)


def unpacked(patches: torch.Tensor, grid: tuple[int, int], cells: Cells) -> torch.Tensor:
    """The pixels ``[3, height, width]`` that ``packed`` made these patches of."""
    shape = (*grid, cells.merge, cells.merge, 3, cells.patch, cells.patch)
    return patches.reshape(shape).permute(4, 0, 2, 5, 1, 3, 6).flatten(4, 6).flatten(1, 3)
