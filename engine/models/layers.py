"""The building blocks of the decoder: norm, embedding, linear layers alone and side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.fused import add_norm
from ..ops.products import linear, linears, narrowed
from ..ops.tape import kept


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
            delta = kept(torch.zeros_like(hidden))
        return add_norm(hidden, delta, self.weight, self.eps)


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

    Their weights may lie side by side, so that one product replaces several; the layers' own
    parameters are then views of it. Either the loader fills them where ``room`` says, or
    ``prepare`` moves them there.
    """

    def __init__(self, *layers: Linear) -> None:
        self.layers = layers
        self._sizes = [layer.out_features for layer in layers]
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.narrow: Tensor | None = None

    def room(self, index: int, leaf: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Where the weight or bias (``leaf``) of layer ``index`` shall lie, uninitialised at first.

        All the layers' rooms are one tensor, allocated for the first of them.
        """
        joined = getattr(self, leaf)
        if joined is None:
            part = getattr(self.layers[index], leaf)
            size = (sum(self._sizes), *part.shape[1:])
            joined = torch.empty(size, dtype=dtype, device=device)
            setattr(self, leaf, joined)
        return joined.split(self._sizes)[index]

    def prepare(self) -> None:
        """Move the weights side by side, and keep them in 16 bits too where nothing is lost."""
        if self.weight is None:
            self._join()
        assert self.weight is not None
        self.narrow = narrowed(self.weight)

    def _join(self) -> None:
        for leaf in ("weight", "bias") if self.layers[0].bias is not None else ("weight",):
            for index, layer in enumerate(self.layers):
                own = getattr(layer, leaf)
                own.data = self.room(index, leaf, own.dtype, own.device).copy_(own.data)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Every layer's ``[tokens, out]`` from ``[tokens, in]``."""
        if self.weight is None:
            return linears(x, [(layer.weight, layer.bias) for layer in self.layers])
        joined = linear(x, self.weight, self.bias, self.narrow)
        return joined.split_with_sizes(self._sizes, -1)
