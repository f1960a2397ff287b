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
from ..ops.ranks import ALONE, Ranks
from ..ops.rotary import Tables, rotated
from ..policies.layout import InFormat, Kept, Layout
from ..policies.policy import Policy
from ..policies.received import Received
from .looking import Looking, LookView
from .observe import Observer
from .pool import Extent, PagedPool, Pool
from .row import Part, Row, Stored
from .showing import show_look, show_prefill

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
        if not self.whole.complete:
            return causal_attention(q, k, v)
        return self.step.finish(self.layer, q, queries, k, v)


class Uncached:
    """A forward pass that stores nothing: exact logits of a whole prompt."""

    def __init__(self, tokens: int, rotary: Tensor, looking: Looking | None = None) -> None:
        self.positions = torch.arange(tokens, device=rotary.device)
        self.rotary = rotary[None]
        self._looking = looking or Looking()

    def view(self, layer: int) -> LayerView:
        """See ``Step.view``."""
        return LayerView(self, layer, Whole(len(self.positions)))

    def cross(self, layer: int) -> LookView | None:
        """See ``Step.cross``."""
        return self._looking.view(layer, self.positions)

    def chunks(self, tokens: int) -> list[slice]:
        """See ``Step.chunks``."""
        return chunks(tokens)

    def narrow(self, layer: int) -> Tensor | None:
        """Nothing is narrowed."""
        return None

    def finish(self, layer: int, q: Tensor, queries: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; nothing is kept."""
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
        looking: Looking | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """``turn`` describes the new tokens alone; ``new_tokens`` will be decoded afterwards.

        ``observer`` and ``rotary [words]`` stay with the row, later turns included; ``looking`` is
        what cross layers see, of a model that has such; ``ranks`` share its heads.
        """
        self.ranks = ranks
        self.pools, self.new_tokens = pools, new_tokens
        self.past = past or Row()
        goes_on = self.past.layers and self.past.policy.spec == policy.spec
        self.policy = self.past.policy if goes_on else policy.for_sequence()
        self.positions = turn.positions[0] + self.past.seen
        self.row = Row(
            policy=self.policy,
            image_spans=[*self.past.image_spans, *_spans(turn, self.past.seen)],
            rotary=self.past.rotary if rotary is None else rotary,
            observer=observer or self.past.observer,
        )
        self.rotary = self.row.rotary[None]
        self._turn = turn
        self._onward: Tensor | None = None
        self._text: int | None = None
        self._taken: list[Extent] = []
        self._looking = looking or Looking()

    def __enter__(self) -> Prefill:
        self._looking.hold()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.row.pictures, self.row.cores = self._looking.keep(), self._looking.cores
            try:
                if self._looking.watched and self.row.pictures:
                    show_look(self.row, self._looking.last)
            except BaseException:
                self.row.give()
                raise
            self.past.give()
            return
        for extent in self._taken:
            extent.give()
        self._looking.release()

    def view(self, layer: int) -> LayerView:
        """See ``Step.view``."""
        past = held(self.pools[layer], self.past.layers[layer]) if self.past.layers else None
        return LayerView(self, layer, Whole(self._turn.columns, past))

    def cross(self, layer: int) -> LookView | None:
        """See ``Step.cross``."""
        return self._looking.view(layer, self._turn.positions[0])

    def chunks(self, tokens: int) -> list[slice]:
        """See ``Step.chunks``."""
        return [slice(None)] if self.policy.in_one_piece else chunks(tokens)

    def narrow(self, layer: int) -> Tensor | None:
        """See ``Step.narrow``; later layers' layout loses the same tokens."""
        onward = self._onward
        if onward is not None:
            self._turn = self._turn.at(onward)
        return onward

    def finish(self, layer: int, q: Tensor, queries: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with the last chunk's ``q``, let the policy choose of the layer's columns ``k, v``
        by all of its ``queries``, and store what it keeps.
        """
        layout, earlier = self._turn, None
        if self.past.layers:
            layout, earlier = self._behind_past(layer)
        received = Received(queries, k, earlier, ranks=self.ranks)
        among = self.policy.attending(layer, layout, received)
        if among is None:
            out, attended = causal_attention(q, k, v), (layout, received)
        else:
            mine = among[among >= len(k) - len(q)] - (len(k) - len(q))
            out = torch.zeros_like(q)
            out[mine] = causal_attention(q[mine], k[among], v[among])
            attended = layout.at(among), Received(q[mine], k[among])
        self._keep(layer, k, v, layout, received)
        if self.row.observer is not None:
            show_prefill(self.row, layer, *attended, self.row.layers[layer], self.pools[layer])
        return out

    def _keep(self, layer: int, k: Tensor, v: Tensor, layout: Layout, received: Received) -> None:
        kept = self.policy.retain(layer, layout, received)
        self._onward = self.policy.narrow(layer, layout, received)
        self._refuse_unlike(layer, kept)
        self.row.layers.append(self._store(layer, k, v, layout, kept))

    def _refuse_unlike(self, layer: int, kept: Kept) -> None:
        """Raise OptionError where layers would not keep as much text as each other: a decode step
        counts on it. Image tokens are each layer's own.

        A policy that drops tokens may leave later layers less than another wants to keep.
        """
        text = kept.text.shape[-1]
        if self._text not in (None, text):
            raise OptionError(
                f"cache {self.policy.spec}: layer {layer} keeps {text} tokens of the text, "
                f"earlier layers {self._text}",
                hint="let the policy that drops tokens drop fewer, or the other one keep fewer",
            )
        self._text = text

    def _behind_past(self, layer: int) -> tuple[Layout, Tensor | None]:
        """The layout of stored columns and then the new ones, and what was received earlier."""
        stored = self.past.layers[layer]
        layout = stored.whole_layout().followed_by(self._turn)
        if stored.text_scores is None:
            return layout, None
        start = stored.whole_layout().text_start
        behind = layout.columns - stored.tokens
        return layout, F.pad(stored.text_scores, (start, behind))

    def _store(self, layer: int, k: Tensor, v: Tensor, layout: Layout, kept: Kept) -> Stored:
        """Gather the kept columns into fresh extents, but for what stays where it is."""
        pool, core = self.pools[layer], kept.core
        parts, there = self._old_parts(layer, layout, kept)
        for each in kept.packed:
            fresh = each._replace(columns=each.columns[~there[each.columns]])
            if len(fresh.columns):
                parts.append(self._packed(pool.of(each.format), k, v, layout, fresh, core))
        columns = kept.shared[~there[kept.shared]]
        shared, text = len(columns), kept.text.shape[-1]
        # A pool with a limit may have no room left for packing: what was promised must be there.
        new = self.new_tokens
        ahead = self.policy.most_plain(new) if pool.limit is None else new
        extent = self._take(pool, extent_size(self.policy, layout, shared, text, ahead))
        start = extent.start
        for rows, source in ((pool.k, k), (pool.v, v)):
            rows[start : start + shared] = source[columns]
            rows[start + shared : start + shared + text] = _per_head(source, kept.text)
        mine = None if core is None else _where(columns, core)
        stored = stored_layout(layout, columns, kept.text)
        return Stored(extent, stored, mine, kept.text_scores, tuple(parts))

    def _take(self, pool: Pool | PagedPool, size: int) -> Extent:
        extent = pool.take(size)
        self._taken.append(extent)
        return extent

    def _packed(
        self,
        pool: PagedPool,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        new: InFormat,
        core: Tensor | None,
    ) -> Part:
        """Write columns in a format."""
        extent = self._take(pool, len(new.columns))
        mine = None if core is None else _where(new.columns, core)
        return Part.written(extent, k[new.columns], v[new.columns], layout, new, mine)

    def _old_parts(self, layer: int, layout: Layout, kept: Kept) -> tuple[list[Part], Tensor]:
        """Parts of earlier turns that are kept whole, and which columns they are.

        Of others what is kept becomes plain again.
        """
        there = torch.zeros(layout.columns, dtype=torch.bool, device=layout.image_of.device)
        if not self.past.layers:
            return [], there
        stays, parts = torch.zeros_like(there), []
        stays[torch.cat([kept.shared, *(each.columns for each in kept.packed)])] = True
        stored = self.past.layers[layer]
        end = stored.layout.text_start
        for part in stored.parts:
            begin, end = end, end + part.tokens
            if stays[begin:end].all():
                there[begin:end] = True
                mine = torch.arange(begin, end, device=there.device)
                core = None if kept.core is None else _where(mine, kept.core)
                parts.append(replace(part, extent=part.extent.share(), core=core))
                self._taken.append(part.extent)
        return parts, there


def held(pool: Pool, stored: Stored) -> tuple[Tensor, Tensor]:
    """Keys and values ``[tokens, kv_heads, head_dim]`` of what a layer holds, parts before text."""
    used = slice(stored.start, stored.start + stored.layout.columns)
    k, v = pool.k[used], pool.v[used]
    if not stored.parts:
        return k, v
    start = stored.layout.text_start
    parts = [pool.of(part.format).read(part.extent, part.tokens) for part in stored.parts]
    keys, values = (
        torch.cat([plain[:start], *(part.to(plain.dtype) for part in numbers), plain[start:]])
        for plain, numbers in zip((k, v), zip(*parts, strict=True), strict=True)
    )
    return keys, values


def extent_size(policy: Policy, layout: Layout, shared: int, text: int, new_tokens: int) -> int:
    """Slots that a layer needs which keeps so many columns, and for the tokens to be decoded."""
    budget = policy.text_budget(*layout.lengths(new_tokens))
    if budget is None:
        return shared + text + new_tokens
    return shared + text + min(new_tokens, max(budget.total - text, 0) + 1)


def most_slots(policy: Policy, turn: Layout, new_tokens: int, past: Row) -> int:
    """Slots that any layer needs at most for a turn on top of ``past``."""
    # Under another policy what lies in formats may become plain again.
    goes_on = past.layers and past.policy.spec == policy.spec
    before = [each.layout if goes_on else each.whole_layout() for each in past.layers]
    layouts = [layout.followed_by(turn) for layout in before] or [turn]
    kept = [policy.most_kept(layout) for layout in layouts]
    both = zip(layouts, kept, strict=True)
    return max(extent_size(policy, layout, *most, new_tokens) for layout, most in both)


def most_packed(policy: Policy, turn: Layout, past: Row) -> dict[str, int]:
    """Tokens that any layer writes at most in formats of the cache, by format."""
    layouts = [stored.layout.followed_by(turn) for stored in past.layers] or [turn]
    most: dict[str, int] = {}
    for layout in layouts:
        for name, tokens in policy.most_packed(layout).items():
            most[name] = max(most.get(name, 0), tokens)
    return most


def _spans(turn: Layout, offset: int) -> list[tuple[int, int]]:
    """Positions (start, end) of the pictures of a fresh turn."""
    spans = []
    for index, size in enumerate(turn.image_sizes):
        # A picture that cross layers look at takes no columns: its span is empty.
        start = offset + int(turn.picture(index)[0] if size else turn.text_start)
        spans.append((start, start + size))
    return spans


def _per_head(source: Tensor, columns: Tensor) -> Tensor:
    """Rows of ``source [n, kv_heads, head_dim]`` at ``columns [t]`` or ``[kv_heads, t]``."""
    if columns.dim() == 1:
        return source[columns]
    heads = torch.arange(source.shape[1], device=columns.device)
    return source[columns.T, heads]


def _where(columns: Tensor, chosen: Tensor) -> Tensor:
    """Ascending places in ``columns`` of those that are among the ``chosen``.

    >>> _where(torch.tensor([2, 5, 7]), torch.tensor([1, 2, 7])).tolist()
    [0, 2]
    """
    return torch.isin(columns, chosen).nonzero()[:, 0]


def stored_layout(layout: Layout, shared: Tensor, text: Tensor) -> Layout:
    """The layout of an extent that holds these columns."""
    text = text if text.dim() == 2 else text[None]
    heads = max(len(layout.positions), len(text))
    positions = layout.positions.expand(heads, -1)
    text_positions = positions.gather(1, text.expand(heads, -1))
    outside = torch.full((text.shape[-1],), -1, device=text.device)
    return replace(
        layout,
        image_of=torch.cat([layout.image_of[shared], outside]),
        positions=torch.cat([positions[:, shared], text_positions], 1),
        text_start=len(shared),
        minor=None,
    )
