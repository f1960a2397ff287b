"""Typed reading of a published config.json, with errors that name the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError

_REQUIRED = object()

DAMAGED = "compare the file with the published one; it may be damaged or of another model"
UNSUPPORTED = "the files are whole, but this kind of model is not supported yet; use another one"


def shown(value: object) -> str:
    """A value of an untrusted file for an error: on one line, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class ConfigReader:
    """One section of a config.json whose values are checked as they are read.

    ``where`` names the section in errors.

    >>> ConfigReader({"hidden_size": 64}, "config.json: text_config").integer("hidden_size")
    64
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def fail(self, key: str, problem: str, hint: str = DAMAGED) -> CheckpointError:
        """The error for ``key``; the caller raises it."""
        return CheckpointError(f"{self.where}: {key} {problem}", hint=hint)

    def unsupported(self, key: str, problem: str) -> CheckpointError:
        """The error for a ``key`` that asks for what no model here does."""
        return self.fail(key, problem, UNSUPPORTED)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self.fail(key, "is missing")
            return default
        return value

    def integer(self, key: str, default: Any = _REQUIRED, low: int = 1, high: int = 2**31) -> int:
        """An integer in [low, high]."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"must be an integer, not {shown(value)}")
        if not low <= value <= high:
            raise self.fail(key, f"is {value}; it must lie between {low} and {high}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive finite number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, f"must be a number, not {shown(value)}")
        if not 0 < value < float("inf"):
            raise self.fail(key, f"is {value}; it must be positive and finite")
        return float(value)

    def text(self, key: str, default: Any = _REQUIRED, choices: tuple[str, ...] = ()) -> str:
        """A string, one of ``choices`` where they are given."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.fail(key, f"must be a text, not {shown(value)}")
        if choices and value not in choices:
            raise self.unsupported(key, f"is {shown(value)}; supported: {', '.join(choices)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, not {shown(value)}")
        return value

    def tokens(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Token ids, written as one integer or as a list of them."""
        return self.integers(key, default, "token ids")

    def integers(
        self, key: str, default: tuple[int, ...], what: str = "whole numbers"
    ) -> tuple[int, ...]:
        """Integers from 0 on, written as one or as a list of them."""
        value = self._get(key, default)
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not all(type(number) is int and number >= 0 for number in values):
            raise self.fail(key, f"must be {what}, not {shown(value)}")
        return values

    def section(self, key: str) -> ConfigReader:
        """A nested object; an absent one reads as empty."""
        value = self._get(key, {})
        if not isinstance(value, Mapping):
            raise self.fail(key, f"must be an object, not {shown(value)}")
        return ConfigReader(value, f"{self.where}: {key}")
