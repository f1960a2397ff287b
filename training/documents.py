"""Documents: receipts, forms, columns, signs and tables of key-value fields, with questions."""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from training.fields import Field, choose_fields
from training.fonts import HELD_OUT_FACES, TRAINING_FACES, face
from training.page import SIZE, Box, Glyph, Page, Question, Span

LAYOUTS = ("form", "columns", "receipt", "scatter", "sign")
HELD_OUT_LAYOUT = "table"  # never trained on
MARGIN = 10

Placed = tuple[float, float, str]  # left, top, text
# A sign's board and its ink, as on roads and doors.
BOARDS = (
    ((0, 70, 150), (250, 250, 250)),
    ((0, 100, 60), (250, 250, 250)),
    ((250, 205, 20), (20, 20, 20)),
    ((250, 250, 250), (150, 20, 24)),
    ((40, 40, 44), (250, 205, 20)),
)


@dataclass(frozen=True)
class DocumentStyle:
    """How hard a page is; the defaults are the test pages of the tables."""

    fields: tuple[int, int] = (2, 6)
    font_size: tuple[int, int] = (15, 20)
    rotate: float = 0.2  # share of pages turned by up to 3 degrees
    noise: float = 0.3  # share of pages with noise, blur or JPEG artefacts
    faces: tuple[str, ...] = TRAINING_FACES
    layouts: tuple[str, ...] = LAYOUTS


HELD_OUT_STYLE = DocumentStyle(faces=HELD_OUT_FACES, layouts=(HELD_OUT_LAYOUT,))


def _width(font: ImageFont.FreeTypeFont, text: str) -> float:
    return font.getlength(text)


def _rows(n: int, size: int, rng: random.Random) -> list[float]:
    """Top edges of `n` lines, anywhere on the page, in order and without overlap."""
    line = size * 1.35
    spare = SIZE - 2 * MARGIN - n * line
    cuts = sorted(rng.uniform(0, max(0.0, spare)) for _ in range(n))
    if rng.random() < 0.5:  # evenly spaced
        gap = rng.uniform(0, max(0.0, spare) / n)
        first = rng.uniform(0, max(0.0, spare - gap * (n - 1)))
        cuts = [first + gap * i for i in range(n)]
    return [MARGIN + cut + line * i for i, cut in enumerate(cuts)]


def _sign_rows(n: int, size: int, rng: random.Random) -> list[float]:
    """Top edges of `n` lines that follow one another closely, the whole anywhere on the page."""
    line = size * rng.uniform(1.3, 1.6)
    spare = SIZE - 2 * MARGIN - n * line
    first = MARGIN + rng.uniform(0, max(0.0, spare))
    return [first + (line if spare > 0 else size * 1.3) * i for i in range(n)]


def _lay_out(
    fields: list[Field], layout: str, font: ImageFont.FreeTypeFont, rng: random.Random
) -> list[tuple[Placed, Placed]]:
    """Where the key and the value of every field stand."""
    size, n = int(font.size), len(fields)
    space = _width(font, " ")
    tops = (_sign_rows if layout == "sign" else _rows)(n, size, rng)
    keys = [_width(font, f.key) for f in fields]
    values = [_width(font, f.value) for f in fields]
    widest = max(k + v for k, v in zip(keys, values, strict=True)) + space
    left = rng.uniform(MARGIN, max(MARGIN, SIZE - MARGIN - widest))
    column = max(keys) + 3 * space
    if layout in ("columns", "table") and left + column + max(values) > SIZE - MARGIN:
        left = MARGIN
    right = rng.uniform(min(left + widest + space, SIZE - MARGIN), SIZE - MARGIN)
    out = []
    for f, key, value, top in zip(fields, keys, values, tops, strict=True):
        x = left
        at = left + key + space
        if layout in ("columns", "table"):
            at = left + column
        elif layout == "receipt":
            at = right - value
        elif layout == "scatter":
            x = rng.uniform(MARGIN, max(MARGIN, SIZE - MARGIN - key - value - space))
            at = x + key + space
        elif layout == "sign":
            x = max(MARGIN, (SIZE - key - value - space) / 2)
            at = x + key + space
        out.append(((x, top, f.key), (max(at, x + key + 0.6 * space), top, f.value)))
    return out


def _glyphs(font: ImageFont.FreeTypeFont, placed: Placed) -> list[Glyph]:
    x, top, text = placed
    y = top + 0.62 * font.size
    edges = [_width(font, text[:i]) for i in range(len(text) + 1)]
    return [Glyph(c, x + (edges[i] + edges[i + 1]) / 2, y) for i, c in enumerate(text) if c != " "]


