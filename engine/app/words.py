"""Words without a flag: which of them are pictures or videos, and which one is the prompt."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence

from ..errors import OptionError
from ..pictures.remote import is_address
from .modes import MODES

COMMANDS = ("serve", "batch")
_PICTURE = re.compile(
    r".+\.(jpe?g|jfif|png|webp|bmp|gif|tiff?|hei[cf]|avif|jxl|svg|pdf|psd|ico|fits?)", re.I | re.S
)
_VIDEO = re.compile(r".+\.(mp4|m4v|mov|webm|mkv|avi|mpe?g|m?ts|ogv|flv)", re.I | re.S)
# One word that could only be a path: with a folder, or with an ending.
_PATH = re.compile(r"(?!@)(\S*/\S*|~\S*|[\w-]+\.[A-Za-z]\w{1,4})")


def sort_words(flags: argparse.Namespace, words: Sequence[str]) -> None:
    """Bring --image into one list, and share ``words`` out between --image, --video and --prompt.

    ``guessed`` are the pictures that nobody called one.

    Of several values of one --image those behind the first are such words as well:
    ``--image a.jpg b.jpg "Which one is larger?"``.

    Raises OptionError unless at most one word is left for the prompt.
    """
    if words and words[0] in COMMANDS:
        raise OptionError(f"{words[0]!r} comes before its flags", hint="write it first")
    if words and words[0] and words[0] in MODES:
        raise OptionError(
            f"{words[0]!r} is no picture, and alone no question",
            hint=f"did you mean --{words[0]}? -p {words[0]} asks it all the same",
        )
    if any(not group[0] for group in flags.image):
        raise OptionError("the name of --image is empty", hint="name a picture: --image car.jpg")
    pictures: list[str] = []
    prompts = [] if flags.prompt is None else [flags.prompt]
    for first, *others in [*flags.image, ["", *words]]:
        pictures += [first] if first else []
        for word in others:
            into = flags.video if ends_like_video(word) else pictures
            (into if is_picture(word) else prompts).append(word)
    if len(prompts) > 1:
        shown = " and ".join(f"{text[:40]!r}" for text in prompts[:2])
        raise OptionError(f"there is more than one prompt: {shown}", hint="quote it as one word")
    if [*pictures, *prompts].count("-") > 1:
        raise OptionError("stdin (-) can be read once only", hint="name files for the others")
    named = {group[0] for group in flags.image}
    flags.guessed = [word for word in pictures if word not in named]
    flags.image, flags.prompt = pictures, prompts[0] if prompts else None


def is_picture(word: str) -> bool:
    """Whether a word means a picture: it is a file, or could be nothing but a mistyped one.

    >>> is_picture("car.jpg"), is_picture("photos/car"), is_picture("What is it?")
    (True, True, False)
    """
    return (
        word == "-"
        or is_address(word)
        or os.path.exists(os.path.expanduser(word))
        or ends_like_picture(word)
        or bool(_PATH.fullmatch(word))
    )


def ends_like_video(word: str) -> bool:
    """Whether a word is one and ends as the names of videos do."""
    return bool(_VIDEO.fullmatch(word)) and (" " not in word or os.path.exists(word))


def ends_like_picture(word: str) -> bool:
    """Whether a word ends as the names of pictures do."""
    return bool(_PICTURE.fullmatch(word))
