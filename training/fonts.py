"""Faces that any machine with the project's `train` extra has: Pillow's own and matplotlib's."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

TRAINING_FACES = (
    "pillow",
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
)
HELD_OUT_FACES = ("STIXGeneral.ttf", "STIXGeneralBol.ttf")  # never trained on


@lru_cache(maxsize=1)
def _folder() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@lru_cache(maxsize=256)
def face(name: str, size: int) -> ImageFont.FreeTypeFont:
    """The face `name` at `size` pixels; `pillow` is the one built into Pillow."""
    if name == "pillow":
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)
        return font
    return ImageFont.truetype(str(_folder() / name), size, layout_engine=ImageFont.Layout.BASIC)
