"""Attention pages written by a test, and what is read back of them."""

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.engine import Engine
from engine.insight.page import stream_with_page
from engine.result import Result
from tests.checkpoints import Shape
from tests.noise import noise

SHAPE = Shape(kv_heads=2)
CACHE = "avl:secondary=0.6,core=0.3,every=2,floor=3"
HOSTILE = "</script><script>alert(1)</script><!-- <b>&amp;</b> \u2028"


def answer(engine: Engine, path: Path, prompt: str = "What is this?", **options: Any) -> Result:
    *_, result = stream_with_page(
        engine, path, prompt, [noise(70, 50)], max_new_tokens=9, ignore_eos=True, **options
    )
    assert isinstance(result, Result)
    return result


def data_in(path: Path) -> dict[str, Any]:
    found = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text()
    )
    assert len(found) == 1
    return dict(json.loads(found[0]))


def part(data: dict[str, Any], name: str, dtype: torch.dtype) -> Tensor:
    """One of the page's arrays, read by its own offsets."""
    blob = data["blob"]
    start, length = blob["arrays"][name]
    whole = zlib.decompress(base64.b64decode(blob["bytes"]))
    return torch.frombuffer(bytearray(whole[start : start + length]), dtype=dtype)
