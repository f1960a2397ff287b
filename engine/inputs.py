"""What the flags of a question name: its prompt, its pictures, its options, its files to
write, its engine.

All but the engine is checked before torch is imported: a typo fails in a fraction of a second.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.errors import OptionError
from engine.image import MAX_PIXELS, LoadedImage
from engine.messages import EXAMPLE
from engine.options import OptionValues, make_options
from engine.remote import open_picture

if TYPE_CHECKING:
    from engine.engine import Engine


def read_prompt(prompt: str | None) -> str:
    """The text of --prompt, from a file (@) or stdin (-) where it says so; never empty."""
    if prompt is None:
        raise OptionError("no --prompt is given", hint='add --prompt "What is in the picture?"')
    try:
        text = _prompt_text(prompt)
    except (OSError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"--prompt {prompt}: cannot be read as text ({reason})") from error
    if not text.strip():
        raise OptionError("the prompt is empty", hint=EXAMPLE)
    return text


def _prompt_text(prompt: str) -> str:
    if prompt == "-":
        return sys.stdin.read()
    if prompt.startswith("@"):
        with open(prompt[1:], encoding="utf-8") as file:
            return file.read()
    return prompt


def read_options(flags: argparse.Namespace) -> OptionValues:
    """The flags of an answer, their ranges checked."""
    values = OptionValues(
        max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        seed=flags.seed,
        stop=flags.stop,
        repetition_penalty=flags.repetition_penalty,
        logprobs=flags.logprobs,
    )
    make_options(**values)
    return values


def opener(flags: argparse.Namespace) -> Callable[[str], LoadedImage]:
    """How the flags say that a picture is opened; "-" is stdin."""
    if not 1 <= flags.max_pixels <= MAX_PIXELS:
        raise OptionError(
            f"--max-pixels is {flags.max_pixels}", hint=f"use 1 to {MAX_PIXELS} pixels"
        )

    def open_named(name: str) -> LoadedImage:
        source = sys.stdin.buffer.read() if name == "-" else name
        return open_picture(source, flags.max_pixels, flags.allow_url)

    return open_named


def open_pictures(flags: argparse.Namespace) -> list[LoadedImage]:
    """The pictures of --image, in order."""
    return list(map(opener(flags), flags.image))


def check_targets(flags: argparse.Namespace) -> None:
    """Refuse at once what could only fail after the answer: files that cannot be written."""
    if flags.draw_boxes:
        _check_target("--draw-boxes", flags.draw_boxes, flags.image, "no picture to draw on")
        if not flags.draw_boxes.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
            raise OptionError(
                f"--draw-boxes {flags.draw_boxes}: not a picture's name",
                hint="end it in .png, .jpg or .webp",
            )
    if flags.attention:
        _check_target("--attention", flags.attention, flags.image, "no picture to show")
        if flags.compare:
            raise OptionError(
                "--attention takes no --compare",
                hint="its page compares with the full cache already",
            )


def _check_target(flag: str, path: str, pictures: list[str], lack: str) -> None:
    if not pictures:
        raise OptionError(f"{flag} has {lack}", hint="add --image FILE")
    folder = os.path.dirname(path)
    if folder and not os.path.isdir(folder):
        raise OptionError(f"{flag} {path}: no folder {folder}", hint="name a folder that exists")


def load_engine(flags: argparse.Namespace) -> Engine:
    """The engine that the flags ask for; torch is imported here."""
    from engine.engine import DEFAULT_CACHE, Engine

    return Engine.load(
        flags.model,
        device=flags.device,
        dtype=flags.dtype,
        cache=flags.cache or DEFAULT_CACHE,
        style=flags.style,
        revision=flags.revision,
        offline=flags.offline,
        vision_tower=flags.vision_tower,
        selection="sync" if flags.sync_selection else "branch",
        graphs=flags.graphs,
    )
