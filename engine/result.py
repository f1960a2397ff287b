"""What an answer comes back as."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .cache.report import CacheReport
    from .pictures.boxes import Box

FinishReason = Literal["stop", "length", "cancelled"]
Likeliest = list[tuple[int, float]]  # ids of the likeliest tokens and their log-probabilities


@dataclass
class Timings:
    """Seconds spent, and what follows from them.

    Attributes:
        load: reading the model, once per engine.
        picture: opening, preprocessing and encoding the pictures.
        prefill: the prompt, up to the first token's logits.
        decode: all decode steps together.
        steps: decode steps; the first token needs none.
    """

    load: float = 0.0
    picture: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    steps: int = 0

    @property
    def ttft(self) -> float:
        """Time to the first token: pictures and prefill."""
        return self.picture + self.prefill

    @property
    def per_token(self) -> float:
        """Mean seconds of a decode step; 0 without any."""
        return self.decode / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decode steps per second; 0 without any."""
        return self.steps / self.decode if self.decode else 0.0


@dataclass(frozen=True)
class Result:
    """A finished answer.

    Attributes:
        text: the answer, cut before a stop text.
        token_ids: the generated ids without the end token.
        prompt_tokens: tokens of the prompt, pictures expanded.
        image_tokens: how many of them are image tokens.
        finish_reason: "stop" (end token or stop text), "length" (max_new_tokens reached) or
            "cancelled".
        timings: seconds.
        cache: tokens and bytes in the cache when the answer ended.
        index: which request of a batch this answers, from 0.
        logprobs: log-probability of each of ``token_ids``, where they were asked for.
        top_logprobs: the likeliest tokens in place of each, where they were asked for.
        boxes: the regions that the text names, in pixels of the latest picture (Qwen-VL).
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    image_tokens: int
    finish_reason: FinishReason
    timings: Timings
    cache: CacheReport
    index: int = 0
    logprobs: list[float] | None = None
    top_logprobs: list[Likeliest] | None = None
    boxes: list[Box] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The result as plain values, for JSON; times come with what is derived from them."""
        values = asdict(self)
        for name in ("ttft", "per_token", "tokens_per_second"):
            values["timings"][name] = getattr(self.timings, name)
        return values
