"""``--compare``: the exact model beside a cache policy, on the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from ..errors import OptionError

if TYPE_CHECKING:
    from ..engine import Engine
    from ..options import OptionValues
    from ..pictures.encoded import Picture
    from ..prompts.messages import Messages
    from ..result import Result


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt, and the first token (from 0) that differs; None: no token does."""

    full: Result
    chosen: Result
    first_difference: int | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "full": self.full.as_dict(),
            "chosen": self.chosen.as_dict(),
            "first_difference": self.first_difference,
        }

    def lines(self) -> list[str]:
        """The report, for people."""
        return [
            *_describe(self.full),
            *_describe(self.chosen),
            _difference(self.first_difference, self.full),
        ]


def compare(
    engine: Engine,
    prompt: Messages,
    images: Sequence[Picture],
    options: OptionValues,
    *,
    raw: bool = False,
) -> Comparison:
    """Answer ``prompt`` under the full cache and under the engine's policy.

    A few tokens are generated first, so that neither run pays for what the first run of a process
    sets up; the pictures are encoded before both.

    Raises OptionError if the engine's policy is the full cache itself.
    """
    if engine.policy.spec == "full":
        raise OptionError(
            "--compare has nothing to compare: the cache is full", hint="add --cache avl"
        )
    encoded = [engine.encode(image) for image in images]
    exact = engine.with_cache("full")
    exact.generate("Hello", max_new_tokens=2)
    full = exact.generate(prompt, encoded, raw=raw, **options)
    chosen = engine.generate(prompt, encoded, raw=raw, **options)
    return Comparison(full, chosen, first_difference(full.token_ids, chosen.token_ids))


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place where two sequences differ, the end of the shorter one counted; else None.

    >>> first_difference([5, 6, 7], [5, 6]), first_difference([5], [5])
    (2, None)
    """
    pairs = enumerate(zip_longest(one, other))
    return next((place for place, (a, b) in pairs if a != b), None)


def _describe(result: Result) -> list[str]:
    cache, times = result.cache, result.timings
    return [
        f"--- {cache.policy}",
        result.text,
        f"[{len(result.token_ids)} tokens | cache {cache.bytes_used / 1e6:.2f} MB of "
        f"{cache.bytes_full / 1e6:.2f} MB full | prefill {times.prefill * 1e3:.0f} ms, "
        f"{times.tokens_per_second:.1f} tokens/s]",
    ]


def _difference(place: int | None, full: Result) -> str:
    if place is None:
        return f"--- the same {len(full.token_ids)} tokens"
    return f"--- the answers differ from token {place + 1} on (of {len(full.token_ids)})"
