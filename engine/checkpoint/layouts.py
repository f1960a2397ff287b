"""Weights in few bits: what each publisher's tensors mean, by the layout's own definition.

docs/quantised.md has the definitions in words, and where they come from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .header import TensorInfo

Settings = Mapping[str, object]  # of config.json's quantization_config
Parts = Mapping[str, Tensor]
Infos = Mapping[str, TensorInfo]


class Codes(NamedTuple):
    """A matrix of whole numbers: ``scale * (code - zero)``, one scale and zero for each group.

    Attributes:
        codes: uint8 or int8 ``[out, in]``.
        scale, zero: ``[out, groups]``.
        group_of: the group of each input ``[in]``; None: groups are runs of equally many.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_of: Tensor | None = None

    def numbers(self) -> Tensor:
        """What the matrix is, fp32 ``[out, in]``."""
        group = self.codes.shape[1] // self.scale.shape[1]
        scale, zero = (
            part.float().repeat_interleave(group, 1)
            if self.group_of is None
            else part.float()[:, self.group_of.long()]
            for part in (self.scale, self.zero)
        )
        return scale * (self.codes.float() - zero)

    def some(self, start: int, stop: int) -> Codes:
        """Some of the rows."""
        rows = slice(start, stop)
        return Codes(self.codes[rows], self.scale[rows], self.zero[rows], self.group_of)


