"""What chats and batches need of the engine that is asked: the engine itself, seen from below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ..models.vision_language import VisionLanguageModel
from ..options import Options
from ..pictures.encoded import Picture
from ..policies.policy import Policy
from ..prompts.messages import Messages
from ..result import Timings
from .generation import Answer
from .session import Turn
from .stepping import Stepping


class Asked(Protocol):
    """A loaded model with its policy, which makes turns and answers of prompts; see ``Engine``."""

    model: VisionLanguageModel
    policy: Policy
    stepping: Stepping
    load_seconds: float

    @property
    def device(self) -> torch.device:
        """Where the model lies."""

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
