"""Selection beside the model changes no token, however late or early either stream is."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.app.flags import build_parser
from engine.app.inputs import load_engine
from engine.app.noise import Noise
from engine.cache.streams import FORMS, Beside, InOrder, side_for
from engine.engine import Engine
from engine.errors import OptionError
from engine.running import stepping
from tests.checkpoints import Shape
from tests.noise import noise
from tests.pretend_cuda import PretendCuda
from tests.rows import Rows, state
from tests.simulated import Simulated, points_in

SHAPE = Shape(kv_heads=2)
POLICIES = ["avl:floor=3", "avl:every=1,floor=3,text=0.5", "avl:text=1,every=2", "h2o", "full"]
STEPS = 25
PER_LAYER = {"branch": False, "layers": True}


@functools.cache
def in_order(spec: str, prompts: tuple[int, ...]) -> Any:
    """Tokens and what is kept when selection runs in the model's own order."""
    rows = Rows(spec, list(prompts), STEPS + 1, selection="sync")
    assert isinstance(rows.stepper.decoding.side, InOrder)
    return rows.go(STEPS), state(rows.settle())


def beside(spec: str, prompts: tuple[int, ...], side: Simulated) -> Any:
    """The same on a simulated stream."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping, "side_for", lambda form, device: side)
        rows = Rows(spec, list(prompts), STEPS + 1)
    with points_in(side):
        return rows.go(STEPS), state(rows.settle())


@pytest.mark.parametrize("form", PER_LAYER)
@pytest.mark.parametrize("spec", POLICIES)
def test_every_order_that_events_allow_gives_the_same_tokens(spec: str, form: str) -> None:
    late = split = 0
    for seed in range(4):
        prompts = ((0,), (2,), (0, 1, 2), (3, 2))[seed]
        side = Simulated(seed, PER_LAYER[form])
        assert beside(spec, prompts, side) == in_order(spec, prompts)
        late, split = late + side.late, split + side.split
    if spec != "full":  # which selects nothing
        assert late > 20, "selection was never late: nothing was tried"
        assert split > 100


@pytest.mark.parametrize("form", PER_LAYER)
def test_rows_at_different_steps_of_the_cycle(form: str) -> None:
    """A row that joins later ranks at other steps: the step's lists are mixed."""
    ends = []
    for side in (InOrder(), *(Simulated(seed, PER_LAYER[form]) for seed in range(3))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stepping, "side_for", lambda *_, side=side: side)
            rows = Rows("avl:floor=3", [0], 60)
        said = rows.go(4)
        rows.rows.append(rows.admit(2))
        said += rows.go(20, [*said[-1], 7])
        ends.append((said, state(rows.settle())))
    assert all(end == ends[0] for end in ends)


@pytest.mark.parametrize("missing", ["fork", "join"])
@pytest.mark.parametrize("form", PER_LAYER)
@pytest.mark.parametrize("spec", ["avl:every=2,text=1", "avl:every=1,floor=3,text=0.5", "h2o"])
def test_a_missing_event_is_caught(spec: str, form: str, missing: str) -> None:
    """Without the wait of either stream for the other, some order gives something else."""

    def differs(seed: int) -> bool:
        side = Simulated(seed, PER_LAYER[form], missing)
        return beside(spec, (0,), side) != in_order(spec, (0,))

    assert any(differs(seed) for seed in range(8))