class Blocks(NamedTuple):
    """A matrix as our own products read it (``ops.few_bits``): q8 with a scale per row, or q4."""

    format: str
    codes: Tensor
    scale: Tensor | None = None

    def some(self, start: int, stop: int) -> Blocks:
        """Some of the rows; of q4 whole blocks of eight."""
        if self.scale is None:
            return Blocks(self.format, self.codes[start // 8 : stop // 8])
        return Blocks(self.format, self.codes[start:stop], self.scale[start:stop])


Stored = Tensor | Codes | Blocks
Read = Callable[[TensorInfo], Tensor]


@dataclass(frozen=True)
class Layout:
    """How one publisher packs a weight.

    Attributes:
        name: what errors and ``--check`` call it.
        needed, optional: its tensors, by what follows the layer's name; the first of ``needed``
            tells that a layer may be packed so.
        shape: ``(out, in)``, None if the tensors' shapes are not those of this layout.
        numbers: what is stored, given the tensors and the config's settings.
    """

    name: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    shape: Callable[[Infos, Read], tuple[int, int] | None]
    numbers: Callable[[Parts, Settings], Stored]


# --- whole numbers in words ----------------------------------------------------------------------


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """Whole numbers of 4 or 8 bits from int32 ``[..., n]``, the lowest bits first: uint8."""
    found = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return found
    return torch.stack([found & 15, found >> 4], -1).flatten(-2)


def _bits(packed: int, count: int) -> int:
    """How many bits each of ``count`` numbers has in so many words; 0 if none that is read."""
    return next((bits for bits in (4, 8) if -(-count * bits // 32) == packed), 0)


def _is(info: TensorInfo | None, *shape: int) -> bool:
    return info is None or info.shape == shape


# --- GPTQ ----------------------------------------------------------------------------------------


def _gptq_shape(parts: Infos, read: Read) -> tuple[int, int] | None:
    """qweight ``[in * bits / 32, out]``, qzeros ``[groups, out * bits / 32]``."""
    weight, zeros, scales = (parts[leaf].shape for leaf in ("qweight", "qzeros", "scales"))
    if not len(weight) == len(zeros) == len(scales) == 2 or weight[1] != scales[1]:
        return None
    bits = _bits(zeros[1], scales[1])
    size_in = weight[0] * 32 // bits if bits else 0
    fits = zeros[0] == scales[0] and scales[0] and size_in and size_in % scales[0] == 0
    return (scales[1], size_in) if fits and _is(parts.get("g_idx"), size_in) else None


def _gptq(parts: Parts, settings: Settings) -> Codes:
    """Inputs run along the words; the first version stores every zero less one."""
    scales = parts["scales"].T
    bits = _bits(parts["qzeros"].shape[1], len(scales))
    codes = _unpacked(parts["qweight"].T, bits)
    zero = _unpacked(parts["qzeros"], bits).T.float()
    if settings.get("checkpoint_format") != "gptq_v2":
        zero = zero + 1
    group = codes.shape[1] // scales.shape[1]
    order = parts.get("g_idx")
    in_runs = order is None or bool((order == torch.arange(len(order)) // group).all())
    return Codes(codes, scales, zero, None if in_runs else order)


# --- AWQ -----------------------------------------------------------------------------------------

_AWQ_COLUMNS = [0, 4, 1, 5, 2, 6, 3, 7]  # where in a word each of eight outputs lies


def _awq_shape(parts: Infos, read: Read) -> tuple[int, int] | None:
    """qweight ``[in, out / 8]``, qzeros ``[groups, out / 8]``."""
    weight, zeros, scales = (parts[leaf].shape for leaf in ("qweight", "qzeros", "scales"))
    if not len(weight) == len(zeros) == len(scales) == 2 or "g_idx" in parts:
        return None
    fits = weight[1] * 8 == scales[1] == zeros[1] * 8 and zeros[0] == scales[0]
    return (scales[1], weight[0]) if fits and scales[0] and weight[0] % scales[0] == 0 else None


def _awq(parts: Parts, settings: Settings) -> Codes:
    """Outputs run along the words, even ones first."""

    def codes(words: Tensor) -> Tensor:
        return _unpacked(words, 4).unflatten(-1, (-1, 8))[..., _AWQ_COLUMNS].flatten(-2).T

    return Codes(codes(parts["qweight"]), parts["scales"].T, codes(parts["qzeros"]))


# --- compressed-tensors --------------------------------------------------------------------------


def _compressed_shape(parts: Infos, read: Read) -> tuple[int, int] | None:
    """weight_packed ``[out, in * bits / 32]``, weight_scale ``[out, groups]``; the shape beside."""
    if parts["weight_shape"].shape != (2,) or len(parts["weight_packed"].shape) != 2:
        return None
    out, size_in = map(int, read(parts["weight_shape"]))
    scale = parts["weight_scale"].shape
    bits = _bits(parts["weight_packed"].shape[1], size_in)
    fits = bits and len(scale) == 2 and scale[0] == out and scale[1] and size_in % scale[1] == 0
    fits = fits and parts["weight_packed"].shape[0] == out
    zero = _is(parts.get("weight_zero_point"), -(-out * (bits or 4) // 32), scale[-1])
    return (out, size_in) if fits and zero and _is(parts.get("weight_g_idx"), size_in) else None


def _compressed(parts: Parts, settings: Settings) -> Codes:
    """Inputs run along the words, half the range above what they stand for; zeros likewise."""
    out, size_in = map(int, parts["weight_shape"])
    packed, scale, points = parts["weight_packed"], parts["weight_scale"], "weight_zero_point"
    bits = _bits(packed.shape[1], size_in)
    zero = torch.full_like(scale, 1 << (bits - 1))
    if points in parts:
        zero = _unpacked(parts[points].T, bits)[:, :out].T
    order = parts.get("weight_g_idx")
    order = None if order is None or bool((order < 0).any()) else order
    return Codes(_unpacked(packed, bits)[:, :size_in], scale, zero, order)


# --- bitsandbytes --------------------------------------------------------------------------------

_STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))


_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


class _Book(NamedTuple):
    """The JSON beside a weight of 4 bits: sizes, and those of a second quantisation."""

    out: int
    size_in: int
    block: int
    outer_block: int
    offset: float


def _book_of(parts: Parts) -> _Book | None:
    """Read the JSON; None if it is no such thing."""
    text = next((parts[leaf] for leaf in _STATES if leaf in parts), None)
    try:
        state = json.loads(bytes([] if text is None else text.tolist()))
        out, size_in = map(int, state["shape"])
        block, outer = int(state["blocksize"]), int(state.get("nested_blocksize", 256))
        book = _Book(out, size_in, block, outer, float(state.get("nested_offset", 0)))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return book if min(out, size_in, block, outer) > 0 else None


def _book_shape(parts: Infos, read: Read) -> tuple[int, int] | None:
    """weight uint8 ``[out * in / 2, 1]``, absmax one for each block; the shape in the JSON."""
    book = _book_of({leaf: read(parts[leaf]) for leaf in _STATES if leaf in parts})
    if book is None:
        return None
    nested = parts["weight.absmax"].dtype == torch.uint8
    complete = not nested or all(leaf in parts for leaf in _NESTED)
    count = book.out * book.size_in
    halves, blocks = (math.prod(parts[leaf].shape) for leaf in ("weight", "weight.absmax"))
    fits = (halves, blocks) == (-(-count // 2), -(-count // book.block)) and complete
    return (book.out, book.size_in) if fits and _is(parts["weight.quant_map"], 16) else None


def _book(parts: Parts, settings: Settings) -> Tensor:
    """A code is one of 16 numbers of a list, times the largest of its block.

    Those may be codes themselves, of a list of 256 (double quantisation).
    """
    book, most = _book_of(parts), parts["weight.absmax"].flatten()
    assert book, "the shape was read from it"
    if most.dtype == torch.uint8:
        outer, numbers = (parts[leaf].float() for leaf in _NESTED)
        scale = outer.repeat_interleave(book.outer_block)[: len(most)]
        most = numbers[most.long()] * scale + book.offset
    byte = torch.arange(256)  # the first of two numbers is in the upper half
    pairs = parts["weight.quant_map"].float()[torch.stack([byte >> 4, byte & 15], -1)]
    numbers = F.embedding(parts["weight"].flatten().int(), pairs).flatten()
    blocks = F.pad(numbers, (0, len(most) * book.block - len(numbers))).view(-1, book.block)
    count = book.out * book.size_in
    return blocks.mul_(most.float()[:, None]).flatten()[:count].view(book.out, book.size_in)


def _rows_shape(parts: Infos, read: Read) -> tuple[int, int] | None:
    """weight int8 ``[out, in]``, SCB ``[out]``: the largest number of each row."""
    weight = parts["weight"]
    fits = weight.dtype == torch.int8 and len(weight.shape) == 2
    return (
        (weight.shape[0], weight.shape[1]) if fits and _is(parts["SCB"], weight.shape[0]) else None
    )


def _rows(parts: Parts, settings: Settings) -> Codes:
    scale = parts["SCB"].float()[:, None] / 127
    return Codes(parts["weight"], scale, torch.zeros_like(scale))


# --- our own -------------------------------------------------------------------------------------


def _q4_shape(parts: Infos, read: Read) -> tuple[int, int] | None:
    shape = parts["weight_q4"].shape
    return (shape[0] * 8, shape[1] * 32) if len(shape) == 3 and shape[2] == 160 else None


def _q8_shape(parts: Infos, read: Read) -> tuple[int, int] | None:
    shape = parts["weight_q8"].shape
    fits = len(shape) == 2 and _is(parts["weight_q8_scale"], shape[0])
    return (shape[0], shape[1]) if fits else None


LAYOUTS = (
    Layout("GPTQ", ("qweight", "qzeros", "scales"), ("g_idx",), _gptq_shape, _gptq),
    Layout("AWQ", ("qweight", "qzeros", "scales"), ("g_idx",), _awq_shape, _awq),
    Layout(
        "compressed-tensors",
        ("weight_packed", "weight_scale", "weight_shape"),
        ("weight_zero_point", "weight_g_idx"),
        _compressed_shape,
        _compressed,
    ),
    Layout(
        "bitsandbytes, 4 bits",
        ("weight.absmax", "weight", "weight.quant_map"),
        (*_STATES, *_NESTED),
        _book_shape,
        _book,
    ),
    Layout("bitsandbytes, 8 bits", ("SCB", "weight"), ("weight_format",), _rows_shape, _rows),
    Layout("q4", ("weight_q4",), (), _q4_shape, lambda parts, _: Blocks("q4", parts["weight_q4"])),
    Layout(
        "q8",
        ("weight_q8", "weight_q8_scale"),
        (),
        _q8_shape,
        lambda parts, _: Blocks("q8", parts["weight_q8"], parts["weight_q8_scale"]),
    ),
)
