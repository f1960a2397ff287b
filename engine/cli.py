"""The command line: flags to an engine, answers to stdout, everything else to stderr.

Imports are ordered by cost: flags are checked first, then the pictures are opened with Pillow, and
only then torch and the model are loaded, so that a typo fails in a fraction of a second.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from engine.errors import EngineError, OptionError
from engine.templates import STYLES

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.image import LoadedImage
    from engine.prompt import Prompt
    from engine.result import Result

INTERRUPTED = 130

EXAMPLES = """examples:
  python main.py --image car.jpg --prompt "What colour is the car?"
  python main.py --image page.png --prompt "Read all the text." --cache full --stats
  python main.py --model ./llava-1.5-7b-hf --image a.jpg --prompt "Describe it." --json

The default cache, avl, is an approximation: it frees and skips image tokens that are attended
little. --cache full is the exact model. Without --model the embedded tiny model answers; it knows
drawings and printed text only. Greedy by default: the same command gives the same text.

exit codes: 0 ok, 1 unexpected, 2 usage, 3 picture, 4 weights or tokenizer, 5 out of memory or
context too long, 130 interrupted"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are our errors and name the closest flag."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage and leaving."""
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        flags = [flag for action in self._actions for flag in action.option_strings]
        close = difflib.get_close_matches(unknown, flags, n=1)
        hint = f"did you mean {close[0]}?" if close else "python main.py --help lists all flags"
        raise OptionError(message, hint=hint)


def build_parser() -> Parser:
    """All flags, in groups."""
    parser = Parser(
        prog="main.py",
        description="Answer a question about pictures with a large vision-language model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("input").add_argument
    add(
        "--image",
        action="append",
        default=[],
        metavar="PATH",
        help="a picture; repeatable; - is stdin",
    )
    add("--prompt", "-p", metavar="TEXT", help="the question; @FILE reads a file, - stdin")
    add("--batch", metavar="FILE", help="answer a file of requests, one JSON object a line")
    add("--output", metavar="FILE", help="where --batch writes (default: FILE.answers.jsonl)")
    add("--rows", type=int, default=8, metavar="N", help="requests decoded together by --batch (8)")
    add("--raw", action="store_true", help="take the prompt verbatim, with no chat template")
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        "-m",
        metavar="DIR_OR_ID",
        help="folder or hub name (default: the embedded model)",
    )
    add("--revision", metavar="SHA", help="branch, tag or commit of a hub model")
    add("--offline", action="store_true", help="never download")
    add("--dtype", default="auto", help="auto, fp32, bf16 or fp16")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    add("--style", choices=tuple(STYLES), help="prompt style (default: the checkpoint's)")
    add = parser.add_argument_group("conversion").add_argument
    add(
        "--convert",
        metavar="DIR",
        help="write --model's pickled weights (.bin) to DIR as safetensors, and leave",
    )
    add(
        "--vision-tower",
        metavar="DIR_OR_ID",
        help="join this tower in (default: the one that the model names)",
    )
    add = parser.add_argument_group("generation").add_argument
    add("--max-new-tokens", "-n", type=int, default=256, metavar="N", help="longest answer (256)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy, the default")
    add("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest; 0 is all")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest of mass P")
    add("--seed", type=int, default=0, help="of the draw (0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    add("--no-stream", action="store_true", help="print the answer only when it is complete")
    add = parser.add_argument_group("cache").add_argument
    add(
        "--cache",
        metavar="SPEC",
        help="full (exact), avl (default), h2o, fastv, streaming, snapkv, random; with parameters: "
        "avl:secondary=0.45,core=0.30,every=3,prefill=0.9,text=0.7",
    )
    add = parser.add_argument_group("information").add_argument
    add("--stats", action="store_true", help="times, tokens per tier and bytes, on stderr")
    add("--json", action="store_true", help="print one JSON object with everything")
    add(
        "--draw-boxes",
        metavar="FILE",
        help="paint the regions the answer names on the last picture (Qwen-VL)",
    )
    add("--check", action="store_true", help="say what this machine offers, and leave")
    add("--quiet", "-q", action="store_true", help="nothing on stderr but errors")
    add("--verbose", "-v", action="store_true", help="show the rendered prompt and its token ids")
    add("--debug", action="store_true", help="full traceback on errors")
    add("--version", action="store_true", help="print the version, and leave")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except EngineError as error:
        if "--debug" in arguments:
            raise
        _complain(str(error), error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader left (`| head -1`): nothing more can be said, and that is no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if "--debug" in arguments:
            raise
        _complain(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        return 1


def _complain(message: str, hint: str = "") -> None:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def _run(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    if options.version:
        print(f"avl-engine {_version()}")
        return 0
    if options.check:
        return _check()
    if options.batch:
        return _batch(options)
    if options.convert or options.vision_tower:
        return _convert(options)
    prompt = _read_prompt(options.prompt)
    if options.draw_boxes:
        _check_drawing(options)
    pictures = _open_pictures(options.image)
    noise = Noise(options, pictures)
    engine = _load(options)
    noise.loaded(engine)
    if options.verbose and not options.quiet:
        noise.prompt(engine.render(prompt, [p.pixels for p in pictures], raw=options.raw))
    return _answer(engine, options, prompt, pictures, noise)


def _version() -> str:
    try:
        return version("avl-engine")
    except PackageNotFoundError:
        return "(not installed)"


def _check() -> int:
    """Print which kernels serve, and why."""
    import torch

    from engine.native import backend

    active = backend()
    print(f"avl-engine {_version()}, Python {sys.version.split()[0]}, torch {torch.__version__}")
    print(f"backend: {active.name} - {active.reason}")
    return 0


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


def _open_pictures(paths: Iterable[str]) -> list[LoadedImage]:
    from engine.image import open_image

    return [open_image(sys.stdin.buffer.read() if path == "-" else path) for path in paths]


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
    engine: Engine,
    options: argparse.Namespace,
    prompt: str,
    pictures: list[LoadedImage],
    noise: Noise,
) -> int:
    """Generate and print; an interrupt keeps what was said so far."""
    live = not (options.json or options.no_stream)
    pieces = engine.stream(
        prompt,
        [picture.pixels for picture in pictures],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop=options.stop,
        raw=options.raw,
    )
    try:
        for piece in pieces:
            if not isinstance(piece, str):
                result = piece
            elif live:
                _say(piece)
    except KeyboardInterrupt:
        _say("\n")
        return INTERRUPTED
    if options.json:
        _say(json.dumps(result.as_dict(), ensure_ascii=False) + "\n")
    else:
        _say("\n" if live else result.text + "\n")
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


def _draw_boxes(path: str, picture: LoadedImage, result: Result, noise: Noise) -> None:
    """Write the picture with the answer's regions, if there are any."""
    from engine.boxes import draw_boxes

    if result.boxes:
        draw_boxes(picture.pixels, result.boxes).save(path)
    else:
        noise.note(f"the answer names no regions; {path} is not written")


