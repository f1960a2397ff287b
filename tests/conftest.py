"""Checkpoints, engines and the oracle, made once and shared by all test files."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from tests.checkpoints import DEFAULT, Shape, write_llava


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint(shape, layout, dtype)``: the folder of a seeded model; leave its files alone."""

    @functools.cache
    def made(
        shape: Shape = DEFAULT, layout: str = "hub", dtype: torch.dtype = torch.float32
    ) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint") / f"{shape.family}-{layout}"
        return write_llava(folder, shape, layout, dtype)

    return made


@pytest.fixture(scope="session")
def engine_of(checkpoint: Callable[..., Path]) -> Callable[..., Engine]:
    """``engine_of(shape, layout, dtype, cache)``: a loaded engine on the CPU."""

    @functools.cache
    def made(
        shape: Shape = DEFAULT, layout: str = "hub", dtype: str = "float32", cache: str = "full"
    ) -> Engine:
        return Engine.load(checkpoint(shape, layout), device="cpu", dtype=dtype, cache=cache)

    return made
