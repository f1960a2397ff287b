"""From an RGB picture to the float tensor a vision tower takes.

Pillow's own resize on 8-bit pixels is the definition here: the models were trained with it, and
other bicubic filters move the answer (torch without antialias is off by up to 159 grey levels).
Two published ways to make a picture square for LLaVA-1.5 give different pixels, hence answers:

    crop   transformers' CLIP processor: shortest edge to ``size``, then the centre square
    pad    the original repository: pad to a square with the mean colour, then the same
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from PIL import Image

from ..checkpoint.config import ConfigReader, shown
from ..errors import CheckpointError, ImageError
from .image import MAX_PIXELS

Mode = Literal["crop", "pad"]

# Mean and standard deviation of CLIP's training pictures; every supported tower uses them.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Pixels:
    """A picture as a vision tower takes it: ``tiles [tiles, 3, height, width]`` float32.

    ``size`` is the picture's own (width, height); a plain LLaVA-1.5 picture is one tile. ``video``:
    the tiles are frames of a video; ``times`` are theirs, for a model that counts them; ``stamp``
    is a text that stands in front of it.
    """

    tiles: torch.Tensor
    size: tuple[int, int]
    video: bool = False
    times: tuple[int, ...] = ()
    stamp: str = ""


@dataclass(frozen=True)
class ImageProcessor:
    """Turns an RGB picture into ``[3, height, width]`` float32, the way a checkpoint asks for.

    ``mode`` is "pad" to make the picture square with its mean colour first. ``shortest_edge``
    resizes keeping the ratio, ``exact_size`` (height, width) does not keep it; None skips that
    step, and ``crop_size`` None skips the centre crop. ``resample`` is Pillow's number (3 is
    bicubic).
    """

    mode: Mode = "crop"
    shortest_edge: int | None = 224
    exact_size: tuple[int, int] | None = None
    crop_size: tuple[int, int] | None = (224, 224)
    resample: Image.Resampling = Image.Resampling.BICUBIC
    rescale_factor: float = 1 / 255
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        mode: Mode | None = None,
        name: str = "preprocessor_config.json",
    ) -> "ImageProcessor":
        """Read a checkpoint's preprocessor_config.json; missing keys take CLIP's defaults.

        ``mode`` overrides ``do_pad`` of the file. Unknown keys are ignored; a wrong value raises
        ``CheckpointError`` that names the key (``name`` is the file in that message).
        """
        read = _Reader(config, name)
        if mode is None:
            mode = "pad" if read.flag("do_pad", False) else "crop"
        if mode not in get_args(Mode):
            raise CheckpointError(f"unknown picture mode {mode!r}", hint="use crop or pad")
        shortest, exact = read.size() if read.flag("do_resize", True) else (None, None)
        crop = read.pair("crop_size", 224) if read.flag("do_center_crop", True) else None
        if crop is None and exact is None:
            raise read.fail(
                "do_center_crop", "is false: pictures of one size need a crop or a fixed size"
            )
        normalize = read.flag("do_normalize", True)
        return cls(
            mode=mode,
            shortest_edge=shortest,
            exact_size=exact,
            crop_size=crop,
            resample=read.resample(),
            rescale_factor=read.factor() if read.flag("do_rescale", True) else 1.0,
            mean=read.channels("image_mean", CLIP_MEAN) if normalize else (0.0, 0.0, 0.0),
            std=read.channels("image_std", CLIP_STD) if normalize else (1.0, 1.0, 1.0),
        )

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of every picture that leaves this processor."""
        size = self.crop_size or self.exact_size
        assert size is not None  # from_config refuses the other combinations
        return size

    def prepare(self, image: Image.Image) -> Pixels:
        """Return the picture as one tile."""
        return Pixels(self(image)[None], image.size)

    def prepare_beside(self, image: Image.Image) -> Pixels:
        """The same of one of several pictures in a prompt."""
        return self.prepare(image)

    def prepare_frames(
        self, frames: Iterable[Image.Image], seconds: Sequence[float] = ()
    ) -> list[Pixels]:
        """A video's frames, one after the other, as what stands in its place of a prompt: so many
        pictures here, one for a model that has learned videos. ``seconds`` are their times.
        """
        return [self.prepare_beside(frame) for frame in frames]

    def prepare_all(self, images: Sequence[Image.Image]) -> list[Pixels]:
        """All pictures of a prompt."""
        prepare = self.prepare if len(images) == 1 else self.prepare_beside
        return [prepare(image) for image in images]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the pixels of an RGB picture as ``[3, height, width]`` float32."""
        if self.mode == "pad":
            image = pad_to_square(image, tuple(int(value * 255) for value in self.mean))
        if self.exact_size is not None:
            height, width = self.exact_size
            image = image.resize((width, height), self.resample)
        elif self.shortest_edge is not None:
            image = self._resize_shortest_edge(image)
        if self.crop_size is not None:
            image = centre_crop(image, self.crop_size)
        return to_tensor(image, self.rescale_factor, self.mean, self.std)

    def _resize_shortest_edge(self, image: Image.Image) -> Image.Image:
        assert self.shortest_edge is not None
        size = shortest_edge_size(image.size, self.shortest_edge)
        if size[0] * size[1] > MAX_PIXELS and self.crop_size is not None:
            image, size = _cut_long_side(image, size, self.crop_size)
        return image.resize(size, self.resample)


def as_video(processor: ImageProcessor, frames: Iterable[Image.Image]) -> list[Pixels]:
    """The frames of a video as the tiles of one ``Pixels``, each what ``processor`` makes of it."""
    sizes, tiles = list[tuple[int, int]](), list[torch.Tensor]()
    for frame in frames:
        sizes.append(frame.size)
        tiles.append(ImageProcessor.__call__(processor, frame))
    return [Pixels(torch.stack(tiles), sizes[0], video=True)]


def shortest_edge_size(size: tuple[int, int], shortest: int) -> tuple[int, int]:
    """Scale (width, height) so that the shorter side is ``shortest``; the longer is rounded down.

    >>> shortest_edge_size((640, 427), 336)
    (503, 336)
    """
    width, height = size
    if width <= height:
        return shortest, int(shortest * height / width)
    return int(shortest * width / height), shortest


def centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Cut (height, width) out of the middle; where the picture is smaller, black fills up."""
    height, width = size
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Put the picture in the middle of a square of its longer side, filled with ``colour``."""
    width, height = image.size
    side = max(width, height)
    if side * side > MAX_PIXELS:
        raise ImageError(
            f"a picture of {width} x {height} padded to a square has {side * side:,} pixels; "
            f"at most {MAX_PIXELS:,} are held",
            hint="cut or shrink its longer side first",
        )
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def to_tensor(
    image: Image.Image, factor: float, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Return ``(pixel * factor - mean) / std`` of an RGB picture as ``[3, height, width]`` float32.

    A pixel has only 256 values, so the arithmetic (the product in float64, the rest in float32, as
    the reference does) runs once per value and channel; the picture is looked up in that table.
    """
    levels = (torch.arange(256, dtype=torch.float64) * factor).to(torch.float32)
    table = (levels - torch.tensor(mean).unsqueeze(1)) / torch.tensor(std).unsqueeze(1)
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = flat.view(image.height, image.width, 3).permute(2, 0, 1).long()
    return torch.stack([table[channel][pixels[channel]] for channel in range(3)])


