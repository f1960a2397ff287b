"""Where a picture's tokens lie on it: the grids a reader can look at."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ..models.llava import Llava
from ..models.llava_next import LlavaNext
from ..models.llava_onevision import LlavaOnevision
from ..models.llava_video import LongVa
from ..models.mllama import Mllama
from ..models.qwen_patches import QwenPatches
from ..models.vision_language import VisionLanguageModel
from ..pictures.patches import unpacked
from ..pictures.preprocess import ImageProcessor, Pixels

LIST_COLUMNS = 16


@dataclass(frozen=True)
class Panel:
    """A picture under a grid of image tokens.

    Attributes:
        title: what is shown.
        picture: the pixels that the vision tower saw.
        rows, columns: of the grid.
        tokens: ``rows * columns`` numbers of image tokens, counted within the picture.
        placed: whether a cell's token comes from what lies under it. Qwen-VL's 256 queries each
            read the whole picture: they are a list, not places.
        newlines: numbers of tokens that lie on no cell: ends of the grid's rows (LLaVA-1.6), or
            class tokens where a model keeps them.
        beside: what these are.
        row_seams, column_seams: rows and columns of the grid with which a further tile begins.
    """

    title: str
    picture: Image.Image
    rows: int
    columns: int
    tokens: list[int]
    placed: bool = True
    newlines: tuple[int, ...] = ()
    beside: str = "newline"
    row_seams: tuple[int, ...] = ()
    column_seams: tuple[int, ...] = ()


def panels_of(model: VisionLanguageModel, processor: ImageProcessor, pixels: Pixels) -> list[Panel]:
    """The grids of one picture; all of them together show each of its tokens once.

    LLaVA-1.5 has one of 24 x 24. LLaVA-1.6 has the whole picture and the tiles joined, the black
    border cut off: a 640 x 480 one has 24 x 24 and 36 x 48 patches with 36 newlines.
    """
    if isinstance(model, QwenPatches):
        return [_whole(model, processor, pixels)]
    seen = [to_picture(tile, processor) for tile in pixels.tiles]
    if isinstance(model, LlavaNext) and len(seen) > 1:
        return _tiled(model, pixels, seen)
    if isinstance(model, Mllama):
        return [_canvas(model, pixels, seen)]
    if isinstance(model, LongVa):
        return _tile_by_tile(model, pixels, seen)
    if isinstance(model, Llava):
        return [_one_tile(model, pixels, seen[0])]
    count = model.image_tokens(pixels)
    rows = -(-count // LIST_COLUMNS)
    title = f"{count} queries in order (each reads the whole picture)"
    return [Panel(title, seen[0], rows, LIST_COLUMNS, _range(count), placed=False)]


def to_picture(tile: Tensor, processor: ImageProcessor) -> Image.Image:
    """The RGB picture that ``tile [3, height, width]`` was normalised from."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (processor.mean, processor.std))
    values = (tile * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    height, width = values.shape[1:]
    return Image.frombytes("RGB", (width, height), bytes_of(values.permute(1, 2, 0)))


def _whole(model: QwenPatches, processor: ImageProcessor, pixels: Pixels) -> Panel:
    """A picture of any size, whose tokens lie on it row by row."""
    rows, columns = model.cells.grid(pixels.size)
    picture = to_picture(unpacked(pixels.tiles, (rows, columns), model.cells), processor)
    title = f"the picture as the model sees it, {picture.width} x {picture.height}"
    return Panel(title, picture, rows, columns, _range(rows * columns))


def _one_tile(model: Llava, pixels: Pixels, seen: Image.Image) -> Panel:
    """Patch after patch; features besides are a class token in front, or a newline behind."""
    vision = model.config.vision
    side, first = vision.grid, vision.features - vision.patches
    tokens = [max(0, first + patch) for patch in range(vision.patches)]
    others = sorted(set(range(model.image_tokens(pixels))) - set(tokens))
    title = "the picture as the model sees it"
    beside = "class token" if first else "newline"
    return Panel(title, seen, side, side, tokens, newlines=tuple(others), beside=beside)


def _tile_by_tile(model: LongVa, pixels: Pixels, seen: list[Image.Image]) -> list[Panel]:
    """Every tile's tokens, row by row within it."""
    of_tile = model.image_tokens(pixels) // len(seen)
    side = math.isqrt(of_tile)
    starts = range(0, of_tile * len(seen), of_tile)
    return [
        Panel(f"tile {number}", tile, side, side, [*range(start, start + of_tile)])
        for number, (start, tile) in enumerate(zip(starts, seen, strict=True), 1)
    ]


def _canvas(model: Mllama, pixels: Pixels, seen: list[Image.Image]) -> Panel:
    """The tiles of a canvas side by side; each has a class token that lies on no cell."""
    (rows, columns), vision = model.canvas(pixels.size), model.config.vision
    side, features = vision.image // vision.patch, vision.tile_features
    picture = Image.new("RGB", (columns * vision.image, rows * vision.image))
    for number, tile in enumerate(seen):
        picture.paste(tile, (number % columns * vision.image, number // columns * vision.image))
    starts = torch.arange(rows * columns).view(rows, 1, columns, 1) * features + 1
    places = torch.arange(side * side).view(1, side, 1, side)
    return Panel(
        f"the picture on its canvas of {rows} x {columns} tiles",
        picture,
        rows * side,
        columns * side,
        (starts + places).flatten().tolist(),
        newlines=tuple(range(0, rows * columns * features, features)),
        beside="class token",
        row_seams=tuple(range(side, rows * side, side)),
        column_seams=tuple(range(side, columns * side, side)),
    )


def _tiled(model: LlavaNext, pixels: Pixels, seen: list[Image.Image]) -> list[Panel]:
    """The whole picture, and its tiles side by side without the black border."""
    grid, vision = model.grid(pixels), model.config.vision
    size, patch = vision.image, vision.image // vision.grid
    rows, columns = grid.tiles
    canvas = Image.new("RGB", (columns * size, rows * size))
    for number, tile in enumerate(seen[1:]):
        canvas.paste(tile, (number % columns * size, number // columns * size))
    left, top = grid.left * patch, grid.top * patch
    box = (left, top, left + grid.width * patch, top + grid.height * patch)
    height, width = grid.height, grid.width
    if isinstance(model, LlavaOnevision):
        height, width = model.shrunk(grid)
    starts = [grid.base + row * (width + 1) for row in range(height)]
    seams = (grid.top, height), (grid.left, width)
    shrunk = (height, width) != (grid.height, grid.width)  # so that no cell is of one tile
    across, down = ((), ()) if shrunk else (_seams(*ends, vision.grid) for ends in seams)
    return [
        Panel("the whole picture", seen[0], vision.grid, vision.grid, _range(grid.base)),
        Panel(
            f"its {rows} x {columns} tiles",
            canvas.crop(box),
            height,
            width,
            [start + column for start in starts for column in range(width)],
            newlines=tuple(start + width for start in starts),
            row_seams=across,
            column_seams=down,
        ),
    ]


def _seams(cut: int, length: int, side: int) -> tuple[int, ...]:
    """Where tiles of ``side`` begin inside what is left when ``cut`` was cut off before it."""
    return tuple(at for at in range(1, length) if (at + cut) % side == 0)


def bytes_of(tensor: Tensor) -> bytes:
    """The values of a CPU tensor in order, without numpy."""
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def _range(count: int) -> list[int]:
    return list(range(count))
