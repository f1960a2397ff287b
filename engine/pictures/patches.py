"""Qwen2-VL's pictures and its successors': any size, cut into patches without tiles or padding.

Of a video two frames, one behind the other, make the patches of one *slice*, which is otherwise
like a picture.

A picture is resized to whole cells of ``merge x merge`` patches, as near to its own size as limits
on its pixels allow; each cell becomes one image token. Patches of a cell lie one behind the other,
cells row by row. Sizes are (width, height).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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

    def resized(self, size: tuple[int, int], frames: int = 1) -> tuple[int, int]:
        """(width, height) of whole cells for a picture; raises ImageError beyond a ratio of 200.
        Limits are those of so many ``frames`` together.

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
        even = 1 if frames == 1 else round(frames / 2) * 2  # as published
        if even * math.prod(sides) > self.most:
            ratio = math.sqrt(frames * width * height / self.most)
            sides = [
                max(self.side, math.floor(length / ratio / self.side) * self.side)
                for length in size
            ]
        elif even * math.prod(sides) < self.least:
            ratio = math.sqrt(self.least / (frames * width * height))
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
class VideoRules:
    """How a generation's videos are shown.

    Attributes:
        least, most: pixels, of a frame or, if ``together``, of all frames.
        rate: units of time in a second (Qwen2.5-VL); 0: one for each slice (Qwen2-VL).
        stamped: each slice stands by itself behind a text that says its seconds (Qwen3-VL).
    """

    least: int = 100352
    most: int = 602112
    together: bool = False
    rate: float = 0.0
    stamped: bool = False

    def cells(self, cells: Cells, frames: int) -> Cells:
        """Limits for a video of so many frames: no frame has more than 768 cells."""
        if not self.together:
            return replace(cells, least=self.least, most=self.most)
        each = max(min(768 * cells.side**2, self.most // frames), int(1.05 * self.least))
        return replace(cells, least=self.least, most=each * frames)


@dataclass(frozen=True)
class PatchProcessor(ImageProcessor):
    """Turns a picture, or a video, into the patches of its cells."""

    cells: Cells = Cells()
    video: VideoRules = VideoRules()
    cells_of_frame: int | None = None  # at most, if somebody limits them

    def limited(self, tokens: int | None) -> PatchProcessor:
        """The same with pictures of so many cells at most."""
        if tokens is None:
            return self
        most = min(self.cells.most, tokens * self.cells.side**2)
        cells = replace(self.cells, most=most, least=min(self.cells.least, most))
        return replace(self, cells=cells, cells_of_frame=tokens)

    def prepare(self, image: Image.Image) -> Pixels:
        """Return ``[patches, 3, patch, patch]``."""
        return Pixels(self._patches(image, self.cells.resized(image.size)), image.size)

    def _patches(self, image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
        fitted = image.resize(size, self.resample)
        pixels = to_tensor(fitted, self.rescale_factor, self.mean, self.std)
        return packed(pixels, self.cells)

    def prepare_frames(
        self, frames: Iterable[Image.Image], seconds: Sequence[float] = ()
    ) -> list[Pixels]:
        """Slices ``[patches, 3, 2, patch, patch]``, one ``Pixels`` of all, or each its own where
        they are stamped; ``size`` is that of resized frames.
        """
        shown = iter(frames)
        if not seconds:
            held = list(shown)
            shown, seconds = iter(held), [number / 2 for number in range(len(held))]
        size, slices = (0, 0), list[torch.Tensor]()
        for first in shown:
            size = size if slices else self.frame_size(first.size, len(seconds))
            both = [self._patches(frame, size) for frame in (first, next(shown, first))]
            slices.append(torch.stack(both, 2))
        return self._standing(slices, size, seconds)

    def _standing(
        self, slices: Sequence[torch.Tensor], size: tuple[int, int], seconds: Sequence[float]
    ) -> list[Pixels]:
        """Slices in their places, with times or stamps."""
        pairs = [(start, min(start + 1, len(seconds) - 1)) for start in range(0, len(seconds), 2)]
        if self.video.stamped:
            means = [(seconds[first] + seconds[second]) / 2 for first, second in pairs]
            stamps = [f"<{mean:.1f} seconds>" for mean in means]
            both = zip(slices, stamps, strict=True)
            return [Pixels(each, size, True, (0,), stamp) for each, stamp in both]
        since = [seconds[first] - seconds[0] for first, _ in pairs]
        rate = self.video.rate
        times = [int(rate * time + 1e-6) if rate else n for n, time in enumerate(since)]
        return [Pixels(torch.cat([*slices]), size, True, tuple(times))]

    def frame_size(self, size: tuple[int, int], frames: int) -> tuple[int, int]:
        """(width, height) that the frames of a video of ``size`` are resized to."""
        together = self.video.together
        width, height = size
        if together and min(size) < self.cells.side:  # as published
            scale = max(self.cells.side / width, self.cells.side / height)
            size = int(width * scale), int(height * scale)
        limits = self.video.cells(self.cells, frames)
        if self.cells_of_frame is not None:
            most = self.cells_of_frame * self.cells.side**2 * (frames if together else 1)
            limits = replace(limits, most=min(limits.most, most), least=min(limits.least, most))
        return limits.resized(size, frames if together else 1)


def packed(pixels: torch.Tensor, cells: Cells) -> torch.Tensor:
    """Patches ``[patches, 3, patch, patch]`` of ``pixels [3, height, width]``, cell by cell."""
    rows, columns = (length // cells.side for length in pixels.shape[1:])
    shape = (3, rows, cells.merge, cells.patch, columns, cells.merge, cells.patch)
    return pixels.reshape(shape).permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)


def unpacked(patches: torch.Tensor, grid: tuple[int, int], cells: Cells) -> torch.Tensor:
    """The pixels ``[3, height, width]`` that ``packed`` made these patches of."""
    shape = (*grid, cells.merge, cells.merge, 3, cells.patch, cells.patch)
    return patches.reshape(shape).permute(4, 0, 2, 5, 1, 3, 6).flatten(4, 6).flatten(1, 3)
