"""What is done to a built decoder's matrices from outside, for every model alike."""

from __future__ import annotations

import torch

from ..checkpoint.tensors import Placement, anywhere
from ..models.decoder import Decoder
from ..models.matrix import Linear, matrices
from ..ops import fused

# On a CPU, hidden sizes up to this gain from prepared weights; larger ones only pay for the copy.
PREPARE_UP_TO = 1024


def side_by_side(model: torch.nn.Module, device: torch.device) -> Placement:
    """Where weights go that are multiplied together: side by side from the start, but on a CPU.

    There one product gains nothing, and weights stay in the file's map.
    """
    if device.type == "cpu" and not fused.switched_on():
        return anywhere

    def place(name: str, dtype: torch.dtype) -> torch.Tensor | None:
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path)
        if not isinstance(layer, Linear):
            return None
        return layer.matrix.place(layer, leaf, dtype, device)

    return place


def prepare(decoder: Decoder, device: torch.device) -> None:
    """Build what is computed and not loaded, once the weights are on ``device``.

    That is the rotary embedding, and weights prepared for decoding. Preparing these saves launches
    and bytes, which only count on a GPU and for small matrices.
    """
    decoder.rotation = decoder.make_rotation(device)
    if device.type == "cpu" and decoder.config.hidden > PREPARE_UP_TO:
        return
    for matrix in matrices(decoder):
        matrix.join()
        matrix.shorten()
