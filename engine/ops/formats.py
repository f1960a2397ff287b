"""How numbers are written: one row for each format, defined in plain torch.

The kernels have the same rows (``cuda/formats.h``, read by ``ops.native``). How numbers lie is no
affair of theirs: weights and caches share the formats and not the layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Few(NamedTuple):
    """Numbers in few bits, along the last dimension: scale * (code - zero).

    Attributes:
        codes: q8: int8 ``[..., n]``; q4: uint8 ``[..., n / 2]``, of each run of 32 the first 16 in
            the lower halves of 16 bytes and the others in the upper ones; q2 likewise ``[..., n /
            4]``, four parts of 8 numbers in two bits each.
        scale: q8: float32 ``[...]``, of the whole last dimension; else float16 ``[..., n / 32]``.
        zero: the code that stands for 0, which need not be whole, as ``scale``; q8: None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return sum(part.nbytes for part in self if part is not None)


Packed = Tensor | Few


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

    def pack(self, numbers: Tensor) -> Packed:
        """Write numbers, rounded to the nearest."""
        return numbers.to(self.dtype)

    def unpack(self, packed: Packed) -> Tensor:
        """Read them, in float32."""
        assert isinstance(packed, Tensor)
        return packed.float()

    def dot(self, packed: Packed, x: Tensor, start: Tensor | None = None) -> Tensor:
        """Each row of x ``[rows, n]`` times each of ``packed [out, n]``: float32 ``[rows, out]``.

        Sums are in float32 and begin at ``start [out]``.
        """
        return F.linear(x.float(), self.unpack(packed), None if start is None else start.float())


class Q8(Format):
    """Whole numbers from -127 to 127 and a scale, the largest number's size / 127.

    A row of a matrix has one scale (in 4 bytes beside the codes): that loses next to nothing
    (quantised Llamas' perplexity is within 0.2 %), and what is summed needs no scale before its
    end.
    """

    def pack(self, numbers: Tensor) -> Few:
        """See ``Format.pack``.

        >>> Q8_ROW.pack(torch.tensor([1.0, -2.0])).codes.tolist()
        [64, -127]
        """
        wide = numbers.float()
        scale = wide.abs().amax(-1) / 127
        codes = (wide / scale.clamp(min=_TINY)[..., None]).round().clamp(-127, 127)
        return Few(codes.to(torch.int8), scale)

    def unpack(self, packed: Packed) -> Tensor:
        """See ``Format.unpack``."""
        assert isinstance(packed, Few)
        return packed.codes.float() * packed.scale[..., None]


class Affine(Format):
    """Codes from 0 on; of every 32 numbers the least becomes 0 and the largest the last code.

    Numbers that are alike beside their size get steps of a 2,048th of it, so that ``zero`` keeps
    its meaning in 16 bits.
    """

    @property
    def bits(self) -> int:
        """Of a code: what a run's scale and zero leave."""
        return (self.bytes - 4) * 8 // self.run

    def pack(self, numbers: Tensor) -> Few:
        """See ``Format.pack``.

        >>> few = Q4_RUN.pack(torch.arange(32.0) / 31)
        >>> few.codes[0, :3].tolist(), few.scale.item(), few.zero.item()
        ([128, 128, 145], 0.06665..., 0.0)
        """
        last = (1 << self.bits) - 1
        runs = numbers.float().unflatten(-1, (-1, self.run))
        low, high = runs.aminmax(dim=-1)
        least = torch.maximum(low.abs(), high.abs()) / 2048
        scale = torch.maximum((high - low) / last, least).half()
        wide = scale.float().clamp(min=_TINY)
        zero = torch.where(scale > 0, -low / wide, 0).half()  # too small for 16 bits: all are 0
        codes = (runs / wide[..., None] + zero.float()[..., None]).round().clamp(0, last)
        return few_of_codes(codes.to(torch.uint8).flatten(-2), scale, zero, bits=self.bits)

    def unpack(self, packed: Packed) -> Tensor:
        """See ``Format.unpack``."""
        assert isinstance(packed, Few)
        assert packed.zero is not None
        runs = codes_of(packed, self.bits).float().unflatten(-1, (-1, self.run))
        scale, zero = packed.scale.float()[..., None], packed.zero.float()[..., None]
        return (scale * (runs - zero)).flatten(-2)


def few_of_codes(codes: Tensor, scale: Tensor, zero: Tensor, *, bits: int = 4) -> Few:
    """q4 or q2 of codes ``[..., n]`` uint8, one in a byte."""
    parts = codes.unflatten(-1, (-1, 8 // bits, 4 * bits)).unbind(-2)
    joined = parts[0].clone()
    for at, part in enumerate(parts[1:], 1):
        joined |= part << bits * at
    return Few(joined.flatten(-2), scale, zero)


def codes_of(few: Few, bits: int = 4) -> Tensor:
    """The codes of q4 or q2 one in a byte: uint8 ``[..., n]``."""
    joined = few.codes.unflatten(-1, (-1, 4 * bits))
    parts = [joined >> at & (1 << bits) - 1 for at in range(0, 8, bits)]
    return torch.stack(parts, -2).flatten(-3)


_TINY = torch.finfo(torch.float32).tiny

FP32 = Format("fp32", torch.float32, run=1, bytes=4)
FP16 = Format("fp16", torch.float16, run=1, bytes=2)
BF16 = Format("bf16", torch.bfloat16, run=1, bytes=2)
Q8_ROW = Q8("q8", torch.int8, run=1, bytes=1)
Q4_RUN = Affine("q4", torch.uint8, run=32, bytes=20)
Q2_RUN = Affine("q2", torch.uint8, run=32, bytes=12)
FORMATS = {row.name: row for row in (FP32, FP16, BF16, Q8_ROW, Q4_RUN, Q2_RUN)}
PLAIN = (FP32, FP16, BF16)  # a number is a number of torch's


def format_of(dtype: torch.dtype) -> Format:
    """The format of plain numbers in ``dtype``; raises KeyError where there is none."""
    return _BY_DTYPE[dtype]


_BY_DTYPE = {row.dtype: row for row in PLAIN}
