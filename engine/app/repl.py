"""``--chat``: a conversation on the terminal, or over a pipe with one question a line.

Answers go to stdout, everything else to stderr; ``app.lines`` says how lines are typed.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

from ..errors import EngineError, OptionError
from ..files import write_whole
from ..naming import display_name
from ..pictures.video import Video
from ..prompts.messages import with_system
from .capping import capped
from .lines import FENCE, is_dropped, typed_paths
from .terminal import complain, say

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..engine import Engine
    from ..options import OptionValues
    from ..pictures.image import LoadedImage
    from ..result import Result
    from .noise import Noise

_LEAVE = ("/exit", "/quit")
_BARE = (*_LEAVE, "/clear", "/stats", "/help")  # commands that take nothing

HELP = f"""/image FILE   show a picture with the next question; a file dropped here does the same
/video FILE   show a video, or a folder of its frames
/clear        forget the conversation
/stats        figures of the last answer
/cache SPEC   another cache policy, such as full or avl; forgets the conversation
/save FILE    write the conversation as text
/help         this list
/exit         leave; /quit and Ctrl-D too
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
        show_video: Callable[[str], Video] = Video,
    ) -> None:
        """``open_picture`` opens what /image names, ``show_video`` what /video does; ``system``
        stands before the first question.
        """
        self.engine, self._chat = engine, engine.chat()
        self.code = 0
        self._open, self._options, self._noise = open_picture, options, noise
        self._video_of = show_video
        self._system = system
        self._pictures: list[LoadedImage] = []
        self._videos: list[Video] = []
        self._said: list[tuple[str, str]] = []
        self._last: Result | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/video": self._video,
            "/clear": self._clear,
            "/stats": self._stats,
            "/cache": self._cache,
            "/save": self._save,
            "/help": lambda _: self._tell(HELP),
        }

    @property
    def commands(self) -> list[str]:
        """What a line may begin with instead of a question."""
        return [*self._commands, "/exit"]

    def show(self, pictures: Sequence[LoadedImage], videos: Sequence[Video] = ()) -> None:
        """Show pictures and videos with the next question."""
        self._pictures += pictures
        self._videos += videos

    def run(self, lines: Iterator[str]) -> int:
        """Answer questions and obey commands until /exit; returns the exit code."""
        for line in lines:
            if line.strip() in _LEAVE:
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
        if command in _BARE and rest.strip():
            raise OptionError(f"{command} stands alone", hint=f"write {command}")
        if command in self._commands:
            self._commands[command](rest.strip())
        elif is_dropped(line):
            self._image(line.strip())
        elif command.startswith("/") and "/" not in command[1:]:
            raise OptionError(
                f"unknown command {display_name(command)[:40]}",
                hint=f"use {', '.join(self.commands)}",
            )
        elif line.strip():
            self._ask(line)

    def _ask(self, question: str) -> None:
        """Answer as it comes. Ctrl-C ends the answer; what was said stays in the conversation."""
        pictures, self._pictures = [picture.pixels for picture in self._pictures], []
        videos, self._videos = self._videos, []
        try:
            self._answer(question, pictures, videos)
        except EngineError:  # shown again, they would be refused again
            if pictures:
                self._tell(f"({len(pictures)} pictures are put away; /image shows one again)")
            if videos:
                self._tell(f"({len(videos)} videos are put away; /video shows one again)")
            raise

    def _answer(self, question: str, pictures: list[Image], videos: list[Video]) -> None:
        first = not self._chat.token_ids
        system = self._system if first else None
        prompt = with_system(question, len(pictures), system, len(videos))
        answer = ""
        with _stop_button() as stopped:
            ask = partial(self._chat.stream, prompt, pictures, videos=videos)
            pieces = capped(ask, self._options, self._noise.note)
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
        self._said.append((question, answer))
        if stopped():
            self._tell("(stopped)")
        elif self._last is not None:
            self._noise.finished(self._last)

    # -- commands ---------------------------------------------------------------------------------

    def _image(self, text: str) -> None:
        paths = typed_paths(text)
        if not paths:
            raise OptionError("/image needs a file name", hint="/image car.jpg")
        if "-" in paths:
            raise OptionError("stdin (-) holds the conversation", hint="/image car.jpg")
        refused: list[EngineError] = []
        for path in paths:
            try:
                self._show_one(self._open(path))
            except EngineError as error:
                refused.append(error)
        for other in refused[1:]:
            complain(str(other), other.hint)
        if refused:
            raise refused[0]

    def _show_one(self, picture: LoadedImage) -> None:
        for note in picture.notes:
            self._noise.note(note)
        self._tell(f"{picture.name}: {picture.pixels.width} x {picture.pixels.height} pixels")
        self.show([picture])

    def _video(self, text: str) -> None:
        paths = typed_paths(text)
        if not paths:
            raise OptionError("/video needs a file name", hint="/video clip.mp4")
        for path in paths:
            video = self._video_of(path)
            video.images()  # all but its pixels is checked
            self.show([], [video])
            self._tell(f"{display_name(path)}: shown with the next question")

    def _clear(self, _: str) -> None:
        self._chat, self._said, self._last = self.engine.chat(), [], None
        self._pictures, self._videos = [], []
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

    def _save(self, text: str) -> None:
        if not text:
            raise OptionError("/save needs a file name", hint="/save chat.txt")
        path = " ".join(typed_paths(text))
        text = "".join(f"> {q}\n\n{answer}\n\n" for q, answer in self._said)
        try:
            if os.path.lexists(path):  # never over what is there
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            write_whole(path, text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            reason = f"{display_name(path)} cannot be written: {error.strerror}"
            raise OptionError(reason, hint="give another name, or a place with room") from None
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
