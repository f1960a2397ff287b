"""A minimal inference engine for large vision-language models with a native A-VL cache.

>>> from engine import Engine
>>> engine = Engine.load()                                     # doctest: +SKIP
>>> engine.generate("What colour is the car?", images=["examples/car.jpg"]).text  # doctest: +SKIP
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine
    from .errors import (
        CapacityError,
        CheckpointError,
        EngineError,
        ImageError,
        OptionError,
    )
    from .pictures.video import Video
    from .policies.avl import Avl
    from .policies.fastv import FastV
    from .policies.full import Full
    from .policies.h2o import H2o
    from .policies.random import Random
    from .policies.sift import Sift
    from .policies.snapkv import SnapKv
    from .policies.streaming import Streaming
    from .policies.zipvl import ZipVl
    from .result import Result, Timings

# torch says so wherever numpy, which nothing here needs, is not installed.
warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)

# Where each public name lives. They are imported at first use: importing torch takes a second,
# and a command line with a mistyped path should not wait for it.
_HOMES = {
    "Avl": ".policies.avl",
    "CapacityError": ".errors",
    "CheckpointError": ".errors",
    "Engine": ".engine",
    "EngineError": ".errors",
    "FastV": ".policies.fastv",
    "Full": ".policies.full",
    "H2o": ".policies.h2o",
    "ImageError": ".errors",
    "OptionError": ".errors",
    "Random": ".policies.random",
    "Result": ".result",
    "Sift": ".policies.sift",
    "SnapKv": ".policies.snapkv",
    "Streaming": ".policies.streaming",
    "Timings": ".result",
    "Video": ".pictures.video",
    "ZipVl": ".policies.zipvl",
}

__all__ = [
    "Avl",
    "CapacityError",
    "CheckpointError",
    "Engine",
    "EngineError",
    "FastV",
    "Full",
    "H2o",
    "ImageError",
    "OptionError",
    "Random",
    "Result",
    "Sift",
    "SnapKv",
    "Streaming",
    "Timings",
    "Video",
    "ZipVl",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
