"""Weights in few bits: which are rounded as they are read, and what becomes of packed ones.

The layers of the decoder are what every token reads. Embedding and language head stay as they are
(in 8 bits per row the head alone costs more than all layers do; ``+head`` takes it along), and so
do norms, the vision tower and the projector: a picture is seen once, and 4 bits in the tower cost
five times what they do in the whole decoder (docs/quality.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..checkpoint.convert import Packer
from ..checkpoint.layouts import LAYOUTS, Blocks, Codes, Stored
from ..checkpoint.names import target_names
from ..checkpoint.pickled import Piece
from ..checkpoint.tensors import Taker
from ..errors import OptionError
from ..models.matrix import Linear
from ..naming import told
from ..ops.few_bits import LANES, RUN, FewBits, empty, few_bits, fits, laid_out, quantise
from ..ops.formats import FORMATS, Few, few_of_codes, format_of
from ..options import WEIGHTS
from .families import Family

LAYERS, HEAD = "decoder.layers.", "decoder.head."

# A parameter's name to the format that it is rounded to; None: as it is.
Rounding = Callable[[str], str | None]


def check_weights(wanted: str) -> None:
    """Raise OptionError unless this names what the weights are rounded to."""
    if wanted not in WEIGHTS:
        raise OptionError(
            f"unknown weights {told(wanted)}", hint=f"use one of {', '.join(WEIGHTS)}"
        )


def rounding(model: nn.Module, wanted: str, lanes: int = 1) -> Rounding:
    """What becomes of a model's parameters where its weights are ``wanted``.

    Matrices whose rows are no multiple of ``lanes``, or no whole runs of the format, stay as they
    are. Raises OptionError if all do.
    """
    name, _, more = wanted.partition("+")
    if name == "auto":
        return lambda parameter: None
    prefixes = (LAYERS, HEAD) if more else (LAYERS,)
    rounded = {
        f"{path}.weight"
        for path, layer in model.named_modules()
        if isinstance(layer, Linear) and f"{path}.".startswith(prefixes)
        if fits(layer.in_features, name) and layer.out_features % lanes == 0
    }
    if not rounded:
        raise OptionError(
            f"no layer of this model fits {name}: inputs in runs of {FORMATS[name].run}"
            + (f", outputs in runs of {lanes}" if lanes > 1 else ""),
            hint="leave out weights=",
        )
    return lambda parameter: name if parameter in rounded else None


def taker(model: nn.Module, wanted: str, device: torch.device, dtype: torch.dtype) -> Taker:
    """Takes what is packed or shall be rounded, one tensor at a time: no other exists twice.

    A packed weight stays as it is where a format of ours says the same numbers and no other is
    wanted; else it is rounded to the wanted one, or written out in ``dtype``.
    """
    rounded_to = rounding(model, wanted)

    def take(parameter: str, packed: bool, read: Callable[[], Stored]) -> bool:
        name = rounded_to(parameter)
        if name is None and not packed:
            return False
        path, _, leaf = parameter.rpartition(".")
        layer, weight = model.get_submodule(path), held_as(read(), name)
        if isinstance(weight, FewBits) and isinstance(layer, Linear):
            layer.quantised(weight.to(device))
        else:
            own = nn.Parameter(_plain(weight, dtype).to(device), requires_grad=False)
            layer.register_parameter(leaf, own)
        return True

    return take


def packer(family: Family, wanted: str) -> Packer:
    """Writes a checkpoint's tensors as products read them: what ``taker`` rounds, and packed ones.

    Rows of q4 lie by eights: a matrix of other counts of rows stays as it is.
    """
    lanes = LANES if wanted.startswith("q4") else 1
    rounded_to = rounding(family.model, wanted, lanes)
    layouts = {each.name: each for each in LAYOUTS}

    def packed(piece: Piece) -> list[Piece]:
        names = target_names(family.rename(piece.name))
        found = {rounded_to(name) for name in names} or {None}
        format_ = found.pop()
        if format_ is None or found:
            return [replace(piece, read=lambda: _plain(held_as(piece.read(), None), piece.dtype))]
        few = empty(format_, piece.shape[0], piece.shape[1], "meta")
        leaves = layouts[format_].needed
        parts = [few.codes] if few.scale is None else [few.codes, few.scale]
        prefix = piece.name.removesuffix("weight")
        return [
            Piece(prefix + leaf, part.dtype, tuple(part.shape), partial(_part, piece, format_, at))
            for at, (leaf, part) in enumerate(zip(leaves, parts, strict=True))
        ]

    return packed


def _part(piece: Piece, name: str, at: int) -> Tensor:
    """Codes or scales (``at``) of a tensor in few bits."""
    few = held_as(piece.read(), name)
    assert isinstance(few, FewBits)
    part = (few.codes, few.scale)[at]
    assert part is not None
    return part


def _plain(weight: FewBits | Tensor, dtype: torch.dtype) -> Tensor:
    return weight.numbers().to(dtype) if isinstance(weight, FewBits) else weight.to(dtype)


def held_as(stored: Stored, name: str | None) -> FewBits | Tensor:
    """A weight as it shall be held, in the format ``name`` if one is named."""
    weight: FewBits | Tensor
    if isinstance(stored, Blocks):
        weight = few_bits(*stored)
    elif isinstance(stored, Codes):
        same = same_numbers(stored)
        weight = stored.numbers() if same is None else same
    else:
        weight = stored
    if name is None or (isinstance(weight, FewBits) and weight.format == name):
        return weight
    return quantise(weight.numbers() if isinstance(weight, FewBits) else weight, name)


def same_numbers(stored: Codes) -> FewBits | None:
    """Whole numbers in a format of ours that says exactly the same; None where none does.

    q8 has one scale per row and no zero, q4 a scale in fp16 for each 32 inputs: one for 64 or 128
    is repeated.
    """
    codes, scale, zero, group_of = stored
    size_in, groups = codes.shape[1], scale.shape[1]
    if groups == 1 and bool((zero == (0 if codes.dtype == torch.int8 else 128)).all()):
        signed = codes if codes.dtype == torch.int8 else (codes ^ 128).view(torch.int8)
        return laid_out(Few(signed, scale.float()[:, 0]), "q8")
    group, short = size_in // groups, scale.half()
    exact = bool((short.float() == scale.float()).all()) and bool((codes <= 15).all())
    if group_of is not None or group % RUN or not exact:
        return None
    parts = (part.half().repeat_interleave(group // RUN, 1) for part in (short, zero))
    return laid_out(few_of_codes(codes, *parts), "q4")


def held(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's weights by format, the most first."""
    found: dict[str, int] = {}
    for parameter in model.parameters():
        name = format_of(parameter.dtype).name
        found[name] = found.get(name, 0) + parameter.nbytes
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.few_bits:
            few = layer.few_bits
            found[few.format] = found.get(few.format, 0) + few.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def bytes_of(model: nn.Module, itemsize: int, wanted: str) -> int:
    """What the weights will take, none of which is read yet; ``itemsize`` of those not rounded."""
    rounded_to, total = rounding(model, wanted), 0
    for name, parameter in model.named_parameters():
        row = FORMATS.get(rounded_to(name) or "")
        bytes_, run = (row.bytes, row.run) if row else (itemsize, 1)
        total += parameter.numel() // run * bytes_
    return total
