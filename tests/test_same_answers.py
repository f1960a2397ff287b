"""What is promised to stay the same from machine to machine: docs/same_answers.md, held to it.

Tokens are, within float32: for every instruction set that this processor has, whatever torch uses,
and for every number of threads. Bits are only from run to run on one machine.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.ops import native

ROOT = Path(__file__).resolve().parent.parent
# The embedded model about a drawing, the exact cache and the default: ids and the first scores.
PROGRAM = """
import json, sys, torch
torch.set_num_threads(int(sys.argv[1]))
from engine import Engine
engine = Engine.load(device="cpu", dtype=sys.argv[2])
asked = "Describe the picture in detail.", ["examples/scene.jpg"]
scores = engine.logits(*asked)[-1].tolist()
engines = engine, engine.with_cache("full")
print(json.dumps([scores, *(other.generate(*asked).token_ids for other in engines)]))
"""


def answers(threads: int, dtype: str = "float32", **chosen: str) -> Any:
    """Scores of the first token and the ids of two answers, in a process of its own."""
    environment = os.environ | chosen
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(threads), dtype],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def ways() -> list[dict[str, str]]:
    """Every instruction set of ours that is here, each beside one of torch's; and torch alone."""
    module, _ = native.load()
    ours = [isa for isa in native.ISAS if module is not None and module.has_isa(isa)]
    torchs = {"baseline": "default"}
    forced = [{"AVL_ISA": isa, "ATEN_CPU_CAPABILITY": torchs.get(isa, "avx2")} for isa in ours]
    return [*forced, {"AVL_NATIVE": "0"}]


@pytest.fixture(scope="module")
def best() -> Any:
    return answers(2)


@pytest.mark.parametrize("way", ways(), ids=str)
def test_tokens_are_the_same_whatever_computes_them(best: Any, way: dict[str, str]) -> None:
    (scores, *ids), (their_scores, *their_ids) = best, answers(1, **way)
    assert ids == their_ids
    assert max(abs(a - b) for a, b in zip(scores, their_scores, strict=True)) < 1e-4


def test_bits_are_the_same_from_run_to_run(best: Any) -> None:
    assert answers(2) == best


def test_an_instruction_set_that_is_not_here_is_refused() -> None:
    command = [sys.executable, "main.py", "--image", "examples/car.jpg", "-p", "What?"]
    environment = os.environ | {"AVL_ISA": "altivec"}
    if not native.loaded():
        pytest.skip("needs the native module")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "AVL_ISA=altivec" in done.stderr
    assert done.stdout == ""
