"""Questions about a scene, with exact answers and the places they are read from."""

from __future__ import annotations

import random
from collections import Counter

from training.page import Question, Span, Thing

ZONES = (
    "at the top left",
    "at the top",
    "at the top right",
    "at the left",
    "in the centre",
    "at the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURAL = {"cross": "crosses"}


def plural(kind: str) -> str:
    return PLURAL.get(kind, kind + "s")


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _looked(task: str, question: str, answer: str, thing: Thing) -> Question:
    """A question whose whole answer is read from one object."""
    return Question(task, question, answer, (Span(0, len(answer), thing.box),))


def describe(things: list[Thing], question: str) -> Question:
    """All objects in reading order, one sentence each, after their number."""
    n = len(things)
    text = "There is one object." if n == 1 else f"There are {NUMBERS[n]} objects."
    spans = []
    for t in things:
        start = len(text)
        text += f" {article(t.colour).capitalize()} {t.colour} {t.kind} is {ZONES[t.zone]}."
        spans.append(Span(start, len(text), t.box))
    return Question("describe", question, text, tuple(spans))


def _names(things: list[Thing]) -> dict[Thing, list[str]]:
    """Every way to name an object that fits no other object of the scene."""
    kinds = Counter(t.kind for t in things)
    pairs = Counter((t.kind, t.colour) for t in things)
    names: dict[Thing, list[str]] = {t: [] for t in things}
    for t in things:
        if kinds[t.kind] == 1:
            names[t].append(t.kind)
        if pairs[t.kind, t.colour] == 1:
            names[t].append(f"{t.colour} {t.kind}")
    return names


def _single(things: list[Thing], rng: random.Random) -> list[Question]:
    """Colour, shape and place of one object, and what stands in a zone."""
    out = []
    kinds = Counter(t.kind for t in things)
    colours = Counter(t.colour for t in things)
    names = _names(things)
    for t in things:
        if kinds[t.kind] == 1:
            spelling = rng.choice(("colour", "color"))
            text = rng.choice(
                (f"What {spelling} is the {t.kind}?", f"Which {spelling} is the {t.kind}?")
                if rng.random() < 0.4
                else (f"What {spelling} is the {t.kind}?",)
            )
            out.append(_looked("colour", text, f"The {t.kind} is {t.colour}.", t))
        if colours[t.colour] == 1:
            answer = f"The {t.colour} object is {article(t.kind)} {t.kind}."
            out.append(_looked("shape", f"What is the {t.colour} object?", answer, t))
        if names[t]:
            name = rng.choice(names[t])
            out.append(
                _looked("where", f"Where is the {name}?", f"The {name} is {ZONES[t.zone]}.", t)
            )
        answer = f"{article(t.colour).capitalize()} {t.colour} {t.kind}."
        out.append(_looked("zone", f"What is {ZONES[t.zone]}?", answer, t))
    empty = sorted(set(range(9)) - {t.zone for t in things})
    if empty:
        out.append(Question("zone", f"What is {ZONES[rng.choice(empty)]}?", "Nothing."))
    return out


def _count_answer(number: int, one: str, many: str) -> str:
    return f"There is one {one}." if number == 1 else f"There are {NUMBERS[number]} {many}."


def _counts(things: list[Thing], rng: random.Random, kinds: tuple[str, ...]) -> list[Question]:
    present = Counter(t.kind for t in things)
    out = []
    for kind in sorted({rng.choice(things).kind, present.most_common(1)[0][0], rng.choice(kinds)}):
        answer = _count_answer(present[kind], kind, plural(kind))
        out.append(Question("count", f"How many {plural(kind)} are there?", answer))
    answer = _count_answer(len(things), "object", "objects")
    out.append(Question("count", "How many objects are there?", answer))
    return out


def _exists(things: list[Thing], rng: random.Random, colours: list[str]) -> list[Question]:
    """Yes/no questions, half of them about an object that is not there."""
    t = rng.choice(things)
    name = f"{article(t.colour)} {t.colour} {t.kind}"
    out = [Question("yesno", f"Is there {name}?", f"Yes, there is {name}.")]
    other = rng.choice(
        [c for c in colours if (t.kind, c) not in {(o.kind, o.colour) for o in things}]
    )
    name = f"{article(other)} {other} {t.kind}"
    out.append(Question("yesno", f"Is there {name}?", f"No, there is not {name}."))
    return out


def _relations(things: list[Thing], rng: random.Random) -> list[Question]:
    """Questions that need two places: left of / above, neighbours, and which is larger."""
    names = {t: rng.choice(n) for t, n in _names(things).items() if n}
    if len(names) < 2:
        return []
    out = []
    a, b = rng.sample(sorted(names, key=lambda t: t.zone), 2)
    (ay, ax), (by, bx) = divmod(a.zone, 3), divmod(b.zone, 3)
    if ax != bx:
        word, true = rng.choice((("left", ax < bx), ("right", ax > bx)))
        text = f"Is the {names[a]} to the {word} of the {names[b]}?"
        out.append(Question("yesno", text, "Yes." if true else "No."))
    if ay != by:
        word, true = rng.choice((("above", ay < by), ("below", ay > by)))
        out.append(
            Question(
                "yesno", f"Is the {names[a]} {word} the {names[b]}?", "Yes." if true else "No."
            )
        )
    by_zone = {t.zone: t for t in things}
    for step, word in ((-1, "left"), (1, "right")):
        if 0 <= bx + step <= 2 and b.zone + step in by_zone:
            near = by_zone[b.zone + step]
            answer = f"{article(near.colour).capitalize()} {near.colour} {near.kind}."
            out.append(_looked("relation", f"What is {word} of the {names[b]}?", answer, near))
    wide_a, wide_b = a.box[2] - a.box[0], b.box[2] - b.box[0]
    if max(wide_a, wide_b) > 1.3 * min(wide_a, wide_b):
        larger = a if wide_a > wide_b else b
        text = f"Which is larger, the {names[a]} or the {names[b]}?"
        out.append(Question("relation", text, f"The {names[larger]}."))
    return out


def ask(things: list[Thing], rng: random.Random) -> list[Question]:
    """All questions about a scene in random order, the description first."""
    from training.scenes import COLOURS, KINDS

    words = ("Describe the picture in detail.",) * 3 + (
        "Describe the picture.",
        "Describe the image in detail.",
        "What do you see?",
    )
    short = _single(things, rng) + _counts(things, rng, KINDS)
    short += _exists(things, rng, list(COLOURS)) + _relations(things, rng)
    rng.shuffle(short)
    return [describe(things, rng.choice(words)), *short]
