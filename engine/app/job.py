"""The requests of a batch job: one JSON object a line, over the defaults of the command line.

A line holds the arguments of ``Engine.generate``, and may hold a ``system`` text:
``{"prompt": "What is it?", "images": ["a.jpg"], "max_new_tokens": 64}``. Pictures and ``videos``
are found beside the job file, wherever the command is started.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..naming import display_name, told
from ..options import OptionValues, make_options
from ..pictures.image import MAX_PIXELS, LoadedImage
from ..pictures.remote import is_address, open_picture
from ..pictures.video import Video
from ..prompts.messages import with_system
from .modes import SHOWN
from .reading import MOST_REQUESTS, STDIN, check_text, read_whole

# What a request is without a word about it; all but the event that only a program can set.
DEFAULTS: dict[str, Any] = {
    name: option.default
    for name, option in inspect.signature(make_options).parameters.items()
    if name in OptionValues.__annotations__ and name != "cancel"
} | {"raw": False}
KEYS = ("prompt", "images", "videos", "system", *SHOWN, *DEFAULTS)


def is_cloud(name: str) -> bool:
    """Whether a name is a place in a cloud, such as ``s3://bucket/a.jpg``."""
    return bool(re.match(r"(?!https?:)[a-z][a-z0-9+]*://", name))


def open_beside(source: str) -> LoadedImage:
    """A picture of a job without limits of its own: a file or a ``data:`` URL."""
    return open_picture(source, MAX_PIXELS, allow_url=False)


class Job:
    """Numbered requests, from 0. A line that is no request is one that fails.

    Attributes:
        folder: where the pictures and videos of the lines are.
    """

    def __init__(
        self,
        text: str,
        folder: Path,
        defaults: Mapping[str, Any] | None = None,
        open_picture: Callable[[str], LoadedImage] = open_beside,
        show_video: Callable[..., Video] = Video,
    ) -> None:
        """``defaults`` stand for keys that a line lacks; names of pictures and videos there are
        complete as they are.
        """
        self.folder, self._open, self._video = folder, open_picture, show_video
        self._defaults = {**DEFAULTS, **(defaults or {})}
        # Not splitlines(): a JSON text may hold other line ends.
        lines = io.StringIO(text, newline=None)
        self._lines = [_parse(line) for line in lines if line.strip()]

    @classmethod
    def read(
        cls,
        source: str | Path,
        defaults: Mapping[str, Any] | None = None,
        open_picture: Callable[[str], LoadedImage] = open_beside,
        show_video: Callable[..., Video] = Video,
    ) -> Job:
        """The job of a file, "-" is stdin; raises OptionError if there is none in it."""
        folder = Path() if source == STDIN else Path(source).parent
        data = read_whole(_called(source), str(source), MOST_REQUESTS)
        # A byte that is no UTF-8 is the fault of its line alone.
        text = data.decode("utf-8-sig", "surrogateescape")
        job = cls(text, folder, defaults, open_picture, show_video)
        if not len(job):
            raise OptionError(
                f"{_called(source)} holds no requests", hint='write {"prompt": "..."} lines'
            )
        return job

    def __len__(self) -> int:
        return len(self._lines)

    def request(self, number: int) -> dict[str, Any]:
        """The arguments of ``Engine.generate``, pictures opened; raises what is wrong with them."""
        values = self._merged(number)
        unknown = sorted(values.keys() - set(KEYS))
        if unknown:
            raise OptionError(
                f"a request has unknown keys: {', '.join(unknown)}",
                hint=f"known: {', '.join(KEYS)}",
            )
        place = self._place if "images" in self._value(number) else str
        names = map(place, _names(values.get("images")))
        values["images"] = [self._open(name).pixels for name in names]
        place = self._place if "videos" in self._value(number) else str
        names = map(place, _names(values.get("videos"), "videos"))
        shown = {key: values.pop(key) for key in SHOWN if key in values}
        values["videos"] = [self._video(name, **shown) for name in names]
        system = values.pop("system", None)
        if system is not None:
            values["prompt"] = _spoken_to(values, system)
        return values

    def digest(self, number: int) -> str:
        """Tells apart requests that may be answered differently."""
        line = self._lines[number]
        try:
            content = line.text if isinstance(line, _Refused) else self._merged(number)
            text = json.dumps(content, sort_keys=True)
        except RecursionError:
            text = "nested too deeply"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _merged(self, number: int) -> dict[str, Any]:
        return {**self._defaults, **self._value(number)}

    def _value(self, number: int) -> Mapping[str, Any]:
        line = self._lines[number]
        if isinstance(line, _Refused):
            raise line.error
        return line

    def _place(self, name: str) -> str:
        return name if is_address(name) else str(self.folder / os.path.expanduser(name))


@dataclass(frozen=True)
class _Refused:
    """A line that is no request, and why."""

    text: str
    error: OptionError


def _parse(line: str) -> Mapping[str, Any] | _Refused:
    """What a line holds."""
    try:
        check_text("a request", line)
        value = json.loads(line, object_pairs_hook=_without_duplicates, parse_int=_whole)
    except OptionError as error:
        return _Refused(line, error)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    hint = 'write {"prompt": "...", "images": []}'
    return _Refused(line, OptionError("a request is no JSON object", hint=hint))


def _whole(digits: str) -> int:
    """A whole number of a request; Python itself refuses those of thousands of digits."""
    if len(digits) > 400:
        raise OptionError(
            f"a request has a number of {len(digits):,} digits", hint="use a smaller number"
        )
    return int(digits)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are given once: of two values nobody knows which one is meant."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise OptionError(f"a request gives {display_name(twice)} twice", hint="leave one out")
    return values


def _called(source: str | Path) -> str:
    return "stdin (--batch -)" if source == STDIN else f"--batch {display_name(str(source))}"


def _names(given: object, key: str = "images") -> list[str]:
    names = [given] if isinstance(given, str) else given
    if names is None:
        return []
    what, example = {"images": ("picture", "a.jpg"), "videos": ("video", "a.mp4")}[key]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise OptionError(
            f"a request's {key} are {told(given)}", hint=f'write "{key}": ["{example}"]'
        )
    if "" in names:
        raise OptionError(f"the name of a request's {what} is empty", hint="name a file")
    if STDIN in names:
        raise OptionError(f"a request names stdin as its {what}", hint="name a file")
    return names


def _spoken_to(values: Mapping[str, Any], system: object) -> Any:
    """The prompt behind a system text; messages that begin with one of their own keep it."""
    prompt = values.get("prompt")
    if not isinstance(system, str):
        raise OptionError(f"a request's system is {told(system)}", hint="write a text")
    if values.get("raw"):
        raise OptionError(
            "a raw request takes no system text", hint="write it into the prompt, or leave out raw"
        )
    if isinstance(prompt, str) and prompt.strip():
        return with_system(prompt, len(values["images"]), system, len(values["videos"]))
    if not isinstance(prompt, list) or not prompt:
        return prompt  # refused where prompts are read
    first = prompt[0]
    own = isinstance(first, dict) and first.get("role") == "system"
    return prompt if own else [{"role": "system", "content": system}, *prompt]
