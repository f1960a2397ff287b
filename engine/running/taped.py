"""The decoder as one call on a CPU: a step's native calls, recorded and repeated.

A decode step reads all weights once, which leaves nothing else in the processor's caches: the few
hundred microseconds of Python around each layer's kernels then cost as much as a tenth of a large
model's step, and most of a small one's. But from step to step only numbers change, in buffers that
stay where they are. So the calls are made from Python once for every kind of step, and recorded;
all later steps of this kind repeat the record. It is for a CPU what a CUDA graph is for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..cache.cross_steps import CrossStepView
from ..cache.decode import DecodeView, Decoding
from ..models.decoder import Decoder, finished
from ..ops import fused, native
from ..ops.rotary import Tables
from ..ops.tape import Tape
from .runner import Eager

# Steps whose rotations are computed at once.
AHEAD = 64
# Tapes that are kept: every number of rows has one for each kind of list it attends.
TAPES = 64


def obstacle(decoder: Decoder, decoding: Decoding) -> str | None:
    """Why steps of ``decoding`` cannot be made of native calls alone, as far as one can tell."""
    weight = decoder.norm.weight
    if weight.device.type != "cpu":
        return "tapes are for a CPU"
    if not native.loaded() or not fused.serves(weight):
        return "no native kernels serve"
    return "selection runs by layers" if decoding.side.per_layer else None


class Taped:
    """Runs tapes, one for each number of rows and kind of step; see ``Runner``.

    Tapes live until a tensor they read has moved.
    """

    def __init__(self, decoder: Decoder, decoding: Decoding) -> None:
        self.eager_because: str | None = None
        self._decoder, self._decoding = decoder, decoding
        self._eager = Eager(decoder, decoding)
        self._rotations = Rotations(decoder, decoding)
        # For each kind of step its tape and where it leaves its result; None: not all was native.
        self._tapes: dict[object, tuple[Tape, Tensor] | None] = {}
        self._stream: Tensor | None = None
        decoding.state.holders.add(self)

    def void(self) -> None:
        """See ``Holder``."""
        self._tapes.clear()
        self._stream = None

    def load(self) -> None:
        """See ``Runner.load``."""
        self._rotations.forget()
        if self._stream is None:
            rows, weight = self._decoding.state.sizes.rows, self._decoder.norm.weight
            self._stream = torch.empty(rows, len(weight), dtype=weight.dtype)
            self._tables = self._rotations.tables(weight.dtype).blank(rows)
        mine = slice(len(self._decoding.rows))
        self._input = self._stream[mine], self._tables.at(mine)

    def step(self, tokens: Tensor) -> Tensor:
        """See ``Runner.step``."""
        decoding = self._decoding
        kind = (len(tokens), *decoding.kind, torch.get_num_threads())
        if kind in self._tapes and self._tapes[kind] is None:
            return self._eager.step(tokens)
        stream, tables = self._input
        stream.copy_(self._decoder.embed(tokens))
        tables.copy_(self._rotations.tables(stream.dtype))
        decoding.arrive(0)
        result = self._run(kind) if kind in self._tapes else self._record(kind, stream, tables)
        decoding.leave_part(0)
        decoding.advance()
        return result.to(torch.float32, copy=True)

    def unload(self) -> None:
        """See ``Eager.unload``."""

    def _run(self, kind: object) -> Tensor:
        found = self._tapes[kind]
        assert found is not None, "a kind without a tape is taken eagerly"
        found[0].run()
        return found[1]

    def _record(self, kind: object, stream: Tensor, tables: Tables) -> Tensor:
        """Make a step and keep its calls, if they are all there is to it."""
        decoder, tape, inner = self._decoder, Tape(), Inner(self._decoding)
        with Strangers() as strangers, tape.record():
            result = decoder.head(finished(decoder.through(stream, tables, inner)))
        if strangers.met:
            self.eager_because = f"{strangers.met} is computed outside the native kernels"
        if len(self._tapes) == TAPES:
            self._tapes.pop(next(iter(self._tapes)))
        self._tapes[kind] = None if strangers.met else (tape, result)
        return result


class Inner:
    """A step between its first layer's arrival and its last one's leave."""

    def __init__(self, decoding: Decoding) -> None:
        self.positions, self.rotary, self._decoding = decoding.positions, decoding.rotary, decoding

    def view(self, layer: int) -> DecodeView:
        """See ``Step.view``."""
        return DecodeView(self._decoding, layer)

    def cross(self, layer: int) -> CrossStepView | None:
        """See ``Step.cross``."""
        return self._decoding.cross(layer)

    def chunks(self, tokens: int) -> list[slice]:
        """A step is one."""
        return [slice(None)]

    def narrow(self, layer: int) -> Tensor | None:
        """Decoding never narrows."""
        return None


class Strangers(TorchDispatchMode):
    """Notes torch operations that compute: a tape of native calls does not repeat them.

    Views and allocations are made once; a constant stays what it is.

    Attributes:
        met: the first of them; empty if there was none.
    """

    HARMLESS = ("empty", "empty_like", "empty_strided", "new_empty", "zeros", "zeros_like")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.met = ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise torch imports its compiler, for a second, to keep it out of here."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in self.HARMLESS:
            self.met = self.met or name
        call: Callable[..., object] = func
        return call(*args, **(kwargs or {}))


class Rotations:
    """Rotation tables of a ``Decoding``, computed for many steps ahead: positions only count on."""

    def __init__(self, decoder: Decoder, decoding: Decoding) -> None:
        self._decoder, self._decoding = decoder, decoding
        self.forget()

    def forget(self) -> None:
        """Other rows follow."""
        self._first, self._ahead = -AHEAD, list[Tables]()

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
        rotary = decoding.rotary.expand(AHEAD, rows, -1).flatten(0, 1)
        tables = self._decoder.rotation.tables(positions.flatten(), rotary, dtype)
        steps = [slice(start, start + rows) for start in range(0, AHEAD * rows, rows)]
        self._ahead = [tables.at(step) for step in steps]
