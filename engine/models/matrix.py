"""A model's matrices: where their numbers lie, and how few rows and many are multiplied by them.

A linear layer names its parameters for loading; its matrix multiplies. Layers of one input share a
matrix, so that their weights can lie side by side and one product serve them all. Whatever changes
a built model's matrices does so from outside, one after the other: see ``loading.preparing``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.few_bits import FewBits
from ..ops.products import GEMV_ROWS, Weight, Weights, few_rows, gemv, in_16_bits, many_rows


class Linear(nn.Linear):
    """A linear layer: its parameters, and the ``matrix`` that multiplies.

    ``few_bits`` is its weight once that is quantised, and ``weight`` None then.
    """

    def __init__(self, size_in: int, size_out: int, bias: bool = True) -> None:
        super().__init__(size_in, size_out, bias=bias)
        self.matrix = Matrix(self)
        self.few_bits: FewBits | None = None

    def quantised(self, weight: FewBits) -> None:
        """Take a weight in few bits in place of the parameter."""
        self.few_bits = weight
        self.register_parameter("weight", None)

    @property
    def numbers(self) -> Weight:
        """The weight, in whatever format."""
        return self.weight if self.few_bits is None else self.few_bits

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return self.matrix.product(x)[self.matrix.layers.index(self)]


class Matrix:
    """The weights of a linear layer, or of several of one input, and their product.

    The layers' parameters are all there is at first. ``place`` or ``join`` make them views of one
    tensor; ``shorten`` adds a copy that few rows read.
    """

    def __init__(self, *layers: Linear) -> None:
        self.layers = layers
        self._sizes = [layer.out_features for layer in layers]
        self._joined: dict[str, Tensor] = {}
        self._short: Tensor | None = None
        for layer in layers:
            layer.matrix = self

    def product(self, x: Tensor) -> Sequence[Tensor]:
        """``x [..., in]`` by every layer's weight, plus its bias: each ``[..., out]``."""
        weights = self._weights(few=True)
        alike = len({type(weight) for weight, _ in weights}) == 1
        if alike and few_rows(x, weights[0][0]):
            flat = gemv(x.reshape(-1, x.shape[-1]), *weights)
            results = [y.view(*x.shape[:-1], y.shape[1]) for y in flat]
        else:
            results = [many_rows(x, *each) for each in self._weights(few=False)]
        return results[0].split_with_sizes(self._sizes, -1) if self._joined else results

    def bytes_read(self, rows: int) -> int:
        """Bytes of weights that a product of ``rows`` rows reads."""
        return sum(weight.nbytes for weight, _ in self._weights(few=rows <= GEMV_ROWS))

    def _weights(self, few: bool) -> list[Weights]:
        """What few rows or many are multiplied by: all layers as one, or each as it lies."""
        whole: list[Weights]
        if self._joined:
            whole = [(self._joined["weight"], self._joined.get("bias"))]
        else:
            whole = [(layer.numbers, layer.bias) for layer in self.layers]
        return [(self._short, whole[0][1])] if few and self._short is not None else whole

    def place(
        self, layer: Linear, leaf: str, dtype: torch.dtype, device: torch.device | str
    ) -> Tensor | None:
        """Where the weight or bias (``leaf``) of a layer shall lie, uninitialised at first.

        That is side by side with the others', in one tensor that is allocated for the first of
        them; None for a layer that has the matrix to itself: anywhere.
        """
        if len(self.layers) == 1:
            return None
        if leaf not in self._joined:
            size = (sum(self._sizes), *getattr(layer, leaf).shape[1:])
            self._joined[leaf] = torch.empty(size, dtype=dtype, device=device)
        return self._joined[leaf].split(self._sizes)[self.layers.index(layer)]

    def join(self) -> None:
        """Move the weights of several layers side by side, unless they lie so or are quantised."""
        if self._joined or self.in_few_bits:
            return
        for layer in self.layers:
            for leaf, own in layer.named_parameters():
                place = self.place(layer, leaf, own.dtype, own.device)
                if place is not None:
                    own.data = place.copy_(own.data)

    def shorten(self) -> None:
        """Keep weights that are one tensor in 16 bits too where few rows gain by it."""
        (weight, _), *others = self._weights(few=False)
        if isinstance(weight, Tensor) and not others:
            self._short = in_16_bits(weight.data)

    @property
    def in_few_bits(self) -> bool:
        """Whether any of its weights is quantised."""
        return any(layer.few_bits is not None for layer in self.layers)


def matrices(module: nn.Module) -> list[Matrix]:
    """The matrices of a module's linear layers, each once, in the module's order."""
    linear = (layer for layer in module.modules() if isinstance(layer, Linear))
    return list(dict.fromkeys(layer.matrix for layer in linear))
