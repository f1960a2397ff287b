"""The flags of the command line: what they are called, and the closest one to a typo."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..errors import OptionError
from ..options import DTYPES, WEIGHTS
from ..pictures.image import MAX_PIXELS
from ..pictures.video import FRAMES
from ..policies.specs import DEFAULT_CACHE, POLICIES
from ..prompts.templates import OWN, STYLES
from .modes import find_mode
from .terminal import say
from .words import sort_words

EXAMPLES = """examples:
  {0} car.jpg "What colour is the car?"
  {0} page.png "Read all the text." --cache full --stats
  {0} --model ./llava-1.5-7b-hf --image a.jpg --prompt "Describe it." --json
  {0} --video clip.mp4 --frames 16 "What happens?"
  {0} --chat --image car.jpg
  {0} --batch requests.jsonl --output answers.jsonl
  {0} --check --model ./llava-1.5-7b-hf
"""

NOTES = """The default cache, sift, is an approximation: it keeps pictures in 4 bits and reads what
is attended. --cache full is the exact model; --cache avl has the paper's settings and frees half
of a picture. Without --model the embedded tiny model answers; it knows drawings and
printed text only. Greedy by default: the same command gives the same text.

A word that is a file, ends like a picture's name or begins with data: or https:// is a picture;
one that ends like a video's is a video; another one is the prompt, and there is one prompt. A model
that has not learned videos sees the frames as so many pictures.

--batch: a line is {"prompt": "...", "images": ["a.jpg"], "max_new_tokens": 64}; the flags of an
answer, --prompt, --image, --video, --system and --raw stand for what a line lacks; pictures and
videos of a line are found beside the job file. Started again, the same command goes on where it
was, and tries again what failed; answers of other requests, of another model or cache are refused.
- as FILE is stdin, and as --output stdout. If requests failed, the exit code is that of the first.

exit codes: 0 ok, 1 unexpected, 2 usage, 3 picture, 4 weights or tokenizer, 5 out of memory or
context too long, 130 interrupted, 141 nobody reads stdout any more"""


def program() -> str:
    """How this program was started, for its help."""
    names = {"main.py": "python main.py", "__main__.py": "python -m engine"}
    return names.get(os.path.basename(sys.argv[0]), "avl")


def _number(kind: Callable[[str], float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            if len(text) > 40:
                reason = f"{text[:20]!r}... has {len(text):,} characters, too many for {what}"
                raise argparse.ArgumentTypeError(reason) from None
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None

    return convert


_whole, _real = _number(int), _number(float)


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def _dtype(text: str) -> str:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"unknown dtype {text!r}, use {', '.join(DTYPES)}")
    return text


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?|mps", text):
        raise argparse.ArgumentTypeError(
            f"unknown device {text!r}, use auto, cpu, cuda, cuda:1 or mps"
        )
    return text


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are our errors and name the closest flag."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("action", None, _Once)
        self.given: set[str] = set()

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage and leaving."""
        unknown = message.removeprefix("unrecognized arguments: ").split(" ", 1)[0]
        flags = [flag for action in self._actions for flag in action.option_strings]
        word = unknown.partition("=")[0]
        begun = [flag for flag in flags if flag.startswith(word)] if word[2:] else []
        close = begun[:3] or difflib.get_close_matches(word, flags, n=1)
        usual = f"{self.prog} --help lists all flags; a name that begins with - comes behind --"
        hint = f"did you mean {' or '.join(close)}?" if close else usual
        raise OptionError(message, hint=hint)

    def print_help(self, file: Any = None) -> None:
        """Print; unlike argparse's own, say when that could not be done."""
        say(self.format_help())


class _Once(argparse.Action):
    """Store a value; of two nobody knows which one is meant."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, Parser)
        if self.dest in parser.given:
            raise OptionError(f"{option_string} is given twice", hint="give it once")
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


def parse_flags(arguments: Sequence[str]) -> tuple[argparse.Namespace, str]:
    """The flags, words without one sorted into pictures and the prompt; and the mode they ask for.

    Raises OptionError for what does not go together.
    """
    parser = build_parser()
    behind = [*arguments, "--"].index("--")  # what comes behind are words, whatever they look like
    arguments, rest = arguments[:behind], arguments[behind + 1 :]
    flags, words = parser.parse_known_args(arguments)
    unknown = [word for word in words if word[:1] == "-" != word and " " not in word]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    given = _given(arguments)
    sort_words(flags, [*words, *rest])
    bare = {name for name in ("image", "video", "prompt") if getattr(flags, name)} - given
    return flags, "version" if flags.version else find_mode(given | bare, bare)


def _given(arguments: Sequence[str]) -> set[str]:
    """Names of the flags that stand on the command line, whatever their value."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_known_args(arguments)[0]))


