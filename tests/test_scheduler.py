"""The one loop: rows come and go, prompts are read in slices, and pools have a budget."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache import prefill as prefill_file
from engine.cache.prefill import Prefill, most_slots
from engine.cache.row import Row
from engine.engine import Engine
from engine.errors import CapacityError, OptionError
from engine.policies.layout import Layout
from engine.policies.specs import parse
from engine.result import Timings
from engine.running.batch import job_of
from engine.running.generation import Answer
from engine.running.scheduler import Job, Over, Scheduler
from engine.running.turn import prefill
from tests.cache_run import CacheRun, embeddings, seeded_decoder
from tests.checkpoints import Shape
from tests.noise import noise
from tests.test_transactions import taken

SHAPE = Shape(layers=3, kv_heads=2)
POLICIES = [
    *("full", "avl:floor=3", "avl:every=2,floor=3,text=0.5,secondary=0.3,core=0.2", "h2o"),
    *("fastv:layer=2", "streaming", "snapkv:window=4", "random"),
    *("sift", "zipvl:tau=0.8,every=2,format=plain,minor=freed"),
]


def request(number: int, new_tokens: int) -> dict[str, object]:
    pictures = [noise(70, 50, seed=number)] * (number % 2)
    asked = {"prompt": f"What is {number}?", "images": pictures, "max_new_tokens": new_tokens}
    return {**asked, "ignore_eos": True}


def said(job: Job) -> list[int]:
    assert isinstance(job.answer, Answer)
    return job.answer.token_ids


def run(scheduler: Scheduler, jobs: list[Job]) -> list[list[int]]:
    while not scheduler.idle:
        scheduler.step()
    assert [job.failed for job in jobs] == [None] * len(jobs)
    return [said(job) for job in jobs]


# -- rows come and go -----------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_that_come_and_go_leave_the_others_as_they_are(
    policy: str, graphs: bool, checkpoint: Callable[..., object]
) -> None:
    """In every order of coming and going: each answer is the one it would be alone."""
    engine = Engine.load(
        checkpoint(SHAPE), device="cpu", dtype="float32", cache=policy, graphs=graphs
    )
    lengths = [3, 9, 4, 12, 2, 6, 1]
    alone = [engine.generate(**request(n, k)).token_ids for n, k in enumerate(lengths)]
    scheduler = engine.scheduler(rows=3)
    jobs = []
    for number, new_tokens in enumerate(lengths):
        jobs.append(scheduler.submit(job_of(engine, request(number, new_tokens))))
        scheduler.step()
        scheduler.step()
    assert run(scheduler, jobs) == alone
    assert taken(scheduler.pools) == [[]] * SHAPE.layers


def test_a_cancelled_row_leaves_the_others_as_they_are(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(SHAPE).with_cache("avl:floor=3")
    alone = [engine.generate(**request(n, 9)).token_ids for n in range(4)]
    for cancelled in range(4):
        scheduler = engine.scheduler(rows=4)
        jobs = [scheduler.submit(job_of(engine, request(n, 9))) for n in range(4)]
        for _ in range(7):
            scheduler.step()
        scheduler.cancel(jobs[cancelled])
        others = [job for job in jobs if job is not jobs[cancelled]]
        assert run(scheduler, others) == [x for n, x in enumerate(alone) if n != cancelled]
        assert said(jobs[cancelled]) == alone[cancelled][: len(said(jobs[cancelled]))]
        assert taken(scheduler.pools) == [[]] * SHAPE.layers


def test_a_row_that_joins_moves_nothing_of_the_others(engine_of: Callable[..., Engine]) -> None:
    """With room for it, the tensors that steps read stay, and so does all that lies in them."""
    engine = engine_of(SHAPE).with_cache("avl:floor=3")
    scheduler = engine.scheduler(rows=4, budget=10**6)
    for number in range(3):
        scheduler.submit(job_of(engine, request(number, 20)))
    for _ in range(6):
        scheduler.step()
    state = scheduler._stepper.decoding.state
    scheduler.cancel(scheduler.running[2])  # its place was made, so that nothing need be enlarged
    before = [(tensor, tensor.data_ptr(), dim) for tensor, dim in state.by_row()]
    lists = state.lists.slots[:2, :, :2].clone(), state.text.write[:, :2].clone()
    row, _ = prefill(engine.model, scheduler.pools, engine.policy, _turn(engine, 5), 20)
    scheduler._stepper.join(row)
    assert [(x.data_ptr(), dim) for x, dim in state.by_row()] == [(at, d) for _, at, d in before]
    assert torch.equal(state.lists.slots[:2, :, :2], lists[0])
    assert torch.equal(state.text.write[:, :2], lists[1])


def _turn(engine: Engine, number: int) -> object:
    asked = request(number, 1)
    return engine.turn(asked["prompt"], asked["images"], Timings())


# -- prompts in slices ----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_chunks_give_what_a_whole_pass_gives(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, answer tokens, and a second turn: the same logits, and the same columns kept."""
    runs = []
    for chunk in (7, 2048):
        monkeypatch.setattr(prefill_file, "CHUNK", chunk)
        run = CacheRun(seeded_decoder(3), parse(policy))
        logits = [run.prefill(embeddings(40, 1), [(3, 30)], 12)]
        logits += [run.decode(embeddings(1, n)) for n in range(5)]
        logits += [run.prefill(embeddings(16, 9), [], 4), run.decode(embeddings(1, 8))]
        positions = [stored.layout.positions.tolist() for stored in run.settle().layers]
        runs.append((logits, positions))
    assert runs[0][1] == runs[1][1]
    for mine, theirs in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(mine.flatten(), theirs.flatten(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("slices", [1, 2, 5])
def test_rows_go_on_while_a_prompt_is_read(
    slices: int, engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill_file, "CHUNK", 8)
    engine = engine_of(SHAPE).with_cache("avl:floor=3")
    alone = [engine.generate(**request(n, 30)).token_ids for n in range(3)]
    scheduler = engine.scheduler(rows=3, budget=10**6, slices=slices)
    jobs = [scheduler.submit(job_of(engine, request(0, 30)))]
    while not said(jobs[0]):
        scheduler.step()
    jobs.append(scheduler.submit(job_of(engine, request(1, 30))))
    before = len(said(jobs[0]))
    while not said(jobs[1]):
        scheduler.step()
    chunks = -(-len(jobs[1].turn.token_ids) // 8)
    assert len(said(jobs[0])) - before >= SHAPE.layers * chunks // slices - 1
    jobs.append(scheduler.submit(job_of(engine, request(2, 30))))
    assert run(scheduler, jobs) == alone


def test_a_prompt_that_is_cancelled_between_slices_leaves_nothing(
    engine_of: Callable[..., Engine],
) -> None:
    engine = engine_of(SHAPE)
    for steps in range(SHAPE.layers):
        scheduler = engine.scheduler(rows=2, budget=10**6, slices=1)
        job = scheduler.submit(job_of(engine, request(1, 5)))
        for _ in range(steps):
            scheduler.step()
        scheduler.cancel(job)
        assert scheduler.idle
        assert taken(scheduler.pools) == [[]] * SHAPE.layers


def test_an_answer_that_is_cancelled_while_its_prompt_is_read_has_no_token(
    engine_of: Callable[..., Engine],
) -> None:
    stop = threading.Event()
    stop.set()
    result = engine_of(SHAPE).generate("What?", [noise(70, 50)], cancel=stop)
    assert (result.token_ids, result.finish_reason) == ([], "cancelled")
    assert result.cache.bytes_used == 0


# -- a budget -------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(POLICIES), st.integers(1, 60), st.integers(0, 25), st.data())
def test_no_layer_takes_more_than_was_said(
    spec: str, tokens: int, new_tokens: int, data: st.DataObject
) -> None:
    """For prompts with and without a picture, and for turns on top of them."""
    begin = data.draw(st.integers(0, tokens))
    spans = [(begin, data.draw(st.integers(begin, tokens)))] if begin < tokens else []
    spans = [span for span in spans if span[0] < span[1]]
    policy, decoder, run = parse(spec), seeded_decoder(3), CacheRun(seeded_decoder(3), parse(spec))
    past = Row()
    for turn, size in enumerate((tokens, 9)):
        layout = Layout.of_tokens(size, spans if turn == 0 else [], torch.device("cpu"))
        most = most_slots(policy, layout, new_tokens, past)
        with Prefill(run.pools, policy, layout, new_tokens, past) as step, torch.inference_mode():
            decoder(embeddings(size, turn), step)
        assert max(stored.extent.size for stored in step.row.layers) <= most
        past = step.row


def test_requests_wait_until_there_is_room(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(SHAPE).with_cache("avl:floor=3")
    alone = [engine.generate(**request(n, 12)).token_ids for n in range(6)]
    slots = max(job_slots(engine, n) for n in range(6))
    per_slot = engine.model.decoder.config.kv_bytes_per_token * 4
    scheduler = engine.scheduler(rows=6, budget=2 * slots * per_slot)
    pools = [pool.k.data_ptr() for pool in scheduler.pools]
    jobs = [scheduler.submit(job_of(engine, request(n, 12))) for n in range(6)]
    most = 0
    while not scheduler.idle:
        scheduler.step()
        most = max(most, len(scheduler.running))
    assert 2 <= most < 6
    assert [said(job) for job in jobs] == alone
    assert [pool.k.data_ptr() for pool in scheduler.pools] == pools


def job_slots(engine: Engine, number: int) -> int:
    job = job_of(engine, request(number, 12))
    return job.turn.slots(job.policy, job.new_tokens, Row())[0]


def test_a_request_that_can_never_fit_is_refused_before_it_is_read(
    engine_of: Callable[..., Engine],
) -> None:
    engine = engine_of(SHAPE)
    per_slot = engine.model.decoder.config.kv_bytes_per_token * 4
    scheduler = engine.scheduler(rows=2, budget=30 * per_slot)
    small, large = (scheduler.submit(job_of(engine, request(n, k))) for n, k in ((0, 5), (1, 12)))
    events = []
    while not scheduler.idle:
        events += scheduler.step()
    assert small.failed is None
    assert Over(large, None) in events
    assert large.row is None
    assert isinstance(large.failed, CapacityError)
    needed = len(large.turn.token_ids) + 12
    assert f"needs {needed} slots of cache in a layer" in str(large.failed)
    assert "there are 30" in str(large.failed)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"rows": value} for value in (0, -1, 1.5, True, "x", None)),
        *({"slices": value} for value in (0, -1, 1.5, "x")),
        *({"budget": value} for value in (0, -1, "x", 10**30)),
    ],
    ids=str,
)
def test_counts_that_are_none_are_refused(
    engine_of: Callable[..., Engine], wrong: dict[str, object]
) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        engine_of(SHAPE).scheduler(**wrong)
