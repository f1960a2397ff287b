"""What cross layers hold: shared, given back, counted; and steps of rows with and without pictures.

Also how policies act on the text of a model whose pictures are no part of the sequence.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.cache.crossing import CrossPools, Sight, groups
from engine.cache.looking import Looking
from engine.cache.pool import Pool
from engine.cache.row import Row
from engine.engine import Engine
from engine.errors import CapacityError
from engine.models.cross_layer import CrossLayer
from engine.ops import native, products
from engine.policies.specs import POLICIES, parse
from engine.result import Result, Timings
from engine.running import taped
from engine.running.batch import job_of
from engine.running.generation import Answer
from engine.running.scheduler import Job, Over, Scheduler
from engine.running.stepping import Stepper, Stepping
from engine.running.turn import make_cross_pools, make_pools, prefill
from tests.mllama_checkpoint import DEFAULT, write_mllama
from tests.noise import noise
from tests.test_transactions import taken

WORDS = "What is this picture?"
FEATURES, FULL = DEFAULT.tile_features, parse("full")
# Pictures of a request, by the tiles they take.
WIDE, SMALL, LARGE = (160, 50), (30, 40), (100, 100)
MIXED: list[list[tuple[int, int]]] = [[WIDE], [], [SMALL, LARGE], [SMALL], [], [LARGE]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mllama(tmp_path_factory.mktemp("mllama") / "m")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.load(folder, device="cpu", dtype="float32", cache="full")


def request(number: int, new_tokens: int = 9) -> dict[str, Any]:
    images = [noise(*size, seed=number + n) for n, size in enumerate(MIXED[number])]
    words = f"{number}: {WORDS[: 8 + 3 * number]}"
    options = {"max_new_tokens": new_tokens, "ignore_eos": True}
    return {"prompt": words, "images": images, **options}


def alone(engine: Engine, asked: dict[str, Any]) -> list[int]:
    return engine.generate(**asked).token_ids


def said(job: Job) -> list[int]:
    assert job.failed is None, job.failed
    assert isinstance(job.answer, Answer)
    return job.answer.token_ids


def run(scheduler: Scheduler, jobs: list[Job]) -> list[list[int]]:
    while not scheduler.idle:
        scheduler.step()
    return [said(job) for job in jobs]


# -- which pictures a token sees ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("places", "before", "expected"),
    [
        ([], 0, [(0, [])]),
        ([], 2, [(0, [0, 1])]),
        ([3], 0, [(0, []), (3, [0])]),
        ([0, 1, 2], 1, [(0, [0]), (0, [1]), (1, [1, 2]), (2, [1, 2, 3])]),
        ([2, 4, 5, 9], 0, [(0, []), (2, [0]), (4, [1]), (5, [1, 2]), (9, [3])]),
    ],
)
def test_a_token_sees_the_last_run_of_pictures(
    places: list[int], before: int, expected: list[tuple[int, list[int]]]
) -> None:
    numbers = list(range(before + len(places)))
    assert [(start, numbers[seen]) for start, seen in groups(places, before)] == expected


# -- rows that are decoded together ---------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 3, 6])
def test_rows_with_and_without_pictures_answer_as_alone(rows: int, engine: Engine) -> None:
    requests = [request(n, 4 + 5 * (n % 3)) for n in range(len(MIXED))]
    done = {r.index: r for r in engine.generate_batch(requests, rows)}
    for number, asked in enumerate(requests):
        result = done[number]
        assert isinstance(result, Result), result
        assert result.token_ids == alone(engine, asked)


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("graphs", [False, True])
def test_prompts_in_slices_and_captured_steps_say_the_same(
    graphs: bool, slices: int, engine: Engine
) -> None:
    other = engine.with_cache("full")
    other.stepping = Stepping(graphs=graphs)
    requests = [request(n) for n in range(len(MIXED))]
    scheduler = other.scheduler(3, slices=slices)
    jobs = [scheduler.submit(job_of(other, asked)) for asked in requests]
    assert run(scheduler, jobs) == [alone(engine, asked) for asked in requests]


@pytest.mark.parametrize("numbers", [[0], [1], [0, 1], [1, 0, 2], [4, 1]])
def test_torch_alone_gives_the_same_steps(
    numbers: list[int], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention over listed features equals attention over the whole, whoever computes it."""
    requests = [request(number) for number in numbers]
    expected = [alone(engine, asked) for asked in requests]
    monkeypatch.setattr(native, "serves", lambda *_: False)
    done = {r.index: r for r in engine.generate_batch(requests, 4)}
    assert [done[n].token_ids for n in range(len(numbers))] == expected


