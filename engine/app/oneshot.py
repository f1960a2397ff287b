"""One question, one answer on stdout; or two of them, to compare."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..errors import ContextError, EngineError, OptionError
from ..files import written_whole
from ..prompts.messages import with_system
from .capping import capped, shortened
from .inputs import (
    check_targets,
    load_engine,
    open_pictures,
    open_videos,
    read_options,
    read_prompt,
)
from .noise import Noise
from .terminal import INTERRUPTED, say, say_json

if TYPE_CHECKING:
    from ..engine import Engine
    from ..pictures.encoded import Picture
    from ..pictures.image import LoadedImage
    from ..prompts.messages import Messages
    from ..result import Result


def answer_once(flags: argparse.Namespace) -> int:
    """Answer --prompt about the pictures of --image and the videos of --video; returns the exit
    code.
    """
    text, options = read_prompt(flags.prompt, flags.guessed), read_options(flags)
    check_targets(flags)
    pictures, videos = open_pictures(flags), open_videos(flags)
    noise = Noise(flags, pictures)
    spoken = with_system(text, len(pictures), flags.system, len(videos))
    engine = load_engine(flags, noise)
    if flags.draw_boxes and not engine.names_regions:
        raise OptionError(
            f"--draw-boxes: {engine.name} names no regions", hint="use a Qwen-VL, or leave it out"
        )
    opened = [picture.pixels for picture in pictures]
    prompt, pixels = engine.with_videos(spoken, opened, videos, raw=flags.raw)
    if flags.verbose and not flags.quiet:
        noise.prompt(engine.render(prompt, pixels, raw=flags.raw))
    if flags.compare:
        return _compare(engine, prompt, pixels, flags, noise)
    stream = engine.stream
    if flags.attention:
        from ..insight.page import stream_with_page

        stream = partial(stream_with_page, engine, flags.attention)
    asked = partial(stream, prompt, pixels, raw=flags.raw)
    return _answer(capped(asked, options, noise.note), flags, pictures, noise)


def _compare(
    engine: Engine,
    prompt: Messages,
    pixels: Sequence[Picture],
    flags: argparse.Namespace,
    noise: Noise,
) -> int:
    from ..insight.compare import compare

    options = read_options(flags)
    try:
        found = compare(engine, prompt, pixels, options, raw=flags.raw)
    except ContextError as error:
        options = shortened(options, error, noise.note)
        found = compare(engine, prompt, pixels, options, raw=flags.raw)
    if flags.json:
        say_json(found.as_dict())
    else:
        say("\n".join(found.lines()) + "\n")
    return 0


def _answer(
    pieces: Iterable[str | Result],
    flags: argparse.Namespace,
    pictures: list[LoadedImage],
    noise: Noise,
) -> int:
    """Print an answer as it comes; an interrupt keeps what was said so far."""
    live = not (flags.json or flags.no_stream)
    text = ""
    try:
        for piece in pieces:
            if not isinstance(piece, str):
                result = piece
                continue
            text += piece
            if live:
                say(piece)
    except KeyboardInterrupt:
        if not flags.json:
            say("\n" if live else text + "\n")
        return INTERRUPTED
    if flags.json:
        say_json(result.as_dict())
    else:
        say("\n" if live else result.text + "\n")
    noise.finished(result)
    if flags.draw_boxes:
        _draw_boxes(flags.draw_boxes, pictures[-1], result)
    return 0


def _draw_boxes(path: str, picture: LoadedImage, result: Result) -> None:
    """Write the picture with the answer's regions; raises EngineError if it names none."""
    from PIL import Image

    from ..pictures.boxes import SIGNATURE, draw_boxes, signed

    if not result.boxes:
        raise EngineError(
            f"--draw-boxes: the answer names no regions, {path} is not written",
            hint="ask where something is",
        )
    kind = Image.registered_extensions()[os.path.splitext(path)[1].lower()]
    with written_whole(path, SIGNATURE) as file:
        draw_boxes(picture.pixels, result.boxes).save(file, format=kind, exif=signed())
