"""Matrices in few bits, as products read them: the layout that kernels want, and the products.

A row of q8 lies as it is. Of q4 eight rows lie interleaved in blocks (``Q4Block`` of
``cuda/args.h``), so that one vector of the processor holds eight outputs and nothing is summed
across. Products of few rows round their inputs too (``seen``): whole numbers multiply twice as
fast.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import FORMATS, Q4_RUN, Few, codes_of, few_of_codes

RUN, LANES = Q4_RUN.run, 8  # numbers of a row in a block, and rows
_HEAD = 2 * 2 * LANES  # bytes of a block before its codes: scales and zeros
BLOCK = _HEAD + LANES * RUN // 2


@dataclass(frozen=True)
class FewBits:
    """A matrix ``[out, size_in]`` in few bits.

    Attributes:
        format: q8 or q4.
        out, size_in: its shape.
        codes: q8: int8 ``[out, in]``; q4: uint8 ``[out / 8, in / 32, 160]``, the last block's rows
            beyond ``out`` of zeros.
        scale: q8: fp32 ``[out]``; q4: None, the blocks hold them.
    """

    format: str
    out: int
    size_in: int
    codes: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def numbers(self) -> Tensor:
        """What the matrix is, fp32 ``[out, in]``."""
        few = Few(self.codes, self.scale) if self.scale is not None else separate(self)
        return FORMATS[self.format].unpack(few)

    def __len__(self) -> int:
        return self.out

    def rows(self, start: int, stop: int) -> FewBits:
        """Some of the rows, as views; of q4 from a multiple of eight on."""
        if self.scale is not None:
            parts = self.codes[start:stop], self.scale[start:stop]
            return replace(self, out=stop - start, codes=parts[0], scale=parts[1])
        assert start % LANES == 0, "eight rows lie interleaved"
        codes = self.codes[start // LANES : -(-stop // LANES)]
        return replace(self, out=stop - start, codes=codes)

    def to(self, device: torch.device) -> FewBits:
        """The same on another device."""
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, codes=self.codes.to(device), scale=scale)


def few_bits(name: str, codes: Tensor, scale: Tensor | None = None) -> FewBits:
    """A matrix that lies as products read it; of q4 all rows of all blocks."""
    if scale is not None:
        return FewBits(name, codes.shape[0], codes.shape[1], codes, scale)
    return FewBits(name, len(codes) * LANES, codes.shape[1] * RUN, codes)


def fits(size_in: int, name: str) -> bool:
    """Whether rows of ``size_in`` numbers can be written in a format: they are whole runs."""
    return size_in % FORMATS[name].run == 0


def quantise(
    weight: Tensor, name: str, device: torch.device | str | None = None, block: int = 1 << 17
) -> FewBits:
    """Round ``weight [out, in]`` to q8 or q4, whose rows must be whole runs.

    About ``block`` numbers at a time, so that little memory is needed beside the result, which is
    made on ``device`` (None: where the weight is).
    """
    out, size_in = weight.shape
    device = weight.device if device is None else device
    few = empty(name, out, size_in, device)
    rows = max(LANES, block // max(1, size_in) // LANES * LANES)
    for start in range(0, out, rows):
        part = few.rows(start, min(out, start + rows))
        made = FORMATS[name].pack(weight[start : start + rows].to(device))
        assert isinstance(made, Few)
        done = laid_out(made, name)
        part.codes.copy_(done.codes)
        if part.scale is not None and done.scale is not None:
            part.scale.copy_(done.scale)
    return few


def empty(name: str, out: int, size_in: int, device: torch.device | str) -> FewBits:
    """Memory for a matrix."""
    if name == "q8":
        codes = torch.empty(out, size_in, dtype=torch.int8, device=device)
        return FewBits(name, out, size_in, codes, torch.empty(out, device=device))
    shape = (-(-out // LANES), size_in // RUN, BLOCK)
    return FewBits(name, out, size_in, torch.empty(shape, dtype=torch.uint8, device=device))


def laid_out(few: Few, name: str) -> FewBits:
    """Rows in few bits ``[out, in]`` as products read them."""
    if few.zero is None:
        out, size_in = few.codes.shape
        return FewBits(name, out, size_in, few.codes.contiguous(), few.scale.contiguous())
    codes = codes_of(few)
    out, size_in = codes.shape
    parts = [F.pad(part, (0, 0, 0, -out % LANES)) for part in (codes, few.scale, few.zero)]
    blocks, runs = -(-out // LANES), size_in // RUN
    # [block, row, run, half, v, i] -> [half, block, run, v, row, i]: two halves of a byte.
    halves = parts[0].view(blocks, LANES, runs, 2, 4, 4).permute(3, 0, 2, 4, 1, 5)
    packed = torch.empty(blocks, runs, BLOCK, dtype=torch.uint8, device=codes.device)
    packed[..., _HEAD:] = (halves[0] | halves[1] << 4).reshape(blocks, runs, -1)
    for at, part in ((0, parts[1]), (2 * LANES, parts[2])):
        numbers = part.view(blocks, LANES, runs).transpose(1, 2).contiguous()
        packed[..., at : at + 2 * LANES] = numbers.view(torch.uint8)
    return FewBits(name, out, size_in, packed)


def separate(matrix: FewBits) -> Few:
    """The rows of a matrix in q4 one after the other."""
    blocks, runs, _ = matrix.codes.shape
    both = matrix.codes[..., _HEAD:].view(blocks, runs, 4, LANES, 4)
    halves = torch.stack([both & 15, both >> 4], 2)  # [block, run, half, v, row, i]
    codes = halves.permute(0, 4, 1, 2, 3, 5).reshape(blocks * LANES, runs * RUN)
    scale, zero = (
        matrix.codes[..., at : at + 2 * LANES].contiguous().view(torch.float16).transpose(1, 2)
        for at in (0, 2 * LANES)
    )
    numbers = (part.reshape(blocks * LANES, runs)[: matrix.out] for part in (scale, zero))
    return few_of_codes(codes[: matrix.out], *numbers)


def seen(x: Tensor, name: str) -> Tensor:
    """Inputs ``x [rows, in]`` as products of few rows see them beside weights of a format: fp32.

    That is in whole numbers of 16 bits in runs of 64 (q8), or of 8 bits in runs of 32 (q4, q2).
    """
    run, largest = _INPUTS[name]
    size_in = x.shape[-1]
    runs = F.pad(x.float(), (0, -size_in % run)).unflatten(-1, (-1, run))
    most = runs.abs().amax(-1, keepdim=True)
    inverse = torch.div(torch.tensor(largest), most)  # a number / a tensor would be a product
    codes = (runs * torch.where(most > 0, inverse, 0)).round()
    return (codes * (most / largest)).flatten(-2)[..., :size_in]


_INPUTS = {"q8": (64, 32767.0), "q4": (RUN, 127.0), "q2": (RUN, 127.0)}
