"""Trimmed Llama: features that the first cross layer hardly looks at go (arXiv 2504.00557).

In a model with cross-attention the keys and values of pictures' features outweigh all of the text's
and never change. The first cross layer decides for all: of each query head the features with the
most weight are kept, summed over the prompt's tokens that see the picture; what no head keeps goes,
in every cross layer. Heads agree in part, so that of 6,404 features a ratio of .25 keeps some 60 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import OptionError
from .policy import Policy, check_share

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Trimmed(Policy):
    """The paper's rule; text is left alone.

    Attributes:
        ratio: share of a picture's features that each head keeps, one at least.
    """

    name: ClassVar[str] = "trimmed"

    ratio: float = 0.25

    def __post_init__(self) -> None:
        check_share(self, "ratio")

    def check_depth(self, layers: int, cross_layers: int = 0) -> None:
        """There must be cross layers."""
        if not cross_layers:
            raise OptionError(
                "cache policy trimmed: this model has no cross-attention layers",
                hint="use it with Llama-3.2-Vision; for others there are avl and sift",
            )

    def features(self, received: Tensor) -> Tensor:
        """The union of the heads' best.

        >>> import torch
        >>> Trimmed(0.5).features(torch.tensor([[5.0, 1, 4, 0], [5, 0, 1, 4]])).tolist()
        [0, 2, 3]
        """
        each = max(1, int(self.ratio * received.shape[1]))
        return received.topk(each, 1).indices.unique()
