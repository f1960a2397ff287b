"""A chat completion as clients send it, checked field by field: nothing is ignored in silence.

Every field is either taken, or accepted where it asks for nothing that the engine does not do, or
has no effect on an answer and is named in a header of the response, or is refused by its name.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..pictures.data_url import is_data
from .refusal import RefusalError, wrong


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    pictures: int = 8
    picture_characters: int = 28_000_000  # of all pictures as they are sent, in base64
    messages: int = 256
    choices: int = 8
    tokens: int = 4096  # of an answer
    stops: int = 16
    stop_characters: int = 256
    top_logprobs: int = 20


@dataclass(frozen=True)
class Asking:
    """A request whose fields are all right.

    Attributes:
        messages: as ``Engine.generate`` takes them.
        pictures: ``data:`` URLs, and others where hosts are allowed, in order.
        options: of ``make_options``; without max_new_tokens: as many as fit.
        choices: how many answers (n), whose seeds count on from the first's.
        stream: whether pieces are wanted as they come; ``usage``: and a last one with the counts.
        logprobs: whether every token's log-probability is wanted, and ``top`` others beside it.
        cache: the spec of a policy; None: the server's own.
        tiers: whether the client watches where image tokens lie, see ``Watching``.
        without_effect: fields that were given and change nothing.
    """

    messages: list[dict[str, Any]]
    pictures: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    choices: int = 1
    stream: bool = False
    usage: bool = False
    logprobs: bool = False
    top: int = 0
    cache: str | None = None
    tiers: bool = False
    without_effect: tuple[str, ...] = ()


# Fields that ask for something only beside these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "min_p": (0,),
}
# Fields that say nothing about an answer.
_WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier"),
    *("parallel_tool_calls", "prompt_cache_retention"),
}
_TAKEN = {
    *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k"),
    *("seed", "stop", "n", "stream", "stream_options", "logprobs", "top_logprobs", "ignore_eos"),
    *("repetition_penalty", "cache"),
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def parse(body: object, model: str, limits: Limits, *, urls: bool = False) -> Asking:
    """What a request's JSON asks of the served ``model``; ``urls``: pictures may lie elsewhere.

    Raises RefusalError naming the field.
    """
    if not isinstance(body, dict):
        raise RefusalError(400, "the body is not a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    _refuse_others(given)
    if given.get("model", model) != model:
        raise RefusalError(
            404, f"model: there is no {given['model']!r:.80}, only {model!r}", "model"
        )
    messages, pictures = _conversation(given.get("messages"), limits, urls)
    seed = _whole(given, "seed", -(2**63), 2**63 - 1)
    top_k = _whole(given, "top_k", -1, 2**31)
    options: dict[str, Any] = {
        "temperature": _real(given, "temperature", 0, 100),
        "top_p": _real(given, "top_p", 1e-9, 1),
        "top_k": None if top_k is None else max(0, top_k),
        "seed": (secrets.randbits(62) if seed is None else seed) % 2**63,
        "repetition_penalty": _real(given, "repetition_penalty", 1e-3, 1e3),
        "ignore_eos": _flag(given, "ignore_eos"),
        "stop": _stops(given.get("stop", ()), limits),
    }
    tokens = _tokens(given, limits)
    if tokens is not None:
        options["max_new_tokens"] = tokens
    logprobs = _flag(given, "logprobs")
    top = _whole(given, "top_logprobs", 0, limits.top_logprobs) or 0
    if top and not logprobs:
        raise wrong("top_logprobs", "needs logprobs: true")
    cache, tiers = _cache(given)
    if tiers and not (pictures and _flag(given, "stream") and given.get("n", 1) == 1):
        raise wrong("cache", "tiers are shown of one streamed answer about a picture")
    return Asking(
        messages,
        pictures,
        options,
        choices=_whole(given, "n", 1, limits.choices) or 1,
        stream=_flag(given, "stream"),
        usage=_usage(given),
        logprobs=logprobs,
        top=top,
        cache=cache,
        tiers=tiers,
        without_effect=tuple(sorted(given.keys() & _WITHOUT_EFFECT)),
    )


def _refuse_others(given: Mapping[str, Any]) -> None:
    """Refuse fields that nobody knows, and what they ask for that is not there."""
    for name, value in given.items():
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                raise wrong(name, "is not supported", "unsupported_parameter")
        elif name not in _TAKEN and name not in _WITHOUT_EFFECT:
            raise wrong(f"{name:.60}", "is unknown", "unknown_parameter")


# -- numbers and flags -----------------------------------------------------------------------------


def _whole(given: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise wrong(name, f"is {_shown(value)}, use a whole number from {low} to {high}")
    return value


def _real(given: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    if name not in given:
        return None
    value = given[name]
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right or not math.isfinite(value) or not low <= value <= high:
        raise wrong(name, f"is {_shown(value)}, use a number from {low:g} to {high:g}")
    return float(value)


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise wrong(name, f"is {_shown(value)}, use true or false")
    return value


def _shown(value: object) -> str:
    return f"{value!r:.40}" if isinstance(value, int | float | bool | str) else "no such value"


def _tokens(given: Mapping[str, Any], limits: Limits) -> int | None:
    """The longest answer, by either name; None: as long as may be."""
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in given]
    found = {_whole(given, name, 1, limits.tokens) for name in names}
    if len(found) > 1:
        raise wrong("max_tokens", "is not max_completion_tokens; give one of them")
    return found.pop() if found else None


def _usage(given: Mapping[str, Any]) -> bool:
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise wrong("stream_options", "is no object")
    for name in options.keys() - {"include_usage", "include_obfuscation"}:
        raise wrong("stream_options", f"{name!r:.40} is unknown")
    if options and not given.get("stream"):
        raise wrong("stream_options", "needs stream: true")
    return _flag(options, "include_usage")


def _stops(value: object, limits: Limits) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(text, str) for text in stops):
        raise wrong("stop", "is neither a text nor a list of texts")
    if len(stops) > limits.stops:
        raise wrong("stop", f"has {len(stops)} texts, at most {limits.stops} are taken")
    for text in stops:
        if not 1 <= len(text) <= limits.stop_characters:
            most = limits.stop_characters
            raise wrong("stop", f"a text has {len(text)} characters, use 1 to {most}")
    return list(stops)


def _cache(given: Mapping[str, Any]) -> tuple[str | None, bool]:
    """A policy's spec, and whether tiers are to be shown; a spec may stand for itself."""
    value = given.get("cache")
    fields = value if isinstance(value, dict) else {"policy": value}
    for name in fields.keys() - {"policy", "tiers"}:
        raise wrong("cache", f"{name!r:.40} is unknown, use policy and tiers")
    spec = fields.get("policy")
    if spec is not None and (not isinstance(spec, str) or len(spec) > 500):
        raise wrong("cache", 'is no spec of a cache policy such as "avl"')
    return spec, _flag(fields, "tiers")