def _say(text: str) -> None:
    """Write to stdout at once; on a terminal without the control characters a model may emit."""
    if sys.stdout.isatty():
        text = "".join(c for c in text if c in "\n\t" or c.isprintable())
    sys.stdout.write(text)
    sys.stdout.flush()


class Noise:
    """What goes to stderr beside errors: only on a terminal, or where it is asked for."""

    def __init__(self, options: argparse.Namespace, pictures: Iterable[LoadedImage]) -> None:
        self.options = options
        self.wanted = not options.quiet and (sys.stderr.isatty() or options.verbose)
        for picture in pictures:
            for note in picture.notes:
                self.note(f"{picture.name}: {note}")

    def note(self, text: str) -> None:
        """One line on stderr, unless --quiet."""
        if not self.options.quiet:
            print(f"note: {text}", file=sys.stderr)

    def loaded(self, engine: Engine) -> None:
        """The load line, and that the default cache is an approximation."""
        if not self.wanted:
            return
        from engine.native import backend

        dtype = str(engine.dtype).removeprefix("torch.")
        print(
            f"{engine.name} loaded in {engine.load_seconds:.1f} s: {dtype} on {engine.device}, "
            f"{backend().name} kernels, cache {engine.policy.spec}",
            file=sys.stderr,
        )
        if self.options.model is None:
            print(
                "the embedded tiny model knows drawings and printed text; "
                "--model FOLDER runs a real one",
                file=sys.stderr,
            )
        if self.options.cache is None:
            print(
                "the default cache approximates the model; --cache full is exact", file=sys.stderr
            )

    def prompt(self, prompt: Prompt) -> None:
        """The rendered prompt and its ids, a picture's as how many times its id."""
        ids: list[str] = []
        for segment in prompt.segments:
            part = prompt.token_ids[segment.start : segment.end]
            ids += map(str, part) if segment.kind == "text" else [f"{part[0]}*{len(part)}"]
        print(f"prompt: {prompt.text!r}\nids: {' '.join(ids)}", file=sys.stderr)

    def finished(self, result: Result) -> None:
        """The summary line, or all figures with --stats."""
        if self.options.quiet or not (self.wanted or self.options.stats):
            return
        times, cache = result.timings, result.cache
        print(
            f"{cache.image_tokens} image tokens: {cache.core.mean:.0f} core, "
            f"{cache.stored.mean:.0f} stored, {cache.minor.mean:.0f} freed | "
            f"first token {times.ttft * 1e3:.0f} ms, {times.tokens_per_second:.1f} tokens/s | "
            f"cache {cache.bytes_used / 1e6:.2f} MB of {cache.bytes_full / 1e6:.2f} MB full",
            file=sys.stderr,
        )
        if self.options.stats:
            print(
                f"{result.prompt_tokens} prompt tokens, {len(result.token_ids)} generated, "
                f"ended by {result.finish_reason} | load {times.load:.2f} s, "
                f"picture {times.picture * 1e3:.0f} ms, prefill {times.prefill * 1e3:.0f} ms, "
                f"{times.per_token * 1e3:.1f} ms per token | stored {cache.stored_share:.1%}, "
                f"used {cache.used_share:.1%}, text {cache.text.mean:.0f} kept, "
                f"{cache.bytes_allocated / 1e6:.2f} MB allocated",
                file=sys.stderr,
            )
