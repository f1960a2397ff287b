"""What answers need of the engine that is asked: the engine itself, seen from below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..options import Options
from ..pictures.encoded import Picture
from ..policies.policy import Policy
from ..prompts.messages import Messages
from ..result import Timings
from .generation import Answer
from .scheduler import Job, Scheduler
from .turn import Turn
from .videos import VideoSource


class Asked(Protocol):
    """A loaded model with its policy, which makes turns and answers of prompts; see ``Engine``."""

    policy: Policy
    load_seconds: float

    def with_videos(
        self,
        prompt: Messages,
        images: Sequence[Picture] | None,
        videos: Sequence[VideoSource] | None,
        *,
        raw: bool = False,
    ) -> tuple[Messages, Sequence[Picture]]:
        """The prompt with pictures only, and those."""

    def job(
        self,
        prompt: Messages,
        images: Sequence[Picture] | None,
        options: Options,
        *,
        raw: bool = False,
    ) -> Job:
        """The job of one prompt by itself: its pictures are encoded, nothing is read yet."""

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