def test_events_order_both_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stream waits for the attention, the model's for the work, and nobody for more."""
    cuda = PretendCuda(monkeypatch)
    side = Beside(torch.device("cuda"), per_layer=True)
    for step in range(2):
        for part in range(2):
            side.begin(part, lambda step=step, part=part: cuda.work(f"select {part} {step}"))
            cuda.work(f"attend {part} {step}")
            side.start(part)
    side.join()
    assert cuda.log == [
        *[("main", "attend 0 0", None), ("main", "record", 0), ("side", "wait", 0)],
        *[("side", "select 0 0", None), ("side", "record", 1)],
        *[("main", "attend 1 0", None), ("main", "record", 2), ("side", "wait", 2)],
        *[("side", "select 1 0", None), ("side", "record", 3)],
        ("main", "wait", 1),
        *[("main", "attend 0 1", None), ("main", "record", 4), ("side", "wait", 4)],
        *[("side", "select 0 1", None), ("side", "record", 5)],
        ("main", "wait", 3),
        *[("main", "attend 1 1", None), ("main", "record", 6), ("side", "wait", 6)],
        *[("side", "select 1 1", None), ("side", "record", 7)],
        *[("main", "wait", 5), ("main", "wait", 7)],
    ]


def test_a_joined_step_waits_for_nothing_of_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a captured graph must: every event that is waited for was recorded in the same step."""
    cuda = PretendCuda(monkeypatch)
    side = Beside(torch.device("cuda"), per_layer=False)
    for work in (lambda: cuda.work("select"), None, lambda: cuda.work("select")):
        begun = len(cuda.log)
        side.begin(0, work)
        side.start(0)
        side.join()
        step = cuda.log[begun:]
        recorded = {event for _, what, event in step if what == "record"}
        assert {event for _, what, event in step if what == "wait"} == recorded
        assert bool(recorded) == (work is not None)


@pytest.mark.parametrize("form", PER_LAYER)
def test_a_cuda_side_runs_a_decoder(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class itself, its streams pretended: work runs at once, so tokens are right."""
    expected = in_order("avl:floor=3", (0, 1, 2))
    PretendCuda(monkeypatch)
    side = Beside(torch.device("cuda"), PER_LAYER[form])
    monkeypatch.setattr(stepping, "side_for", lambda *_: side)
    rows = Rows("avl:floor=3", [0, 1, 2], STEPS + 1)
    said = rows.go(STEPS)
    assert (said, state(rows.settle())) == expected


def test_what_steps_hold_is_freed_with_what_takes_them() -> None:
    """At once, without a search for cycles: on a GPU these are the pools."""
    rows = Rows("avl:floor=3", [0, 2], 9, selection="branch")
    gc.disable()
    try:
        rows.go(8)
        held = [weakref.ref(rows.stepper.decoding), *map(weakref.ref, rows.pools)]
        del rows
        assert [found() for found in held] == [None] * len(held)
    finally:
        gc.enable()


# -- what is chosen -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_on_a_cpu_selection_is_a_plain_call(form: str) -> None:
    assert isinstance(side_for(form, torch.device("cpu")), InOrder)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_answers_the_same_through_the_engine(
    form: str, engine_of: Callable[..., Engine], checkpoint: Callable[..., Any]
) -> None:
    engine = Engine.load(
        checkpoint(SHAPE), device="cpu", dtype="float32", cache="avl:floor=4", selection=form
    )
    plain = engine_of(SHAPE, cache="avl:floor=4")
    answers = [e.generate("What?", [noise(60, 60)], max_new_tokens=12) for e in (engine, plain)]
    assert answers[0].token_ids == answers[1].token_ids


@pytest.mark.parametrize(
    ("flags", "stepping"),
    [
        ([], {"selection": "branch", "graphs": False}),
        (["--sync-selection"], {"selection": "sync", "graphs": False}),
        (["--graphs"], {"selection": "branch", "graphs": True}),
    ],
)
def test_flags_reach_the_engine(
    flags: list[str], stepping: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(Engine, "load", lambda *_, **options: asked.update(options))
    options = build_parser().parse_args(flags)
    monkeypatch.setattr(Noise, "loaded", lambda *_: None)
    load_engine(options, Noise(options, []))
    assert {name: asked[name] for name in stepping} == stepping


def test_an_unknown_form_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(OptionError, match="unknown selection 'later'"):
        Engine.load("no-such-folder", selection="later")
