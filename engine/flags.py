"""The flags of the command line: what they are called, and the closest one to a typo."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import NoReturn

from engine.errors import OptionError
from engine.image import MAX_PIXELS
from engine.templates import STYLES

EXAMPLES = """examples:
  python main.py --image car.jpg --prompt "What colour is the car?"
  python main.py --image page.png --prompt "Read all the text." --cache full --stats
  python main.py --model ./llava-1.5-7b-hf --image a.jpg --prompt "Describe it." --json
  python main.py --chat --image car.jpg
  python main.py --check --model ./llava-1.5-7b-hf
"""

NOTES = """The default cache, a mild avl, is an approximation: it skips image tokens that are
attended little and frees a tenth. --cache full is the exact model; --cache avl has the paper's
settings and frees half. Without --model the embedded tiny model answers; it knows drawings and
printed text only. Greedy by default: the same command gives the same text.

exit codes: 0 ok, 1 unexpected, 2 usage, 3 picture, 4 weights or tokenizer, 5 out of memory or
context too long, 130 interrupted"""


DTYPES = ("auto", "fp32", "float32", "bf16", "bfloat16", "fp16", "float16")


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

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage and leaving."""
        unknown = message.removeprefix("unrecognized arguments: ").split(" ", 1)[0]
        flags = [flag for action in self._actions for flag in action.option_strings]
        close = difflib.get_close_matches(unknown, flags, n=1)
        hint = f"did you mean {close[0]}?" if close else "python main.py --help lists all flags"
        raise OptionError(message, hint=hint)


def build_parser() -> Parser:
    """All flags, in groups."""
    parser = Parser(
        prog="main.py",
        usage="main.py [flags]",
        description=f"Answers questions about pictures. {EXAMPLES}",
        epilog=NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("input").add_argument
    add(
        "--image",
        action="append",
        default=[],
        metavar="PATH",
        help="a picture: a file, - (stdin) or a data: URL; repeatable",
    )
    add("--allow-url", action="store_true", help="fetch https:// pictures (10 s, 20 MB at most)")
    add(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help=f"refuse larger pictures unread ({MAX_PIXELS})",
    )
    add("--prompt", "-p", metavar="TEXT", help="the question; @FILE reads a file, - stdin")
    add("--system", metavar="TEXT", help="a system message before the first question")
    add("--chat", action="store_true", help="talk: one question a line, /help lists commands")
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
    add("--dtype", default="auto", type=_dtype, help="auto, fp32, bf16 or fp16")
    add("--device", default="auto", type=_device, help="auto, cpu, cuda, cuda:1 or mps (untested)")
    add("--style", choices=tuple(STYLES), help="prompt style (default: the checkpoint's)")
    add(
        "--vision-tower",
        metavar="DIR_OR_ID",
        help="vision tower of a model that leaves it out (default: the one that it names)",
    )
    add = parser.add_argument_group("conversion").add_argument
    add(
        "--convert",
        metavar="DIR",
        help="write --model's pickled weights (.bin) to DIR as safetensors, and leave",
    )
    add = parser.add_argument_group("generation").add_argument
    add("--max-new-tokens", "-n", type=int, default=256, metavar="N", help="longest answer (256)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy, the default")
    add("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest; 0 is all")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest of mass P")
    add("--seed", type=int, default=0, help="of the draw (0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="1 is off, the default")
    add("--logprobs", action="store_true", help="log-probabilities of the tokens, in --json")
    add("--no-stream", action="store_true", help="print the answer only when it is complete")
    add = parser.add_argument_group("cache").add_argument
    add(
        "--cache",
        metavar="SPEC",
        help="full (exact), avl, h2o, fastv, streaming, snapkv, random, with parameters; default: "
        "avl:secondary=0.9,core=0.6,prefill=1,text=1",
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
        metavar="FILE.html",
        help="write a page that shows what each token looked at, and what the cache kept",
    )
    add(
        "--draw-boxes",
        metavar="FILE",
        help="paint the regions the answer names on the last picture (Qwen-VL)",
    )
    add("--check", action="store_true", help="examine this machine and --model, and leave")
    add("--quiet", "-q", action="store_true", help="nothing on stderr but errors")
    add("--verbose", "-v", action="store_true", help="show the rendered prompt and its token ids")
    add("--debug", action="store_true", help="full traceback on errors")
    add("--version", action="store_true", help="print the version, and leave")
    return parser
