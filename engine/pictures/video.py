"""A video as the frames that are shown of it: of a file, of a folder of pictures, or of a list.

Frames are taken evenly by their number, as the published video models do, or so many a second. They
are decoded one after the other as they are asked for; a long video is never in memory.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..errors import ImageError, OptionError
from ..naming import display_name, told
from ..options import as_number, is_iterable
from ..progress import tell
from ..refusals import hint_for
from .image import MAX_PIXELS, Source, open_image
from .video_file import frames_of

FRAMES = 32
MOST_FRAMES = 2048  # that are shown of a video
LISTED_RATE = 2.0  # pictures a second of a list or a folder, as published models see videos


class Shown(NamedTuple):
    """Frames one after the other, and the seconds of each since the beginning of its video."""

    seconds: list[float]
    images: Iterator[Image.Image]


@dataclass(frozen=True)
class Video:
    """A video, and which of its frames are shown.

    Attributes:
        source: a path of a video file or of a folder of pictures, the bytes of a file, or a
            sequence of pictures (see ``open_image``).
        frames: how many are shown at most, evenly over all of them.
        fps: how many of each second, no more than ``frames`` in all; None: ``frames`` decides.
        start, end: seconds between which they lie; ``end`` None is the end.
        max_pixels: of a frame; a larger one is refused.

    >>> [frame.size for frame in Video([Image.new("RGB", (4, 2))] * 9, frames=2).images()]
    [(4, 2), (4, 2)]
    """

    source: str | os.PathLike[str] | bytes | Sequence[Source]
    frames: int = FRAMES
    fps: float | None = None
    start: float = 0.0
    end: float | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if not 1 <= as_number("frames", self.frames, int) <= MOST_FRAMES:
            raise OptionError(f"frames is {self.frames}", hint=f"use 1 to {MOST_FRAMES}")
        if self.fps is not None and not 0 < as_number("fps", self.fps, float) <= 1000:
            raise OptionError(f"fps is {self.fps}", hint="use a number above 0, up to 1000")
        end = math.inf if self.end is None else as_number("end", self.end, float)
        if not 0 <= as_number("start", self.start, float) < end:
            raise OptionError(
                f"start is {self.start} and end {self.end}", hint="use seconds, start before end"
            )

    def images(self) -> Iterator[Image.Image]:
        """The frames that are shown, upright and RGB, one after the other; see ``shown``."""
        return self.shown().images

    def shown(self) -> Shown:
        """The frames that are shown, and their times.

        Raises ImageError for what is no video, OptionError for times of a source that has none.
        """
        if isinstance(self.source, bytes):
            return self._of_file(self.source, f"video of {len(self.source)} bytes")
        if isinstance(self.source, str | os.PathLike):
            path = os.fspath(self.source)
            name = display_name(path)
            if not os.path.isdir(path):
                return self._of_file(path, name)
            return self._of_pictures(_files_in(path, name), name)
        if not is_iterable(self.source):
            raise OptionError(
                f"a video is {told(self.source)}", hint='write videos=["clip.mp4"], or pictures'
            )
        return self._of_pictures([*self.source], "the list of pictures")

    def _of_file(self, source: str | bytes, name: str) -> Shown:
        return Shown(*frames_of(source, name, self.among, self.max_pixels))

    def _of_pictures(self, pictures: Sequence[Source], name: str) -> Shown:
        if self.fps is not None or self.start or self.end is not None:
            raise OptionError(
                f"{name} has no times", hint="leave out fps, start and end; frames chooses evenly"
            )
        if not pictures:
            raise ImageError(f"{name} holds no pictures", hint="give a video, or its frames")
        chosen = evenly(len(pictures), self.frames)
        seconds = [number / LISTED_RATE for number in chosen]
        return Shown(seconds, _opened([pictures[n] for n in chosen], self.max_pixels))

    def among(self, times: Sequence[float]) -> list[int]:
        """Which of the frames at ascending ``times`` (seconds) are shown.

        >>> Video("a.mp4", frames=3).among([0.0, 0.1, 0.2, 0.3, 0.4])
        [0, 2, 4]
        >>> Video("a.mp4", fps=5, start=0.1).among([0.0, 0.1, 0.2, 0.3, 0.4])
        [1, 3]
        """
        end = math.inf if self.end is None else self.end
        within = [n for n, time in enumerate(times) if self.start <= time <= end]
        if self.fps is not None and within:
            first, shown = times[within[0]], list[int]()
            for number in within:  # the first frame at or behind each tick
                if times[number] >= first + len(shown) / self.fps - 1e-6:
                    shown.append(number)
            within = shown
        return [within[place] for place in evenly(len(within), self.frames)]


def _opened(pictures: Sequence[Source], max_pixels: int) -> Iterator[Image.Image]:
    for number, picture in enumerate(pictures, 1):
        tell("frames decoded", number, len(pictures))
        yield open_image(picture, max_pixels).pixels


def evenly(total: int, count: int) -> list[int]:
    """``count`` places among ``total``, evenly from the first to the last, rounded down; all where
    there are no more.

    As LLaVA's video models have it, ``np.linspace(0, total - 1, count, dtype=int)``.

    >>> evenly(10, 4), evenly(3, 8), evenly(5, 1)
    ([0, 3, 6, 9], [0, 1, 2], [0])
    """
    if total <= count:
        return list(range(total))
    if count == 1:
        return [0]
    step = (total - 1) / (count - 1)
    return [*(int(place * step) for place in range(count - 1)), total - 1]


def _files_in(path: str, name: str) -> list[str]:
    """The files of a folder, numbers in their names by value: frame 10 comes behind frame 9."""
    try:
        files = [entry.path for entry in os.scandir(path) if entry.is_file()]
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror}", hint_for(error)) from None
    shown = [file for file in files if not Path(file).name.startswith(".")]
    return sorted(shown, key=_by_numbers)


def _by_numbers(path: str) -> list[tuple[int, str]]:
    parts = re.findall(r"(\d+)|(\D+)", Path(path).name)
    return [(int(digits), "") if digits else (-1, text) for digits, text in parts]
