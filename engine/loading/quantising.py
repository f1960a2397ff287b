"""Which weights are rounded to few bits as they are read, and what that is called.

The layers of the decoder are what every token reads. Embedding and language head stay as they are
(in 8 bits per row the head alone costs more than all layers do; ``+head`` takes it along), and so
do norms, the vision tower and the projector: a picture is seen once, and 4 bits in the tower cost
five times what they do in the whole decoder (docs/quality.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..checkpoint.tensors import Taker
from ..errors import OptionError
from ..models.matrix import Linear
from ..naming import told
from ..ops.few_bits import fits, quantise
from ..ops.formats import FORMATS, format_of
from ..options import WEIGHTS

LAYERS, HEAD = "decoder.layers.", "decoder.head."

# A parameter's name to the format that it is rounded to; None: as it is.
Rounding = Callable[[str], str | None]


def check_weights(wanted: str) -> None:
    """Raise OptionError unless this names what the weights are rounded to."""
    if wanted not in WEIGHTS:
        raise OptionError(
            f"unknown weights {told(wanted)}", hint=f"use one of {', '.join(WEIGHTS)}"
        )


def rounding(model: nn.Module, wanted: str) -> Rounding:
    """What becomes of a model's parameters where its weights are ``wanted``."""
    name, _, more = wanted.partition("+")
    prefixes = (LAYERS, HEAD) if more else (LAYERS,)

    def rounded_to(parameter: str) -> str | None:
        path, _, leaf = parameter.rpartition(".")
        if name == "auto" or leaf != "weight" or not parameter.startswith(prefixes):
            return None
        layer = model.get_submodule(path)
        is_matrix = isinstance(layer, Linear) and fits(layer.in_features, name)
        return name if is_matrix else None

    return rounded_to


def taker(model: nn.Module, wanted: str, device: torch.device) -> Taker:
    """Rounds what shall be to few bits, one tensor at a time: the others never exist twice."""
    rounded_to = rounding(model, wanted)

    def take(parameter: str, read: Callable[[], Tensor]) -> bool:
        name = rounded_to(parameter)
        if name is None:
            return False
        layer = model.get_submodule(parameter.rpartition(".")[0])
        assert isinstance(layer, Linear)
        layer.quantised(quantise(read(), name, device))
        return True

    return take


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
