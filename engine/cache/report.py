"""What a sequence holds in the cache, counted: tokens, tiers and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .picture_bytes import images_among, picture_bytes
from .pool import Pool
from .row import Row, Stored


@dataclass(frozen=True)
class Spread:
    """A count per layer, summed up."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, counts: Sequence[float]) -> Spread:
        """Mean, least and most of ``counts``."""
        return cls(sum(counts) / len(counts), min(counts), max(counts))


@dataclass(frozen=True)
class CacheReport:
    """The cache at the end of an answer; counts are tokens per layer, averaged over heads.

    Attributes:
        policy: the spec of the policy.
        image_tokens: image tokens of the prompt (I).
        stored, core, minor: image tokens in the cache; of these, attended at every step; freed.
        text: text tokens after the last picture that are kept.
        stored_share: tokens in the cache / tokens seen (the paper's Stored %, as a fraction).
        used_share: tokens attended / tokens seen, mean over decode steps (Used %).
        bytes_used: bytes of the tokens kept, and of the features that cross layers hold.
        bytes_allocated: bytes of the tensors that hold them, free slots included.
        bytes_full: what the full cache would use at this length.
        formats: bytes of image tokens by format, the model's own dtype among them. Of a model whose
            cross layers look at pictures, this and the following count features instead.
        image_stored_share: bytes of image tokens / what all of them take in the full cache.
        image_read_share: bytes of image tokens read / what a step over the full cache reads, mean
            over decode steps (without one: what is stored).
        left_out: share of a head's attention that was given to mean values, mean over steps,
            layers and heads.
        values_read: of the values in formats those that were read, by steps that may leave some
            out; 1 where none may.
        features: of pictures, that each cross layer holds; they are no tokens of the sequence, and
            no count of tokens above is of them.
        feature_bytes: bytes of their keys and values, in all cross layers.
        features_whole: how many they were before a policy dropped any.
    """

    policy: str
    image_tokens: int
    stored: Spread
    core: Spread
    minor: Spread
    text: Spread
    stored_share: float
    used_share: float
    bytes_used: int
    bytes_allocated: int
    bytes_full: int
    formats: dict[str, int] = field(default_factory=dict)
    image_stored_share: float = 0.0
    image_read_share: float = 0.0
    left_out: float = 0.0
    values_read: float = 1.0
    features: int = 0
    feature_bytes: int = 0
    features_whole: int = 0


def report(row: Row, pools: Sequence[Pool], cross: Sequence[Pool] = ()) -> CacheReport:
    """Count what ``row`` (settled) holds in ``pools`` and in those of ``cross`` layers; nothing, if
    it has not been read.
    """
    allocated = allocated_bytes([*pools, *cross])
    if not row.layers:
        none = Spread(0.0, 0.0, 0.0)
        counts = 0, none, none, none, none
        return CacheReport(row.policy.spec, *counts, 0.0, 0.0, 0, allocated, 0)
    spans = row.image_spans
    images = [images_among(each.whole_layout().positions, spans) for each in row.layers]
    total = sum(end - start for start, end in row.image_spans)
    core = [
        images[layer] if stored.core is None else float(_core_tokens(stored))
        for layer, stored in enumerate(row.layers)
    ]
    tokens = [stored.tokens for stored in row.layers]
    each = zip(row.layers, pools, strict=True)
    seen, steps, token_bytes = row.seen, row.attended_share, pools[0].slot_bytes
    pictures = picture_bytes(row.across(), cross) if row.pictures else picture_bytes(row, pools)
    used = sum(stored.nbytes(pool, stored.layout.columns) for stored, pool in each)
    feature_bytes = sum(picture.nbytes for picture in row.pictures)
    whole = sum(picture.whole for picture in row.pictures)
    return CacheReport(
        policy=row.policy.spec,
        image_tokens=total,
        stored=Spread.of(images),
        core=Spread.of(core),
        minor=Spread.of([total - stored for stored in images]),
        text=Spread.of([_text_tokens(stored, row.image_spans) for stored in row.layers]),
        stored_share=sum(tokens) / (len(tokens) * seen),
        used_share=sum(steps) / len(steps) if steps else sum(tokens) / (len(tokens) * seen),
        bytes_used=used + feature_bytes,
        bytes_allocated=allocated,
        bytes_full=len(tokens) * seen * token_bytes
        + sum(picture.nbytes_whole for picture in row.pictures),
        formats=pictures.stored,
        image_stored_share=pictures.share(sum(pictures.stored.values()), whole or total),
        image_read_share=pictures.share(pictures.step_bytes, whole or total),
        left_out=pictures.left_out,
        values_read=pictures.values_read,
        features=sum(picture.seen for picture in row.pictures),
        feature_bytes=feature_bytes,
        features_whole=whole,
    )


def _core_tokens(stored: Stored) -> int:
    cores = [stored.core, *(part.core for part in stored.parts)]
    return sum(len(core) for core in cores if core is not None)


def _text_tokens(stored: Stored, spans: list[tuple[int, int]]) -> float:
    """Tokens of a layer that came after the last picture, averaged over its heads."""
    positions = stored.whole_layout().positions
    after = max((end for _, end in spans), default=0)
    return float((positions >= after).sum()) / len(positions)


def allocated_bytes(pools: Sequence[Pool]) -> int:
    """Bytes of the storages behind ``pools``, each counted once."""
    # Told apart by the storage itself: on the meta device there are no addresses.
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for pool in pools
        for tensor in (pool.k, pool.v, *(paged.data for paged in pool.paged.values()))
    }
    return sum(storages.values())
