"""The command line: flags to an engine, answers to stdout, everything else to stderr.

Imports are ordered by cost: flags are checked first, then the pictures are opened with Pillow, and
only then torch and the model are loaded, so that a typo fails in a fraction of a second.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.hub import resolve
from ..checkpoint.target import check_folder
from ..errors import CapacityError, EngineError, OptionError
from ..policies.specs import parse
from ..progress import listening
from .bars import Bars
from .flags import parse_flags
from .inputs import (
    load_engine,
    open_pictures,
    open_videos,
    opener,
    read_options,
    read_prompt,
    showing,
)
from .noise import Noise
from .starting import import_engine, need_folder
from .terminal import (
    INTERRUPTED,
    UNREAD,
    complain,
    flush,
    forget_stdout,
    lacking,
    need_stdout,
    prepare,
    say,
)
from .together import alone, processes, together

# What to do about the refusals of a system that a user is likely to meet.
_HINTS = {
    errno.ENOSPC: "make room there, or write to another place",
    errno.EFBIG: "raise the limit (ulimit -f), or write to another place",
    errno.EACCES: "check who may read and write there",
    errno.EROFS: "write to another place",
    errno.ENOENT: "see whether it was moved or removed meanwhile",
    errno.EBADF: "leave it open, or send it to a file or /dev/null",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    prepare()
    try:
        try:
            return _run(arguments)
        finally:
            flush()  # here, where it can be told that it failed
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader left (`| head -1`): nothing is said, and the code is that of every command.
        forget_stdout()
        return UNREAD
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exception(error)
        return _explain(error)


def _explain(error: Exception) -> int:
    """One error line and one hint, whatever went wrong; returns the exit code."""
    if isinstance(error, EngineError):
        complain(str(error), error.hint)
        return error.exit_code
    if isinstance(error, MemoryError) or "allocate memory" in str(error):  # Python's, or torch's
        complain("out of memory", CapacityError.usual_hint)
        return CapacityError.exit_code
    if isinstance(error, ModuleNotFoundError):
        complain(*lacking(error))
    elif isinstance(error, OSError):
        name = f": {error.filename}" if error.filename else ""
        hint = _HINTS.get(error.errno or 0, EngineError.usual_hint)
        complain(f"{error.strerror or error}{name}", hint)
        forget_stdout()
    else:
        reason = (str(error).splitlines() or [""])[0][:200]
        complain(f"unexpected {type(error).__name__}: {reason}", EngineError.usual_hint)
    return EngineError.exit_code


def _run(arguments: list[str]) -> int:
    need_stdout()
    if arguments[:1] == ["serve"]:
        if processes() > 1:
            raise alone("do not serve")
        return _serve(arguments[1:])
    if arguments[:1] == ["batch"]:
        arguments = ["--batch", *arguments[1:]]
    flags, mode = parse_flags(arguments)
    need_folder()
    if flags.quiet:  # read when the hub's client is imported
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if flags.cache is not None:
        parse(flags.cache)
    run = _MODES.get(mode, _answer)
    if processes() == 1:
        return run(flags)
    with together(flags, mode):
        return run(flags)


def _serve(arguments: list[str]) -> int:
    from .serve_command import serve

    return serve(arguments)


def _answer(flags: argparse.Namespace) -> int:
    from .oneshot import answer_once

    with listening(Bars(flags.quiet)):
        return answer_once(flags)


def _batch(flags: argparse.Namespace) -> int:
    from .batch_command import answer_file

    return answer_file(flags)


def _converse(flags: argparse.Namespace) -> int:
    """A conversation; --prompt is its first question, --image what it is about."""
    from .lines import read_lines
    from .repl import Repl

    if "-" in (flags.prompt, *flags.image):
        raise OptionError("--chat reads its questions from stdin", hint="give a file instead of -")
    options, pictures, videos = read_options(flags), open_pictures(flags), open_videos(flags)
    noise = Noise(flags, pictures)
    engine = load_engine(flags, noise)
    repl = Repl(engine, opener(flags), options, noise, flags.system, showing(flags))
    repl.show(pictures, videos)
    first = [] if flags.prompt is None else [read_prompt(flags.prompt)]
    with listening(Bars(flags.quiet)):
        return repl.run(itertools.chain(first, read_lines(repl.commands)))


def _say_version(_: argparse.Namespace) -> int:
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version("avl-engine")
    except PackageNotFoundError:
        number = "(not installed)"
    say(f"avl-engine {number}\n")
    return 0


def _check(flags: argparse.Namespace) -> int:
    import_engine()
    from .doctor import check

    return check(
        flags.model, flags.revision, flags.offline, flags.quiet, flags.json, flags.vision_tower
    )


def _convert(flags: argparse.Namespace) -> int:
    """Convert pickled weights; started again after an interrupt, it keeps what is done."""
    if not flags.model:
        raise OptionError(
            "a conversion needs a source and a target",
            hint="write --model SOURCE --convert TARGET [--vision-tower TOWER] [--weights q4]",
        )
    target = Path(flags.convert)
    check_folder(target, Path(flags.model))
    source = resolve(flags.model, flags.revision, flags.offline, pickled=True)
    import_engine()
    from ..checkpoint.convert import Packer, as_it_is, convert, find_tower

    tower = find_tower(source, flags.vision_tower, flags.offline, flags.weights)
    pack: Packer = as_it_is
    if flags.weights != "auto":
        from ..loading.families import Wishes, recognise
        from ..loading.quantising import packer

        wishes = Wishes(None, flags.vision_tower, flags.offline)
        pack = packer(recognise(source, wishes), flags.weights)
    convert(source, target, tower, None if flags.quiet else _show_progress, flags.weights, pack)
    say(f"{target}\n")
    return 0


def _show_progress(name: str, done: int, total: int) -> None:
    """One line per file on stderr, rewritten in place on a terminal."""
    live = sys.stderr.isatty()
    if live or done == total:
        end = "\n" if done == total else "\r"
        print(f"{name}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", end=end, file=sys.stderr)


_MODES = {
    "version": _say_version,
    "check": _check,
    "convert": _convert,
    "batch": _batch,
    "chat": _converse,
}
