"""How keys and values in few bits lie in a cache: in pages of 32 tokens.

A page holds the keys of its tokens, token by token, and behind them their values, so that whoever
scans keys alone reads memory in one run. A token's *block* are the codes of all its heads and then
their scales. Keys and values have formats of their own (``ops.formats``): ``k4v2`` means keys in
q4 and values in q2; 16 stands for the plain numbers of the model.

Of keys in q2 the numbers of a channel share a scale and a zero over the tokens of a page, which lie
behind the blocks: per token, two bits do not tell keys apart (KIVI, arXiv 2402.02750). All other
scales are a token's and head's own: one of q8, one and a zero for every 32 numbers of q4 and q2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..options import parse_bits
from .formats import FORMATS, PLAIN, Q2_RUN, Q8_ROW, Affine, Few, codes_of, few_of_codes, format_of

PAGE = 32  # tokens
_RUN = 32  # numbers of a head that share a scale; heads are filled up to whole runs
_BOUNDARY = 16  # bytes that blocks are multiples of
_LEAST = torch.finfo(torch.float16).tiny


@dataclass(frozen=True)
class Side:
    """Keys, or values, of a page.

    Attributes:
        format: of the numbers, as ``FORMATS`` names it.
        heads, head_dim: KV heads of a token and numbers of each.
        by_channel: whether scales are those of a channel over the page.
    """

    format: str
    heads: int
    head_dim: int
    by_channel: bool = False

    @property
    def wide(self) -> int:
        """Numbers of a head with those that fill it up."""
        return -(-self.head_dim // _RUN) * _RUN

    @property
    def codes(self) -> int:
        """Bytes of a head's codes."""
        row = FORMATS[self.format]
        if row in PLAIN:
            return self.head_dim * row.bytes
        return self.wide if row is Q8_ROW else self.wide * (row.bytes - 4) // row.run

    @property
    def scales(self) -> int:
        """Bytes of the scales that a token has for a head."""
        row = FORMATS[self.format]
        if row in PLAIN or self.by_channel:
            return 0
        return 2 if row is Q8_ROW else 4 * self.wide // _RUN

    @property
    def block(self) -> int:
        """Bytes of a token."""
        return -(-self.heads * (self.codes + self.scales) // _BOUNDARY) * _BOUNDARY

    @property
    def token_bytes(self) -> int:
        """Bytes of a token with its share of what belongs to the page."""
        return self.nbytes // PAGE

    @property
    def nbytes(self) -> int:
        """Bytes of a page's tokens."""
        return PAGE * self.block + (4 * self.heads * self.wide if self.by_channel else 0)

    def pack(self, numbers: Tensor) -> Tensor:
        """Write ``[pages * 32, heads, head_dim]``: uint8 ``[pages, nbytes]``."""
        row = FORMATS[self.format]
        if row in PLAIN:
            parts, behind = [_as_bytes(numbers.to(row.dtype))], list[Tensor]()
        else:
            last = numbers[..., -1:].expand(-1, -1, self.wide - self.head_dim)
            parts, behind = self._in_few_bits(torch.cat([numbers, last], -1).float())
        size = self.heads * (self.codes + self.scales)
        gap = parts[0].new_zeros(len(numbers), self.block - size)
        blocks = torch.cat([*(part.flatten(1) for part in parts), gap], 1)
        return torch.cat([blocks.view(-1, PAGE * self.block), *behind], 1)

    def unpack(self, packed: Tensor) -> Tensor:
        """Read ``[pages, nbytes]``: float32 ``[pages * 32, heads, head_dim]``."""
        row, codes = FORMATS[self.format], self._codes(packed)
        if row in PLAIN:
            return codes.view(row.dtype).float()
        if self.by_channel:
            few = few_of_codes(
                self.whole_codes(packed).mT.contiguous(), *self.channels(packed), bits=2
            )
            numbers = Q2_RUN.unpack(few).mT  # [pages, heads, 32, wide]
            return numbers.transpose(1, 2).flatten(0, 1)[..., : self.head_dim]
        scales = self._scales(packed)
        if row is Q8_ROW:
            few = Few(codes.view(torch.int8), scales[..., 0].float())
        else:
            few = Few(codes, *scales.chunk(2, -1))
        return row.unpack(few)[..., : self.head_dim]

    def whole_codes(self, packed: Tensor) -> Tensor:
        """Codes of keys by channel, one in a byte: ``[pages, heads, 32, wide]``."""
        codes = codes_of(Few(self._codes(packed), packed), 2)
        return codes.unflatten(0, (-1, PAGE)).transpose(1, 2)

    def channels(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros of keys by channel, ``[pages, heads, wide, 1]`` float16."""
        behind = packed[:, PAGE * self.block :].contiguous().view(torch.float16)
        scale, zero = behind.view(-1, self.heads, 2, self.wide, 1).unbind(2)
        return scale, zero

    def _in_few_bits(self, wide: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Bytes of codes and of scales ``[tokens, heads, n]``, and of those of a page."""
        row = FORMATS[self.format]
        if row is Q8_ROW:
            scale = (wide.abs().amax(-1, keepdim=True) / 127).half()
            steps = wide / scale.float().clamp(min=_LEAST)
            return [_as_bytes(steps.round().clamp(-127, 127).to(torch.int8)), _as_bytes(scale)], []
        assert isinstance(row, Affine)
        if not self.by_channel:
            few = row.pack(wide)
            assert few.zero is not None
            return [few.codes, _as_bytes(torch.cat([few.scale, few.zero], -1))], []
        few = row.pack(wide.unflatten(0, (-1, PAGE)).permute(0, 2, 3, 1))
        assert few.zero is not None
        codes = codes_of(few, row.bits).permute(0, 3, 1, 2).flatten(0, 1)
        again = few_of_codes(codes.contiguous(), few.scale, few.zero, bits=row.bits)
        ranges = torch.stack([few.scale, few.zero], 2)  # [pages, heads, 2, wide, 1]
        return [again.codes], [_as_bytes(ranges.flatten(1))]

    def _blocks(self, packed: Tensor) -> Tensor:
        return packed[:, : PAGE * self.block].reshape(len(packed) * PAGE, self.block)

    def _codes(self, packed: Tensor) -> Tensor:
        """``[tokens, heads, codes]`` bytes."""
        size = self.heads * self.codes
        return self._blocks(packed)[:, :size].reshape(-1, self.heads, self.codes)

    def _scales(self, packed: Tensor) -> Tensor:
        """``[tokens, heads, scales / 2]`` float16; where there are zeros, behind the scales."""
        start = self.heads * self.codes
        found = self._blocks(packed)[:, start : start + self.heads * self.scales]
        return found.contiguous().view(torch.float16).view(len(found), self.heads, -1)


@dataclass(frozen=True)
class Pages:
    """What pages of a name such as ``k4v2`` look like for a model."""

    name: str
    key: Side
    value: Side

    @classmethod
    def of(cls, name: str, heads: int, head_dim: int, dtype: torch.dtype) -> Pages:
        """``dtype`` is that of the model's numbers, which 16 stands for."""
        formats = [format_of(dtype).name if bits == 16 else f"q{bits}" for bits in parse_bits(name)]
        key = Side(formats[0], heads, head_dim, by_channel=formats[0] == "q2")
        return cls(name, key, Side(formats[1], heads, head_dim))

    @property
    def nbytes(self) -> int:
        """Bytes of a page."""
        return self.key.nbytes + self.value.nbytes

    def pack(self, k: Tensor, v: Tensor) -> Tensor:
        """Pages of ``k, v [tokens, heads, head_dim]``: uint8 ``[pages, nbytes]``.

        The last page is filled up with its last token.
        """
        short = -len(k) % PAGE
        k, v = (torch.cat([x, x[-1:].expand(short, -1, -1)]) for x in (k, v))
        return torch.cat([self.key.pack(k), self.value.pack(v)], 1)

    def unpack(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of ``[pages, nbytes]``, float32 ``[tokens, heads, head_dim]`` each."""
        key, value = self.sides(pages)
        return self.key.unpack(key), self.value.unpack(value)

    def sides(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """The bytes of keys and of values, as views."""
        return pages[:, : self.key.nbytes], pages[:, self.key.nbytes :]


def _as_bytes(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8)
