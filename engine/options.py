"""What a request may ask for, checked at once; without torch, so that a wrong flag fails fast."""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any, TypedDict

from .errors import OptionError
from .naming import told

# What a model may be loaded in: the names of its numbers' format, ours and torch's.
DTYPES = ("auto", "fp32", "float32", "bf16", "bfloat16", "fp16", "float16")
# What weights are rounded to as they are read: the decoder's layers, and the language head too.
WEIGHTS = ("auto", "q8", "q4", "q8+head", "q4+head")


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 is greedy (the lowest id wins a tie); 1 the model's own distribution.
        top_k: draw among the k likeliest tokens; 0 is all.
        top_p: draw among the fewest likeliest tokens whose probabilities reach p; 1 is all.
        seed: of the generator; the same seed and request give the same answer.
        repetition_penalty: divides the positive scores of tokens that stand in the prompt or the
            answer already, and multiplies their negative ones (Keskar et al. 2019); 1 is off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _set_numbers(self, temperature=float, top_k=int, top_p=float, seed=int)
        _set_numbers(self, repetition_penalty=float)
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise OptionError(
                f"repetition_penalty is {self.repetition_penalty}",
                hint="use a number above 0; 1 is off",
            )
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise OptionError(f"temperature is {self.temperature}", hint="use 0 (greedy) or more")
        if self.top_k < 0:
            raise OptionError(f"top_k is {self.top_k}", hint="use 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise OptionError(f"top_p is {self.top_p}", hint="use a value above 0 and up to 1")
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"seed is {self.seed}", hint="use 0 to 9223372036854775807")


def _set_numbers(options: object, **kinds: type) -> None:
    """Make numbers plain ones: numpy's are taken too.

    Requests come from files as well: 2.0 tokens or a seed of "7" would only fail much later.
    """
    for name, kind in kinds.items():
        object.__setattr__(options, name, as_number(name, getattr(options, name), kind))


def is_iterable(value: object) -> bool:
    """Whether a value is a list of others: an array of no dimension only claims to be one, and of
    texts, bytes and mappings nobody means the letters, the numbers and the keys."""
    try:
        iter(value)  # type: ignore[call-overload]
    except TypeError:
        return False
    return not isinstance(value, str | bytes | Mapping)


def as_number(name: str, value: Any, kind: type) -> Any:
    """``value`` as an int, or a float; raises OptionError for what is none."""
    try:
        truth = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
        if truth or isinstance(value, str | bytes):
            raise TypeError
        number = operator.index(value) if kind is int else float(value)
        float(number)
    except OverflowError:
        raise OptionError(f"{name} is beyond all use", hint="use a smaller number") from None
    except (TypeError, ValueError, RuntimeError):
        needed = "a whole number" if kind is int else "a number"
        raise OptionError(f"{name} is {told(value)}", hint=f"use {needed}") from None
    return number


def check_kinds(kind: Any, **values: object) -> None:
    """Raise OptionError for a value that is not of ``kind``."""
    for name, value in values.items():
        if not isinstance(value, kind):
            needed = "True or False" if kind is bool else "a text"
            raise OptionError(f"{name} is {told(value)}", hint=f"use {needed}")


def check_threads(count: int | None) -> None:
    """Raise OptionError unless this machine can run ``count`` threads at once; None is any."""
    most = os.cpu_count() or 1
    if count is not None and not 1 <= as_number("threads", count, int) <= most:
        raise OptionError(f"threads is {count}", hint=f"use 1 to {most} on this machine")


class OptionValues(TypedDict, total=False):
    """The keyword arguments that every way of asking takes; see ``make_options``."""

    max_new_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int
    stop: Sequence[str]
    ignore_eos: bool
    repetition_penalty: float | None
    logprobs: bool
    top_logprobs: int
    cancel: Event | None