def _cut_long_side(
    image: Image.Image, size: tuple[int, int], crop: tuple[int, int]
) -> tuple[Image.Image, tuple[int, int]]:
    """Cut ends off a very long picture that the centre crop would throw away after resizing.

    A 20,000 x 1 picture becomes 6,720,000 x 336 otherwise: 9 GB. Equal amounts go at both ends and
    the rest stays far wider than crop and filter need; the grid of the filter can shift by less
    than a pixel of the resized picture.
    """
    long_side = max(image.size)
    scale = min(size) / min(image.size)
    needed = int(3 * max(crop) / scale) + 16
    needed += (long_side - needed) % 2  # cut the same at both ends
    if needed >= long_side:
        return image, size
    cut = (long_side - needed) // 2
    width, height = image.size
    box = (cut, 0, width - cut, height) if width > height else (0, cut, width, height - cut)
    cropped = image.crop(box)
    return cropped, shortest_edge_size(cropped.size, min(size))


class _Reader(ConfigReader):
    """The values that only a preprocessor configuration has."""

    def size(self) -> tuple[int | None, tuple[int, int] | None]:
        """Return (shortest edge, None), or (None, (height, width))."""
        value = self._get("size", 224)
        if isinstance(value, Mapping) and set(value) != {"shortest_edge"}:
            return None, self.pair("size", 224)
        shortest = value["shortest_edge"] if isinstance(value, Mapping) else value
        if not _is_length(shortest):
            raise self.fail("size", f"is {shown(value)}, not a length in pixels from 1 to 8192")
        return int(shortest), None

    def pair(self, key: str, default: int) -> tuple[int, int]:
        """Return (height, width) of a size given as {"height", "width"} or as one number."""
        value = self._get(key, default)
        sides = value if isinstance(value, Mapping) else {"height": value, "width": value}
        if set(sides) != {"height", "width"} or not all(map(_is_length, sides.values())):
            raise self.fail(
                key, f"is {shown(value)}, not height and width in pixels from 1 to 8192"
            )
        return sides["height"], sides["width"]

    def resample(self) -> Image.Resampling:
        return Image.Resampling(self.integer("resample", 3, 0, 5))

    def factor(self) -> float:
        factor = self.number("rescale_factor", 1 / 255)
        if factor > 1:
            raise self.fail("rescale_factor", f"is {factor}; it must be at most 1")
        return factor

    def channels(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """Return three numbers; those of ``image_std`` are above zero."""
        low = 0.0 if key == "image_mean" else 1e-6
        value = self._get(key, default)
        if not (
            isinstance(value, list | tuple)
            and len(value) == 3
            and all(_is_number(item) and low <= item <= 255 for item in value)
        ):
            raise self.fail(key, f"is {shown(value)}, not three numbers for red, green and blue")
        return tuple(map(float, value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_length(value: object) -> bool:
    return type(value) is int and 1 <= value <= 8192