def _theme(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Paper and ink; light paper four times out of five."""
    paper = tuple(rng.randint(222, 255) for _ in range(3))
    ink = rng.choice([(20, 20, 20), (30, 30, 80), (90, 20, 24), (16, 66, 40), (50, 50, 54)])
    if rng.random() < 0.2:
        paper = rng.choice([(24, 26, 34), (20, 48, 40), (52, 24, 30), (30, 36, 70)])
        ink = tuple(rng.randint(215, 255) for _ in range(3))
    return paper, ink


def _rules(draw: ImageDraw.ImageDraw, layout: str, tops: list[float], s: float, ink) -> None:  # type: ignore[no-untyped-def]
    """The thin lines of receipts and tables."""
    height = min((b - a for a, b in pairwise(tops)), default=0)
    if layout == "table" or (layout == "form" and height > 40):
        for top in tops:
            draw.line((6 * s, (top - 3) * s, (SIZE - 6) * s, (top - 3) * s), fill=ink, width=1)


def _board(
    draw: ImageDraw.ImageDraw, places: list[tuple[Placed, Placed]], size: float, s: float
) -> tuple[int, ...]:
    """A sign's board behind its lines; returns the ink that stands out on it."""
    left = min(key[0] for key, _ in places)
    top, bottom = places[0][0][1], places[-1][0][1] + 1.3 * size
    edges = (left - 8, top - 6, SIZE - left + 8, bottom + 6)
    paint, ink = BOARDS[int(left + top) % len(BOARDS)]
    box = [min(max(edge, 1), SIZE - 2) * s for edge in edges]
    draw.rounded_rectangle(box, radius=6 * s, fill=paint, outline=ink, width=int(2 * s))
    return ink


def _turn(image: Image.Image, glyphs: list[Glyph], angle: float) -> tuple[Image.Image, list[Glyph]]:
    """The page turned counter-clockwise by `angle` degrees about its centre."""
    corner = image.getpixel((0, 0))
    turned = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=corner)
    c, s, m = math.cos(math.radians(angle)), math.sin(math.radians(angle)), SIZE / 2
    moved = [
        Glyph(g.char, m + c * (g.x - m) + s * (g.y - m), m - s * (g.x - m) + c * (g.y - m))
        for g in glyphs
    ]
    return turned, moved


def _spoil(image: Image.Image, rng: random.Random) -> Image.Image:
    """Speckle, a slight blur or JPEG artefacts."""
    kind = rng.randrange(3)
    if kind == 0:
        noise = Image.effect_noise(image.size, rng.uniform(10, 40)).convert("RGB")
        return Image.blend(image, noise, rng.uniform(0.05, 0.16))
    if kind == 1:
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.6)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=rng.randint(55, 92))
    return Image.open(buffer).convert("RGB")


def draw_fields(
    fields: list[Field], layout: str, font_name: str, size: int, rng: random.Random
) -> tuple[Image.Image, list[list[Glyph]]]:
    """Print the fields; returns the page and the glyphs of every field (key, then value)."""
    scale = 2 if rng.random() < 0.5 else 1
    font = face(font_name, size)
    while size > 9:
        font = face(font_name, size)
        widest = max(_width(font, f"{f.key}   {f.value}") for f in fields)
        if widest <= SIZE - 2 * MARGIN and len(fields) * size * 1.35 <= SIZE - 2 * MARGIN:
            break
        size -= 1
    paper, ink = _theme(rng)
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), paper)  # type: ignore[arg-type]
    draw = ImageDraw.Draw(image)
    big = face(font_name, size * scale)
    places = _lay_out(fields, layout, font, rng)
    if layout == "sign":
        ink = _board(draw, places, font.size, scale)
    _rules(draw, layout, [key[1] for key, _ in places], scale, ink)
    glyphs = []
    for pair in places:
        for x, y, text in pair:
            draw.text((x * scale, y * scale), text, font=big, fill=ink)
        glyphs.append(_glyphs(font, pair[0]) + _glyphs(font, pair[1]))
    return image.resize((SIZE, SIZE), Image.Resampling.BICUBIC), glyphs


def _box(glyph: Glyph) -> Box:
    return glyph.x - 1, glyph.y - 1, glyph.x + 1, glyph.y + 1


def _spans(text: str, glyphs: list[Glyph], offset: int) -> list[Span]:
    """One span per printed character of `text`."""
    visible = [i for i, c in enumerate(text) if not c.isspace()]
    return [Span(offset + i, offset + i + 1, _box(g)) for i, g in zip(visible, glyphs, strict=True)]


def _ask(fields: list[Field], glyphs: list[list[Glyph]], rng: random.Random) -> list[Question]:
    text = ""
    spans: list[Span] = []
    out = []
    for f, marks in zip(fields, glyphs, strict=True):
        line = f"{f.key} {f.value}"
        text += "\n" if text else ""
        spans += _spans(line, marks, len(text))
        text += line
        values = marks[len(f.key.replace(" ", "")) :]
        out.append(
            Question("field", f"What is the {f.name}?", f.value, tuple(_spans(f.value, values, 0)))
        )
        if rng.random() < 0.25:
            name = f.name.capitalize() + "."
            span = Span(0, len(name), _box(marks[0]))
            out.append(Question("which", f"Which field says {f.value}?", name, (span,)))
    rng.shuffle(out)
    words = rng.choice(("Read all the text.",) * 4 + ("Read the text.", "What does the page say?"))
    return [Question("read", words, text, tuple(spans)), *out]


def make_document(seed: int, style: DocumentStyle | None = None) -> Page:
    """A page of 336 x 336 pixels with its questions; the same seed gives the same page."""
    rng = random.Random(seed)
    style = style or DocumentStyle()
    fields = choose_fields(rng.randint(*style.fields), rng)
    layout, name = rng.choice(style.layouts), rng.choice(style.faces)
    image, groups = draw_fields(fields, layout, name, rng.randint(*style.font_size), rng)
    if rng.random() < style.rotate:
        angle = rng.uniform(-3, 3)
        flat = [g for group in groups for g in group]
        image, flat = _turn(image, flat, angle)
        moved = iter(flat)
        groups = [[next(moved) for _ in group] for group in groups]
    if rng.random() < style.noise:
        image = _spoil(image, rng)
    return Page(image, _ask(fields, groups, rng), glyphs=[g for group in groups for g in group])
