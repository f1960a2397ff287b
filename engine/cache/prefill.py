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

from ..errors import OptionError
from ..ops.attention import whole_attention
from ..ops.rotary import Tables, rotated
from ..policies.layout import Kept, Layout
from ..policies.policy import Policy
from ..policies.received import Received
from .observe import Observer
from .pool import Extent, Pool
from .row import Row, Stored
from .showing import show_prefill

# Tokens that pass a layer at once: what a layer needs beside its keys and values stays bounded, and
# a pass can be left between two of them.
CHUNK = 2048


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
    out = whole_attention(q, k, v, mask, causal=mask is None, grouped=grouped)
    return out[0].transpose(0, 1)


def chunks(tokens: int) -> list[slice]:
    """The token ranges of a pass; their bounds count from its first token and from nothing else.

    >>> CHUNK, chunks(100), chunks(4096)
    (2048, [slice(0, 100, None)], [slice(0, 2048, None), slice(2048, 4096, None)])
    """
    return [slice(start, min(start + CHUNK, tokens)) for start in range(0, tokens, CHUNK)]


class Whole:
    """One layer's queries, keys and values of a whole pass, gathered chunk by chunk."""

    def __init__(self, tokens: int, past: tuple[Tensor, Tensor] | None = None) -> None:
        """``past``: keys and values that are visible to all of the tokens."""
        self._tokens, self._past, self._done = tokens, past, 0
        self._buffers: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values until now, those of the next chunk ``q, k, v`` included."""
        begin, self._done = self._done, self._done + len(q)
        if len(q) == self._tokens and self._past is None:
            return q, k, v
        earlier = 0 if self._past is None else len(self._past[0])
        if self._buffers is None:
            self._buffers = self._made(earlier, q, k, v)
        for buffer, new, lead in zip(self._buffers, (q, k, v), (0, earlier, earlier), strict=True):
            buffer[lead + begin : lead + self._done] = new
        queries, keys, values = self._buffers
        columns = earlier + self._done
        return queries[: self._done], keys[:columns], values[:columns]

    def _made(self, earlier: int, *like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Buffers for queries, and for keys and values behind those of the past."""
        leads = (0, earlier, earlier)
        q, k, v = (
            x.new_empty(lead + self._tokens, *x.shape[1:])
            for x, lead in zip(like, leads, strict=True)
        )
        if self._past is not None:
            k[:earlier], v[:earlier] = self._past
        return q, k, v

    @property
    def complete(self) -> bool:
        """Whether all tokens are there."""
        return self._done == self._tokens


@dataclass
class LayerView:
    """A layer's view of a pass over whole sequences."""

    step: Prefill | Uncached
    layer: int
    whole: Whole

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tables: Tables) -> Tensor:
        """See ``View.attend``; called for one chunk after the other."""
        q, k = rotated(q, tables, queries=True), rotated(k, tables)
        queries, k, v = self.whole.add(q, k, v)
        out = causal_attention(q, k, v)
        if self.whole.complete:
            self.step.keep(self.layer, queries, k, v)
        return out


