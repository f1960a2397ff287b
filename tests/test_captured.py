"""Captured steps, run dry: static buffers and a schedule give what the readable path gives."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.cache.decode import Decoding
from engine.cache.lengths import POSITION, RERANKS, USED
from engine.cache.streams import InOrder
from engine.engine import Engine
from engine.errors import CapacityError, OptionError
from engine.insight.trace import Trace
from engine.ops import native
from engine.running.captured import LINES, WARM_UPS, capture, obstacle
from engine.running.stepping import Stepping
from tests.checkpoints import Shape
from tests.emulated import standing_in
from tests.noise import noise
from tests.pretend_cuda import PretendCuda
from tests.rows import FORMATS, Rows, state
from tests.session import Session

SHAPE = Shape(kv_heads=2)
POLICIES = [
    *FORMATS,
    "full",
    "avl:floor=3",
    "avl:every=1,floor=3,text=0.5",
    "avl:every=0",
    "avl:core=none,text=1",
    "avl:text=1,every=2",
    "h2o",
    "fastv:layer=2",
    "streaming",
    "snapkv:window=4",
    "random",
]


@pytest.mark.parametrize("spec", POLICIES)
def test_a_captured_step_run_dry_equals_the_readable_path(spec: str) -> None:
    """Token for token over 100 steps and past the end of the schedule, and in all that is kept."""
    assert LINES < 100
    for prompts in ([0], [0, 1, 2, 3]):
        eager, dry = (Rows(spec, prompts, 101, graphs=graphs) for graphs in (False, True))
        assert dry.go(100) == eager.go(100)
        assert dry.stepper.eager_because is None
        assert state(dry.settle()) == state(eager.settle())


@pytest.mark.parametrize("spec", ["avl:floor=3", "avl:every=4,floor=3", "h2o"])
def test_rows_at_different_steps_of_the_cycle(spec: str) -> None:
    """Three rows join at steps 0, 1 and 3: from then on their words differ."""
    ends = []
    for graphs in (False, True):
        batch, said = Rows(spec, [0], 60, graphs=graphs), []
        for prompt, steps in ((2, 1), (3, 2), (None, 40)):
            said += batch.go(steps, said[-1] + [7] if said else None)
            if prompt is not None:
                batch.rows.append(batch.admit(prompt))
        rows = batch.settle()
        assert len({row.step % 3 for row in rows}) > 1
        ends.append((said, state(rows)))
    assert ends[0] == ends[1]


def test_rows_that_fit_are_loaded_into_the_same_buffers() -> None:
    """The second request of the same size finds the captured step; one that is larger does not."""
    batch = Rows("avl:floor=3", [0], 20, graphs=True)
    expected = Rows("avl:floor=3", [3], 20, graphs=False).go(15)
    batch.go(10)
    first = batch.stepper._captured._step
    [row] = batch.settle()
    row.give()
    batch.rows = [batch.admit(3)]
    assert batch.go(15) == expected
    assert batch.stepper._captured._step is first
    batch.settle()
    batch.rows = [batch.admit(2)]  # beside the last one: the pools have grown
    assert batch.go(15) == Rows("avl:floor=3", [2], 20, graphs=False).go(15)
    assert batch.stepper._captured._step is not first


def test_the_schedule_says_what_each_step_will_be_told() -> None:
    """Words written ahead are the words of the steps themselves."""
    batch = Rows("avl:floor=3", [0, 1, 2], 40, graphs=False)
    for row in batch.rows:
        batch.stepper.join(row)
    lengths = batch.stepper.decoding.state.lengths
    ahead = lengths.ahead()
    lines = []
    for _ in range(20):
        lines.append([list(word) for word in ahead.words()])
        ahead.advance()
    now = [5, 6, 7]
    for line in lines:
        assert lengths.words() == line
        now = batch.stepper.step(torch.tensor(now)).argmax(-1).tolist()
    assert [line[POSITION][0] for line in lines] == list(range(40, 60))
    assert [line[RERANKS][0] for line in lines] == [0, 0, 1] * 6 + [0, 0]
    # 11, 17 and 11 tokens of text: with a picture round(0.7 * 11) are kept, and one is written.
    assert lines[0][USED] == [9, 18, 9]


def test_no_slot_is_an_error_before_anything_is_written() -> None:
    batch = Rows("full", [0, 1], 3, graphs=True)
    batch.go(3)
    with pytest.raises(CapacityError, match="row 0 of the cache has no free slot"):
        batch.go(1)
    assert [row.seen for row in batch.settle()] == [43, 20]


@pytest.mark.parametrize("spec", [*FORMATS, "avl:floor=3"])
def test_steps_of_a_gpus_kernels_are_a_cpus(spec: str, emulated_native: ModuleType) -> None:
    """Captured steps with attention in the emulator, all layers in the same scratch memory.

    Sums in another order may round a query otherwise beside keys in few bits.
    """
    expected = Rows(spec, [0, 1, 2], 20, graphs=False)
    want = expected.forced(15)
    with standing_in(emulated_native, order=2):
        batch = Rows(spec, [0, 1, 2], 20, graphs=True)
        got = batch.forced(15)
        assert batch.stepper.eager_because is None
    torch.testing.assert_close(got, want, rtol=0, atol=1e-2)
    for mine, theirs in zip(batch.settle(), expected.settle(), strict=True):
        assert (mine.step, mine.attended_share) == (theirs.step, theirs.attended_share)
        assert (mine.spent is not None) == (batch.policy.leaves_out() > 0)
        if mine.spent is not None:
            torch.testing.assert_close(mine.spent, theirs.spent, rtol=0.02, atol=0.02)


# -- what a capture allows ------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Refuses what a CUDA capture would refuse: reads by the host, shapes that values decide."""

    # resolve_conj and resolve_neg are how tolist and numpy begin.
    FORBIDDEN = (
        *("item", "_local_scalar_dense", "is_nonzero", "equal", "resolve_conj", "resolve_neg"),
        *("nonzero", "masked_select", "unique", "lift_fresh", "index"),
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "planted",
    [
        lambda x: int(x[0]),
        lambda x: bool(x.any()),
        lambda x: torch.tensor([1.0]) + x,
        lambda x: x[x > 0],
        lambda x: x.tolist(),
    ],
)
def test_what_a_capture_refuses_is_noticed(planted: Callable[[torch.Tensor], object]) -> None:
    with torch.inference_mode(), HostReads(), pytest.raises(AssertionError):
        planted(torch.ones(3))