# -- messages and their pictures -------------------------------------------------------------------


def _conversation(
    value: object, limits: Limits, urls: bool
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    if not isinstance(value, list) or not value:
        raise wrong("messages", "is no list of messages")
    if len(value) > limits.messages:
        raise wrong("messages", f"are {len(value)}, at most {limits.messages} are taken")
    pictures: list[str] = []
    messages = [_message(item, number, pictures, urls) for number, item in enumerate(value)]
    if len(pictures) > limits.pictures:
        raise wrong("messages", f"hold {len(pictures)} pictures, at most {limits.pictures}")
    characters = sum(map(len, pictures))
    if characters > limits.picture_characters:
        most = limits.picture_characters
        raise wrong("messages", f"pictures have {characters:,} characters, at most {most:,}")
    return messages, tuple(pictures)


def _message(item: object, number: int, pictures: list[str], urls: bool) -> dict[str, Any]:
    where = f"messages[{number}]"
    if not isinstance(item, dict):
        raise wrong(where, "is no object")
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{where}.role", f"is {_shown(role)}, use {', '.join(_ROLES)}")
    for name in item.keys() - {"role", "content", "name"}:
        if item[name] not in (None, [], {}):
            raise wrong(f"{where}.{name:.40}", "is not supported", "unsupported_parameter")
    if isinstance(content, str):
        return {"role": _ROLES[role], "content": content}
    if not isinstance(content, Sequence) or not content:
        raise wrong(f"{where}.content", "is neither a text nor a list of parts")
    parts = [_part(part, f"{where}.content[{n}]", pictures, urls) for n, part in enumerate(content)]
    return {"role": _ROLES[role], "content": parts}


def _part(part: object, where: str, pictures: list[str], urls: bool) -> dict[str, str]:
    if not isinstance(part, dict):
        raise wrong(where, "is no object")
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if part.get("type") != "image_url":
        raise wrong(f"{where}.type", "is not supported, use text or image_url")
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str):
        raise wrong(f"{where}.image_url", "has no url")
    if not is_data(url):  # above all no path
        if not urls:
            raise wrong(f"{where}.image_url", "is no data: URL; this server fetches nothing")
        if not url.startswith("https://"):
            raise wrong(f"{where}.image_url", "is neither a data: nor an https: URL")
    pictures.append(url)
    return {"type": "image"}
