"""What the flags of a question name: its prompt, its pictures, its options, its files to
write, its engine.

All but the engine is checked before torch is imported: a typo fails in a fraction of a second.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..checkpoint.hub import resolve
from ..errors import ImageError, OptionError
from ..files import PAGE_SIGNATURE, check_target
from ..naming import display_name
from ..options import OptionValues, check_threads, make_options
from ..pictures.boxes import PICTURE_KINDS, SIGNATURE
from ..pictures.image import MAX_PIXELS, LoadedImage, open_image
from ..pictures.remote import is_address, open_picture
from ..pictures.video import Video
from ..policies.specs import DEFAULT_CACHE
from ..prompts.messages import EXAMPLE
from .noise import Noise
from .reading import STDIN, read_text, word_of
from .starting import import_engine

if TYPE_CHECKING:
    from ..engine import Engine


def read_prompt(prompt: str | None, guessed: Sequence[str] = ()) -> str:
    """The text of --prompt, from a file (@) or stdin (-) where it says so; never empty.

    ``guessed`` are words that were taken as pictures.
    """
    if prompt is None:
        hint = 'add --prompt "What is in the picture?"'
        if guessed:
            hint += f"; {_taken(guessed[-1])}"
        raise OptionError("no --prompt is given", hint=hint)
    text = _prompt_text(prompt)
    if not text.strip():
        raise OptionError("the prompt is empty", hint=EXAMPLE)
    return text


def _prompt_text(prompt: str) -> str:
    if prompt == STDIN:
        return read_text("stdin (--prompt -)", STDIN)
    if prompt.startswith("@"):
        try:
            return read_text(f"--prompt {display_name(prompt)}", prompt[1:])
        except OptionError as error:
            hint = f"{error.hint}; a question that itself begins with @ may come from stdin (-)"
            raise OptionError(str(error), hint=hint) from None
    return word_of("--prompt", prompt)


def read_options(flags: argparse.Namespace) -> OptionValues:
    """The flags of an answer, their ranges checked."""
    flags.stop = [word_of("--stop", text) for text in flags.stop]
    flags.system = flags.system and word_of("--system", flags.system)
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
        if name == STDIN:
            return open_image(sys.stdin.buffer, flags.max_pixels, name="stdin")
        return open_picture(picture_path(name), flags.max_pixels, flags.allow_url)

    return open_named


def picture_path(name: str) -> str:
    """A picture's name with ``~`` as a shell reads it, unless a file is really called so."""
    return name if is_address(name) or os.path.exists(name) else os.path.expanduser(name)


def open_pictures(flags: argparse.Namespace) -> list[LoadedImage]:
    """The pictures of --image, in order."""
    open_named = opener(flags)
    pictures = []
    for name in flags.image:
        try:
            pictures.append(open_named(name))
        except ImageError as error:
            if name not in flags.guessed or name == STDIN or os.path.exists(name):
                raise
            raise ImageError(str(error), hint=f"{error.hint}; {_taken(name)}") from None
    return pictures


def open_videos(flags: argparse.Namespace) -> list[Video]:
    """The videos of --video, in order; all but their pixels is checked."""
    shown = showing(flags)
    videos = [shown(picture_path(name)) for name in flags.video]
    for video in videos:
        video.images()
    return videos


def showing(flags: argparse.Namespace) -> Callable[[str], Video]:
    """How the flags say that a video is shown."""
    chosen = partial(
        Video,
        frames=flags.frames,
        fps=flags.fps,
        start=flags.start,
        end=flags.end,
        max_pixels=flags.max_pixels,
    )
    chosen("")  # which is to be checked at once
    return chosen


def _taken(word: str) -> str:
    """What to say of a word that may have been meant as the question."""
    if word == STDIN:
        return "- was taken as a picture from stdin, -p - reads the question there"
    return f"{display_name(word)} was taken as a picture, -p {shlex.quote(word)} asks it"


def check_targets(flags: argparse.Namespace) -> None:
    """Refuse at once what could only fail after the answer: files that cannot be written."""
    inputs = [*map(picture_path, [*flags.image, *flags.video]), *_files_of(flags.prompt)]
    targets = {
        "--draw-boxes": (flags.draw_boxes, PICTURE_KINDS, SIGNATURE, "no picture to draw on"),
        "--attention": (flags.attention, (".html", ".htm"), PAGE_SIGNATURE, "no picture to show"),
    }
    for flag, (path, endings, ours, lack) in targets.items():
        if path is None:
            continue
        if not flags.image:
            raise OptionError(f"{flag} has {lack}", hint="add --image FILE")
        check_target(flag, path, endings, inputs, ours)


def _files_of(prompt: str | None) -> list[str]:
    return [prompt[1:]] if prompt and prompt.startswith("@") else []


def find_model(flags: argparse.Namespace) -> None:
    """See that the model is there, downloaded if needed: a wrong name need not wait for torch."""
    check_threads(flags.threads)
    resolve(flags.model, flags.revision, flags.offline)


def load_engine(flags: argparse.Namespace, noise: Noise) -> Engine:
    """The engine that the flags ask for, and what is to be said of it."""
    engine = engine_of(flags)
    noise.loaded(engine)
    return engine


def engine_of(flags: argparse.Namespace) -> Engine:
    """The engine that the flags ask for; torch is imported here."""
    find_model(flags)
    import_engine()
    from ..engine import Engine

    return Engine.load(
        flags.model,
        device=flags.device,
        dtype=flags.dtype,
        cache=flags.cache or DEFAULT_CACHE,
        style=flags.style,
        revision=flags.revision,
        offline=flags.offline,
        vision_tower=flags.vision_tower,
        max_image_tokens=flags.max_image_tokens,
        selection="sync" if flags.sync_selection else "branch",
        graphs=flags.graphs,
        threads=flags.threads,
        weights=flags.weights,
        parallel=getattr(flags, "parallel", False),
        as_published=flags.as_published,
    )
