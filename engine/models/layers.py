"""The building blocks of decoders and towers beside their matrices: norm, embedding, patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.fused import add_norm
from ..ops.products import faster_in_float32
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


class Patches(nn.Module):
    """Square patches of pictures by one matrix: a convolution whose step is its kernel's size.

    With AVX2 alone torch's takes 35 times as long in 16 bits as in float32.
    """

    bias: Tensor | None

    def __init__(self, side: int, size: int, bias: bool = False) -> None:
        """``side`` in pixels; ``size`` of a patch's vector."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, 3, side, side))
        self.register_parameter("bias", nn.Parameter(torch.empty(size)) if bias else None)

    def forward(self, pixels: Tensor) -> Tensor:
        """``[pictures, 3, height, width]`` to ``[pictures, patches, size]``, row by row."""
        weight: Tensor = self.weight
        if faster_in_float32(pixels):
            pixels, weight = pixels.float(), weight.float()
        patches = F.conv2d(pixels, weight, stride=weight.shape[-1]).to(self.weight.dtype)
        found = patches.flatten(2).transpose(1, 2)
        return found if self.bias is None else found + self.bias
