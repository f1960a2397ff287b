"""What the cache holds of one sequence between passes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..policies.layout import InFormat, Layout
from ..policies.policy import Policy
from .crossing import CrossStored
from .observe import Observer
from .pool import Extent, PagedPool, Pool


@dataclass(frozen=True)
class Part:
    """Tokens that lie in a format of their own, and never move again: image tokens of one turn, or
    whatever a policy packs.

    Attributes:
        format: its name, see ``ops.pages``; a layer's pool may give its keys more bits.
        extent: of the format's pool; the tokens are its first slots, in order.
        image_of, positions: ``[tokens]`` int64, as in ``Layout``.
        total: ``[kv_heads, head_dim]`` fp32, the sum of the values.
        core: ascending, which of the tokens are core; None without a core tier.
        minor: whether they are minor tokens, see ``InFormat``.
    """

    format: str
    extent: Extent
    image_of: Tensor
    positions: Tensor
    total: Tensor
    core: Tensor | None
    minor: bool

    @classmethod
    def written(
        cls,
        extent: Extent,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        new: InFormat,
        core: Tensor | None = None,
    ) -> Part:
        """Write ``new`` columns of ``layout``, whose keys and values ``[tokens, kv_heads,
        head_dim]`` are ``k`` and ``v``, into an extent of their format.
        """
        pool = extent.pool
        assert isinstance(pool, PagedPool), "formats lie in pools of pages"
        pool.write(extent, k, v)
        return cls(
            new.format,
            extent,
            layout.image_of[new.columns],
            layout.positions[:1, new.columns],
            v.float().sum(0),
            core,
            new.minor,
        )

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.image_of)

    def listed(self, core: bool) -> Tensor:
        """Slots of all tokens, or of those of the core."""
        which = self.core if core and self.core is not None else torch.arange(self.tokens)
        return which.cpu() + self.extent.start


@dataclass
class Stored:
    """One layer's share of a sequence: an extent of the layer's pool and what lies in it.

    ``layout``'s columns are the extent's used slots, relative to its start: first the shared slots
    (fixed and image tokens), from ``layout.text_start`` on the text. ``core`` and ``text_scores``
    are as in ``Kept``, with columns now meaning these slots. ``parts`` are what lies in formats of
    its own.
    """

    extent: Extent
    layout: Layout
    core: Tensor | None
    text_scores: Tensor | None
    parts: tuple[Part, ...] = ()

    @property
    def start(self) -> int:
        """The extent's first slot."""
        return self.extent.start

    @property
    def text_slots(self) -> int:
        """Slots for text, used or not."""
        return self.extent.size - self.layout.text_start

    @property
    def tokens(self) -> int:
        """Tokens that are held, for each head."""
        return self.layout.columns + sum(part.tokens for part in self.parts)

    def core_positions(self) -> Tensor | None:
        """Positions of the core image tokens; None without a core tier."""
        if self.core is None:
            return None
        cores = [part.positions[0, part.core] for part in self.parts if part.core is not None]
        return torch.cat([self.layout.positions[0, self.core], *cores])

    def whole_layout(self) -> Layout:
        """The layout of all that is held, parts before the text."""
        if not self.parts:
            return self.layout
        layout, start = self.layout, self.layout.text_start
        heads = len(layout.positions)
        beside = [part.positions.expand(heads, -1) for part in self.parts]
        positions = [layout.positions[:, :start], *beside, layout.positions[:, start:]]
        images = [layout.image_of[:start], *(part.image_of for part in self.parts)]
        minor = [
            torch.full_like(part.image_of, part.minor, dtype=torch.bool) for part in self.parts
        ]
        plain = torch.zeros_like(layout.image_of, dtype=torch.bool)
        return replace(
            layout,
            image_of=torch.cat([*images, layout.image_of[start:]]),
            positions=torch.cat(positions, 1),
            text_start=start + sum(part.tokens for part in self.parts),
            minor=torch.cat([plain[:start], *minor, plain[start:]]),
        )

    def nbytes(self, pool: Pool, columns: int) -> int:
        """Bytes of the tokens that are held, ``columns`` of them plain."""
        packed = [part.tokens * part.extent.pool.slot_bytes for part in self.parts]
        return columns * pool.slot_bytes + sum(packed)

    def share(self) -> Stored:
        """The same for one more holder, who only reads it."""
        parts = tuple(replace(part, extent=part.extent.share()) for part in self.parts)
        return replace(self, extent=self.extent.share(), parts=parts)

    def give(self) -> None:
        """Give back all of it."""
        self.extent.give()
        for part in self.parts:
            part.extent.give()