@dataclass(frozen=True)
class Options:
    """How long an answer may get, how its tokens are drawn, and what ends it.

    ``unsaid`` are attributes of ``sampling`` that nobody has said anything about.
    """

    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    cancel: Event | None = None
    unsaid: frozenset[str] = frozenset()

    def filled(self, values: Mapping[str, float]) -> Options:
        """What is unsaid by ``values``, where they say anything."""
        said: dict[str, Any] = {name: values[name] for name in self.unsaid if name in values}
        return replace(self, sampling=replace(self.sampling, **said)) if said else self

    def __post_init__(self) -> None:
        _set_numbers(self, max_new_tokens=int, top_logprobs=int)
        if not 0 <= self.top_logprobs <= (1000 if self.logprobs else 0):
            raise OptionError(
                f"top_logprobs is {self.top_logprobs}", hint="use 0 to 1000, beside logprobs"
            )
        check_kinds(bool, ignore_eos=self.ignore_eos, logprobs=self.logprobs)
        if self.cancel is not None and not callable(getattr(self.cancel, "is_set", None)):
            raise OptionError(f"cancel is {told(self.cancel)}", hint="use a threading.Event")
        if any(not isinstance(text, str) for text in self.stop):
            raise OptionError("a stop text is not a text", hint='write "stop": ["..."]')
        if self.max_new_tokens < 1:
            raise OptionError(f"max_new_tokens is {self.max_new_tokens}", hint="use 1 or more")
        if any(not text for text in self.stop):
            raise OptionError("a stop text is empty", hint="leave it out to stop at the end token")


def make_options(
    *,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    repetition_penalty: float | None = None,
    logprobs: bool = False,
    top_logprobs: int = 0,
    cancel: Event | None = None,
    **unknown: object,
) -> Options:
    """Options from plain values.

    Args:
        max_new_tokens: the answer's length limit.
        temperature, top_k, top_p, repetition_penalty: see ``Sampling``; temperature 0 is greedy.
            None: greedy without a penalty, or as an engine has it that was loaded ``as_published``.
        seed: see ``Sampling``.
        stop: texts before which the answer ends, or special tokens by their spelling.
        ignore_eos: go on at the end token, for measurements.
        logprobs: give every token's log-probability under the model, in ``Result.logprobs``.
        top_logprobs: how many of the likeliest tokens are given beside each, in
            ``Result.top_logprobs``.
        cancel: an event; once another thread sets it, the answer ends with what it has.

    Raises:
        OptionError: a value is out of its range, or there is no option of that name.
    """
    if unknown:
        known = f"known: {', '.join(OptionValues.__annotations__)}"
        raise OptionError(f"there is no option {', '.join(sorted(unknown))}", hint=known)
    stops = (stop,) if isinstance(stop, str) else stop
    if not is_iterable(stops):
        raise OptionError(f"stop is {told(stop)}", hint="use texts")
    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    drawn["repetition_penalty"] = repetition_penalty
    said: dict[str, Any] = {name: value for name, value in drawn.items() if value is not None}
    sampling, unsaid = Sampling(seed=seed, **said), frozenset(drawn.keys() - said.keys())
    given = max_new_tokens, sampling, tuple(stops), ignore_eos, logprobs, top_logprobs, cancel
    return Options(*given, unsaid)


# Bits of keys and of values that a format of the cache may have; 16: as the model computes.
CACHE_BITS = (16, 8, 4, 2)


def parse_bits(name: str) -> tuple[int, int]:
    """Bits of keys and of values.

    >>> parse_bits("k8v4")
    (8, 4)
    """
    found = re.fullmatch(r"k(\d+)v(\d+)", name) if isinstance(name, str) else None
    bits = tuple(map(int, found.groups())) if found else ()
    if len(bits) != 2 or not set(bits) <= set(CACHE_BITS):
        raise OptionError(
            f"unknown format of the cache {told(name)}",
            hint="use k and v with 16, 8, 4 or 2 bits each, such as k4v4",
        )
    return bits[0], bits[1]
