"""One answer: the rules that choose its tokens and end it, and its text as it comes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache.report import CacheReport
from ..errors import CheckpointError
from ..options import Options
from ..pictures.boxes import Reads
from ..prompts.tokenizer import StreamDecoder, Tokenizer
from ..result import FinishReason, Likeliest, Result, Timings
from .sampling import Sampler
from .scheduler import Over
from .turn import Turn


class StopTexts:
    """Passes text on until a stop text appears; holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop, self.held, self.found = stop, "", False

    def push(self, piece: str) -> str:
        """As much of the text so far as is certain to be shown."""
        self.held += piece
        starts = [at for text in self.stop if (at := self.held.find(text)) >= 0]
        if starts:
            self.found = True
            shown, self.held = self.held[: min(starts)], ""
            return shown
        keep = max((_overlap(self.held, text) for text in self.stop), default=0)
        split = len(self.held) - keep
        shown, self.held = self.held[:split], self.held[split:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class OuterSpace:
    """Drops the white space before and after a text that comes in pieces."""

    def __init__(self) -> None:
        self._held, self._begun = "", False

    def drop(self, piece: str) -> str:
        """As much of the text so far as is certain to be shown."""
        text = self._held + piece
        if not self._begun:
            text = text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        self._begun = self._begun or bool(shown)
        return shown


class Answer:
    """One answer in the making: takes logits, chooses tokens, and knows when it is over."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        options: Options,
        end_tokens: frozenset[int],
        prompt_ids: Sequence[int] = (),
        *,
        strip: bool = False,
        boxes: Reads | None = None,
    ) -> None:
        """``strip`` and ``boxes`` are those of ``Family``."""
        self.token_ids: list[int] = []
        self.finish: FinishReason | None = None
        self._options = options
        named = {tokenizer.special_id(text) for text in options.stop} - {None}
        self._end_tokens = named if options.ignore_eos else end_tokens | named
        self._sampler, self._stream = (
            Sampler(options.sampling, prompt_ids),
            StreamDecoder(tokenizer),
        )
        self._stops = StopTexts(options.stop)
        self._space = OuterSpace() if strip else None
        self._boxes = boxes
        self._pieces: list[str] = []
        self._logprobs: list[float] = []
        self._top: list[Likeliest] = []

    @property
    def text(self) -> str:
        """What has been said so far."""
        return "".join(self._pieces)

    def choose(self, logits: Tensor) -> int:
        """Draw the next token from ``logits [vocab]``."""
        if not self.token_ids:
            _refuse_nan(logits)
        token = self._sampler.choose(logits)
        if self._options.logprobs:
            self._score(logits.log_softmax(-1), token)
        return token

    def _score(self, logprobs: Tensor, token: int) -> None:
        """Note the log-probabilities ``[vocab]`` of a chosen token and of the likeliest ones."""
        self._logprobs.append(float(logprobs[token]))
        if self._options.top_logprobs:
            best = logprobs.topk(min(self._options.top_logprobs, len(logprobs)))
            self._top.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))

    def scores(self, first: int = 0) -> list[tuple[int, float, Likeliest]]:
        """Every token from number ``first`` on, its log-probability, and the likeliest ones."""
        tokens = self.token_ids[first:]
        top = self._top[first:] or [[] for _ in tokens]
        return list(zip(tokens, self._logprobs[first:], top, strict=False))

    def take(self, token: int) -> str:
        """Add a chosen token; returns the text that is now certain, the rest of it at the end."""
        if token in self._end_tokens:
            self.finish = "stop"
            return self._say(self._rest())
        self.token_ids.append(token)
        piece = self._stops.push(self._stream.push(token))
        if self._stops.found:
            self.finish = "stop"
        elif len(self.token_ids) == self._options.max_new_tokens:
            self.finish = "length"
            piece += self._rest()
        elif self.stopped():
            piece += self._rest()
        return self._say(piece)

    def stopped(self) -> bool:
        """Whether it is over without a further token: its ``cancel`` is set."""
        if self._options.cancel is not None and self._options.cancel.is_set():
            self.finish = "cancelled"
        return self.finish is not None

    def _rest(self) -> str:
        """What was held back, once nothing more can follow."""
        last = self._stops.push(self._stream.flush())
        return last if self._stops.found else last + self._stops.held

    def _say(self, piece: str) -> str:
        if self._space:
            piece = self._space.drop(piece)
        if piece:
            self._pieces.append(piece)
        return piece

    def result(self, turn: Turn, timings: Timings, cache: CacheReport) -> Result:
        """The finished answer."""
        assert self.finish is not None, "the answer is not over"
        return Result(
            text=self.text,
            token_ids=self.token_ids,
            prompt_tokens=len(turn.token_ids),
            image_tokens=turn.image_tokens,
            finish_reason=self.finish,
            timings=timings,
            cache=cache,
            logprobs=self._logprobs[: len(self.token_ids)] if self._options.logprobs else None,
            top_logprobs=self._top[: len(self.token_ids)] if self._options.top_logprobs else None,
            boxes=self._boxes(self.text, turn.sizes[-1]) if self._boxes and turn.sizes else [],
        )


class Forced:
    """Takes given tokens in place of chosen ones; ``scores`` is what was said before each."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.scores: list[Tensor] = []
        self.finish: FinishReason | None = None
        self._token_ids = token_ids

    def choose(self, logits: Tensor) -> int:
        """The next given token."""
        self.scores.append(logits)
        if len(self.scores) >= len(self._token_ids):
            self.finish = "length"
        return 0 if self.finish else self._token_ids[len(self.scores) - 1]

    def take(self, token: int) -> str:
        """Nothing is said."""
        return ""

    def stopped(self) -> bool:
        """Nobody can stop it."""
        return False


def result_of(over: Over) -> Result:
    """What a job that is over has come to; raises what it failed of."""
    job = over.job
    if over.cache is None:
        assert job.failed is not None, "only what failed has held nothing"
        raise job.failed
    assert isinstance(job.answer, Answer), "other answers have no result"
    return job.answer.result(job.turn, job.timings, over.cache)


def _refuse_nan(logits: Tensor) -> None:
    """One check per answer: numbers that are not finite would only decode to noise."""
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError(
            "the model's first logits are not finite",
            hint="the weights may be damaged (run --check), or overflow here: try fp32 or bf16",
        )
