"""``--chat``: a conversation on the terminal, or over a pipe with one question a line.

On a terminal the standard library's readline edits the line, remembers what was typed and takes a
paste of many lines as one question. Between two lines of \"\"\" a question may have many lines
anywhere. Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from engine.errors import EngineError, OptionError
from engine.image import display_name
from engine.messages import with_system
from engine.terminal import complain, say

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.image import LoadedImage
    from engine.noise import Noise
    from engine.options import OptionValues
    from engine.result import Result

FENCE = '"""'

HELP = f"""/image FILE   show a picture with the next question; repeatable
/clear        forget the conversation
/stats        figures of the last answer
/cache SPEC   another cache policy, such as full or avl; forgets the conversation
/save FILE    write the conversation as text
/help         this list
/exit         leave; Ctrl-D too
Ctrl-C stops an answer, twice it leaves. {FENCE} on a line of its own begins and ends many lines."""


class Repl:
    """A conversation that is typed in.

    Attributes:
        code: the exit code: of the first error where stdin is a pipe, else 0.
    """

    def __init__(
        self,
        engine: Engine,
        open_picture: Callable[[str], LoadedImage],
        options: OptionValues,
        noise: Noise,
        system: str | None = None,
    ) -> None:
        """``open_picture`` opens what /image names; ``system`` stands before the first question."""
        self.engine, self._chat = engine, engine.chat()
        self.code = 0
        self._open, self._options, self._noise = open_picture, options, noise
        self._system = system
        self._pictures: list[LoadedImage] = []
        self._said: list[tuple[str, str]] = []
        self._last: Result | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/clear": self._clear,
            "/stats": self._stats,
            "/cache": self._cache,
            "/save": self._save,
            "/help": lambda _: self._tell(HELP),
        }

    def show(self, pictures: list[LoadedImage]) -> None:
        """Show pictures with the next question."""
        self._pictures += pictures

    def run(self, lines: Iterator[str]) -> int:
        """Answer questions and obey commands until /exit; returns the exit code."""
        for line in lines:
            if line.strip() in ("/exit", "/quit"):
                break
            try:
                self.take(line)
            except EngineError as error:
                complain(str(error), error.hint)
                if not sys.stdin.isatty():
                    self.code = self.code or error.exit_code
        return self.code

    def take(self, line: str) -> None:
        """One question or command; raises EngineError, which leaves the conversation usable."""
        command, _, rest = line.strip().partition(" ")
        if command in self._commands:
            self._commands[command](rest.strip())
        elif command.startswith("/") and "/" not in command[1:]:
            known = ", ".join([*self._commands, "/exit"])
            raise OptionError(f"unknown command {display_name(command)[:40]}", hint=f"use {known}")
        elif line.strip():
            self._ask(line)

    def _ask(self, question: str) -> None:
        """Answer as it comes. Ctrl-C ends the answer; what was said stays in the conversation."""
        pictures = [picture.pixels for picture in self._pictures]
        first = not self._chat.token_ids
        prompt = with_system(question, len(pictures), self._system if first else None)
        answer = ""
        with _stop_button() as stopped:
            pieces = self._chat.stream(prompt, pictures, **self._options)
            for piece in pieces:
                if not isinstance(piece, str):
                    self._last = piece
                    continue
                answer += piece
                say(piece)
                if stopped():
                    break
            pieces.close()  # type: ignore[attr-defined]  # a generator: this settles the chat
        say("\n")
        self._pictures = []
        self._said.append((question, answer))
        if stopped():
            self._tell("(stopped)")
        elif self._last is not None:
            self._noise.finished(self._last)

    # -- commands ---------------------------------------------------------------------------------

    def _image(self, path: str) -> None:
        if path in ("", "-"):  # stdin holds the conversation
            raise OptionError("/image needs a file name", hint="/image car.jpg")
        picture = self._open(path)
        for note in picture.notes:
            self._noise.note(note)
        self._pictures.append(picture)
        self._tell(f"{picture.name}: {picture.pixels.width} x {picture.pixels.height} pixels")

    def _clear(self, _: str) -> None:
        self._chat, self._pictures, self._said, self._last = self.engine.chat(), [], [], None
        self._tell("the conversation is forgotten")

    def _stats(self, _: str) -> None:
        if self._last is None:
            raise OptionError("there are no figures yet", hint="ask something first")
        self._noise.figures(self._last)

    def _cache(self, spec: str) -> None:
        if not spec:
            self._tell(f"cache {self.engine.policy.spec}")
            return
        self.engine = self.engine.with_cache(spec)
        self._clear("")
        self._tell(f"cache {self.engine.policy.spec}")

    def _save(self, path: str) -> None:
        if not path:
            raise OptionError("/save needs a file name", hint="/save chat.txt")
        text = "".join(f"> {q}\n\n{answer}\n\n" for q, answer in self._said)
        try:
            with open(path, "x", encoding="utf-8") as file:  # never over what is there
                file.write(text)
        except OSError as error:
            reason = f"{display_name(path)} cannot be written: {error.strerror}"
            raise OptionError(reason, hint="give another name") from None
        self._tell(f"{len(self._said)} answers written to {display_name(path)}")

    def _tell(self, text: str) -> None:
        print(text, file=sys.stderr)


@contextmanager
def _stop_button() -> Iterator[Callable[[], bool]]:
    """Ctrl-C only sets a mark meanwhile, so that no step is cut in half; a second one raises."""
    pressed: list[int] = []

    def press(number: int, _: FrameType | None) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


# -- lines ----------------------------------------------------------------------------------------


def read_lines() -> Iterator[str]:
    """The lines of stdin until its end; what stands between two lines of \"\"\" comes as one."""
    lines = _typed_lines() if sys.stdin.isatty() else _piped_lines()
    for line in lines:
        if line.strip() != FENCE:
            yield line
            continue
        block: list[str] = []
        for inner in lines:
            if inner.strip() == FENCE:
                break
            block.append(inner)
        yield "\n".join(block)


def _piped_lines() -> Iterator[str]:
    try:
        for line in sys.stdin:
            yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise OptionError(f"stdin is not text: {error}", hint="give questions in UTF-8") from None


def _typed_lines() -> Iterator[str]:
    """Lines typed at a prompt. Ctrl-C drops the line; a second one at once leaves."""
    with _history():
        dropped = False
        while True:
            try:
                yield input("> " if sys.stdout.isatty() else "")
                dropped = False
            except EOFError:
                return
            except KeyboardInterrupt:
                if dropped:
                    raise
                dropped = True
                print("\n(Ctrl-C again or /exit leaves)", file=sys.stderr)


@contextmanager
def _history() -> Iterator[None]:
    """Line editing, and what was typed in earlier conversations, readable by the user alone."""
    try:
        import readline
    except ImportError:  # a Python without it: plain lines
        yield
        return
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = home / "avl-engine" / "history"
    readline.parse_and_bind("set enable-bracketed-paste on")
    readline.set_history_length(1000)
    with suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)
