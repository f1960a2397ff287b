"""The command line as a user meets it: exit code, one error line, one hint, no traces."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.app.cli import main


class Asked:
    """One run of the command line in this process; ``seconds`` are those of the processor."""

    def __init__(self, code: int, out: str, err: str, seconds: float) -> None:
        self.code, self.out, self.err, self.seconds = code, out, err, seconds
        lines = [line for line in err.splitlines() if line]
        self.errors = [line for line in lines if line.startswith("error: ")]
        self.hints = [line for line in lines if line.startswith("hint: ")]
        self.others = [line for line in lines if line not in self.errors + self.hints]


Ask = Callable[..., Asked]


def asking(capsys: pytest.CaptureFixture[str]) -> Ask:
    """``ask(*arguments)`` runs the command line."""

    def run(*arguments: str | Path) -> Asked:
        capsys.readouterr()
        began = time.process_time()
        code = main([str(argument) for argument in arguments])
        seconds = time.process_time() - began
        return Asked(code, *capsys.readouterr(), seconds)

    return run


def refused(asked: Asked, code: int, *words: str) -> None:
    """One error line with all words in it or its hint, nothing else, nothing on stdout."""
    assert asked.code == code, asked.err
    assert len(asked.errors) == 1, asked.err
    assert len(asked.hints) == 1, asked.err
    assert not asked.others, asked.err
    assert not asked.out
    assert "object at 0x" not in asked.err
    for word in words:
        assert word in asked.err, asked.err