def build_parser() -> Parser:
    """All flags, in groups."""
    parser = Parser(
        prog=program(),
        usage=f"{program()} [PICTURE ...] [PROMPT] [flags]",
        description=f"Answers questions about pictures. {EXAMPLES.format(program())}",
        epilog=NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("input").add_argument
    add(
        "--image",
        action="append",
        nargs="+",
        default=[],
        metavar="PATH",
        help="pictures: files, - (stdin) or data: URLs; repeatable",
    )
    add(
        "--video",
        action="append",
        type=_name,
        default=[],
        metavar="PATH",
        help="a video, or a folder of its frames; repeatable",
    )
    add("--frames", type=_whole, default=FRAMES, metavar="N", help=f"shown of a video ({FRAMES})")
    add("--fps", type=_real, metavar="F", help="frames shown of a second, --frames at most")
    add("--start", type=_real, default=0.0, metavar="S", help="seconds where a video is begun")
    add("--end", type=_real, metavar="S", help="seconds where it is left")
    add("--allow-url", action="store_true", help="fetch https:// pictures (10 s, 20 MB at most)")
    add(
        "--max-pixels",
        type=_whole,
        default=MAX_PIXELS,
        metavar="N",
        help=f"refuse larger pictures unread ({MAX_PIXELS})",
    )
    add("--prompt", "-p", metavar="TEXT", help="the question; @FILE reads a file, - stdin")
    add("--system", metavar="TEXT", help="a system message before the first question")
    add("--chat", action="store_true", help="talk: one question a line, /help lists commands")
    add(
        "--batch",
        type=_name,
        metavar="FILE",
        help="answer requests, one JSON object a line; - is stdin",
    )
    add(
        "--output",
        type=_name,
        metavar="FILE",
        help="where --batch writes (FILE.answers.jsonl); - is stdout",
    )
    add(
        "--rows",
        type=_whole,
        default=8,
        metavar="N",
        help="requests answered together (8)",
    )
    add(
        "--ray",
        type=_name,
        metavar="ADDRESS",
        help="spread --batch over a Ray cluster; local: over this machine (docs/scale.md)",
    )
    add(
        "--workers",
        type=_whole,
        metavar="N",
        help="engines on that cluster (default: one a GPU, or one for --threads cores)",
    )
    add("--raw", action="store_true", help="take the prompt verbatim, with no chat template")
    add_model(parser)
    add = parser.add_argument_group("conversion").add_argument
    add(
        "--convert",
        type=_name,
        metavar="DIR",
        help="write --model's pickled weights to DIR as safetensors, or any as --weights says",
    )
    add = parser.add_argument_group("generation").add_argument
    add(
        "--max-new-tokens", "-n", type=_whole, default=256, metavar="N", help="longest answer (256)"
    )
    add("--temperature", type=_real, metavar="T", help="0 is greedy, the default")
    add("--top-k", type=_whole, metavar="K", help="draw among the K likeliest; 0 is all")
    add("--top-p", type=_real, metavar="P", help="draw among the likeliest of mass P")
    add("--seed", type=_whole, default=0, help="of the draw (0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    add("--repetition-penalty", type=_real, metavar="R", help="1 is off, the default")
    add(
        "--logprobs",
        action="store_true",
        help="log-probabilities of tokens, in --json or --batch",
    )
    add("--no-stream", action="store_true", help="print the answer only when it is complete")
    add_cache(parser)
    add = parser.add_argument_group("information").add_argument
    add(
        "--compare",
        action="store_true",
        help="answer with the full cache and with --cache, and say what differs",
    )
    add("--stats", action="store_true", help="times, tokens per tier and bytes, on stderr")
    add("--json", action="store_true", help="print one JSON object with everything")
    add(
        "--attention",
        type=_name,
        metavar="FILE.html",
        help="write a page that shows what each token looked at, and what the cache kept",
    )
    add(
        "--draw-boxes",
        type=_name,
        metavar="FILE",
        help="paint the regions the answer names on the last picture (Qwen-VL)",
    )
    add("--check", action="store_true", help="examine this machine and --model, and leave")
    add("--quiet", "-q", action="store_true", help="nothing on stderr but errors")
    add("--verbose", "-v", action="store_true", help="show the rendered prompt and its token ids")
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--version", action="store_true", help="print the version, and leave")
    return parser


def add_model(parser: Parser) -> None:
    """The flags that say which model runs, and how."""
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        "-m",
        type=_name,
        metavar="DIR_OR_ID",
        help="folder or hub name (default: the embedded model)",
    )
    add("--revision", type=_name, metavar="SHA", help="branch, tag or commit of a hub model")
    add("--offline", action="store_true", help="never download")
    add(
        "--weights",
        default="auto",
        choices=WEIGHTS,
        help="round the decoder's weights to 8 or 4 bits, +head: the language head too",
    )
    add("--dtype", default="auto", type=_dtype, help="auto, fp32, bf16 or fp16")
    add("--device", default="auto", type=_device, help="auto, cpu, cuda, cuda:1 or mps (untested)")
    add("--threads", type=_whole, metavar="N", help="threads (default: one for each core)")
    add("--style", choices=(*STYLES, OWN), help="prompt style (default: the checkpoint's)")
    add(
        "--as-published",
        action="store_true",
        help="draw as generation_config.json has it, where no flag says otherwise",
    )
    add(
        "--vision-tower",
        type=_name,
        metavar="DIR_OR_ID",
        help="vision tower of a model that leaves it out (default: the one that it names)",
    )
    add(
        "--max-image-tokens",
        type=_whole,
        metavar="N",
        help="shrink pictures to N tokens, where a model takes them of any size (Qwen2-VL on)",
    )


def add_cache(parser: Parser) -> None:
    """The flags of the cache."""
    add = parser.add_argument_group("cache").add_argument
    add(
        "--cache",
        metavar="SPEC",
        help=f"{', '.join(POLICIES)}, with parameters; full is exact; default: {DEFAULT_CACHE}",
    )
    add(
        "--sync-selection",
        action="store_true",
        help="on a GPU, rank cached tokens in order, not beside the model (same text)",
    )
    add(
        "--graphs",
        action="store_true",
        help="on a GPU, replay decode steps from captured CUDA graphs (same text)",
    )
