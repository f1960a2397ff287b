"""Key-value fields of documents: names, how they are printed, and random values."""

from __future__ import annotations

import random
from dataclasses import dataclass

CURRENCIES = ("", "", "$", "EUR")
MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
NAMES = {
    "money": ("total", "tax", "price", "change", "cash", "discount", "subtotal", "balance", "fee"),
    "date": ("date", "due date", "expiry date", "birth date"),
    "time": ("time", "arrival", "departure"),
    "code": ("code", "order", "invoice", "account", "flight", "seat", "ticket", "plate"),
    "number": ("number", "table", "room", "gate", "quantity", "phone", "platform", "weight"),
    "word": ("name", "city", "street", "item", "customer", "country", "company", "cashier"),
}
_CONSONANTS, _VOWELS = "BCDFGHJKLMNPRSTVWZ", "AEIOUY"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_DIGITS = "0123456789"


@dataclass(frozen=True)
class Field:
    """`name` as asked for, `key` as printed, `value` as printed and answered."""

    name: str
    key: str
    value: str


def _take(alphabet: str, n: int, rng: random.Random) -> str:
    return "".join(rng.choice(alphabet) for _ in range(n))


def word(rng: random.Random) -> str:
    """A pronounceable upper-case word of 3 to 8 letters."""
    text = "".join(
        rng.choice(_CONSONANTS if i % 2 == 0 else _VOWELS) for i in range(rng.randint(3, 7))
    )
    return text + (rng.choice(_CONSONANTS) if rng.random() < 0.3 else "")


def _date(rng: random.Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1990, 2035)
    return rng.choice(
        (
            f"{year}-{month:02}-{day:02}",
            f"{day:02}.{month:02}.{year}",
            f"{day:02}/{month:02}/{year}",
            f"{day} {MONTHS[month - 1]} {year}",
        )
    )


def _code(rng: random.Random) -> str:
    return rng.choice(
        (
            f"{_take(_LETTERS, 2, rng)}-{_take(_DIGITS, rng.randint(2, 4), rng)}",
            f"{_take(_LETTERS, 1, rng)}{_take(_DIGITS, rng.randint(1, 3), rng)}",
            f"{_take(_LETTERS + _DIGITS, rng.randint(4, 7), rng)}",
            f"{_take(_DIGITS, 2, rng)}-{_take(_LETTERS, 3, rng)}",
        )
    )


def value(kind: str, rng: random.Random) -> str:
    """A random value of one kind, as printed."""
    if kind == "money":
        amount = f"{rng.randint(0, 10 ** rng.randint(1, 3) - 1)}.{rng.randint(0, 99):02}"
        sign = rng.choice(CURRENCIES)
        return f"{amount} EUR" if sign == "EUR" else sign + amount
    if kind == "date":
        return _date(rng)
    if kind == "time":
        return f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    if kind == "code":
        return _code(rng)
    if kind == "number":
        return str(rng.randint(1, 10 ** rng.randint(1, 6)))
    return word(rng) if rng.random() < 0.75 else f"{word(rng)} {word(rng)}"


def choose_fields(n: int, rng: random.Random) -> list[Field]:
    """`n` different fields; a page prints its keys in one style."""
    pairs = rng.sample([(kind, name) for kind, names in NAMES.items() for name in names], n)
    upper, colon = rng.random() < 0.12, rng.random() < 0.6
    out = []
    for kind, name in pairs:
        key = name.upper() if upper else name.capitalize()
        out.append(Field(name, key + (":" if colon else ""), value(kind, rng)))
    return out
