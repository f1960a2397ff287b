"""Answers in the shapes of OpenAI's chat completions, whole and in chunks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..prompts.tokenizer import Tokenizer
from ..result import Result
from .worker import Scores

# What an answer that nobody wants any more is said to have ended by: clients know no other word.
_REASONS = {"stop": "stop", "length": "length", "cancelled": "stop"}


@dataclass(frozen=True)
class Shapes:
    """What all responses to a request have in common."""

    id: str
    created: int
    model: str
    tokenizer: Tokenizer

    def completion(
        self, results: Sequence[Result], cached: int, scores: Sequence[Scores] | None
    ) -> dict[str, Any]:
        """The whole response; ``scores`` by answer where they are wanted."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "finish_reason": _REASONS[result.finish_reason],
                "logprobs": None if scores is None else self._logprobs(scores[index]),
            }
            for index, result in enumerate(results)
        ]
        return self._head("chat.completion") | {"choices": choices, "usage": usage(results, cached)}

    def chunk(
        self,
        index: int,
        delta: dict[str, str],
        finish: str | None = None,
        scores: Scores | None = None,
        *,
        usage: bool = False,
    ) -> dict[str, Any]:
        """A piece of one answer; ``usage``: a last chunk will tell the counts."""
        choice = {
            "index": index,
            "delta": delta,
            "finish_reason": finish and _REASONS[finish],
            "logprobs": self._logprobs(scores) if scores else None,
        }
        head = self._head("chat.completion.chunk") | {"choices": [choice]}
        return head | ({"usage": None} if usage else {})

    def counts(self, results: Sequence[Result], cached: int) -> dict[str, Any]:
        """The last chunk: no piece of an answer, but what all of it took."""
        return self._head("chat.completion.chunk") | {
            "choices": [],
            "usage": usage(results, cached),
        }

    def watched(self, value: dict[str, Any], *, usage: bool) -> dict[str, Any]:
        """A chunk of no text, of what the cache of the answer shows."""
        head = self._head("chat.completion.chunk") | {"choices": [], "cache": value}
        return head | ({"usage": None} if usage else {})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, scores: Scores) -> dict[str, Any]:
        content = [
            self._token(token, value) | {"top_logprobs": [self._token(*each) for each in top]}
            for token, value, top in scores
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        # Behind another token: by itself a word would lose the space before it.
        lead = self.tokenizer.encode("a")[-1]
        text = self.tokenizer.decode([lead, token])[len(self.tokenizer.decode([lead])) :]
        found = re.fullmatch(r"<0x([0-9A-F]{2})>", self.tokenizer.spelling(token) or "")
        # A part of a character has no text; SentencePiece spells its byte, of others it is unknown.
        whole = None if "\ufffd" in text else [*text.encode()]
        bytes_ = [int(found[1], 16)] if found else whole
        return {"token": text, "bytes": bytes_, "logprob": max(logprob, -9999.0)}


def usage(results: Sequence[Result], cached: int) -> dict[str, Any]:
    """Tokens of a request and its answers; ``cache`` is what the first answer held, and ``cached``
    how many of the prompt's tokens were there already.
    """
    first = results[0]
    prompt, said = first.prompt_tokens, sum(len(result.token_ids) for result in results)
    cache = first.cache
    return {
        "prompt_tokens": prompt,
        "completion_tokens": said,
        "total_tokens": prompt + said,
        "prompt_tokens_details": {"image_tokens": first.image_tokens, "cached_tokens": cached},
        "cache": {
            "policy": cache.policy,
            "stored_share": round(cache.stored_share, 4),
            "attended_share": round(cache.used_share, 4),
            "picture_stored_share": round(cache.image_stored_share, 4),
            "picture_read_share": round(cache.image_read_share, 4),
            "bytes": cache.bytes_used,
            "bytes_full": cache.bytes_full,
        },
        "seconds": {
            "first_token": round(first.timings.ttft, 4),
            "per_token": round(first.timings.per_token, 5),
        },
    }
