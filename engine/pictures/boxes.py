"""Regions that an answer names: ``<ref>the dog</ref><box>(12,40),(530,987)</box>``.

Qwen-VL writes coordinates from 0 to 999, in thousandths of the picture's width and height. A region
is a ``<box>`` of two corners or a ``<quad>`` of four; a ``<ref>`` in front names what is there, for
all regions up to the next. Qwen2.5-VL and Qwen3-VL write JSON, ``{"bbox_2d": [12, 40, 530, 987],
"label": "the dog"}``: in pixels of the resized picture, or in thousandths. Regions are places in
the latest picture of the conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

_POINT = r"\(\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\)"
_COMMA = r"\s*,?\s*"
_REGION = re.compile(
    r"<ref>(?P<label>.*?)</ref>"
    rf"|<box>\s*(?P<box>{_COMMA.join([_POINT] * 2)})\s*</box>"
    rf"|<quad>\s*(?P<quad>{_COMMA.join([_POINT] * 4)})\s*</quad>",
    re.DOTALL,
)
_NUMBER = r"\s*\d{1,6}(?:\.\d{1,6})?\s*"
_FOUR = ",".join([_NUMBER] * 4)
_OBJECT = re.compile(rf'\{{[^{{}}]*"bbox_2d"\s*:\s*\[(?P<box>{_FOUR})\][^{{}}]*\}}')
_LABEL = re.compile(r'"label"\s*:\s*("(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])*")')
PICTURE_KINDS = (".png", ".jpg", ".jpeg", ".webp")  # the endings of files drawn on
SIGNATURE = b"avl-engine --draw-boxes"  # in every file that is drawn
_SOFTWARE = 0x0131  # the EXIF tag of what has made a picture
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


@dataclass(frozen=True)
class Box:
    """A region: what it is called ("" for nothing), and its corners (x, y) in pixels.

    A box has two corners, left top and right bottom; a quad has four, in the order given.
    """

    label: str
    corners: tuple[tuple[int, int], ...]


def parse_boxes(text: str, size: tuple[int, int]) -> list[Box]:
    """The regions that ``text`` names in a picture of ``size`` (width, height) pixels.

    What is not complete or not well formed is left out; nothing lies outside the picture.

    >>> parse_boxes("<ref>a dog</ref><box>(0,500),(250,999)</box>", (640, 480))
    [Box(label='a dog', corners=((0, 240), (160, 479)))]
    """
    boxes, label = [], ""
    for found in _REGION.finditer(text):
        if found["label"] is not None:
            label = found["label"].strip()
            continue
        points = [
            (_pixels(x, size[0]), _pixels(y, size[1]))
            for x, y in re.findall(_POINT, found["box"] or found["quad"])
        ]
        boxes.append(Box(label, _ordered(points) if found["box"] else tuple(points)))
    return boxes


# What reads an answer's regions in a picture of a size (width, height).
Reads: TypeAlias = Callable[[str, tuple[int, int]], list[Box]]


def parse_json_boxes(text: str, size: tuple[int, int], scale: tuple[int, int]) -> list[Box]:
    """The regions that ``text`` names as JSON, in a picture of ``size`` (width, height) pixels;
    ``scale`` is the width and height that coordinates are of.

    What is not complete or not well formed is left out; nothing lies outside the picture.

    >>> said = '[{"bbox_2d": [0, 500, 250, 1000], "label": "a dog"}]'
    >>> parse_json_boxes(said, (640, 480), (1000, 1000))
    [Box(label='a dog', corners=((0, 240), (160, 479)))]
    """
    boxes = []
    for found in _OBJECT.finditer(text):
        numbers = [float(number) for number in found["box"].split(",")]
        points = [
            tuple(_scaled(*each) for each in zip(numbers[i : i + 2], scale, size, strict=True))
            for i in (0, 2)
        ]
        label = _LABEL.search(found[0])
        named = json.loads(label[1]).strip() if label else ""
        boxes.append(Box(named, _ordered(points)))  # type: ignore[arg-type]
    return boxes


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of an RGB picture with every region outlined and named."""
    picture = image.convert("RGB")
    draw = ImageDraw.Draw(picture)
    line = max(2, round(min(picture.size) / 150))
    font = ImageFont.load_default(size=max(12, round(min(picture.size) / 28)))
    for number, box in enumerate(boxes):
        colour = _COLOURS[number % len(_COLOURS)]
        outline = _outline(box)
        draw.line([*outline, outline[0]], fill=colour, width=line)
        if box.label:
            _write(draw, picture.size, box, colour, font)
    return picture


def signed() -> Image.Exif:
    """What tells a drawn picture from one that a user has."""
    exif = Image.Exif()
    exif[_SOFTWARE] = SIGNATURE.decode()
    return exif


def _write(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: Box,
    colour: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Write a region's name above it, or inside where the picture ends."""
    left, top = min(x for x, _ in box.corners), min(y for _, y in box.corners)
    x0, y0, x1, y1 = map(int, draw.textbbox((0, 0), box.label, font=font))
    width, height = x1 - x0 + 4, y1 - y0 + 4
    left = max(0, min(left, size[0] - width))
    top = top - height if top >= height else top
    draw.rectangle([left, top, left + width, top + height], fill=colour)
    draw.text((left + 2 - x0, top + 2 - y0), box.label, fill="white", font=font)


def _outline(box: Box) -> list[tuple[int, int]]:
    if len(box.corners) != 2:
        return list(box.corners)
    (left, top), (right, bottom) = box.corners
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _ordered(points: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Left top and right bottom, whichever corners were given."""
    xs, ys = sorted(x for x, _ in points), sorted(y for _, y in points)
    return (xs[0], ys[0]), (xs[-1], ys[-1])


def _scaled(place: float, scale: int, length: int) -> int:
    """From a place in a picture of length ``scale`` to a pixel of the picture."""
    return min(int(place * length / scale), length - 1)


def _pixels(thousandths: str, length: int) -> int:
    """From 0..999 to a pixel of the picture."""
    return min(int(thousandths) * length // 1000, length - 1)
