"""What answers need of the engine that is asked: the engine itself, seen from below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..cache.observe import Observer
from ..options import Options
from ..pictures.encoded import Picture
from ..policies.policy import Policy
from ..prompts.messages import Messages
from ..result import Timings
from .generation import Answer
from .scheduler import Job, Scheduler
from .turn import Turn


class Asked(Protocol):
    """A loaded model with its policy, which makes turns and answers of prompts; see ``Engine``."""

    policy: Policy
    load_seconds: float

    def turn(
        self,
        prompt: Messages,
        images: Sequence[Picture] | None,
        timings: Timings,
        *,
        raw: bool = False,
        after: Sequence[int] | None = None,
        earlier: Sequence[tuple[int, int]] = (),
    ) -> Turn:
        """Open and encode the pictures, and build the prompt around them."""

    def answer(self, options: Options, prompt_ids: Sequence[int]) -> Answer:
        """An empty answer under the model's tokenizer and end tokens."""

    def scheduler(self, rows: int = 1) -> Scheduler:
        """What answers jobs, in pools of its own."""


def new_job(
    engine: Asked,
    prompt: Messages,
    images: Sequence[Picture] | None,
    options: Options,
    *,
    raw: bool = False,
    observer: Observer | None = None,
) -> Job:
    """The job of one prompt by itself: its pictures are encoded, nothing is read yet."""
    timings = Timings(load=engine.load_seconds)
    turn = engine.turn(prompt, images, timings, raw=raw)
    answer = engine.answer(options, turn.token_ids)
    return Job(turn, answer, engine.policy, options.max_new_tokens, timings, observer=observer)
