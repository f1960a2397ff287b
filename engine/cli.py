"""The command line: flags to an engine, answers to stdout, everything else to stderr.

Imports are ordered by cost: flags are checked first, then the pictures are opened with Pillow, and
only then torch and the model are loaded, so that a typo fails in a fraction of a second.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import EngineError, OptionError
from engine.flags import build_parser
from engine.image import MAX_PIXELS
from engine.messages import with_system
from engine.noise import Noise
from engine.options import OptionValues, make_options
from engine.terminal import complain, forget_stdout, say

if TYPE_CHECKING:
    from engine.engine import Engine, Messages
    from engine.image import LoadedImage
    from engine.result import Result

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except EngineError as error:
        if "--debug" in arguments:
            raise
        complain(str(error), error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader left (`| head -1`): nothing more can be said, and that is no error.
        forget_stdout()
        return 0
    except OSError as error:
        if "--debug" in arguments:
            raise
        complain(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        forget_stdout()
        return 1


def _run(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    if options.quiet:  # read when the hub's client is imported
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if options.version:
        print(f"avl-engine {_version()}")
        return 0
    if options.check:
        return _check(options)
    if options.batch:
        return _batch(options)
    if options.convert or options.vision_tower:
        return _convert(options)
    return _converse(options) if options.chat else _answer_once(options)


def _answer_once(options: argparse.Namespace) -> int:
    """One question, one answer; or two, to compare."""
    text, generation = _read_prompt(options.prompt), _generation(options)
    if options.draw_boxes:
        _check_drawing(options)
    if options.attention:
        _check_page(options)
    if options.raw and options.system is not None:
        raise OptionError("--raw takes no --system", hint="write the system text into the prompt")
    pictures = _open_pictures(options)
    noise = Noise(options, pictures)
    prompt = with_system(text, len(pictures), options.system)
    engine = _load(options)
    noise.loaded(engine)
    pixels = [picture.pixels for picture in pictures]
    if options.verbose and not options.quiet:
        noise.prompt(engine.render(prompt, pixels, raw=options.raw))
    if options.compare:
        return _compare(engine, prompt, pictures, options)
    stream = engine.stream
    if options.attention:
        from engine.insight.page import stream_with_page

        stream = partial(stream_with_page, engine, options.attention)
    pieces = stream(prompt, pixels, raw=options.raw, **generation)
    return _answer(pieces, options, pictures, noise)


def _compare(
    engine: Engine, prompt: Messages, pictures: list[LoadedImage], options: argparse.Namespace
) -> int:
    from engine.compare import compare

    pixels = [picture.pixels for picture in pictures]
    found = compare(engine, prompt, pixels, _generation(options), raw=options.raw)
    if options.json:
        say(json.dumps(found.as_dict(), ensure_ascii=False) + "\n")
    else:
        say("\n".join(found.lines()) + "\n")
    return 0


def _converse(options: argparse.Namespace) -> int:
    """A conversation; --prompt is its first question, --image what it is about."""
    from engine.repl import Repl, read_lines

    for flag in ("json", "raw", "compare", "attention", "draw_boxes"):
        if getattr(options, flag):
            raise OptionError(f"--chat takes no --{flag.replace('_', '-')}", hint="leave one out")
    if "-" in (options.prompt, *options.image):
        raise OptionError("--chat reads its questions from stdin", hint="give a file instead of -")
    generation, pictures = _generation(options), _open_pictures(options)
    noise = Noise(options, pictures)
    engine = _load(options)
    noise.loaded(engine)
    repl = Repl(engine, _opener(options), generation, noise, options.system)
    repl.show(pictures)
    first = [] if options.prompt is None else [_read_prompt(options.prompt)]
    return repl.run(itertools.chain(first, read_lines()))


def _generation(options: argparse.Namespace) -> OptionValues:
    """The flags of an answer, their ranges checked."""
    values = OptionValues(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop=options.stop,
        repetition_penalty=options.repetition_penalty,
        logprobs=options.logprobs,
    )
    make_options(**values)
    return values


def _version() -> str:
    try:
        return version("avl-engine")
    except PackageNotFoundError:
        return "(not installed)"


def _check(options: argparse.Namespace) -> int:
    from engine.doctor import check

    return check(options.model, options.revision, options.offline, options.quiet, options.json)


def _convert(options: argparse.Namespace) -> int:
    """Convert pickled weights; started again after an interrupt, it keeps what is done."""
    if not (options.convert and options.model):
        raise OptionError(
            "a conversion needs a source and a target",
            hint="write --model SOURCE --convert TARGET [--vision-tower TOWER]",
        )
    from weights.convert import convert, find_source, find_tower

    source = find_source(options.model, options.revision, options.offline)
    tower = find_tower(source, options.vision_tower, options.offline)
    progress = None if options.quiet else _show_progress
    target = convert(source, Path(options.convert), tower, progress)
    print(target)
    return 0


def _show_progress(name: str, done: int, total: int) -> None:
    """One line per file on stderr, rewritten in place on a terminal."""
    live = sys.stderr.isatty()
    if live or done == total:
        end = "\n" if done == total else "\r"
        print(f"{name}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", end=end, file=sys.stderr)


def _batch(options: argparse.Namespace) -> int:
    """Answer a file of requests into another, with a progress bar on stderr."""
    from tqdm import tqdm

    from engine.batch_file import count_lines, run_batch

    source = Path(options.batch)
    target = Path(options.output) if options.output else source.with_suffix(".answers.jsonl")
    total = count_lines(source)
    engine = _load(options)
    with tqdm(total=total, unit="request", disable=options.quiet, file=sys.stderr) as bar:
        for done in run_batch(engine, source, target, options.rows):
            bar.update(done - bar.n)
    print(target)
    return 0


def _read_prompt(prompt: str | None) -> str:
    if prompt is None:
        raise OptionError("no --prompt is given", hint='add --prompt "What is in the picture?"')
    if prompt == "-":
        return sys.stdin.read()
    if prompt.startswith("@"):
        try:
            with open(prompt[1:], encoding="utf-8") as file:
                return file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"--prompt {prompt}: cannot be read as text ({error})") from error
    return prompt


def _opener(options: argparse.Namespace) -> Callable[[str], LoadedImage]:
    """How the flags say that a picture is opened."""
    from engine.remote import open_picture

    if not 1 <= options.max_pixels <= MAX_PIXELS:
        raise OptionError(
            f"--max-pixels is {options.max_pixels}", hint=f"use 1 to {MAX_PIXELS} pixels"
        )

    def open_named(name: str) -> LoadedImage:
        source = sys.stdin.buffer.read() if name == "-" else name
        return open_picture(source, options.max_pixels, options.allow_url)

    return open_named


def _open_pictures(options: argparse.Namespace) -> list[LoadedImage]:
    return list(map(_opener(options), options.image))


def _load(options: argparse.Namespace) -> Engine:
    from engine.engine import DEFAULT_CACHE, Engine

    return Engine.load(
        options.model,
        device=options.device,
        dtype=options.dtype,
        cache=options.cache or DEFAULT_CACHE,
        style=options.style,
        revision=options.revision,
        offline=options.offline,
    )


def _answer(
    pieces: Iterable[str | Result],
    options: argparse.Namespace,
    pictures: list[LoadedImage],
    noise: Noise,
) -> int:
    """Print an answer as it comes; an interrupt keeps what was said so far."""
    live = not (options.json or options.no_stream)
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
        if not options.json:
            say("\n" if live else text + "\n")
        return INTERRUPTED
    if options.json:
        say(json.dumps(result.as_dict(), ensure_ascii=False) + "\n")
    else:
        say("\n" if live else result.text + "\n")
    if options.draw_boxes:
        _draw_boxes(options.draw_boxes, pictures[-1], result, noise)
    noise.finished(result)
    return 0


def _check_drawing(options: argparse.Namespace) -> None:
    """Refuse at once what could only fail after the answer."""
    if not options.image:
        raise OptionError("--draw-boxes has no picture to draw on", hint="add --image FILE")
    folder, name = os.path.split(options.draw_boxes)
    if not name.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
        raise OptionError(
            f"--draw-boxes {options.draw_boxes}: not a picture's name",
            hint="end it in .png, .jpg or .webp",
        )
    if folder and not os.path.isdir(folder):
        raise OptionError(f"--draw-boxes {options.draw_boxes}: no folder {folder}")


def _check_page(options: argparse.Namespace) -> None:
    """Refuse at once what could only fail after the answer."""
    if not options.image:
        raise OptionError("--attention has no picture to show", hint="add --image FILE")
    if options.compare:
        raise OptionError(
            "--attention takes no --compare", hint="its page compares with the full cache already"
        )
    folder = os.path.dirname(options.attention)
    if folder and not os.path.isdir(folder):
        raise OptionError(f"--attention {options.attention}: no folder {folder}")


def _draw_boxes(path: str, picture: LoadedImage, result: Result, noise: Noise) -> None:
    """Write the picture with the answer's regions, if there are any."""
    from engine.boxes import draw_boxes

    if result.boxes:
        draw_boxes(picture.pixels, result.boxes).save(path)
    else:
        noise.note(f"the answer names no regions; {path} is not written")
