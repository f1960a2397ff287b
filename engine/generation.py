"""The one prefill and decode loop, and the rules that end an answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from engine.cache.decode import Decoding
from engine.cache.layout import Layout
from engine.cache.policy import Policy
from engine.cache.pool import Pool
from engine.cache.prefill import Prefill
from engine.cache.report import CacheReport, report
from engine.cache.row import Row
from engine.errors import CapacityError, CheckpointError, OptionError
from engine.models.llava import Llava
from engine.result import FinishReason, Result, Timings
from engine.sampling import Sampler, Sampling
from engine.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Options:
    """How long an answer may get, how its tokens are drawn, and what ends it.

    ``stop`` are texts: the answer ends before the first of them. ``ignore_eos`` goes on to
    ``max_new_tokens`` whatever the model says, for measurements.
    """

    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise OptionError(f"max_new_tokens is {self.max_new_tokens}", hint="use 1 or more")
        if any(not text for text in self.stop):
            raise OptionError("a stop text is empty", hint="leave it out to stop at the end token")


@dataclass(frozen=True)
class Turn:
    """New tokens for a sequence: ids, where pictures lie, and the pictures' features."""

    token_ids: Sequence[int]
    spans: list[tuple[int, int]]
    features: Sequence[Tensor]

    @property
    def image_tokens(self) -> int:
        """Image tokens among the ids."""
        return sum(end - start for start, end in self.spans)


class Session:
    """One sequence and its cache: prefill a turn, then decode token by token."""

    def __init__(self, model: Llava, policy: Policy) -> None:
        self.model, self.policy = model, policy
        self._decoder = model.decoder
        weight, config = self._decoder.norm.weight, self._decoder.config
        self.pools = [
            Pool(config.kv_heads, config.head_dim, weight.dtype, weight.device)
            for _ in range(config.layers)
        ]
        self.row: Row | None = None
        self._decoding: Decoding | None = None

    @property
    def seen(self) -> int:
        """Tokens in the sequence so far, evicted ones included."""
        if self._decoding is not None:
            return self._decoding.seen[0]
        return self.row.seen if self.row else 0

    @torch.inference_mode()
    def prefill(self, turn: Turn, new_tokens: int) -> Tensor:
        """Process a turn; returns the next token's logits ``[vocab]``."""
        _check_context(turn, self.seen, new_tokens, self._decoder.config.context)
        self._settle()
        device = self._decoder.norm.weight.device
        layout = Layout.of_tokens(len(turn.token_ids), turn.spans, device)
        step = Prefill(self.pools, self.policy, layout, new_tokens, self.row)
        ids = torch.tensor(turn.token_ids, device=device)
        hidden = self._decoder(self.model.embed(ids, turn.spans, turn.features), step)
        self.row = step.row
        return self._decoder.logits(hidden[-1])

    @torch.inference_mode()
    def decode(self, token_id: int) -> Tensor:
        """Process one more token; returns the next token's logits ``[vocab]``."""
        if self._decoding is None:
            assert self.row is not None, "prefill comes first"
            self._decoding = Decoding(self.pools, self.policy, [self.row])
        token = torch.tensor([token_id], device=self._decoding.device)
        hidden = self._decoder(self._decoder.embed(token), self._decoding)
        self._decoding.advance()
        return self._decoder.logits(hidden[0])

    @torch.inference_mode()
    def report(self) -> CacheReport:
        """Count what the cache holds now."""
        self._settle()
        assert self.row is not None, "prefill comes first"
        return report(self.row, self.pools, self.policy)

    def _settle(self) -> None:
        if self._decoding is not None:
            self.row = self._decoding.settle(0)
            self._decoding = None


def _check_context(turn: Turn, seen: int, new_tokens: int, context: int) -> None:
    prompt = seen + len(turn.token_ids)
    if prompt + new_tokens > context:
        raise CapacityError(
            f"prompt {prompt:,} tokens ({turn.image_tokens:,} image) + {new_tokens:,} requested "
            f"exceed the model's context of {context:,}",
            hint="shorten the prompt, give fewer pictures, or lower --max-new-tokens",
        )


class StopTexts:
    """Passes text on until a stop text appears; holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop, self.held, self.found = stop, "", False

    def push(self, piece: str) -> str:
        """The part of the text so far that is certain to be shown."""
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


def generate(
    session: Session,
    turn: Turn,
    tokenizer: Tokenizer,
    options: Options,
    end_tokens: frozenset[int],
    timings: Timings,
) -> Iterator[str | Result]:
    """Answer a turn: yields pieces of text as they become certain, and the Result at the end."""
    sampler, stream = Sampler(options.sampling), StreamDecoder(tokenizer)
    stops = StopTexts(options.stop)
    token_ids: list[int] = []
    pieces: list[str] = []
    ended = False
    began = perf_counter()
    logits = session.prefill(turn, options.max_new_tokens)
    _refuse_nan(logits)
    timings.prefill = perf_counter() - began
    token = sampler.choose(logits)
    while token not in end_tokens or options.ignore_eos:
        token_ids.append(token)
        piece = stops.push(stream.push(token))
        if piece:
            pieces.append(piece)
            yield piece
        if stops.found or len(token_ids) == options.max_new_tokens:
            break
        began = perf_counter()
        token = sampler.choose(session.decode(token))
        timings.steps += 1
        timings.decode += perf_counter() - began
    else:
        ended = True
    if not stops.found:
        last = stops.push(stream.flush())
        last += "" if stops.found else stops.held
        if last:
            pieces.append(last)
            yield last
    finish: FinishReason = "stop" if ended or stops.found else "length"
    yield Result(
        text="".join(pieces),
        token_ids=token_ids,
        prompt_tokens=len(turn.token_ids),
        image_tokens=turn.image_tokens,
        finish_reason=finish,
        timings=timings,
        cache=session.report(),
    )


def _refuse_nan(logits: Tensor) -> None:
    """One check per answer: numbers that are not finite would only decode to noise."""
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError(
            "the model's first logits are not finite",
            hint="the weights may be damaged (run --check), or overflow here: try fp32 or bf16",
        )
