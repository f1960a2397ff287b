"""A decode step captured once and replayed: CUDA graphs over static buffers.

Started one by one, the hundreds of kernels of a step keep a fast GPU waiting for the host. A graph
starts them with one call, but repeats exactly what was captured: the same addresses, shapes and
launches. So everything that changes from step to step lies in tensors that keep their place:

- the rows' tokens go into one buffer and their logits come out of another;
- all that follows from lengths (positions, counts, which list a row attends, budgets) is written
  down for many steps ahead, see ``Lengths``, and every replay moves on by a line;
- lists, scores and write places are those of ``Decoding``, which it changes in place.

Two graphs serve a number of rows: one for steps in which no row's core is ranked again, and one
for steps in which some row's is, with logits and the ranking on a forked branch. They outlive the
rows they were captured for, since others are filled into the same buffers. If a row is larger than
all before, or if a pool has grown since, the step is captured anew.

Without a CUDA device ``replay`` runs the very function that would be captured: a dry run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from ..cache.decode import Decoding, no_slot
from ..cache.lengths import RERANKS, WORDS, Lengths
from ..cache.slot_lists import FULL, MIXED
from ..models.vision_language import VisionLanguageModel
from ..ops import native

# Steps whose words are written down at once.
LINES = 64
# Steps before a capture, in which libraries and plans allocate what they will keep.
WARM_UPS = 3
# torch allows one capture at a time in a process.
_capturing = Lock()


def obstacle(model: VisionLanguageModel, decoding: Decoding) -> str | None:
    """Why the steps of ``decoding`` cannot be captured; None if they can."""
    if decoding.side.per_layer:
        return "selection by layers runs on into the next step, and a graph ends with its step"
    if any(row.observer is not None for row in decoding.rows):
        return "an observer reads every step"
    if any(row.policy.packs_every for row in decoding.rows):
        return "the host packs what was generated"
    pool, config = decoding.pools[0].k, model.decoder.config
    queries = pool.new_empty(1, config.heads, config.head_dim)
    if pool.is_cuda and not native.usable(queries, pool):
        return "no compiled attention kernel serves, and plain torch reads counts on the host"
    return None


class Captured:
    """Replays captured steps; see ``Runner``.

    Attributes:
        by_rows: the captured step of each number of rows, where some of them see a picture through
            cross layers and where none does, until a tensor it reads has moved.
    """

    eager_because: str | None = None

    def __init__(self, model: VisionLanguageModel, decoding: Decoding) -> None:
        self._model, self._decoding = model, decoding
        self.by_rows: dict[tuple[int, bool], CapturedStep] = {}
        self._step: CapturedStep | None = None
        self._done = 0
        decoding.state.holders.add(self)

    def void(self) -> None:
        """See ``Holder``."""
        self.by_rows.clear()
        self._step = None

    @torch.inference_mode()
    def load(self) -> None:
        """See ``Runner.load``."""
        decoding = self._decoding
        kind = len(decoding.rows), decoding.looks
        if kind not in self.by_rows:
            self.by_rows[kind] = CapturedStep(self._model, decoding)
        self._step = self.by_rows[kind]
        self._ahead = decoding.state.lengths.ahead()
        self._refill()

    def step(self, tokens: Tensor) -> Tensor:
        """See ``Runner.step``."""
        if self._next == len(self._reranks):
            self._refill()
        if not self._reranks:
            raise no_slot(self._ahead.overfull()[0])
        assert self._step is not None, "load comes first"
        logits = self._step.replay(tokens, self._reranks[self._next])
        self._next += 1
        self._done += 1
        return logits.clone()

    def unload(self) -> None:
        """See ``Runner.unload``: the host counts what the device has done."""
        for _ in range(self._done):
            self._decoding.account()
        self._done = 0

    def _refill(self) -> None:
        """Write down the words of the next steps, as many as there are lines and slots for."""
        lines = _lines(self._ahead)
        self._reranks = [self._decoding.tiered and any(line[RERANKS]) for line in lines]
        self._next = 0
        assert self._step is not None, "load comes first"
        self._step.schedule(lines)


class CapturedStep:
    """The decode step of as many rows as ``decoding`` has now."""

    def __init__(self, model: VisionLanguageModel, decoding: Decoding) -> None:
        self.model, self.decoding = model, decoding
        rows, device = len(decoding.rows), decoding.state.device
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._logits = torch.empty(rows, model.decoder.config.vocab, device=device)
        self._schedule = torch.zeros(LINES, WORDS, rows, dtype=torch.int32, device=device)
        self._line = torch.zeros(1, dtype=torch.int64, device=device)
        variants = (False, True) if decoding.tiered else (False,)
        self._replay = {reranks: self._captured(reranks) for reranks in variants}

    def schedule(self, lines: list[list[list[int]]]) -> None:
        """Begin with the first of ``lines [steps][WORDS][rows]``."""
        if lines:
            self._schedule[: len(lines)] = torch.tensor(lines, dtype=torch.int32)
        self._line.zero_()

    def replay(self, tokens: Tensor, reranks: bool) -> Tensor:
        """Process ``tokens [rows]`` int64 by the schedule's next line; returns logits ``[rows,
        vocab]`` fp32, which the next step overwrites.
        """
        self._tokens.copy_(tokens, non_blocking=True)
        self._replay[reranks]()
        return self._logits

    def _run(self, reranks: bool) -> None:
        """One step, from buffers to buffers; the host neither reads nor decides anything."""
        decoder, decoding = self.model.decoder, self.decoding
        words = self._schedule.index_select(0, self._line)[0]
        decoding.set_course(words, MIXED if decoding.tiered else FULL, reranks)
        hidden = decoder(decoder.embed(self._tokens), decoding)
        self._logits.copy_(decoder.logits(hidden))
        decoding.rank_features()
        decoding.side.join()
        self._line += 1

    def _captured(self, reranks: bool) -> Callable[[], None]:
        """A call that repeats the step."""
        run, device = partial(self._run, reranks), self.decoding.state.device
        if device.type != "cuda":
            return run
        self.schedule(_lines(self.decoding.state.lengths.ahead()))
        return capture(run, self._rewound(), device)

    def _rewound(self) -> Callable[[], None]:
        """A call that makes the rows what they are now: every trial run takes the same step."""
        now = [(tensor, tensor.clone()) for tensor, _ in self.decoding.state.by_row()]

        def rewind() -> None:
            for tensor, was in now:
                tensor.copy_(was)
            self._line.zero_()

        return rewind


def capture(
    run: Callable[[], None], prepare: Callable[[], None], device: torch.device
) -> Callable[[], None]:
    """Capture ``run`` as a CUDA graph; ``prepare`` is called before every trial run, and at last.

    Returns what replays it on the current stream.
    """
    with _capturing, torch.cuda.device(device):
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        for _ in range(WARM_UPS):
            prepare()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                run()
            current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
        prepare()
    return graph.replay


def _lines(ahead: Lengths) -> list[list[list[int]]]:
    """The words of the coming steps, ``[steps][WORDS][rows]``, until a row has no slot left."""
    lines: list[list[list[int]]] = []
    while len(lines) < LINES and not ahead.overfull():
        lines.append([list(word) for word in ahead.words()])
        ahead.advance()
    return lines
