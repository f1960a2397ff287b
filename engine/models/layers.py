"""The building blocks of the decoder: norm, embedding, linear layers alone and side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.native import linear, narrowed


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension."""
        weight = self.weight
        return torch.rms_norm(hidden, weight.shape, weight, self.eps)


class Embedding(nn.Module):
    """A table of vectors. torch's own imports for a second to draw random numbers."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows ``[tokens, size]`` of integer ``ids [tokens]``."""
        return F.embedding(ids, self.weight)


class Linear(nn.Linear):
    """A linear layer that takes the native kernel for few rows where that is faster."""

    narrow: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return linear(x, self.weight, self.bias, self.narrow)

    def prepare(self) -> None:
        """Keep the weight in 16 bits too, for decoding, where nothing is lost by it."""
        self.narrow = narrowed(self.weight.data)


class SideBySide:
    """Several linear layers of one input.

    ``prepare`` lays their weights side by side, so that one product replaces several; the layers'
    own parameters become views of it.
    """

    def __init__(self, *layers: Linear) -> None:
        self.layers = layers
        self._sizes = [layer.out_features for layer in layers]
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.narrow: Tensor | None = None

    def prepare(self) -> None:
        """Copy the weights side by side, and keep them in 16 bits too where nothing is lost."""
        self.weight = torch.cat([layer.weight.data for layer in self.layers])
        for layer, part in zip(self.layers, self.weight.split(self._sizes), strict=True):
            layer.weight.data = part
        if self.layers[0].bias is not None:
            self.bias = torch.cat([layer.bias.data for layer in self.layers])
        self.narrow = narrowed(self.weight)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Every layer's ``[tokens, out]`` from ``[tokens, in]``."""
        if self.weight is None:
            return [layer(x) for layer in self.layers]
        joined = linear(x, self.weight, self.bias, self.narrow)
        return joined.split_with_sizes(self._sizes, -1)
