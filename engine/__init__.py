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
    from engine.cache.avl import Avl
    from engine.cache.fastv import FastV
    from engine.cache.full import Full
    from engine.cache.h2o import H2o
    from engine.cache.random import Random
    from engine.cache.snapkv import SnapKv
    from engine.cache.streaming import Streaming
    from engine.engine import Engine
    from engine.errors import (
        CapacityError,
        CheckpointError,
        EngineError,
        ImageError,
        OptionError,
    )
    from engine.result import Result, Timings

# torch says so wherever numpy, which nothing here needs, is not installed.
warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)

# Where each public name lives. They are imported at first use: importing torch takes a second,
# and a command line with a mistyped path should not wait for it.
_HOMES = {
    "Avl": "engine.cache.avl",
    "CapacityError": "engine.errors",
    "CheckpointError": "engine.errors",
    "Engine": "engine.engine",
    "EngineError": "engine.errors",
    "FastV": "engine.cache.fastv",
    "Full": "engine.cache.full",
    "H2o": "engine.cache.h2o",
    "ImageError": "engine.errors",
    "OptionError": "engine.errors",
    "Random": "engine.cache.random",
    "Result": "engine.result",
    "SnapKv": "engine.cache.snapkv",
    "Streaming": "engine.cache.streaming",
    "Timings": "engine.result",
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
    "SnapKv",
    "Streaming",
    "Timings",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
