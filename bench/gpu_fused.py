"""The small fused kernels as benchmark cells, each beside torch's operations for the same."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import predict
from bench.gpu_cells import Contestant, Device, KernelCell
from bench.gpu_steps import switched
from bench.gpu_timing import Call
from bench.predict import Shape, Way
from engine.ops import fused
from engine.ops.fused import Destination

Inputs = tuple[object, ...]
SLOTS = 4096


@dataclass(frozen=True)
class Operation:
    """A fused kernel: 16-bit numbers moved per row, and how many kernels torch needs for it."""

    name: str
    moved: Callable[[Shape], int]
    torch_kernels: int
    inputs: Callable[[Shape, int, Callable[..., Tensor]], Inputs]


def _norm_inputs(shape: Shape, rows: int, draw: Callable[..., Tensor]) -> Inputs:
    return draw(rows, shape.hidden), draw(rows, shape.hidden), draw(shape.hidden), 1e-5


def _rope_inputs(shape: Shape, rows: int, draw: Callable[..., Tensor]) -> Inputs:
    size = (shape.heads, shape.head_dim)
    q, k, v = (draw(rows, *size) for _ in range(3))
    cos, sin = draw(rows, 1, shape.head_dim), draw(rows, 1, shape.head_dim)
    pools = [draw(SLOTS, *size) for _ in range(2)]
    places = torch.randperm(SLOTS * shape.heads, device=q.device)[: rows * shape.heads]
    return q, k, v, cos, sin, None, Destination(*pools, places)


OPERATIONS = (
    Operation("add_norm", lambda s: 4 * s.hidden, 2, _norm_inputs),
    Operation("rope_write", lambda s: 6 * s.hidden, 8, _rope_inputs),
    Operation(
        "silu_mul", lambda s: 3 * s.mlp, 2, lambda s, n, draw: (draw(n, s.mlp), draw(n, s.mlp))
    ),
    # Logits are in fp32: two numbers of 16 bits for each.
    Operation("argmax", lambda s: 2 * s.vocab, 1, lambda s, n, draw: (draw(n, s.vocab).float(),)),
)


def fused_cells(rows: int, shape: Shape, quick: bool = False) -> list[KernelCell]:
    """A cell for every operation at ``rows`` rows."""
    return [_cell(each, rows, shape, quick) for each in OPERATIONS]


def _cell(operation: Operation, rows: int, shape: Shape, quick: bool) -> KernelCell:
    moved = 2 * rows * operation.moved(shape)
    one = predict.stream(moved)
    contestants = {
        "torch": Contestant(operation.torch_kernels * one, moved),
        "fused": Contestant(one, moved),
    }
    turns = 2 if quick else 16

    def make(on: Device) -> dict[str, Call]:
        def draw(*size: int) -> Tensor:
            return torch.randn(size, device=on.device).to(on.dtype)

        sets = [operation.inputs(shape, rows, draw) for _ in range(turns)]
        return {name: functools.partial(_run, operation.name, name, sets) for name in contestants}

    return KernelCell(
        f"{operation.name}, {rows} rows", contestants, make, turns, 3 if quick else 21
    )


def _run(operation: str, name: str, sets: list[Inputs], turn: int) -> object:
    if name == "torch":
        return getattr(fused, f"{operation}_torch")(*sets[turn])
    with switched(Way(fused=True)):
        return getattr(fused, operation)(*sets[turn])