def no_rotary() -> Tensor:
    """The rotary state of a model whose angles follow from a token's number alone."""
    return torch.empty(0, dtype=torch.int64)


@dataclass
class Row:
    """One sequence under its own ``policy``: rows that are decoded together may differ in it.

    ``image_spans`` are the positions of every picture's tokens; ``pictures`` are what the next
    token sees through cross layers, where a model has such, and ``cores`` of each the ascending
    features that are core in every cross layer, if there is a core; ``rotary [words]`` int64 is
    what the model's rotation has made of the first prefill, see ``Step``; ``attended_share``
    collects, for every decode step, the share of the tokens seen that were multiplied with (mean
    over layers); ``observer`` is told of every layer of every pass. ``lists`` counts decode steps
    over the full lists and over the core lists; ``spent [layers, 2]`` is what those steps'
    ``Sifting`` have counted, heads summed up, ``spent_across`` the same of cross layers.
    """

    policy: Policy = field(default_factory=Policy)
    layers: list[Stored] = field(default_factory=list)
    image_spans: list[tuple[int, int]] = field(default_factory=list)
    pictures: tuple[CrossStored, ...] = ()
    cores: tuple[tuple[Tensor, ...], ...] = ()
    rotary: Tensor = field(default_factory=no_rotary)
    step: int = 0
    attended_share: list[float] = field(default_factory=list)
    observer: Observer | None = None
    lists: list[int] = field(default_factory=lambda: [0, 0])
    spent: Tensor | None = None
    spent_across: Tensor | None = None

    @property
    def seen(self) -> int:
        """Tokens seen, which is also the next position."""
        return max((stored.layout.seen for stored in self.layers), default=0)

    @property
    def text(self) -> Layout:
        """A layout with as many text tokens as every layer holds, which a prefill sees to."""
        return self.layers[-1].layout

    def across(self) -> Row:
        """The row as cross layers see it: its pictures are parts, and nothing else is there. A
        feature's position is its number among those of all pictures.
        """
        ends = list(accumulate((picture.whole for picture in self.pictures), initial=0))
        layers = len(self.pictures[0].extents) if self.pictures else 0
        return Row(
            policy=self.policy,
            layers=[self._across(layer) for layer in range(layers)],
            image_spans=list(pairwise(ends)),
            observer=self.observer,
            lists=self.lists,
            spent=self.spent_across,
        )

    def _across(self, layer: int) -> Stored:
        sizes = tuple(picture.whole for picture in self.pictures)
        none = torch.empty(0, dtype=torch.int64)
        layout = Layout(none, none[None], 0, sizes, settled=0, text_seen=0, seen=sum(sizes))
        parts = tuple(self._part(number, layer) for number in range(len(self.pictures)))
        nothing = Extent(self.pictures[0].extents[layer].pool, 0, 0)
        return Stored(nothing, layout, none if self.cores else None, None, parts)

    def _part(self, number: int, layer: int) -> Part:
        picture = self.pictures[number]
        before = sum(earlier.whole for earlier in self.pictures[:number])
        return Part(
            picture.format,
            picture.extents[layer],
            torch.full((picture.seen,), number),
            before + picture.numbers.cpu()[None],
            picture.totals[layer],
            self.cores[number][layer].cpu() if self.cores else None,
            minor=False,
        )

    def share(self) -> Row:
        """The same for a sequence that begins with it: a turn on top of it copies or shares what it
        keeps, and gives this back.
        """
        for picture in self.pictures:
            picture.hold()
        return replace(self, layers=[stored.share() for stored in self.layers], observer=None)

    def give(self) -> None:
        """Give back all that the sequence holds of the pools."""
        for stored in self.layers:
            stored.give()
        for picture in self.pictures:
            picture.give()
