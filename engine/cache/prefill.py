"""Prefill: attend over all tokens of a turn, then store what the policy keeps, layer by layer.

Each layer is compacted right after its attention, so that no more than one layer's full keys and
values exist at any time; the full cache of all layers never does. What earlier turns hold stays
until all layers are done: the peak is then that, what is newly kept, and one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.rotary import Tables, rotated
from ..policies.layout import Kept, Layout
from ..policies.policy import Policy
from ..policies.received import Received
from .observe import Observer
from .pool import Extent, Pool
from .row import Row, Stored
from .showing import show_prefill


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend ``q [tokens, heads, head_dim]`` over ``k, v [columns, kv_heads, head_dim]``.

    The last ``tokens`` columns are the queries' own and causal; earlier columns are visible to all.
    """
    past = len(k) - len(q)
    mask = None
    if past:
        mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(past)
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )
    return out[0].transpose(0, 1)


@dataclass
class LayerView:
    """A layer's view of a step: hands the call on with the layer's number."""

    step: Prefill | Uncached
    layer: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tables: Tables) -> Tensor:
        """See ``View.attend``."""
        q, k = rotated(q, tables, queries=True), rotated(k, tables)
        return self.step.attend(self.layer, q, k, v)


class Uncached:
    """A forward pass that stores nothing: exact logits of a whole prompt."""

    def __init__(self, tokens: int, rotary: Tensor) -> None:
        self.positions = torch.arange(tokens, device=rotary.device)
        self.rotary = rotary[None]

    def view(self, layer: int) -> LayerView:
        """See ``Step.view``."""
        return LayerView(self, layer)

    def narrow(self, layer: int) -> Tensor | None:
        """Nothing is narrowed."""
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Plain causal attention."""
        return causal_attention(q, k, v)


class Prefill:
    """One turn's prefill of one sequence, on top of what earlier turns left in ``past``.

    A block, ``with Prefill(...) as step``, either commits or leaves everything as it was: at its
    end ``row`` is complete, and the extents of ``past`` are given back; an exception gives back
    what the row has taken, and ``past`` can go on.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        policy: Policy,
        turn: Layout,
        new_tokens: int,
        past: Row | None = None,
        observer: Observer | None = None,
        rotary: Tensor | None = None,
    ) -> None:
        """``turn`` describes the new tokens alone; ``new_tokens`` will be decoded afterwards.

        ``observer`` and ``rotary [words]`` stay with the row, later turns included.
        """
        self.pools, self.policy, self.new_tokens = pools, policy, new_tokens
        self.past = past or Row()
        self.positions = turn.positions[0] + self.past.seen
        self.row = Row(
            policy=policy,
            image_spans=[*self.past.image_spans, *_spans(turn, self.past.seen)],
            rotary=self.past.rotary if self.past.layers or rotary is None else rotary,
            observer=observer or self.past.observer,
        )
        self.rotary = self.row.rotary[None]
        self._turn = turn
        self._narrowed: Tensor | None = None
        self._taken: list[Extent] = []

    def __enter__(self) -> Prefill:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.past.give()
            return
        for extent in self._taken:
            extent.give()

    def view(self, layer: int) -> LayerView:
        """See ``Step.view``."""
        return LayerView(self, layer)

    def narrow(self, layer: int) -> Tensor | None:
        """See ``Step.narrow``; later layers' layout loses the same tokens."""
        kept = self._narrowed
        if kept is not None:
            self._turn = self._turn.narrowed(kept)
        return kept

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend, let the policy choose, and store what it keeps."""
        layout, earlier = self._turn, None
        if self.past.layers:
            k, v, layout, earlier = self._behind_past(layer, k, v)
        out = causal_attention(q, k, v)
        received = Received(q, k, earlier)
        kept = self.policy.retain(layer, layout, received)
        self._narrowed = self.policy.narrow(layer, layout, received)
        self.row.layers.append(self._store(self.pools[layer], k, v, layout, kept))
        if self.row.observer is not None:
            show_prefill(self.row, layer, layout, received, self.row.layers[layer])
        return out

    def _behind_past(
        self, layer: int, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Layout, Tensor | None]:
        """Keys, values, layout and earlier scores: stored columns, then the new ones."""
        pool, stored = self.pools[layer], self.past.layers[layer]
        used = slice(stored.start, stored.start + stored.layout.columns)
        k, v = torch.cat([pool.k[used], k]), torch.cat([pool.v[used], v])
        layout = stored.layout.followed_by(self._turn)
        if stored.text_scores is None:
            return k, v, layout, None
        behind = layout.columns - stored.layout.columns
        return k, v, layout, F.pad(stored.text_scores, (stored.layout.text_start, behind))

    def _store(self, pool: Pool, k: Tensor, v: Tensor, layout: Layout, kept: Kept) -> Stored:
        """Gather the kept columns into a fresh extent of ``pool``."""
        shared, text = len(kept.shared), kept.text.shape[-1]
        capacity = shared + text + self._growth(layout, text)
        extent = pool.take(capacity)
        self._taken.append(extent)
        start = extent.start
        for rows, source in ((pool.k, k), (pool.v, v)):
            rows[start : start + shared] = source[kept.shared]
            rows[start + shared : start + shared + text] = _per_head(source, kept.text)
        core = None if kept.core is None else torch.searchsorted(kept.shared, kept.core)
        return Stored(extent, _stored_layout(layout, kept), core, kept.text_scores)

    def _growth(self, layout: Layout, text: int) -> int:
        """Slots to leave free for the tokens to be decoded."""
        budget = self.policy.text_budget(*layout.lengths(self.new_tokens))
        if budget is None:
            return self.new_tokens
        return min(self.new_tokens, max(budget.total - text, 0) + 1)


def _spans(turn: Layout, offset: int) -> list[tuple[int, int]]:
    """Positions (start, end) of the pictures of a fresh turn."""
    starts = [int(turn.picture(index)[0]) + offset for index in range(len(turn.image_sizes))]
    return [(start, start + size) for start, size in zip(starts, turn.image_sizes, strict=True)]


def _per_head(source: Tensor, columns: Tensor) -> Tensor:
    """Rows of ``source [n, kv_heads, head_dim]`` at ``columns [t]`` or ``[kv_heads, t]``."""
    if columns.dim() == 1:
        return source[columns]
    heads = torch.arange(source.shape[1], device=columns.device)
    return source[columns.T, heads]


def _stored_layout(layout: Layout, kept: Kept) -> Layout:
    """The layout of an extent that holds ``kept``."""
    text = kept.text if kept.text.dim() == 2 else kept.text[None]
    heads = max(len(layout.positions), len(text))
    positions = layout.positions.expand(heads, -1)
    text_positions = positions.gather(1, text.expand(heads, -1))
    outside = torch.full((text.shape[-1],), -1, device=text.device)
    return replace(
        layout,
        image_of=torch.cat([layout.image_of[kept.shared], outside]),
        positions=torch.cat([positions[:, kept.shared], text_positions], 1),
        text_start=len(kept.shared),
    )