@pytest.mark.parametrize("spec", POLICIES)
def test_a_captured_step_never_waits_for_the_host(spec: str) -> None:
    """Between fixed buffers only: nothing is read back, no host value enters, shapes stay."""
    if not native.loaded():
        pytest.skip("the torch twins read counts on the host")
    batch = Rows(spec, [0, 1, 2], 30, graphs=True)
    batch.go(4)
    captured = batch.stepper._captured._step
    with torch.inference_mode():
        for replay in captured._replay.values():
            with HostReads():
                replay()


def test_buffers_stay_where_they_are() -> None:
    batch = Rows("avl:floor=3", [0, 1, 2], 80, graphs=True)
    batch.go(4)
    captured = batch.stepper._captured._step
    decoding = captured.decoding

    def addresses() -> list[int]:
        tensors = [captured._tokens, captured._logits, captured._schedule, captured._line]
        tensors += [tensor for tensor, _ in decoding.state.by_row()]
        tensors += [*decoding.scores]
        return [tensor.data_ptr() for tensor in tensors]

    before = addresses()
    batch.go(70)
    assert addresses() == before


def test_a_capture_follows_trial_runs_on_the_same_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = PretendCuda(monkeypatch)

    def run() -> None:
        cuda.work("captured" if cuda.capturing else "tried")

    replay = capture(run, lambda: cuda.work("prepared"), torch.device("cuda"))
    did = [entry[:2] for entry in cuda.log]
    trial = [("main", "prepared"), ("main", "record"), ("side", "wait"), ("side", "tried")]
    trial += [("side", "record"), ("main", "wait")]
    assert did == [*trial * WARM_UPS, ("side", "captured"), ("main", "prepared")]
    replay()
    assert cuda.replays == 1


# -- what is not captured -------------------------------------------------------------------------


def test_an_observer_is_answered_eagerly_and_the_reason_is_named(
    engine_of: Callable[..., Engine],
) -> None:
    engine = engine_of(SHAPE, cache="avl:floor=3")
    turn = engine.turn("What?", [noise(60, 60)], SimpleNamespace())
    session = Session(engine.model, engine.policy, Trace(), Stepping(graphs=True))
    session.prefill(turn, 5)
    session.decode(7)
    assert session.stepper.eager_because == "an observer reads every step"


def test_selection_by_layers_is_not_captured() -> None:
    class PerLayer(InOrder):
        per_layer = True

    batch = Rows("avl:floor=3", [0], 5, graphs=False)
    decoding = Decoding(batch.pools, batch.rows, side=PerLayer())
    assert "selection by layers" in obstacle(batch.model, decoding)


def test_an_unknown_selection_is_refused() -> None:
    with pytest.raises(OptionError, match="unknown selection 'side'"):
        Stepping("side")


# -- through the front door -----------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["full", "avl:floor=4,text=0.5", "h2o"])
def test_an_engine_with_graphs_answers_the_same(
    engine_of: Callable[..., Engine], checkpoint: Callable[..., object], spec: str
) -> None:
    plain = engine_of(SHAPE, cache=spec)
    dry = Engine.load(checkpoint(SHAPE), device="cpu", dtype="float32", cache=spec, graphs=True)
    requests = [
        {"prompt": f"What? {n}", "images": [noise(60, 60)] * (n % 3), "max_new_tokens": 3 + 4 * n}
        for n in range(5)
    ]
    for engine in (plain, dry):
        engine.results = sorted(engine.generate_batch(requests, 3), key=lambda x: x.index)
    for one, other in zip(plain.results, dry.results, strict=True):
        assert one.token_ids == other.token_ids
        assert one.cache == other.cache
    chats = [plain.chat(), dry.chat()]
    for text in ("What is it?", "And then?"):
        mine, theirs = (chat.send(text, max_new_tokens=9, ignore_eos=True) for chat in chats)
        assert (mine.token_ids, mine.cache) == (theirs.token_ids, theirs.cache)
