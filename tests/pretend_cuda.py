"""Stand-ins for torch.cuda's streams, events and graphs that write down what was called.

Nothing is computed on them: they show in which order work, events and waits are given to which
stream, so that the code that only a GPU runs is walked through on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch


class Stream:
    """``log`` is shared by all: (stream, what, event) in the order of the host's calls."""

    def __init__(self, log: list[tuple[str, str, Any]], name: str) -> None:
        self.log, self.name = log, name

    def record_event(self) -> int:
        event = sum(what == "record" for _, what, _ in self.log)
        self.log.append((self.name, "record", event))
        return event

    def wait_event(self, event: int) -> None:
        assert any(entry[1:] == ("record", event) for entry in self.log), "waits for nothing"
        self.log.append((self.name, "wait", event))

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class PretendCuda:
    """What ``torch.cuda`` is replaced by in a test."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, str, Any]] = []
        self.current = Stream(self.log, "main")
        self.replays = 0
        self.capturing = False
        patch.setattr(torch.cuda, "Stream", lambda device=None: Stream(self.log, "side"))
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        patch.setattr(torch.cuda, "stream", self._on)
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        patch.setattr(torch.cuda, "graph", self._graph)

    def work(self, what: str) -> None:
        """Something is started on the current stream."""
        self.log.append((self.current.name, what, None))

    def replay(self) -> None:
        self.replays += 1

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def _graph(self, graph: Any, *, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert graph is self
        assert capture_error_mode == "thread_local"
        assert stream.name != "main", "nothing can be captured on the default stream"
        self.capturing = True
        with self._on(stream):
            yield
        self.capturing = False
