"""What a drawn picture carries: pixels, questions with answers, and where everything stands."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image

SIZE = 336  # pixels on a side, as in the published LLaVA-1.5
PATCH = 14
GRID = SIZE // PATCH  # 24 patches on a side, 576 in all

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the 336 px page


@dataclass(frozen=True)
class Glyph:
    """One printed character and the centre of its box."""

    char: str
    x: float
    y: float


@dataclass(frozen=True)
class Thing:
    """One drawn object of a scene."""

    kind: str
    colour: str
    zone: int  # 0..8, row-major in the 3 x 3 grid of zones
    box: Box


@dataclass(frozen=True)
class Span:
    """Characters `start:end` of an answer are read off the picture at `box`."""

    start: int
    end: int
    box: Box


@dataclass(frozen=True)
class Question:
    """A question with its exact answer; `task` names the kind of question for the tables."""

    task: str
    text: str
    answer: str
    spans: tuple[Span, ...] = ()


@dataclass
class Page:
    """A picture, all questions about it, and the labels of its patches."""

    image: Image.Image
    questions: list[Question]
    glyphs: list[Glyph] = field(default_factory=list)
    things: list[Thing] = field(default_factory=list)
