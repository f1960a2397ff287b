"""The building blocks of the decoder beside its matrices: norm and embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.fused import add_norm
from ..ops.tape import alive


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension of ``[tokens, size]``."""
        return self.after(hidden, None)[1]

    def after(self, hidden: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """``hidden + delta``, and that normalised; without ``delta`` nothing is added."""
        if delta is None:
            delta = alive(torch.zeros_like(hidden))
        return add_norm(hidden, delta, self.weight, self.eps)


class Embedding(nn.Module):
    """A table of vectors. torch's own imports for a second to draw random numbers."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows ``[tokens, size]`` of integer ``ids [tokens]``."""
        return F.embedding(ids, self.weight)
