"""The decoder's layers as one call on a CPU: a step's native calls, recorded and repeated.

A decode step reads all weights once, which leaves nothing else in the processor's caches: the few
hundred microseconds of Python around each layer's kernels then cost as much as a tenth of a large
model's step, and most of a small one's. But from step to step only numbers change, in buffers that
stay where they are. So the calls are made from Python once for every kind of step, and recorded;
all later steps of this kind repeat the record. It is for a CPU what a CUDA graph is for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine import fused, native
from engine.cache.decode import Decoding
from engine.models.decoder import Decoder, Tables
from engine.tape import Tape

# In a layer: two norms; the products for q, k, v, for the output, for gate and up, for down;
# rotation, attention, and the gate times up.
CALLS_PER_LAYER = 9


def recordable(hidden: Tensor, decoding: Decoding) -> bool:
    """Whether steps of ``decoding`` can be made of native calls alone, as far as one can tell."""
    there = hidden.device.type == "cpu" and native.loaded() and fused.serves(hidden)
    return there and not decoding.side.per_layer


class RecordedLayers:
    """The layers and the final norm for the rows of one ``Decoding``, recorded as they are used."""

    def __init__(self, decoder: Decoder, decoding: Decoding) -> None:
        self._decoder, self._decoding = decoder, decoding
        self._stream: Tensor | None = None
        # For each kind of step its tape and where it leaves its result; None: not all was native.
        self._tapes: dict[object, tuple[Tape, Tensor] | None] = {}

    def __call__(self, hidden: Tensor) -> Tensor:
        """Final normed states ``[rows, hidden]`` of the rows' embeddings, as ``Decoder`` gives."""
        decoder, decoding = self._decoder, self._decoding
        tables = decoder.rotation.tables(decoding, hidden.dtype)
        kind = (decoding.kind, torch.get_num_threads())
        if kind not in self._tapes:
            return self._record(kind, hidden, tables)
        found = self._tapes[kind]
        if found is None:
            return decoder.through(hidden, tables, decoding)
        self._take(hidden, tables)
        tape, result = found
        decoding.arrive(0)
        tape.run()
        decoding.leave(0)
        return result

    def _record(self, kind: object, hidden: Tensor, tables: Tables) -> Tensor:
        """Make a step through the layers and keep its calls, if they are all there is to it."""
        decoder, tape = self._decoder, Tape()
        self._take(hidden, tables)
        assert self._stream is not None
        with tape.record():
            result = decoder.through(self._stream, self._tables, self._decoding)
        whole = len(tape) == CALLS_PER_LAYER * len(decoder.layers) + 1
        self._tapes[kind] = (tape, result) if whole else None
        return result

    def _take(self, hidden: Tensor, tables: Tables) -> None:
        """Put a step's input where the tapes read it."""
        if self._stream is None:
            scale = None if tables.scale is None else tables.scale.clone()
            self._stream = hidden.clone()
            self._tables = Tables(tables.cos.clone(), tables.sin.clone(), scale)
            return
        self._stream.copy_(hidden)
        for mine, new in zip(self._tables, tables, strict=True):
            if mine is not None and new is not None:
                mine.copy_(new)
