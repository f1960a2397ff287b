"""Muon for weight matrices, AdamW for everything else.

Muon (K. Jordan et al., 2024) replaces the momentum of a matrix by the nearest orthogonal matrix,
found by a few Newton-Schulz steps; matrices of equal shape are stacked into one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(stack: Tensor, steps: int = 5) -> Tensor:
    """Nearly orthogonal factors of a `[n, rows, columns]` stack, computed in bf16."""
    a, b, c = NEWTON_SCHULZ
    x = stack.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with Nesterov look-ahead, orthogonalised; step size scaled by the matrix shape."""

    def __init__(self, params: Iterable[Tensor], lr: float, decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all matrices that have a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for same in shapes.values():
                self._step_shape(same, group)

    def _step_shape(self, params: list[Tensor], group: dict[str, float]) -> None:
        updates = []
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            updates.append(p.grad.lerp(state["momentum"], group["momentum"]))
        rows, columns = params[0].shape
        scale = max(1.0, rows / columns) ** 0.5 * group["lr"]
        for p, update in zip(params, orthogonalise(torch.stack(updates)), strict=True):
            p.mul_(1 - group["lr"] * group["decay"])
            p.add_(update.to(p.dtype), alpha=-scale)


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices inside the blocks and the projector for Muon; all other parameters for AdamW."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        inner = "blocks." in name or name.startswith(("linear_1", "linear_2"))
        (matrices if inner and p.ndim == 2 else others).append(p)
    return matrices, others
