"""Weights in few bits: which tensors of a checkpoint are one weight together.

Which are there says how a weight is packed, layer by layer: the lists of layers in published
configs are often wrong. What the numbers are is in ``layouts``, what becomes of them in
``loading.quantising``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .folder_files import DOWNLOAD_AGAIN, UNQUANTISED, show
from .header import TensorInfo
from .layouts import LAYOUTS, Infos, Layout, Read, Settings, Stored

_MARKS = tuple(dict.fromkeys(layout.needed[0] for layout in LAYOUTS))

# By quant_method: the settings that tell apart what is read from what is not, where they are said.
_METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "awq": ("version", ("gemm",)),
    "bitsandbytes": ("", ()),
    "compressed-tensors": ("format", ("pack-quantized",)),
    "gptq": ("checkpoint_format", ("gptq", "gptq_v2")),
    "avl-engine": ("", ()),
}


def settings_of(folder: Path, config: Mapping[str, object]) -> Settings:
    """What a config.json says about weights in few bits; empty where they are not.

    Raises CheckpointError for a method, or a variant of one, that is not read.
    """
    sections = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    for section in sections:
        for key in ("quantization_config", "compression_config"):
            settings = section.get(key)
            if settings:
                return _known(folder, settings)
    return {}


def _known(folder: Path, settings: object) -> Settings:
    if not isinstance(settings, Mapping):
        raise unread(folder, "quantization_config")
    method = str(settings.get("quant_method", "method unknown"))
    key, allowed = _METHODS.get(method, ("", ()))
    variant = str(settings.get(key, "")).lower()
    if method not in _METHODS or (variant and variant not in allowed):
        raise unread(folder, show(" ".join(filter(None, [method, variant])))[1:-1])
    return settings


def unread(folder: Path, how: str) -> CheckpointError:
    """The error for weights in few bits that are not read; the caller raises it."""
    return CheckpointError(
        f"{folder}: the weights are quantised in a form that is not read ({how})", hint=UNQUANTISED
    )


@dataclass(frozen=True)
class PackedInfo(TensorInfo):
    """The ``weight`` of a layer that is packed; ``nbytes`` is what all its tensors take.

    ``rows`` are those of the whole weight that it stands for, of ``whole`` rows.
    """

    layout: Layout
    parts: Infos
    rows: tuple[int, int]
    whole: int

    def part(self, dim: int, rank: int, size: int) -> TensorInfo:
        """See ``TensorInfo.part``: packed weights are not shared out."""
        raise CheckpointError(
            f"{show(self.name)} is quantised: such weights are not split over processes",
            hint="use one process, or 16-bit weights with --weights q8 or q4",
        )

    def split(self, count: int) -> list[TensorInfo]:
        """See ``TensorInfo.split``."""
        pieces, at = [], self.rows[0]
        for piece in super().split(count):
            assert isinstance(piece, PackedInfo)
            pieces.append(replace(piece, rows=(at, at + piece.shape[0])))
            at += piece.shape[0]
        return list(pieces)

    def stored(self, read: Read, settings: Settings) -> Stored:
        """Its numbers."""
        parts = {leaf: read(info) for leaf, info in self.parts.items()}
        numbers = self.layout.numbers(parts, settings)
        if self.rows == (0, self.whole):
            return numbers
        start, stop = self.rows
        return numbers[start:stop] if isinstance(numbers, Tensor) else numbers.some(start, stop)


def format_name(info: TensorInfo) -> str:
    """What the format of a stored tensor is called: its layout's name, or its dtype's."""
    if isinstance(info, PackedInfo):
        return info.layout.name
    return str(info.dtype).removeprefix("torch.")


def grouped(tensors: Infos, read: Read) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint, those of each packed weight as one ``PackedInfo``.

    ``read`` is for the few that hold no numbers but say what the others are.

    Raises CheckpointError where a packed weight lacks a tensor, its tensors do not fit each other,
    or the weight is there unpacked as well.
    """
    plain, packed = dict(tensors), dict[str, TensorInfo]()
    for name in tensors:
        mark = next((mark for mark in _MARKS if name.endswith("." + mark)), None)
        if mark is None:
            continue
        info = _packed(name.removesuffix(mark), mark, tensors, read)
        for part in info.parts.values():
            plain.pop(part.name, None)
        if info.name in plain:
            raise CheckpointError(f"{show(info.name)} and {show(name)} are the same weight twice")
        packed[info.name] = info
    return plain | packed


def _packed(layer: str, mark: str, tensors: Infos, read: Read) -> PackedInfo:
    """The weight that ``layer`` + ``mark`` belongs to; ``layer`` ends with a dot."""
    names = " or ".join(layout.name for layout in LAYOUTS if layout.needed[0] == mark)
    for layout in LAYOUTS:
        if layout.needed[0] != mark:
            continue
        parts = {
            leaf: tensors[layer + leaf]
            for leaf in (*layout.needed, *layout.optional)
            if layer + leaf in tensors
        }
        for leaf in layout.needed:
            if leaf not in parts:
                message = (
                    f"{show(layer + mark)} is quantised ({names}) without {show(layer + leaf)}"
                )
                raise CheckpointError(message, hint=DOWNLOAD_AGAIN)
        shape = layout.shape(parts, read)
        if shape is not None:
            return _as_one(f"{layer}weight", layout, parts, shape)
    shapes = ", ".join(f"{leaf} {list(info.shape)}" for leaf, info in parts.items())
    raise CheckpointError(
        f"{show(layer + mark)} is quantised ({names}), but its tensors do not fit: {shapes}",
        hint="4 and 8 bits are read; compare the files with the published ones",
    )


def _as_one(name: str, layout: Layout, parts: Infos, shape: tuple[int, int]) -> PackedInfo:
    first = parts[layout.needed[0]]
    total = sum(info.nbytes for info in parts.values())
    kinds = [info.dtype for info in parts.values() if info.dtype.is_floating_point]
    dtype = kinds[0] if kinds else torch.float16
    place = (name, dtype, shape, first.file, first.start, first.start + total)
    return PackedInfo(*place, layout, parts, (0, shape[0]), shape[0])
