"""Cross-attention of a pass over whole sequences: each token over the pictures that it sees."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor

from ..ops.attention import whole_attention
from ..policies.policy import PLAIN, Policy
from ..policies.select import top
from .crossing import CrossPools, CrossStored, Pair, Project, Sight, groups
from .pool import Extent

_FEW = 64  # tokens whose weights are computed at once


class Fresh:
    """A picture that is new to the cache. With ``pools`` it stays there."""

    def __init__(self, sight: Sight, pools: CrossPools | None, policy: Policy) -> None:
        """Where ``policy`` trims, ``trim`` says behind the first layer what stays of it."""
        self.seen, self.blind = sight.seen, sight.blind
        self._features, self._pools, self.whole = sight.features, pools, sight.seen
        self._trims, self._format = policy.trims, policy.feature_format()
        self._first: Pair | None = None
        self._taken: list[Extent] = []
        self._totals: list[Tensor] = []
        self._numbers = torch.arange(sight.seen)

    def pair(self, layer: int, project: Project) -> Pair:
        """A layer's keys and values, computed now: asked once, layer by layer. What is stored is
        attended as it has been written, so that later questions see the same as this one.
        """
        pair = project(self._features)
        if self._trims and layer == 0:
            self._first = pair
            return pair
        return self._stored(layer, *pair)

    def trim(self, kept: Tensor) -> None:
        """Only these ascending features stay, of the first layer's too; later ones compute no
        others. Tokens that see no picture attend as many.
        """
        assert self._first is not None, "the first layer has been asked"
        (k, v), self._first = self._first, None
        self._features, self.seen, self._numbers = self._features[kept], len(kept), kept
        self.blind = min(self.blind, self.seen)
        self._stored(0, k[kept], v[kept])

    def _stored(self, layer: int, k: Tensor, v: Tensor) -> Pair:
        """Keys and values as they are written."""
        if self._pools is None:
            return k, v
        pool = self._pools.pools[layer].holding(self._format)
        extent = pool.take(self.seen)
        self._taken.append(extent)
        pool.write(extent, k[: self.seen], v[: self.seen])
        if self._format == PLAIN:  # whose values are never left unread
            self._totals.append(torch.zeros(v.shape[1:], device=v.device))
            return k, v
        self._totals.append(v[: self.seen].float().sum(0))
        written = zip(pool.read(extent, self.seen), (k, v), strict=True)
        first, second = (torch.cat([mine.to(x.dtype), x[self.seen :]]) for mine, x in written)
        return first, second

    def hold(self) -> None:
        """What is not there yet has no holder."""

    def kept(self) -> CrossStored:
        """What a row holds after a pass: what has been stored."""
        assert self._pools is not None, "nothing is kept without pools"
        stored = CrossStored(
            ref(self._features),
            self._format,
            tuple(self._taken),
            torch.stack(self._totals),
            self._numbers,
            self.whole,
            sum(pool.slot_bytes for pool in self._pools.pools),
        )
        return stored if self._trims else self._pools.know(stored)

    def give(self) -> None:
        """Give back what was taken."""
        for extent in self._taken:
            extent.give()


class Looking:
    """The pictures of one pass: those that earlier turns see, and the turn's own.

    Of the latter those that later tokens see are stored in ``pools``, if there are any. What lies
    there already is held from ``hold`` on, whoever else gives it back meanwhile, up to ``keep``,
    once all layers are done, or ``release``. Where ``policy`` trims, each turn has pictures of its
    own.

    Attributes:
        watched: whether somebody wants to see what the last token looks at.
        last: if so, of every layer its weights ``[heads, features]`` on each picture that it sees.
    """

    def __init__(
        self,
        sights: Sequence[Sight] = (),
        pools: CrossPools | None = None,
        past: Sequence[CrossStored] = (),
        policy: Policy | None = None,
        *,
        watched: bool = False,
    ) -> None:
        self.policy = policy or Policy()
        self.groups = groups([sight.place for sight in sights], len(past))
        self._last = self.groups[-1][1]
        self.pictures: list[CrossStored | Fresh] = list(past)
        for number, sight in enumerate(sights, len(past)):
            lasts = pools is not None and self._last.start <= number < self._last.stop
            found = None if pools is None else pools.find(sight, self.policy)
            into = pools if lasts else None
            self.pictures.append(found or Fresh(sight, into, self.policy))
        self._cores: dict[int, list[Tensor]] = {}
        self.watched = watched
        self.last: list[list[Tensor]] = []

    def view(self, layer: int, positions: Tensor) -> LookView | None:
        """A layer's view, for tokens at these ascending ``positions`` of the turn."""
        return LookView(self, layer, positions) if self.pictures else None

    def hold(self) -> None:
        """The pass begins."""
        for picture in self.pictures:
            picture.hold()

    def keep(self) -> tuple[CrossStored, ...]:
        """What later tokens see, for a row to hold; the rest is given back."""
        for picture in self.pictures[: self._last.start]:
            picture.give()
        return tuple(picture.kept() for picture in self.pictures[self._last])

    def looked(self, weights: list[Tensor]) -> None:
        """Let the policy choose the core of a layer, one behind the other: ``weights [heads,
        features]`` are what the last token gives to each picture that it sees.
        """
        if self.watched:
            self.last.append(weights)
        for number, mine in enumerate(weights):
            picture = self.pictures[self._last][number]
            size = self.policy.feature_core(picture.whole)
            if size is not None:
                self._cores.setdefault(number, []).append(top(mine.mean(0), size))

    @property
    def cores(self) -> tuple[tuple[Tensor, ...], ...]:
        """Of each picture that later tokens see the core features of every cross layer, ascending;
        empty where all are attended in every step.
        """
        return tuple(tuple(layers) for layers in self._cores.values())

    def release(self) -> None:
        """Give back all of it."""
        for picture in self.pictures:
            picture.give()


