"""LLaVAs that have learned videos: one stands in one place of a prompt, with few tokens a frame.

LLaVA-NeXT-Video (Zhang et al. 2024, ``llava-hf/LLaVA-NeXT-Video-*``) and LongVA (Zhang et al. 2024,
arXiv 2406.16852, ``lmms-lab/LongVA-*``) pool a frame's patches 2 x 2: 576 become 144. The first
pools before its projector, and pictures stay those of LLaVA-1.6. LongVA pools behind it, and has
pictures as it has videos ("UniRes"): the tiles one after the other, without the whole picture,
without newlines.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..checkpoint.config import ConfigReader
from ..pictures.anyres import Canvas, TileProcessor, read_pinpoints
from ..pictures.preprocess import Pixels, as_video
from .llava import Llava, LlavaConfig, parse_original
from .llava_next import LlavaNext, check_square, parse_next_hub


class Pooling(NamedTuple):
    """How ``stride x stride`` patches of a tile become one feature: their mean, or the largest."""

    stride: int = 2
    mode: str = "average"

    @classmethod
    def parse(cls, top: ConfigReader, prefix: str) -> Pooling:
        """Read ``spatial_pool_stride`` and ``spatial_pool_mode``; absent, 2 and "average"."""
        return cls(
            top.integer(f"{prefix}spatial_pool_stride", 2, low=1, high=64),
            top.text(f"{prefix}spatial_pool_mode", "average", ("average", "max")),
        )

    def __call__(self, features: Tensor, side: int) -> Tensor:
        """``[tiles, side * side, width]`` to ``[tiles, (side // stride) ** 2, width]``."""
        grid = features.transpose(1, 2).unflatten(2, (side, side))
        pool = F.avg_pool2d if self.mode == "average" else F.max_pool2d
        return pool(grid, self.stride).flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class FramesProcessor(TileProcessor):
    """Turns a picture into tiles, and a video into one ``Pixels`` whose tiles are its frames."""

    def prepare_frames(
        self, frames: Iterable[Image.Image], seconds: Sequence[float] = ()
    ) -> list[Pixels]:
        """One ``Pixels [frames, 3, size, size]``."""
        return as_video(self, frames)


@dataclass(frozen=True)
class UniresProcessor(FramesProcessor):
    """LongVA's, which leaves out the whole picture."""

    def prepare(self, image: Image.Image) -> Pixels:
        """Return ``[tiles, 3, size, size]``, row by row."""
        whole_first = super().prepare(image)
        return Pixels(whole_first.tiles[1:], image.size)


class VideoLlava(LlavaNext):
    """A LLaVA-1.6 that has videos beside its pictures."""

    @abstractmethod
    def video_tokens(self, frames: int) -> int:
        """Tokens that a video takes in the sequence."""

    @abstractmethod
    def encode_video(self, video: Pixels) -> Tensor:
        """Its tokens ``[video tokens, hidden]``."""

    def image_tokens(self, pixels: Pixels) -> int:
        """Tokens that a picture or a video takes in the sequence."""
        if pixels.video:
            return self.video_tokens(len(pixels.tiles))
        return super().image_tokens(pixels)

    def encode(self, pictures: Sequence[Pixels]) -> list[Tensor]:
        """Tokens ``[tokens, hidden]`` of every picture and video."""
        stills = iter(super().encode([picture for picture in pictures if not picture.video]))
        return [self.encode_video(p) if p.video else next(stills) for p in pictures]


class LlavaNextVideo(VideoLlava):
    """LLaVA-NeXT-Video."""

    processor = FramesProcessor

    def __init__(
        self, config: LlavaConfig, pinpoints: tuple[Canvas, ...], pooling: Pooling
    ) -> None:
        super().__init__(config, pinpoints)
        self.pooling = pooling

    def video_tokens(self, frames: int) -> int:
        """144 for each frame in the published models."""
        return frames * (self.config.vision.grid // self.pooling.stride) ** 2

    def encode_video(self, video: Pixels) -> Tensor:
        """Frame after frame, pooled before the projector."""
        return self.tile_features([video], self._frames)[0].flatten(0, 1)

    def _frames(self, tiles: Tensor) -> Tensor:
        pooled: Tensor = self.projector(self.pooling(self.vision(tiles), self.config.vision.grid))
        return pooled


class LongVa(Llava):
    """LongVA: a picture's tiles are to it what a video's frames are."""

    processor = UniresProcessor

    def __init__(
        self, config: LlavaConfig, pinpoints: tuple[Canvas, ...], pooling: Pooling
    ) -> None:
        super().__init__(config)
        self.pinpoints, self.pooling = pinpoints, pooling

    def image_tokens(self, pixels: Pixels) -> int:
        """144 for each tile or frame in the published models."""
        return len(pixels.tiles) * (self.config.vision.grid // self.pooling.stride) ** 2

    def features(self, tiles: Tensor) -> Tensor:
        """Pooled behind the projector."""
        return self.pooling(super().features(tiles), self.config.vision.grid)


def parse_next_video(
    config: Mapping[str, Any],
) -> tuple[LlavaConfig, tuple[Canvas, ...], Pooling]:
    """Read config.json of ``llava-hf/LLaVA-NeXT-Video-*``: shape, canvases, pooling."""
    top = ConfigReader(config, "config.json")
    return *parse_next_hub(config), Pooling.parse(top, "")


def parse_longva(
    config: Mapping[str, Any], vision_config: Mapping[str, Any]
) -> tuple[LlavaConfig, tuple[Canvas, ...], Pooling]:
    """Read config.json of ``lmms-lab/LongVA-*`` and its tower's configuration.

    The published code takes no notice of ``rope_scaling``.
    """
    parsed = parse_original({**config, "rope_scaling": None}, vision_config)
    check_square(parsed.vision, "mm_vision_select_feature")
    side = parsed.vision.image
    pinpoints = read_pinpoints(_spelled_out(config, side), "config.json", side, width_first=True)
    return parsed, pinpoints, Pooling.parse(ConfigReader(config, "config.json"), "mm_")


def _spelled_out(config: Mapping[str, Any], side: int) -> Mapping[str, Any]:
    """The config with canvases such as "(1x1),...,(6x6)" as a list of (width, height)."""
    given = config.get("image_grid_pinpoints")
    found = (
        re.fullmatch(r"\((\d)x(\d)\),\.\.\.,\((\d)x(\d)\)", given) if type(given) is str else None
    )
    if not found:
        return config
    left, top, right, bottom = map(int, found.groups())
    columns, rows = range(left, right + 1), range(top, bottom + 1)
    return {**config, "image_grid_pinpoints": [[side * c, side * r] for c in columns for r in rows]}
