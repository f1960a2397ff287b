"""Scenes: one to eight coloured cars and shapes in a 3 x 3 grid of zones, with questions."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from training.page import SIZE, Box, Page, Thing
from training.scene_questions import ask

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 32, 38),
    "orange": (242, 132, 22),
    "yellow": (246, 216, 42),
    "green": (44, 148, 62),
    "blue": (38, 84, 202),
    "purple": (122, 46, 164),
    "pink": (246, 142, 188),
    "brown": (118, 72, 38),
    "black": (24, 24, 28),
    "white": (246, 246, 246),
    "grey": (134, 134, 138),
}
KINDS = (
    "car",
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "diamond",
    "cross",
    "ring",
    "house",
)
CAR_SHARE = 0.28
SCALE = 2  # scenes are drawn twice as large and reduced, so that edges are smooth
ZONE = SIZE / 3

RGB = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class SceneStyle:
    """How hard a scene is: number of objects, smallest and largest half-width in pixels."""

    objects: tuple[int, int] = (1, 8)
    radius: tuple[float, float] = (20.0, 42.0)
    jitter: float = 14.0


def _jittered(rgb: RGB, rng: random.Random, amount: int) -> RGB:
    return tuple(max(0, min(255, c + rng.randint(-amount, amount))) for c in rgb)  # type: ignore[return-value]


def _luma(rgb: RGB) -> float:
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


def _background(rng: random.Random, side: int) -> tuple[Image.Image, list[RGB]]:
    """A plain page, a soft vertical gradient, or sky above ground; and the colours it shows."""
    light = rng.random() < 0.8
    pale = [(238, 238, 234), (222, 232, 240), (240, 230, 218), (226, 238, 224), (232, 226, 238)]
    dark = [(52, 54, 60), (40, 48, 62), (58, 50, 46)]
    first = _jittered(rng.choice(pale if light else dark), rng, 10)
    second = _jittered(rng.choice(pale if light else dark), rng, 10)
    image = Image.new("RGB", (side, side), first)
    style = rng.random()
    if style < 0.45:
        return image, [first]
    if style < 0.7:
        ramp = Image.linear_gradient("L").resize((side, side))
        return Image.composite(Image.new("RGB", (side, side), second), image, ramp), [first, second]
    ground = _jittered((186, 196, 170) if light else (62, 66, 56), rng, 12)
    line = int(side * rng.uniform(0.25, 0.8))
    ImageDraw.Draw(image).rectangle((0, line, side, side), fill=ground)
    return image, [first, ground]


def _star(cx: float, cy: float, r: float) -> list[Point]:
    return [
        (
            cx + (r if i % 2 == 0 else 0.42 * r) * math.sin(math.pi * i / 5),
            cy - (r if i % 2 == 0 else 0.42 * r) * math.cos(math.pi * i / 5),
        )
        for i in range(10)
    ]


def _heart(cx: float, cy: float, r: float) -> list[Point]:
    points = []
    for i in range(40):
        t = 2 * math.pi * i / 40
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((cx + r * x / 16, cy - r * y / 15))
    return points


def _polygon(kind: str, cx: float, cy: float, r: float) -> list[Point]:
    """Corner points of the shapes that are one polygon."""
    if kind == "square":
        s = 0.86 * r
        return [(cx - s, cy - s), (cx + s, cy - s), (cx + s, cy + s), (cx - s, cy + s)]
    if kind == "triangle":
        return [(cx, cy - r), (cx + r, cy + 0.8 * r), (cx - r, cy + 0.8 * r)]
    if kind == "diamond":
        return [(cx, cy - r), (cx + 0.72 * r, cy), (cx, cy + r), (cx - 0.72 * r, cy)]
    if kind == "cross":
        a, b = 0.34 * r, 0.95 * r
        near = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
        far = [(a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
        return [(cx + x, cy + y) for x, y in near + far]
    if kind == "house":
        s = 0.8 * r
        roof = [(cx, cy - r), (cx + 1.05 * r, cy - 0.12 * r), (cx + s, cy - 0.12 * r)]
        eaves, floor = cy - 0.12 * r, cy + 0.9 * r
        walls = [(cx + s, floor), (cx - s, floor), (cx - s, eaves)]
        return [*roof, *walls, (cx - 1.05 * r, eaves)]
    return _star(cx, cy, r) if kind == "star" else _heart(cx, cy, r)


def _disc(draw: ImageDraw.ImageDraw, cx: float, cy: float, r: float, **paint: object) -> None:
    draw.ellipse((cx - r, cy - r, cx + r, cy + r), **paint)  # type: ignore[arg-type]


def _car(
    draw: ImageDraw.ImageDraw, cx: float, cy: float, r: float, fill: RGB, edge: RGB, flip: bool
) -> None:
    """A car from the side: body, cabin with windows, two wheels, a lamp."""
    side = -1 if flip else 1

    def at(points: list[Point]) -> list[Point]:
        return [(cx + side * x * r, cy + y * r) for x, y in points]

    width = max(2, int(r * 0.05))
    body = [(-1.1, -0.08), (-0.72, -0.14), (-0.45, -0.6), (0.35, -0.6), (0.66, -0.1), (1.06, 0.0)]
    draw.polygon(at([*body, (1.12, 0.38), (-1.12, 0.38)]), fill=fill, outline=edge, width=width)
    glass = (196, 222, 236)
    draw.polygon(at([(-0.52, -0.15), (-0.36, -0.48), (-0.07, -0.48), (-0.07, -0.15)]), fill=glass)
    draw.polygon(at([(0.03, -0.15), (0.03, -0.48), (0.29, -0.48), (0.48, -0.15)]), fill=glass)
    lamp = at([(0.98, 0.1), (1.1, 0.22)])
    xs, ys = sorted(p[0] for p in lamp), sorted(p[1] for p in lamp)
    draw.rectangle((xs[0], ys[0], xs[1], ys[1]), fill=(255, 240, 170))
    for x in (-0.62, 0.62):
        wheel = (cx + side * x * r, cy + 0.38 * r)
        _disc(draw, *wheel, 0.25 * r, fill=(32, 32, 34), outline=(90, 90, 94), width=width)
        _disc(draw, *wheel, 0.1 * r, fill=(176, 176, 180))


def draw_thing(
    draw: ImageDraw.ImageDraw, kind: str, fill: RGB, box: Box, edge: RGB, flip: bool
) -> None:
    """Draw one object into `box` (pixels of the enlarged canvas)."""
    cx, cy, r = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, (box[2] - box[0]) / 2
    width = max(2, int(r * 0.05))
    if kind == "car":
        _car(draw, cx, cy + 0.1 * r, r / 1.12, fill, edge, flip)
    elif kind == "circle":
        _disc(draw, cx, cy, 0.92 * r, fill=fill, outline=edge, width=width)
    elif kind == "ring":
        _disc(draw, cx, cy, r, outline=edge, width=int(0.36 * r) + width)
        _disc(draw, cx, cy, r - width, outline=fill, width=int(0.36 * r) - width)
    else:
        draw.polygon(_polygon(kind, cx, cy, r), fill=fill, outline=edge, width=width)
        if kind == "house":
            door = (cx - 0.16 * r, cy + 0.4 * r, cx + 0.16 * r, cy + 0.88 * r)
            draw.rectangle(door, fill=edge)


def _large(kind: str, colour: str, rng: random.Random) -> Thing:
    """A single object of any size; its zone is that of its centre, which keeps off zone borders."""
    while True:
        r = rng.uniform(30, 120)
        cx, cy = (rng.uniform(r + 2, SIZE - r - 2) for _ in range(2))
        if all(abs(v / ZONE - edge) > 0.12 for v in (cx, cy) for edge in (1, 2)):
            zone = int(cy // ZONE) * 3 + int(cx // ZONE)
            return Thing(kind, colour, zone, (cx - r, cy - r, cx + r, cy + r))


def place(rng: random.Random, style: SceneStyle) -> list[Thing]:
    """Choose kinds, colours, zones and sizes; at most one object stands in a zone."""
    low, high = style.objects
    zones = sorted(rng.sample(range(9), rng.randint(low, high)))
    things = []
    for zone in zones:
        kind = "car" if rng.random() < CAR_SHARE else rng.choice(KINDS[1:])
        colour = rng.choice(list(COLOURS))
        if len(zones) == 1 and rng.random() < 0.6:
            return [_large(kind, colour, rng)]
        r = rng.uniform(*style.radius)
        slack = min(style.jitter, max(0.0, ZONE / 2 - r - 2))
        cx = (zone % 3 + 0.5) * ZONE + rng.uniform(-slack, slack)
        cy = (zone // 3 + 0.5) * ZONE + rng.uniform(-slack, slack)
        things.append(Thing(kind, colour, zone, (cx - r, cy - r, cx + r, cy + r)))
    return things


def paint(things: list[Thing], rng: random.Random, scale: int = SCALE) -> Image.Image:
    """Draw the objects on a background; `scale` times 336 pixels on a side."""
    image, shown = _background(rng, SIZE * scale)
    draw = ImageDraw.Draw(image)
    for thing in things:
        fill = _jittered(COLOURS[thing.colour], rng, 10)
        dark = tuple(int(c * 0.55) for c in fill)
        edge: RGB = (225, 225, 225) if max(map(_luma, shown)) < 110 else dark  # type: ignore[assignment]
        if thing.colour == "black" and max(map(_luma, shown)) >= 110:
            edge = (70, 70, 74)
        box = tuple(v * scale for v in thing.box)
        draw_thing(draw, thing.kind, fill, box, edge, rng.random() < 0.5)  # type: ignore[arg-type]
    return image


def make_scene(seed: int, style: SceneStyle | None = None, side: int = SIZE) -> Page:
    """A scene with its questions, `side` pixels wide; the same seed gives the same page."""
    rng = random.Random(seed)
    things = place(rng, style or SceneStyle())
    image = paint(things, rng).resize((side, side), Image.Resampling.BICUBIC)
    return Page(image, ask(things, rng), things=things)
