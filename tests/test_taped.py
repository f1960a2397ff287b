"""Recorded layers: steps repeated from a tape equal steps made from Python, to the last bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from bench.qwen_checkpoint import QwenShape, write_qwen
from engine.engine import Engine
from engine.ops import fused, native, products
from engine.ops.products import gemv
from engine.ops.tape import Tape, recording
from engine.result import Timings
from engine.running import taped
from tests.checkpoints import Shape
from tests.session import Session

pytestmark = pytest.mark.skipif(not native.loaded(), reason="needs the native module")

QUESTION = "What is in this image?"
STEPS = 40
MODELS = {
    "llama": Shape(),
    "mistral-gqa": Shape(family="mistral", kv_heads=1, seed=2),
    "qwen2-bias": Shape(family="qwen2", kv_heads=2, seed=3),
}
AVL = "avl:secondary=0.5,core=0.25,every=3,text=0.7,floor=3"


@pytest.fixture(autouse=True)
def few_rows_are_multiplied_natively(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a processor on which torch would be as fast."""
    monkeypatch.setattr(products, "_native_pays", lambda: True)
    monkeypatch.setattr(taped, "AHEAD", 16)  # so that tests come to the end of it


@pytest.fixture
def engine_of(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[[str, str], Engine]:
    """An engine for a model of MODELS, or Qwen-VL, and a cache."""

    def engine(name: str, cache: str) -> Engine:
        qwen = name == "qwen-vl"
        folder = write_qwen(tmp_path / name, QwenShape()) if qwen else checkpoint(MODELS[name])
        return Engine.load(folder, device="cpu", dtype="bfloat16", cache=cache)

    return engine


def picture() -> Image.Image:
    return Image.radial_gradient("L").resize((77, 77)).convert("RGB")


def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taped, "obstacle", lambda decoder, decoding: "a test asks for it")


def logits_of(engine: Engine) -> tuple[Tensor, Session]:
    session = Session(engine.model, engine.policy)
    session.prefill(engine.turn(QUESTION, [picture()], Timings()), STEPS)
    return torch.stack([session.decode(11 + n % 7).clone() for n in range(STEPS)]), session


def tapes(session: Session) -> list[tuple[Tape, Tensor] | None]:
    return list(session.stepper._taped._tapes.values())


CASES = [("llama", cache) for cache in ("full", AVL, "avl:core=none", "h2o:heavy=0.125", "fastv")]
CASES += [(name, AVL) for name in ("mistral-gqa", "qwen2-bias", "qwen-vl")]


@pytest.mark.parametrize(("name", "cache"), CASES)
def test_a_tape_repeats_what_python_does(
    name: str,
    cache: str,
    engine_of: Callable[[str, str], Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of(name, cache)
    repeated, session = logits_of(engine)
    found = tapes(session)
    assert found
    assert all(found), "a step was not made of native calls alone"
    assert session.stepper.eager_because is None
    eager(monkeypatch)
    made_anew, _ = logits_of(engine)
    assert torch.equal(repeated, made_anew)


def test_rows_that_come_and_go_are_taped_too(
    engine_of: Callable[[str, str], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of("llama", AVL)
    requests = [
        {"prompt": QUESTION, "images": [picture()], "max_new_tokens": 5 + 3 * n} for n in range(4)
    ]

    def answers() -> dict[int, list[int]]:
        done = engine.generate_batch(requests, rows=3)
        return {result.index: result.token_ids for result in done}

    repeated = answers()
    eager(monkeypatch)
    assert answers() == repeated


def test_chat_goes_on_behind_recorded_steps(
    engine_of: Callable[[str, str], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of("llama", AVL)

    def turns() -> list[list[int]]:
        chat = engine.chat()
        first = chat.send(QUESTION, images=[picture()], max_new_tokens=9)
        return [first.token_ids, chat.send("And now?", max_new_tokens=9).token_ids]

    repeated = turns()
    eager(monkeypatch)
    assert turns() == repeated


def test_more_rows_than_the_product_takes_are_not_recorded(
    engine_of: Callable[[str, str], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "GEMV_ROWS", 0)
    monkeypatch.setattr(products, "_multiplies_fast", lambda dtype: True)
    engine = engine_of("llama", "full")
    made, session = logits_of(engine)
    assert tapes(session) == [None]
    assert session.stepper.eager_because == "linear is computed outside the native kernels"
    eager(monkeypatch)
    assert torch.equal(made, logits_of(engine)[0])


def test_the_native_product_of_many_rows_is_recorded(
    engine_of: Callable[[str, str], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "GEMV_ROWS", 0)
    monkeypatch.setattr(products, "_multiplies_fast", lambda dtype: False)
    engine = engine_of("llama", "full")
    made, session = logits_of(engine)
    assert None not in tapes(session)
    eager(monkeypatch)
    assert torch.equal(made, logits_of(engine)[0])


def test_a_tape_keeps_what_its_calls_need() -> None:
    weight, ones, x = torch.randn(5, 48), torch.ones(5), torch.randn(2, 48)
    tape = Tape()
    with tape.record():
        (y,) = gemv(x, (weight, None))
        total, normed = fused.add_norm(y, y, ones, 1e-5)
    assert not recording()
    for made in (y, total, normed):
        made.fill_(float("nan"))
    x.copy_(torch.randn(2, 48))
    tape.run()
    torch.testing.assert_close(total, 2 * x @ weight.T)
    torch.testing.assert_close(normed, torch.rms_norm(total, (5,), ones, 1e-5))


def test_an_error_ends_the_recording() -> None:
    tape = Tape()
    with pytest.raises(ValueError, match="weight"), tape.record():
        gemv(torch.randn(1, 3), (torch.randn(5, 4), None))
    assert not recording()
    gemv(torch.randn(1, 4), (torch.randn(5, 4), None))
    tape.run()  # nothing was recorded
