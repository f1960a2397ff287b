"""Keys and values of a prompt's beginning up to its pictures, which whoever asks about them shares.

A policy that stores pictures whatever is asked about them (``Policy.impartial``) reads them once:
every question is then a turn on top of what is stored. In the formats of the cache that is the very
same memory; plain numbers are copied. An answer equals the same question's over the same stored
beginning; in 16 bits, the plain answer as well.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..cache.pool import Pool
from ..cache.row import Row
from ..policies.policy import Policy
from ..result import FinishReason, Timings
from ..running.scheduler import Job
from ..running.turn import Turn


class Reading:
    """What becomes of the logits behind a beginning: nothing."""

    finish: FinishReason | None = None

    def choose(self, logits: Tensor) -> int:
        """Any token: it is never decoded."""
        self.finish = "length"
        return 0

    def take(self, token: int) -> str:
        """Nothing is said."""
        return ""

    def stopped(self) -> bool:
        """Nobody waits for it."""
        return False


class Prefixes:
    """Beginnings that are stored, the latest used last; at most ``most`` bytes of them.

    Attributes:
        hits, misses: how often a beginning was there, and was not.
    """

    def __init__(self, pools: Sequence[Pool], most: int) -> None:
        self._pools, self._most = pools, most
        self._rows: OrderedDict[bytes, Row] = OrderedDict()
        self.hits = self.misses = 0

    def reading(self, job: Job, asker: str) -> tuple[bytes, Job] | None:
        """Where a job's beginning is kept, and a job that reads it; None if it has none to share,
        or if it is there already.
        """
        if not (job.policy.impartial and job.turn.spans) or self._most == 0:
            return None
        key, turn = _key(job.policy, job.turn, asker), _split(job.turn)[0]
        if key in self._rows:
            return None
        self.misses += 1
        return key, Job(turn, Reading(), job.policy, 0, Timings(), keeps=True)

    def put(self, key: bytes, row: Row) -> None:
        """Keep a beginning that was read; the oldest go where there are too many bytes."""
        if key in self._rows:
            row.give()
            return
        self._rows[key] = row
        while len(self._rows) > 1 and self.nbytes > self._most:
            self.drop()

    def begin(self, job: Job, asker: str, *, fresh: bool = False) -> int:
        """Let a job begin behind what is stored of it; returns how many tokens it need not read:
        none where that was read ``fresh`` for it.
        """
        if not (job.policy.impartial and job.turn.spans):
            return 0
        row = self._rows.get(key := _key(job.policy, job.turn, asker))
        if row is None:
            return 0
        self._rows.move_to_end(key)
        self.hits += not fresh
        job.past, job.turn = row.share(), _split(job.turn)[1]
        return 0 if fresh else row.seen

    def drop(self) -> bool:
        """Let go of the one that was used longest ago; whether there was any."""
        if not self._rows:
            return False
        self._rows.popitem(last=False)[1].give()
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of all of them, a picture that cross layers share counted once."""
        pictures = {picture for row in self._rows.values() for picture in row.pictures}
        return sum(picture.nbytes for picture in pictures) + sum(
            stored.nbytes(pool, stored.layout.columns)
            for row in self._rows.values()
            for pool, stored in zip(self._pools, row.layers, strict=True)
        )


def _split(turn: Turn) -> tuple[Turn, Turn]:
    """The tokens up to the last picture's end, and the others."""
    end = turn.spans[-1][1]
    first = replace(turn, token_ids=turn.token_ids[:end])
    rest = replace(turn, token_ids=turn.token_ids[end:], spans=[], features=[], times=())
    return first, rest


def _key(policy: Policy, turn: Turn, asker: str) -> bytes:
    """What a beginning depends on: its text, its pictures' features, and how they are stored; and
    who asks: how fast an answer comes tells nobody what others have asked.
    """
    digest = hashlib.sha256(
        f"{asker!r} {policy.spec} {turn.spans} {turn.own_sizes} {turn.times} ".encode()
    )
    digest.update(str(list(turn.token_ids[: turn.spans[-1][1]])).encode())
    for features in turn.features:
        numbers = features.contiguous().cpu()
        digest.update(ctypes.string_at(numbers.data_ptr(), numbers.nbytes))
    return digest.digest()
