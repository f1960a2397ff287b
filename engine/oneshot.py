"""One question, one answer on stdout; or two of them, to compare."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from engine.errors import OptionError
from engine.inputs import check_targets, load_engine, open_pictures, read_options, read_prompt
from engine.messages import with_system
from engine.noise import Noise
from engine.terminal import INTERRUPTED, say

if TYPE_CHECKING:
    from engine.engine import Engine, Messages
    from engine.image import LoadedImage
    from engine.result import Result


def answer_once(flags: argparse.Namespace) -> int:
    """Answer --prompt about the pictures of --image; returns the exit code."""
    text, options = read_prompt(flags.prompt), read_options(flags)
    check_targets(flags)
    if flags.raw and flags.system is not None:
        raise OptionError("--raw takes no --system", hint="write the system text into the prompt")
    pictures = open_pictures(flags)
    noise = Noise(flags, pictures)
    prompt = with_system(text, len(pictures), flags.system)
    engine = load_engine(flags)
    noise.loaded(engine)
    pixels = [picture.pixels for picture in pictures]
    if flags.verbose and not flags.quiet:
        noise.prompt(engine.render(prompt, pixels, raw=flags.raw))
    if flags.compare:
        return _compare(engine, prompt, pictures, flags)
    stream = engine.stream
    if flags.attention:
        from engine.insight.page import stream_with_page

        stream = partial(stream_with_page, engine, flags.attention)
    return _answer(stream(prompt, pixels, raw=flags.raw, **options), flags, pictures, noise)


def _compare(
    engine: Engine, prompt: Messages, pictures: list[LoadedImage], flags: argparse.Namespace
) -> int:
    from engine.compare import compare

    pixels = [picture.pixels for picture in pictures]
    found = compare(engine, prompt, pixels, read_options(flags), raw=flags.raw)
    if flags.json:
        say(json.dumps(found.as_dict(), ensure_ascii=False) + "\n")
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
        say(json.dumps(result.as_dict(), ensure_ascii=False) + "\n")
    else:
        say("\n" if live else result.text + "\n")
    if flags.draw_boxes:
        _draw_boxes(flags.draw_boxes, pictures[-1], result, noise)
    noise.finished(result)
    return 0


def _draw_boxes(path: str, picture: LoadedImage, result: Result, noise: Noise) -> None:
    """Write the picture with the answer's regions, if there are any."""
    from engine.boxes import draw_boxes

    if result.boxes:
        draw_boxes(picture.pixels, result.boxes).save(path)
    else:
        noise.note(f"the answer names no regions; {path} is not written")
