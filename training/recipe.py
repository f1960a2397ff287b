"""The recipe: stages in order, each with its pages, batch, learning rates and losses."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.data import PageMix
from training.documents import DocumentStyle
from training.losses import Weights
from training.scenes import SceneStyle


@dataclass(frozen=True)
class Stage:
    """One stage; it ends after `minutes` of wall time, learning rates go from first to last."""

    name: str
    minutes: float
    batch: int
    mix: PageMix
    lr: tuple[float, float]  # Muon; AdamW follows at a tenth
    weights: Weights = field(default_factory=Weights)
    vision_only: bool = False


def mix_of(
    patches: int, text: int, scenes: float, fields: int, objects: int, long: float
) -> PageMix:
    return PageMix(
        patches=patches,
        text=text,
        scenes=scenes,
        scene=SceneStyle(objects=(1, objects)),
        document=DocumentStyle(fields=(1, fields)),
        long_share=long,
    )


TWO_CORES = (
    Stage("vision", 7, 32, mix_of(112, 8, 0.35, 4, 6, 0.0), (0.02, 0.02), vision_only=True),
    Stage(
        "point",
        24,
        16,
        mix_of(96, 96, 0.65, 4, 6, 0.6),
        (0.02, 0.014),
        Weights(patch=0.5, guide=0.2, read=0.1),
    ),
    Stage(
        "decay",
        26,
        16,
        mix_of(96, 96, 0.65, 4, 8, 0.6),
        (0.014, 0.005),
        Weights(patch=0.5, guide=0.15, read=0.1),
    ),
    Stage(
        "free",
        8,
        16,
        mix_of(96, 96, 0.65, 4, 8, 0.6),
        (0.005, 0.004),
        Weights(patch=0.4, read=0.05),
    ),
    Stage(
        "page",
        18,
        8,
        mix_of(576, 128, 0.65, 6, 8, 0.6),
        (0.005, 0.0002),
        Weights(patch=0.3, read=0.05),
    ),
    # The second half: reading. Each of these may also start from exported weights (`--start`).
    Stage("glyphs", 12, 32, mix_of(208, 8, 0.1, 8, 6, 0.0), (0.015, 0.006), vision_only=True),
    Stage(
        "documents",
        16,
        32,
        mix_of(96, 96, 0.25, 4, 8, 0.6),
        (0.012, 0.008),
        Weights(patch=0.6, guide=0.15, read=0.1),
    ),
    Stage(
        "dense",
        28,
        32,
        mix_of(128, 112, 0.3, 6, 8, 0.6),
        (0.008, 0.0025),
        Weights(patch=0.5, guide=0.1, read=0.05),
    ),
    Stage(
        "pages",
        24,
        8,
        mix_of(576, 128, 0.4, 6, 8, 0.6),
        (0.003, 0.0001),
        Weights(patch=0.3, read=0.05),
    ),
)

# Once more over the reading half, at lower rates: `--start runs/tiny/checkpoint.pt --plan again`.
AGAIN = (
    Stage("glyphs", 11, 32, mix_of(208, 8, 0.1, 8, 6, 0.0), (0.011, 0.005), vision_only=True),
    Stage(
        "documents",
        12,
        32,
        mix_of(96, 96, 0.3, 4, 8, 0.6),
        (0.009, 0.006),
        Weights(patch=0.6, guide=0.15, read=0.1),
    ),
    Stage(
        "dense",
        32,
        32,
        mix_of(128, 112, 0.3, 6, 8, 0.6),
        (0.007, 0.002),
        Weights(patch=0.5, guide=0.1, read=0.05),
    ),
    Stage(
        "pages",
        20,
        8,
        mix_of(576, 128, 0.35, 6, 8, 0.6),
        (0.003, 0.0001),
        Weights(patch=0.3, read=0.05),
    ),
)

PLANS = {"two-cores": TWO_CORES, "again": AGAIN}