# -- tapes ----------------------------------------------------------------------------------------


@pytest.fixture
def bf16(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Few rows are multiplied natively, also where torch would be as fast."""
    monkeypatch.setattr(products, "_native_pays", lambda: True)
    return Engine.load(folder, device="cpu", dtype="bfloat16", cache="full")


def decoded(engine: Engine, numbers: list[int], steps: int) -> tuple[list[torch.Tensor], Stepper]:
    """Logits of forced steps; rows with and without pictures leave on the way."""
    pools, cross, rows = make_pools(engine.model), make_cross_pools(engine.model), list[Row]()
    for number in numbers:
        asked = request(number)
        turn = engine.turn(asked["prompt"], asked["images"], Timings())
        rows.append(prefill(engine.model, pools, engine.policy, turn, steps, cross=cross)[0])
    stepper = Stepper(engine.model, pools, Stepping())
    for row in rows:
        stepper.join(row)
    found = []
    for step in range(steps):
        if step == steps // 2 and stepper.rows > 1:
            stepper.leave(0)
        tokens = torch.arange(stepper.rows) * 7 + step
        found.append(stepper.step(tokens).clone())
    return found, stepper


@pytest.mark.skipif(not native.loaded(), reason="needs the native module")
@pytest.mark.parametrize("cache", ["full", "avl:text=0.3,floor=3", "h2o:heavy=0.125"])
@pytest.mark.parametrize("numbers", [[0], [1], [0, 1], [1, 0], [1, 4, 2]])
def test_a_tape_repeats_steps_through_cross_layers(
    numbers: list[int], cache: str, bf16: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated, stepper = decoded(bf16.with_cache(cache), numbers, 12)
    tapes = list(stepper._taped._tapes.values())
    assert tapes
    assert all(tapes), stepper.eager_because
    assert stepper.eager_because is None
    monkeypatch.setattr(taped, "obstacle", lambda *_: "a test asks for it")
    made_anew, _ = decoded(bf16.with_cache(cache), numbers, 12)
    for ours, theirs in zip(repeated, made_anew, strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_of_text_alone_passes_cross_layers_by(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [alone(engine, request(n)) for n in (1, 4)]

    def refused(*_: Any) -> None:
        raise AssertionError("a cross layer was run")

    monkeypatch.setattr(CrossLayer, "forward", refused)
    done = {r.index: r for r in engine.generate_batch([request(1), request(4)], 2)}
    assert [done[n].token_ids for n in range(2)] == expected


# -- pools ----------------------------------------------------------------------------------------


def test_rows_that_ask_about_one_picture_share_it(engine: Engine) -> None:
    scheduler, image = engine.scheduler(3), engine.encode(noise(*WIDE))
    asked = [{"prompt": f"{n} {WORDS}", "images": [image]} for n in range(3)]
    options = {"max_new_tokens": 6, "ignore_eos": True}
    jobs = [scheduler.submit(job_of(engine, each | options)) for each in asked]
    while len(scheduler.running) < 3:
        scheduler.step()
    assert scheduler.cross is not None
    for pool in scheduler.cross.pools:
        assert taken([pool]) == [[(0, 3 * FEATURES)]]
    stored = {id(job.row.pictures[0]) for job in jobs if job.row}
    assert len(stored) == 1
    answers = run(scheduler, jobs)
    assert taken(list(scheduler.cross.pools)) == [[], []]
    assert answers == [alone(engine, each | options) for each in asked]
    again = scheduler.submit(job_of(engine, asked[1] | options))
    assert run(scheduler, [again]) == [answers[1]]  # nothing of what was given back is found


def test_a_shared_picture_stays_while_a_prompt_is_read(engine: Engine) -> None:
    """Whose picture it was is over before the second prompt is; a third would take its slots."""
    scheduler, image = engine.scheduler(2, slices=1), engine.encode(noise(*WIDE))
    options = {"ignore_eos": True, "images": [image]}
    short = {"prompt": WORDS, "max_new_tokens": 3, **options}
    long = {"prompt": WORDS * 2, "max_new_tokens": 30, **options}
    first = scheduler.submit(job_of(engine, short))
    second = scheduler.submit(job_of(engine, long))
    third = scheduler.submit(job_of(engine, request(0)))
    while not first.over:
        scheduler.step()
    assert second.row is None
    assert scheduler._reading is not None
    assert scheduler.cross is not None
    assert taken(list(scheduler.cross.pools)) == [[(0, 3 * FEATURES)]] * 2
    answers = run(scheduler, [first, second, third])
    assert answers == [alone(engine, each) for each in (short, long, request(0))]
    assert taken(list(scheduler.cross.pools)) == [[], []]


def test_a_picture_that_nobody_will_see_again_is_not_held(engine: Engine) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": WORDS}]}]
    result = engine.generate(messages, [noise(*LARGE), noise(*SMALL)], max_new_tokens=2)
    assert result.cache.features == FEATURES
    chat = engine.chat()
    for sizes, held in (([LARGE], 4), ([], 4), ([SMALL, WIDE], 4), ([SMALL], 1), ([], 1)):
        images = [noise(*size, seed=n) for n, size in enumerate(sizes)]
        result = chat.send(WORDS, images, max_new_tokens=3, ignore_eos=True)
        assert result.cache.features == held * FEATURES
        cross = chat._scheduler.cross
        assert cross is not None
        in_use = [sum(end - start for start, end in each) for each in taken(list(cross.pools))]
        assert in_use == [held * FEATURES] * 2
    chat._row.give()
    assert taken([*chat._scheduler.pools, *cross.pools]) == [[]] * 7


class PlantedError(Exception):
    pass


@pytest.mark.parametrize("later", [False, True], ids=["first turn", "later turn"])
@pytest.mark.parametrize("layer", range(7))
def test_a_prefill_that_fails_costs_no_slot(
    layer: int, later: bool, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, untouched = engine.chat(), engine.chat()
    if later:
        for each in (chat, untouched):
            each.send(WORDS, [noise(*LARGE)], max_new_tokens=3, ignore_eos=True)
    scheduler = chat._scheduler
    assert scheduler.cross is not None
    pools = [*scheduler.pools, *scheduler.cross.pools]
    before = taken(pools)
    through = engine.model.decoder.layers[layer]
    forward = type(through).forward

    def failing(self: torch.nn.Module, *given: Any) -> Any:
        made = forward(self, *given)
        if self is through:
            raise PlantedError
        return made

    with monkeypatch.context() as patch:
        patch.setattr(type(through), "forward", failing)
        with pytest.raises(PlantedError):
            chat.send(WORDS, [noise(*WIDE), noise(*SMALL)], max_new_tokens=3)
    assert taken(pools) == before
    sent = [each.send("Sure?", max_new_tokens=6, ignore_eos=True) for each in (chat, untouched)]
    assert sent[0].token_ids == sent[1].token_ids


def test_a_budget_is_kept_and_what_can_never_fit_is_refused(engine: Engine) -> None:
    model = engine.model
    config, whole = model.decoder.config, 4 * FEATURES
    slot = config.kv_bytes_per_token // config.layers * 4
    budget = slot * (2 * 2 * whole + 5 * 120)
    scheduler = engine.scheduler(2, budget=budget)
    assert scheduler.cross is not None
    assert [pool.limit for pool in scheduler.cross.pools] == [2 * whole] * 2
    assert [pool.limit for pool in scheduler.pools] == [120] * 5
    requests = [request(n) for n in range(len(MIXED))]
    jobs = [scheduler.submit(job_of(engine, asked)) for asked in requests]
    assert run(scheduler, jobs) == [alone(engine, asked) for asked in requests]
    assert taken([*scheduler.pools, *scheduler.cross.pools]) == [[]] * 7
    too_many = {"prompt": WORDS, "images": [noise(*LARGE, seed=n) for n in range(3)]}
    job = scheduler.submit(job_of(engine, too_many | {"max_new_tokens": 2}))
    events = scheduler.step()
    assert isinstance(events[0], Over)
    assert isinstance(job.failed, CapacityError)
    assert f"{2 * whole} of a cross layer" in str(job.failed)


def test_a_small_budget_is_halved(engine: Engine) -> None:
    config = engine.model.decoder.config
    slot = config.kv_bytes_per_token // config.layers * 4
    scheduler = engine.scheduler(8, budget=100 * slot)
    assert scheduler.cross is not None
    assert [pool.limit for pool in scheduler.cross.pools] == [25, 25]
    assert [pool.limit for pool in scheduler.pools] == [10] * 5


def test_jobs_wait_for_room_for_their_features(engine: Engine) -> None:
    """Two rows could be decoded, but only one picture lies in the pools: the other job waits."""
    config = engine.model.decoder.config
    slot = config.kv_bytes_per_token // config.layers * 4
    scheduler = engine.scheduler(2, budget=slot * (2 * 2 * 4 * FEATURES + 5 * 500))
    assert scheduler.cross is not None
    for pool in scheduler.cross.pools:
        pool.take(3 * FEATURES)
    requests = [request(5), request(0), request(1)]
    jobs = [scheduler.submit(job_of(engine, asked)) for asked in requests]
    most = 0
    while not scheduler.idle:
        scheduler.step()
        most = max(most, sum(bool(job.row and job.row.pictures) for job in scheduler.running))
    assert most == 1
    assert [said(job) for job in jobs] == [alone(engine, asked) for asked in requests]


def test_what_moves_is_told_to_those_who_decode(engine: Engine) -> None:
    """A pool grows for a new row's picture while another row is between two steps."""
    scheduler = engine.scheduler(2)
    first = scheduler.submit(job_of(engine, request(3, 12)))
    for _ in range(4):
        scheduler.step()
    assert scheduler.cross is not None
    where = [pool.k.data_ptr() for pool in scheduler.cross.pools]
    second = scheduler.submit(job_of(engine, request(2, 12)))
    answers = run(scheduler, [first, second])
    assert all(
        pool.k.data_ptr() != before
        for pool, before in zip(scheduler.cross.pools, where, strict=True)
    )
    assert answers == [alone(engine, request(3, 12)), alone(engine, request(2, 12))]


def test_a_source_that_is_gone_is_not_found() -> None:
    pool = Pool(1, 16, torch.float32, torch.device("cpu"))
    cross, features = CrossPools([pool]), torch.randn(5, 8)
    looking = Looking([Sight(0, features, 3)], cross)
    view = looking.view(0, torch.arange(2))
    assert view is not None
    view.attend(torch.randn(2, 2, 16), lambda x: (torch.randn(len(x), 1, 16),) * 2)
    looking.hold()
    (stored,) = looking.keep()
    assert (stored.seen, cross.find(Sight(7, features, 3), FULL)) == (3, stored)
    assert cross.find(Sight(0, features.clone(), 3), FULL) is None
    assert cross.find(Sight(0, features, 3, blind=5), FULL) is None
    assert cross.find(Sight(0, features, 3), parse("sift")) is None  # written otherwise
    stored.give()
    assert cross.find(Sight(0, features, 3), FULL) is None


# -- policies and reports -------------------------------------------------------------------------

SPECS = [
    *(name for name in POLICIES if name != "trimmed"),
    "avl:text=0.3,floor=2,prefill=1+fastv:layer=1",
    "sift:format=k8v4,skip=0.3",
]


@pytest.mark.parametrize("spec", SPECS)
def test_policies_leave_cross_layers_alone(spec: str, engine: Engine) -> None:
    """Alone, together and over turns: the same tokens, and all features."""
    other = engine.with_cache(spec)
    requests = [request(n, 14) for n in (0, 1, 2)]
    single = [other.generate(**asked) for asked in requests]
    done = {r.index: r for r in other.generate_batch(requests, 3)}
    for number, result in enumerate(single):
        assert done[number].token_ids == result.token_ids
        assert result.cache.features == [3, 0, 5][number] * FEATURES
        assert result.cache.image_tokens == 0
        assert result.cache.bytes_used <= result.cache.bytes_allocated
    chat = other.chat()
    for sizes in ([WIDE], [], [SMALL]):
        chat.send(WORDS, [noise(*size) for size in sizes], max_new_tokens=6, ignore_eos=True)


@pytest.mark.parametrize("spec", ["full", "random", "fastv:layer=1", "avl:text=1"])
def test_policies_of_image_tokens_change_nothing(spec: str, engine: Engine) -> None:
    asked = request(2, 12)
    assert alone(engine.with_cache(spec), asked) == alone(engine, asked)


def test_text_behind_the_picture_is_evicted_and_nothing_before_it(engine: Engine) -> None:
    policy = parse("avl:text=0.5,floor=2")
    asked = request(0)
    turn = engine.turn(asked["prompt"], asked["images"], Timings())
    ((start, end),) = turn.spans
    assert start == end
    assert turn.token_ids[end - 1] == engine.model.image_token
    pools, cross = make_pools(engine.model), make_cross_pools(engine.model)
    row, _ = prefill(engine.model, pools, policy, turn, 4, cross=cross)
    behind = len(turn.token_ids) - end
    for stored in row.layers:
        positions = stored.layout.positions
        assert positions[:, :end].tolist() == [list(range(end))] * len(positions)
        assert positions.shape[1] - end == round(0.5 * behind)
        assert (positions[:, end:] >= end).all()


def test_the_report_counts_features_beside_tokens(engine: Engine) -> None:
    asked = request(2, 5)
    result, config = engine.generate(**asked), engine.model.decoder.config
    token_bytes = config.kv_bytes_per_token * 4
    feature = token_bytes // config.layers * DEFAULT_CROSS
    cache, seen = result.cache, result.prompt_tokens + 4
    assert (cache.features, cache.feature_bytes) == (5 * FEATURES, 5 * FEATURES * feature)
    assert cache.bytes_full == cache.bytes_used == seen * token_bytes + cache.feature_bytes
    assert (cache.stored_share, cache.formats) == (1.0, {"fp32": cache.feature_bytes})
    assert (cache.image_stored_share, cache.image_read_share) == (1.0, 1.0)
    text_only = engine.generate(**request(1, 5)).cache
    assert (text_only.features, text_only.feature_bytes) == (0, 0)


DEFAULT_CROSS = len(DEFAULT.cross)


def test_a_pass_needs_no_pictures(engine: Engine) -> None:
    """A prefill that is told of none, of a model that could see some."""
    pools = make_pools(engine.model)
    turn = engine.turn(WORDS, [], Timings())
    row, logits = prefill(engine.model, pools, engine.policy, turn, 2)
    assert row.pictures == ()
    torch.testing.assert_close(logits, engine.logits(WORDS)[-1], rtol=0, atol=2e-5)