class LookView:
    """A cross layer's view of a pass; see ``CrossView``."""

    def __init__(self, looking: Looking, layer: int, positions: Tensor) -> None:
        self._looking, self._pictures = looking, looking.pictures
        self._layer, self._tokens = layer, len(positions)
        self._policy = looking.policy
        new = any(isinstance(picture, Fresh) for picture in self._pictures)
        self._trims_now = self._policy.trims and layer == 0 and new
        self._received: dict[int, Tensor] = {}  # by picture, where some are trimmed
        starts = torch.tensor([start for start, _ in looking.groups], device=positions.device)
        found = torch.searchsorted(positions, starts).tolist()
        ends = [*found[1:], len(positions)]
        seen = [pictures for _, pictures in looking.groups]
        self._ranges = list(zip(found, ends, seen, strict=True))
        self._pairs: list[Pair] = []
        self._done = 0

    def attend(self, q: Tensor, project: Project) -> tuple[Tensor, Tensor]:
        """See ``CrossView.attend``; called for one chunk after the other."""
        if not self._pairs:
            written = (picture.pair(self._layer, project) for picture in self._pictures)
            self._pairs = [(k.to(q.dtype), v.to(q.dtype)) for k, v in written]
        begin, self._done = self._done, self._done + len(q)
        out, sees = torch.zeros_like(q), torch.ones(len(q), device=q.device)
        for start, end, pictures in self._ranges:
            mine = slice(max(start, begin) - begin, min(end, self._done) - begin)
            if mine.start < mine.stop:
                blind = pictures.start == pictures.stop
                pairs = self._pairs_for_blind() if blind else self._pairs_of(pictures)
                if pairs:
                    out[mine] = attention_across(q[mine], pairs)
                sees[mine] = float(not blind)
                if self._trims_now and not blind:
                    self._receive(pictures, received(q[mine], pairs))
        if self._done == self._tokens:
            self._trim()
            self._look_last(q[-1:])
        return out, sees

    def _look_last(self, q: Tensor) -> None:
        """The last token's weights, where they choose or are shown."""
        (*_, (_, _, last)) = self._ranges
        asked = self._looking.watched or self._policy.feature_core(1) is not None
        if asked and last.start < last.stop:
            self._looking.looked(received(q, self._pairs_of(last)))

    def _receive(self, pictures: slice, given: Sequence[Tensor]) -> None:
        """Add what tokens have given to the features of each picture."""
        for number, mine in zip(range(pictures.start, pictures.stop), given, strict=True):
            earlier = self._received.get(number)
            self._received[number] = mine if earlier is None else earlier + mine

    def _trim(self) -> None:
        """Let the policy choose of the turn's pictures, behind the first layer."""
        for number, given in self._received.items():
            picture = self._pictures[number]
            if isinstance(picture, Fresh):
                kept = self._policy.features(given)
                picture.trim(kept)
                k, v = self._pairs[number]
                self._pairs[number] = k[kept], v[kept]

    def _pairs_of(self, pictures: slice) -> list[Pair]:
        """What a token attends that sees these pictures."""
        both = zip(self._pairs[pictures], self._pictures[pictures], strict=True)
        return [(k[: picture.seen], v[: picture.seen]) for (k, v), picture in both]

    def _pairs_for_blind(self) -> list[Pair]:
        """What a token attends that sees none."""
        sizes = [picture.blind for picture in self._pictures]
        both = zip(self._pairs, sizes, strict=True)
        return [(k[:size], v[:size]) for (k, v), size in both if size]


def received(q: Tensor, pairs: Sequence[Pair]) -> list[Tensor]:
    """What ``q [tokens, heads, head_dim]`` give to the features of each pair, ``[heads, features]``
    fp32: softmax weights over all of them together, summed over the tokens.
    """
    k = torch.cat([k for k, _ in pairs]).repeat_interleave(q.shape[1] // pairs[0][0].shape[1], 1)
    total = torch.zeros(q.shape[1], len(k), device=q.device)
    for few in q.split(_FEW):  # the weights of all tokens at once may be larger than the model
        logits = torch.einsum("thd,nhd->htn", few.float(), k.float()) * q.shape[2] ** -0.5
        total += logits.softmax(-1).sum(1)
    return list(total.split([len(k) for k, _ in pairs], 1))


def attention_across(q: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """Attend ``q [tokens, heads, head_dim]`` over the keys and values of all ``pairs`` together."""
    k, v = pairs[0] if len(pairs) == 1 else (torch.cat(x) for x in zip(*pairs, strict=True))
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return whole_attention(q, k, v, grouped=grouped)[0].transpose(0, 1)