class Uncached:
    """A forward pass that stores nothing: exact logits of a whole prompt."""

    def __init__(self, tokens: int, rotary: Tensor) -> None:
        self.positions = torch.arange(tokens, device=rotary.device)
        self.rotary = rotary[None]

    def view(self, layer: int) -> LayerView:
        """See ``Step.view``."""
        return LayerView(self, layer, Whole(len(self.positions)))

    def chunks(self, tokens: int) -> list[slice]:
        """See ``Step.chunks``."""
        return chunks(tokens)

    def narrow(self, layer: int) -> Tensor | None:
        """Nothing is narrowed."""
        return None

    def keep(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Nothing is kept."""


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
        self.pools, self.new_tokens = pools, new_tokens
        self.past = past or Row()
        goes_on = self.past.layers and self.past.policy.spec == policy.spec
        self.policy = self.past.policy if goes_on else policy.for_sequence()
        self.positions = turn.positions[0] + self.past.seen
        self.row = Row(
            policy=self.policy,
            image_spans=[*self.past.image_spans, *_spans(turn, self.past.seen)],
            rotary=self.past.rotary if self.past.layers or rotary is None else rotary,
            observer=observer or self.past.observer,
        )
        self.rotary = self.row.rotary[None]
        self._turn = turn
        self._onward: Tensor | None = None
        self._size: object = None
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
        past = None
        if self.past.layers:
            pool, stored = self.pools[layer], self.past.layers[layer]
            used = slice(stored.start, stored.start + stored.layout.columns)
            past = pool.k[used], pool.v[used]
        return LayerView(self, layer, Whole(self._turn.columns, past))

    def chunks(self, tokens: int) -> list[slice]:
        """See ``Step.chunks``."""
        return chunks(tokens)

    def narrow(self, layer: int) -> Tensor | None:
        """See ``Step.narrow``; later layers' layout loses the same tokens."""
        onward = self._onward
        if onward is not None:
            self._turn = self._turn.at(onward)
        return onward

    def keep(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Let the policy choose of a layer's columns ``k, v``, and store what it keeps."""
        layout, earlier = self._turn, None
        if self.past.layers:
            layout, earlier = self._behind_past(layer)
        received = Received(q, k, earlier)
        kept = self.policy.retain(layer, layout, received)
        self._onward = self.policy.narrow(layer, layout, received)
        self._refuse_unlike(layer, kept)
        self.row.layers.append(self._store(self.pools[layer], k, v, layout, kept))
        if self.row.observer is not None:
            show_prefill(self.row, layer, layout, received, self.row.layers[layer])

    def _refuse_unlike(self, layer: int, kept: Kept) -> None:
        """Raise OptionError where layers would not keep as much as each other: decoding counts on
        as much text in all of them, and on as many image tokens where there is a core.

        A policy that drops tokens may leave later layers less than another wants to keep.
        """
        tiers = None if kept.core is None else (len(kept.shared), len(kept.core))
        size = kept.text.shape[-1], tiers
        if self._size is not None and size != self._size:
            raise OptionError(
                f"cache {self.policy.spec}: layer {layer} has fewer tokens of this prompt left "
                "than earlier layers keep",
                hint="let the policy that drops tokens drop fewer, or the other one keep fewer",
            )
        self._size = size

    def _behind_past(self, layer: int) -> tuple[Layout, Tensor | None]:
        """The layout of stored columns and then the new ones, and what was received earlier."""
        stored = self.past.layers[layer]
        layout = stored.layout.followed_by(self._turn)
        if stored.text_scores is None:
            return layout, None
        behind = layout.columns - stored.layout.columns
        return layout, F.pad(stored.text_scores, (stored.layout.text_start, behind))

    def _store(self, pool: Pool, k: Tensor, v: Tensor, layout: Layout, kept: Kept) -> Stored:
        """Gather the kept columns into a fresh extent of ``pool``."""
        shared, text = len(kept.shared), kept.text.shape[-1]
        extent = pool.take(extent_size(self.policy, layout, shared, text, self.new_tokens))
        self._taken.append(extent)
        start = extent.start
        for rows, source in ((pool.k, k), (pool.v, v)):
            rows[start : start + shared] = source[kept.shared]
            rows[start + shared : start + shared + text] = _per_head(source, kept.text)
        core = None if kept.core is None else torch.searchsorted(kept.shared, kept.core)
        return Stored(extent, _stored_layout(layout, kept), core, kept.text_scores)


def extent_size(policy: Policy, layout: Layout, shared: int, text: int, new_tokens: int) -> int:
    """Slots that a layer needs which keeps so many columns, and for the tokens to be decoded."""
    budget = policy.text_budget(*layout.lengths(new_tokens))
    if budget is None:
        return shared + text + new_tokens
    return shared + text + min(new_tokens, max(budget.total - text, 0) + 1)


def most_slots(policy: Policy, turn: Layout, new_tokens: int, past: Row) -> int:
    """Slots that any layer needs at most for a turn on top of ``past``."""
    layouts = [stored.layout.followed_by(turn) for stored in past.layers] or [turn]
    kept = [policy.most_kept(layout) for layout in layouts]
    both = zip(layouts, kept, strict=True)
    return max(extent_size(policy, layout, *most, new_tokens) for layout, most in both)


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
