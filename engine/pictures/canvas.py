"""Llama-3.2-Vision's pictures: one to four tiles of a canvas that fits them.

A picture is scaled, with its ratio kept, into the corner of a canvas of whole tiles; the rest of
the canvas is black. Sizes are (width, height) for pictures; a canvas counts its tiles as (rows,
columns).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from PIL import Image

from .preprocess import ImageProcessor, Pixels, to_tensor

Canvas = tuple[int, int]


@cache
def canvases(most: int) -> tuple[Canvas, ...]:
    """All canvases of at most so many tiles, in the order that their embeddings have.

    >>> canvases(4)
    ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
    """
    sides = range(1, most + 1)
    return tuple((rows, columns) for rows in sides for columns in sides if rows * columns <= most)


def canvas_of(size: tuple[int, int], tile: int, most: int) -> Canvas:
    """The canvas of a picture: the least that holds it unshrunk, else where it shrinks least.

    Among equals the one of fewest tiles.

    >>> canvas_of((640, 480), tile=560, most=4), canvas_of((100, 900), tile=560, most=4)
    ((1, 2), (2, 1))
    """
    width, height = size

    def scale(canvas: Canvas) -> float:
        return min(canvas[0] * tile / height, canvas[1] * tile / width)

    scales = [scale(canvas) for canvas in canvases(most)]
    chosen = min([s for s in scales if s >= 1], default=max(scales))
    fitting = [canvas for canvas in canvases(most) if scale(canvas) == chosen]
    return min(fitting, key=lambda canvas: canvas[0] * canvas[1])


def fitted_size(size: tuple[int, int], canvas: Canvas, tile: int) -> tuple[int, int]:
    """(width, height) of a picture on its canvas: enlarged up to a tile at most, rounded down.

    >>> [fitted_size(size, (1, 2), tile=560) for size in ((640, 480), (100, 40), (2000, 10))]
    [(640, 480), (560, 224), (1120, 5)]
    """
    width, height = size
    wanted = max(tile, min(width, canvas[1] * tile)), max(tile, min(height, canvas[0] * tile))
    by_width, by_height = wanted[0] / width, wanted[1] / height
    if by_width < by_height:
        return wanted[0], min(max(1, int(height * by_width)), wanted[1])
    return min(max(1, int(width * by_height)), wanted[0]), wanted[1]


@dataclass(frozen=True)
class CanvasProcessor(ImageProcessor):
    """Turns a picture into the tiles of its canvas, row by row; ``exact_size`` is a tile's.

    ``most`` is how many tiles a picture may have.
    """

    most: int = 4

    def prepare(self, image: Image.Image) -> Pixels:
        """Return ``[tiles, 3, size, size]``."""
        tile, _ = self.output_size
        rows, columns = canvas_of(image.size, tile, self.most)
        fitted = image.resize(fitted_size(image.size, (rows, columns), tile), self.resample)
        canvas = Image.new("RGB", (columns * tile, rows * tile))
        canvas.paste(fitted)
        pixels = to_tensor(canvas, self.rescale_factor, self.mean, self.std)
        tiles = pixels.unflatten(2, (columns, tile)).unflatten(1, (rows, tile))
        return Pixels(tiles.permute(1, 3, 0, 2, 4).flatten(0, 1).contiguous(), image.size)
