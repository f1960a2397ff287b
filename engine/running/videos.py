"""Videos of a prompt, put in the places of pictures: below here there are only pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

from PIL import Image

from ..errors import OptionError
from ..naming import told
from ..options import is_iterable
from ..pictures.encoded import Picture, listed
from ..pictures.image import Source
from ..pictures.preprocess import Pixels
from ..pictures.video import Video
from ..prompts.messages import Messages

VideoSource = Video | str | PathLike[str] | bytes | Sequence[Source]
Prepare = Callable[[Iterable[Image.Image]], list[Pixels]]  # frames to what stands in their place


def listed_videos(videos: Sequence[VideoSource] | VideoSource | None) -> list[Video]:
    """Videos as a list: None is none, and a path, bytes or a ``Video`` need no list around it."""
    if videos is None:
        return []
    if isinstance(videos, Video | str | PathLike | bytes):
        videos = [videos]
    if not is_iterable(videos):
        raise OptionError(f"videos are {told(videos)}", hint='write videos=["clip.mp4"]')
    return [video if isinstance(video, Video) else Video(video) for video in videos]  # type: ignore[arg-type]


def with_videos(
    prompt: Messages,
    images: Sequence[Picture] | Picture | None,
    videos: Sequence[VideoSource] | VideoSource | None,
    prepare: Prepare,
    *,
    raw: bool = False,
) -> tuple[Messages, Sequence[Picture]]:
    """The prompt with pictures' places only, and what stands in them.

    A text's videos come behind its pictures. Messages have ``{type: "video"}`` where one goes, a
    raw prompt ``<video>``.

    Raises OptionError unless there are as many videos as places, ImageError for a broken one.
    """
    pictures, given = [*listed(images)], listed_videos(videos)
    if isinstance(prompt, str) and not (raw and given):
        return prompt, [*pictures, *(p for video in given for p in prepare(video.images()))]
    filled = _Filled(pictures, given, prepare)
    if isinstance(prompt, str):
        parts = re.split("(<image>|<video>)", prompt)
        kinds = {"<image>": filled.picture, "<video>": filled.video}
        prompt = "".join("<image>" * kinds[p]() if p in kinds else p for p in parts)
    elif is_iterable(prompt):
        prompt = [filled.message(message) for message in prompt]
    if filled.places != len(given):
        raise OptionError(
            f"the prompt has places for {filled.places} videos, but {len(given)} are given",
            hint='write one {"type": "video"} in a user message for each, or <video> if raw',
        )
    return prompt, [*filled.pictures, *filled.left]


class _Filled:
    """The places of a prompt as they are met, and what stands in them."""

    def __init__(self, images: list[Picture], videos: list[Video], prepare: Prepare) -> None:
        self.pictures: list[Picture] = []
        self.places = 0  # of videos
        self.left: Iterator[Picture] = iter(images)
        self._videos, self._prepare = iter(videos), prepare

    def picture(self) -> int:
        """Fill a picture's place; where none is left, the count is refused later."""
        self.pictures += [picture for picture in [next(self.left, None)] if picture is not None]
        return 1

    def video(self) -> int:
        """Fill a video's place; how many pictures it takes."""
        self.places += 1
        video = next(self._videos, None)
        frames = [] if video is None else self._prepare(video.images())
        self.pictures += frames
        return len(frames)

    def message(self, message: Any) -> Any:
        """A message, its videos' entries as those of pictures; what is wrong with it stays so."""
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list | tuple):
            return message
        entries = [new for entry in content for new in self._entries(entry)]
        return {**message, "content": entries}

    def _entries(self, entry: Any) -> Iterator[Any]:
        kind = entry.get("type") if isinstance(entry, Mapping) else None
        if kind == "video" and set(entry) == {"type"}:
            yield from [{"type": "image"}] * self.video()
            return
        if kind == "image":
            self.picture()
        yield entry
