"""A decoder split over processes: which part of every matrix a rank holds (see ``ops.ranks``).

Queries', keys' and values' heads and the MLP's inner features are shared out, rows of the matrices
that make them and columns of those that take them; the latter's results are sums over ranks. The
language head is split by tokens where they divide; embedding, norms and tower are everyone's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..errors import OptionError
from ..models.decoder import Decoder, DecoderLayer
from ..models.matrix import Linear
from ..ops.ranks import Ranks

ROWS, COLUMNS = 0, 1
_PARTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ROWS),
    **dict.fromkeys(("o_proj", "down_proj"), COLUMNS),
}


def split(decoder: Decoder, ranks: Ranks) -> Mapping[str, int]:
    """Make a built decoder, still without weights, one rank's part.

    Returns the dimension along which a parameter is split, by its name in the model.

    Raises OptionError for sizes that do not divide, and for layers of another kind.
    """
    config = decoder.config
    own = replace(
        config,
        heads=ranks.share(config.heads, "heads"),
        kv_heads=ranks.share(config.kv_heads, "heads of keys and values"),
        mlp=ranks.share(config.mlp, "features of the MLP"),
    )
    decoder.config, decoder.ranks = own, ranks
    cuts: dict[str, int] = {}
    with torch.device("meta"):
        for number, layer in enumerate(decoder.layers):
            if type(layer) is not DecoderLayer:
                raise OptionError(
                    "a model with cross layers is not split over processes", hint="use one process"
                )
            decoder.layers[number] = DecoderLayer(own, layer.number, ranks)
            for name, dim in _PARTS.items():
                for leaf, _ in getattr(layer, name).named_parameters():
                    cuts[f"decoder.layers.{number}.{name}.{leaf}"] = dim
        if not config.tied_head and config.vocab % ranks.size == 0:
            decoder.head = Linear(config.hidden, config.vocab // ranks.size, bias=False)
            cuts["decoder.head.weight"] = ROWS
    return cuts
