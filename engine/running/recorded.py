"""The decoder as one call on a CPU: a step's native calls, recorded and repeated.

A decode step reads all weights once, which leaves nothing else in the processor's caches: the few
hundred microseconds of Python around each layer's kernels then cost as much as a tenth of a large
model's step, and most of a small one's. But from step to step only numbers change, in buffers that
stay where they are. So the calls are made from Python once for every kind of step, and recorded;
all later steps of this kind repeat the record. It is for a CPU what a CUDA graph is for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.decode import Decoding
from ..models.decoder import Decoder
from ..ops import fused, native
from ..ops.rotary import Tables
from ..ops.tape import Tape

# In a layer: two norms; the products for q, k, v, for the output, for gate and up, for down;
# rotation, attention, and the gate times up.
CALLS_PER_LAYER = 9
# Behind the layers: the final norm and the product of the language head.
CALLS_BEHIND = 2
# Steps whose rotations are computed at once.
AHEAD = 64


def recordable(hidden: Tensor, decoding: Decoding) -> bool:
    """Whether steps of ``decoding`` can be made of native calls alone, as far as one can tell."""
    there = hidden.device.type == "cpu" and native.loaded() and fused.serves(hidden)
    return there and not decoding.side.per_layer


class RecordedDecoder:
    """The decoder for the rows of one ``Decoding``, recorded as it is used."""

    def __init__(self, decoder: Decoder, decoding: Decoding) -> None:
        self._decoder, self._decoding = decoder, decoding
        self._rotations = Rotations(decoder, decoding)
        self._stream: Tensor | None = None
        # For each kind of step its tape and where it leaves its result; None: not all was native.
        self._tapes: dict[object, tuple[Tape, Tensor] | None] = {}

    def __call__(self, hidden: Tensor) -> Tensor:
        """Scores of the next tokens ``[rows, vocab]`` in fp32, from the rows' embeddings."""
        decoding = self._decoding
        self._take(hidden)
        kind = (decoding.kind, torch.get_num_threads())
        if kind not in self._tapes:
            return self._record(kind)
        found = self._tapes[kind]
        if found is None:
            return self._decoder.logits(self._layers())
        tape, result = found
        decoding.arrive(0)
        tape.run()
        decoding.leave(0)
        return result.to(torch.float32, copy=True)

    def _take(self, hidden: Tensor) -> None:
        """Put a step's input where the tapes read it."""
        tables = self._rotations.tables(hidden.dtype)
        if self._stream is None:
            scale = None if tables.scale is None else tables.scale.clone()
            self._stream = hidden.clone()
            self._tables = Tables(tables.cos.clone(), tables.sin.clone(), scale)
            return
        self._stream.copy_(hidden)
        for mine, new in zip(self._tables, tables, strict=True):
            if mine is not None and new is not None:
                mine.copy_(new)

    def _layers(self) -> Tensor:
        assert self._stream is not None
        return self._decoder.through(self._stream, self._tables, self._decoding)

    def _record(self, kind: object) -> Tensor:
        """Make a step and keep its calls, if they are all there is to it."""
        decoder, tape = self._decoder, Tape()
        with tape.record():
            result = decoder.head(self._layers())
        whole = len(tape) == CALLS_PER_LAYER * len(decoder.layers) + CALLS_BEHIND
        self._tapes[kind] = (tape, result) if whole else None
        return result.to(torch.float32, copy=True)


class Rotations:
    """Rotation tables of a ``Decoding``, computed for many steps ahead: positions only count on."""

    def __init__(self, decoder: Decoder, decoding: Decoding) -> None:
        self._rotation, self._decoding = decoder.rotation, decoding
        self._first = -AHEAD
        self._ahead: list[Tables] = []

    def tables(self, dtype: torch.dtype) -> Tables:
        """Those of the coming step, see ``Rotation.tables``."""
        step = self._decoding.seen[0] - self._first
        if not 0 <= step < AHEAD:
            self._compute(dtype)
            step = 0
        return self._ahead[step]

    def _compute(self, dtype: torch.dtype) -> None:
        decoding = self._decoding
        rows, self._first = len(decoding.positions), decoding.seen[0]
        positions = decoding.positions + torch.arange(AHEAD)[:, None]
        opening = decoding.opening.expand(AHEAD, rows).flatten()
        tables = self._rotation.tables(positions.flatten(), opening, dtype)
        steps = [slice(start, start + rows) for start in range(0, AHEAD * rows, rows)]
        self._ahead = [tables.narrowed(step) for step in steps]
