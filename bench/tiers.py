"""Draw a picture with its image tokens tinted core, secondary and minor beside the plain picture.

python -m bench.tiers --model FOLDER --image examples/scene.jpg --output docs/tiers.png
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from bench.common import ROOT
from engine.cache.observe import CORE, MINOR, SECONDARY
from engine.engine import Engine
from engine.insight.panels import Panel, panels_of
from engine.insight.trace import Trace
from engine.pictures.image import open_image

# Tiers differ in pattern as well as in colour: a frame, stripes, and dark with a dot.
COLOURS = {CORE: (0, 114, 178), SECONDARY: (230, 159, 0), MINOR: (48, 52, 59)}
STRENGTH = {CORE: 0.3, SECONDARY: 0.22, MINOR: 0.68}
MEANINGS = {
    CORE: "core: attended at every step",
    SECONDARY: "secondary: attended at some",
    MINOR: "minor: freed",
}
CELL, GAP = 20, 20


def main() -> None:
    """Draw the picture that the README shows."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", help="folder or hub name (default: the embedded model)")
    parser.add_argument("--image", type=Path, default=ROOT / "examples" / "scene.jpg")
    parser.add_argument("--prompt", default="Describe the picture in detail.")
    parser.add_argument("--cache", default="avl")
    parser.add_argument("--layer", type=int, help="default: the middle one")
    parser.add_argument("--step", type=int, default=-1, help="pass, 0 the prefill; -1 the last one")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "tiers.png")
    options = parser.parse_args()
    engine = Engine.load(options.model, cache=options.cache)
    trace = Trace()
    *_, result = engine.stream(options.prompt, [options.image], observer=trace)
    layers = trace.passes[options.step]
    layer = len(layers) // 2 if options.layer is None else options.layer
    tiers = layers[layer].tiers.tolist()
    pixels = engine.processor.prepare(open_image(options.image).pixels)
    panel = panels_of(engine.model, engine.processor, pixels)[-1]
    if not panel.placed:
        parser.error("the image tokens of this model have no places on the picture")
    draw(panel, tiers).quantize(128).save(options.output, optimize=True)
    counts = ", ".join(f"{tiers.count(tier)} {MEANINGS[tier].split(':')[0]}" for tier in COLOURS)
    print(f"{options.output}: layer {layer}, {counts}\nanswer: {result.text}")


def draw(panel: Panel, tiers: list[int]) -> Image.Image:
    """The plain picture, the tinted one beside it, and a legend below."""
    width, height = panel.columns * CELL, panel.rows * CELL
    plain = panel.picture.resize((width, height), Image.Resampling.LANCZOS)
    tinted = plain.copy()
    for number, token in enumerate(panel.tokens):
        row, column = divmod(number, panel.columns)
        at = (column * CELL, row * CELL)
        tinted.paste(tint(plain.crop((*at, at[0] + CELL, at[1] + CELL)), tiers[token]), at)
    whole = Image.new("RGB", (2 * width + GAP, height + 60), "white")
    whole.paste(plain, (0, 0))
    whole.paste(tinted, (width + GAP, 0))
    _legend(whole, height + 18, [tiers.count(tier) for tier in COLOURS])
    return whole


def tint(patch: Image.Image, tier: int) -> Image.Image:
    """One patch in the colour and pattern of its tier."""
    colour = COLOURS[tier]
    patch = Image.blend(patch, Image.new("RGB", patch.size, colour), STRENGTH[tier])
    pen, (width, height) = ImageDraw.Draw(patch), patch.size
    if tier == CORE:
        pen.rectangle((0, 0, width - 1, height - 1), outline=colour, width=2)
    elif tier == SECONDARY:
        for start in range(-height, width, width // 2):
            pen.line((start, height, start + height, 0), fill=colour, width=2)
    else:
        centre = width // 2, height // 2
        pen.rectangle((*centre, centre[0] + 1, centre[1] + 1), fill=(139, 147, 161))
    return patch


def _legend(whole: Image.Image, top: int, counts: list[int]) -> None:
    pen, font, left = ImageDraw.Draw(whole), ImageFont.load_default(17), 0
    for tier, count in zip(COLOURS, counts, strict=True):
        key = tint(Image.new("RGB", (CELL, CELL), "white"), tier)
        whole.paste(key, (left, top))
        whole.paste(key, (left + CELL, top))
        text = f"{count} {MEANINGS[tier]}"
        pen.text((left + 2 * CELL + 8, top + 10), text, "black", font, anchor="lm")
        left += 2 * CELL + 8 + round(pen.textlength(text, font)) + 30


if __name__ == "__main__":
    main()
