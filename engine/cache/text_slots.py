"""The evictable text of all rows while they decode: places, scores, free slots."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import ranking
from .lengths import POSITION, RECENT, TOTAL, USED
from .row import Row
from .sizes import Sizes


class TextSlots:
    """Text of every layer, row and KV head; a *place* is a slot counted from the text's start.

    A row that holds n text tokens uses the places 0 to n during a step: n tokens and the one in
    writing. After the step either one token per head is evicted, whose place the next token takes,
    or the text grows by a place. Scores exist only where some row evicts.

    Attributes:
        start: ``[layers, rows]`` int64 pool slots where text begins.
        write: ``[layers, rows, kv_heads]`` int64 where the next token goes,
            ``slot * kv_heads + head``.
        scores: ``[layers, rows, kv_heads, places]`` fp32 attention received so far.
        positions: the same shape, int32; -1 where nothing lies.
    """

    def __init__(self, layers: int, kv_heads: int, sizes: Sizes, device: torch.device) -> None:
        places = sizes.places if sizes.evicting else 0
        self.start = torch.zeros(layers, sizes.rows, dtype=torch.int64, device=device)
        self.write = torch.zeros(layers, sizes.rows, kv_heads, dtype=torch.int64, device=device)
        self.scores = torch.zeros(layers, sizes.rows, kv_heads, places, device=device)
        self.positions = torch.full_like(self.scores, -1, dtype=torch.int32)

    def join(self, row: Row, r: int, held: int, evicts: bool) -> None:
        """Write row ``r``, which holds ``held`` text tokens."""
        kv_heads = self.write.shape[-1]
        start = torch.tensor([stored.start + stored.layout.text_start for stored in row.layers])
        self.start[:, r] = start
        self.write[:, r] = (start[:, None] + held) * kv_heads + torch.arange(kv_heads)
        if not evicts:
            return
        self.scores[:, r] = 0
        self.positions[:, r] = -1
        self.positions[:, r, :, held] = row.seen
        for layer, stored in enumerate(row.layers):
            text = stored.layout.positions[:, stored.layout.text_start :]
            self.positions[layer, r, :, :held] = text
            if stored.text_scores is not None:
                self.scores[layer, r, :, :held] = stored.text_scores

    def free_places(self, r: int) -> Tensor:
        """``[layers, kv_heads]``: row ``r``'s places of the next token."""
        return self.slots(r) - self.start[:, r, None]

    def slots(self, r: int) -> Tensor:
        """``[layers, kv_heads]``: pool slots of row ``r``'s next token."""
        return self.write[:, r] // self.write.shape[-1]

    def grow(self, layers: slice) -> None:
        """The next tokens go behind the last; where no row evicts."""
        self.write[layers].add_(self.write.shape[-1])

    def aging(
        self,
        layers: slice,
        logits: Tensor,
        lse: Tensor,
        first: Tensor,
        words: Tensor,
        error: Tensor,
    ) -> Callable[[], None]:
        """The call that credits a step's attention and finds places for the next tokens.

        Args:
            layers: whose text it is.
            logits: ``[layers * rows, heads, max]`` of the step over its lists; ``lse`` beside it.
            first: ``[layers, rows]`` int32, where text begins in the lists.
            words: ``[WORDS, rows]`` int32, see ``Lengths``; zeros where there is no row.
            error: see ``ranking``.
        """
        state = self.scores[layers], self.positions[layers], self.write[layers]
        return ranking.plan_age(
            logits,
            lse,
            first.view(-1),
            self.start[layers].view(-1),
            *(words[word] for word in (USED, TOTAL, RECENT, POSITION)),
            *(tensor.flatten(0, 1) for tensor in state),
            error=error,
        )
