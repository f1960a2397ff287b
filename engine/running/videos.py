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
# Around a place that is stamped: Qwen3-VL's.
START, END = "<|vision_start|>", "<|vision_end|>"
_START, _END = re.escape(START), re.escape(END)
# Frames and their seconds, to what stands in their place.
Prepare = Callable[[Iterable[Image.Image], Sequence[float]], list[Pixels]]


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

    A text's videos come behind its pictures, and it behind both. Messages have ``{type: "video"}``
    where one goes, a raw prompt ``<video>``.

    Raises OptionError unless there are as many videos as places, ImageError for a broken one.
    """
    pictures, given = [*listed(images)], listed_videos(videos)
    if isinstance(prompt, str) and not (raw and given):
        frames = [frame for video in given for frame in prepared(video, prepare)]
        if not any(frame.stamp for frame in frames):
            return prompt, [*pictures, *frames]
        places = [{"type": "image"}] * len(pictures) + [e for f in frames for e in entries_of(f)]
        content = [*places, {"type": "text", "text": prompt}]
        return [{"role": "user", "content": content}], [*pictures, *frames]
    filled = _Filled(pictures, given, prepare)
    if isinstance(prompt, str):
        parts = re.split(f"(<image>|(?:{_START})?<video>(?:{_END})?)", prompt)
        prompt = "".join(filled.written(part) for part in parts)
    elif is_iterable(prompt):
        prompt = [filled.message(message) for message in prompt]
    if filled.places != len(given):
        raise OptionError(
            f"the prompt has places for {filled.places} videos, but {len(given)} are given",
            hint='write one {"type": "video"} in a user message for each, or <video> if raw',
        )
    return prompt, [*filled.pictures, *filled.left]


def prepared(video: Video, prepare: Prepare) -> list[Pixels]:
    """What stands in a video's place."""
    seconds, images = video.shown()
    return prepare(images, seconds)


def entries_of(frame: Pixels) -> list[dict[str, str]]:
    """What a message has in a frame's place."""
    stamp = [{"type": "text", "text": frame.stamp}] if frame.stamp else []
    return [*stamp, {"type": "image"}]


class _Filled:
    """The places of a prompt as they are met, and what stands in them."""

    def __init__(self, images: list[Picture], videos: list[Video], prepare: Prepare) -> None:
        self.pictures: list[Picture] = []
        self.places = 0  # of videos
        self.left: Iterator[Picture] = iter(images)
        self._videos, self._prepare = iter(videos), prepare

    def picture(self) -> None:
        """Fill a picture's place; where none is left, the count is refused later."""
        self.pictures += [picture for picture in [next(self.left, None)] if picture is not None]

    def video(self) -> list[Pixels]:
        """Fill a video's place with what stands there."""
        self.places += 1
        video = next(self._videos, None)
        frames = [] if video is None else prepared(video, self._prepare)
        self.pictures += frames
        return frames

    def written(self, part: str) -> str:
        """A part of a raw prompt: a place, filled, or a text."""
        if part == "<image>":
            self.picture()
        if "<video>" not in part:
            return part
        frames = self.video()
        if any(frame.stamp for frame in frames):  # each has marks of its own
            return "".join(f"{frame.stamp}{START}<image>{END}" for frame in frames)
        return part.replace("<video>", "<image>" * len(frames))

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
            for frame in self.video():
                yield from entries_of(frame)
            return
        if kind == "image":
            self.picture()
        yield entry
