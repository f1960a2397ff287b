"""A prefill that fails in its middle leaves everything as it was: one row, a batch, a chat."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from engine.cache.decode import Decoding
from engine.cache.pool import Pool
from engine.cache.prefill import Prefill
from engine.engine import Engine
from engine.policies.layout import Layout
from engine.policies.specs import parse
from engine.running.batch import job_of
from engine.running.chat import Chat
from engine.running.generation import Answer
from engine.running.scheduler import Over
from tests.cache_run import CacheRun, embeddings, seeded_decoder
from tests.checkpoints import Shape
from tests.noise import noise

SHAPE = Shape(layers=3, kv_heads=2)
LAYERS = range(3)
POLICIES = (
    "full",
    "avl:secondary=0.5,core=0.3,every=2,floor=3",
    "avl:secondary=0.5,core=0.3,every=2,floor=3,format=k8v4,minor=k4v2",
    "sift",
    "zipvl:tau=0.8,every=3",
    "h2o",
    "fastv:layer=1",
)
# Before a layer has taken its slots, between that and filling them, and behind it.
PLACES = ("retain", "gather", "behind")


class PlantedError(Exception):
    pass


@contextmanager
def failing(layer: int, place: str) -> Iterator[None]:
    """Prefills fail in ``layer`` at ``place``; decoding does not."""
    store, patch = Prefill._store, pytest.MonkeyPatch()

    def planted(self: Prefill, pool: Pool, *arguments: Any) -> Any:
        if len(self.row.layers) != layer:
            return store(self, pool, *arguments)
        if place == "retain":
            raise PlantedError
        if place == "gather":
            patch.setattr("engine.cache.prefill.stored_layout", fail)
        store(self, pool, *arguments)
        raise PlantedError

    def fail(*_: Any) -> None:
        raise PlantedError

    patch.setattr(Prefill, "_store", planted)
    try:
        yield
    finally:
        patch.undo()


def taken(pools: list[Pool]) -> list[list[tuple[int, int]]]:
    """What of each pool is in use: the stretches between its holes."""
    found = []
    for pool in pools:
        edges = [0, *(edge for hole in pool.holes.free for edge in hole), pool.slots]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        found.append([(start, end) for start, end in pairs if end > start])
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_later_turn_that_fails_costs_no_slot_and_no_number(policy: str, place: str) -> None:
    """In every layer: what the pools hold, and what the sequence says next, is as without it."""
    calm, disturbed = (CacheRun(seeded_decoder(3), parse(policy)) for _ in range(2))
    for run in (calm, disturbed):
        run.prefill(embeddings(40, 1), [(3, 30)], 12)
        run.decode(embeddings(1, 2))
        run.settle()
    before = taken(disturbed.pools)
    for layer in range(len(disturbed.pools)):
        with failing(layer, place), pytest.raises(PlantedError):
            disturbed.prefill(embeddings(9, 3), [], 12)
        assert taken(disturbed.pools) == before
    for step in (
        lambda run: run.prefill(embeddings(9, 3), [], 12),
        lambda run: run.decode(embeddings(1, 4)),
    ):
        assert torch.equal(step(calm), step(disturbed))


def test_a_first_prefill_that_fails_leaves_nothing() -> None:
    decoder = seeded_decoder(3)
    run = CacheRun(decoder, parse("full"))
    layout = Layout.of_tokens(10, [], torch.device("cpu"))
    for layer in range(len(run.pools)):
        with failing(layer, "behind"), pytest.raises(PlantedError):  # noqa: SIM117
            with Prefill(run.pools, run.policy, layout, 4) as step:
                decoder(embeddings(10, 1), step)
        assert taken(run.pools) == [[]] * len(run.pools)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_chat_goes_on_as_if_the_failed_turn_had_not_been(
    engine_of: Callable[..., Engine], policy: str, layer: int
) -> None:
    def turns(disturb: Callable[[Chat], None]) -> list[list[int]]:
        chat = engine_of(SHAPE).with_cache(policy).chat()
        found = [chat.send("What?", [noise(70, 50)], max_new_tokens=5, ignore_eos=True).token_ids]
        disturb(chat)
        for question in ("And now?", "Why?"):
            found.append(chat.send(question, max_new_tokens=5, ignore_eos=True).token_ids)
        return found

    def disturb(chat: Chat) -> None:
        with failing(layer, "gather"), pytest.raises(PlantedError):
            chat.send("Never mind.", [noise(30, 30)], max_new_tokens=5)

    assert turns(disturb) == turns(lambda chat: None)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_row_that_fails_costs_the_others_nothing(
    engine_of: Callable[..., Engine], layer: int
) -> None:
    engine = engine_of(SHAPE).with_cache(POLICIES[1])
    asked = [
        {"prompt": f"What {n}?", "max_new_tokens": 4 + n, "ignore_eos": True} for n in range(3)
    ]
    alone = [engine.generate(**request).token_ids for request in asked]
    scheduler = engine.scheduler(rows=4)
    first = scheduler.submit(job_of(engine, asked[0]))
    scheduler.step()
    scheduler.step()
    with failing(layer, "behind"):
        refused = scheduler.submit(job_of(engine, {"prompt": "What?", "images": [noise(70, 50)]}))
        assert scheduler.step() == [Over(refused, None)]
    assert isinstance(refused.failed, PlantedError)
    jobs = [first, *(scheduler.submit(job_of(engine, asked[number])) for number in (1, 2))]
    while not scheduler.idle:
        scheduler.step()
    answers = [job.answer for job in jobs]
    assert [a.token_ids for a in answers if isinstance(a, Answer)] == alone
    assert taken(scheduler.pools) == [[]] * len(scheduler.pools)


def test_rows_of_different_policies_are_decoded_together(
    engine_of: Callable[..., Engine],
) -> None:
    """Each as it would be alone, to 1e-5 in float32 whatever the others do.

    Beside keys in few bits queries are rounded: sums in another order may turn a code over.
    """
    decoder = seeded_decoder(3)
    specs = [*POLICIES, "streaming", "snapkv:window=4"]
    shared = CacheRun(decoder, parse("full")).pools

    def started(number: int, pools: list[Pool] | None = None) -> CacheRun:
        run = CacheRun(decoder, parse(specs[number]))
        run.pools = pools or run.pools
        run.prefill(embeddings(30 + 4 * number, number), [(3, 20 + number)], 9)
        return run

    runs = [started(number) for number in range(len(specs))]
    joined = [started(number, shared).row for number in range(len(specs))]
    decoding = Decoding(shared, [row for row in joined if row is not None])
    assert [row.policy.spec for row in decoding.rows] == [run.policy.spec for run in runs]
    for step in range(8):
        hidden = torch.cat([embeddings(1, 100 * step + n) for n in range(len(specs))])
        with torch.inference_mode():
            together = decoder.logits(decoder(hidden, decoding))
            decoding.advance()
        for number, run in enumerate(runs):
            alone = run.decode(embeddings(1, 100 * step + number))
            near = 2e-3 if "=k" in specs[number] or specs[number] == "sift" else 1e-5
            torch.testing.assert_close(together[number], alone.flatten(), atol=near, rtol=near)
