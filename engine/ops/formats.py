"""How numbers are written: one row for each format, defined in plain torch.

The kernels have the same rows (``cuda/formats.h``, read by ``ops.native``). How numbers lie is no
affair of theirs: weights and caches share the formats and not the layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """Numbers along a tensor's last dimension, ``run`` of them written in ``bytes`` bytes.

    >>> BF16.pack(torch.tensor([1.0, 1.005])).tolist()
    [1.0, 1.0078125]
    """

    name: str
    dtype: torch.dtype  # of what is stored
    run: int
    bytes: int

    def pack(self, numbers: Tensor) -> Tensor:
        """Write numbers, rounded to the nearest."""
        return numbers.to(self.dtype)

    def unpack(self, packed: Tensor) -> Tensor:
        """Read them, in float32."""
        return packed.float()

    def dot(self, packed: Tensor, x: Tensor, start: Tensor | None = None) -> Tensor:
        """Each row of x ``[rows, n]`` times each of ``packed [out, n]``: float32 ``[rows, out]``.

        Sums are in float32 and begin at ``start [out]``.
        """
        return F.linear(x.float(), self.unpack(packed), None if start is None else start.float())


FP32 = Format("fp32", torch.float32, run=1, bytes=4)
FP16 = Format("fp16", torch.float16, run=1, bytes=2)
BF16 = Format("bf16", torch.bfloat16, run=1, bytes=2)
FORMATS = {row.name: row for row in (FP32, FP16, BF16)}


def format_of(dtype: torch.dtype) -> Format:
    """The format of plain numbers in ``dtype``; raises KeyError where there is none."""
    return _BY_DTYPE[dtype]


_BY_DTYPE = {row.dtype: row for row in FORMATS.values()}
