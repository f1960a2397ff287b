"""The cache with pictures in formats of their own: exact where they are, whoever asks of it."""

import itertools
from collections.abc import Callable

import pytest
import torch

from engine.cache.prefill import most_packed, most_slots
from engine.cache.report import report
from engine.cache.row import Row
from engine.engine import Engine
from engine.errors import CapacityError, OptionError
from engine.loading.preparing import prepare
from engine.models.decoder import Decoder
from engine.policies.layout import Layout
from engine.policies.specs import parse
from engine.running.batch import job_of
from tests.cache_run import CacheRun, embeddings, seeded_decoder
from tests.checkpoints import Shape
from tests.noise import noise

SHAPE = Shape(layers=3, kv_heads=2, image=112)  # 64 image tokens: two pages
SPANS = [(3, 40), (44, 80)]
TURNS = [(90, SPANS), (12, []), (50, [(5, 39)])]
AVL = "avl:secondary=0.6,core=0.3,every=2,prefill=1,text=0.5,floor=4"
FEW = ("k8v8", "k4v4", "k4v2", "k2v2")


def outputs(spec: str) -> list[torch.Tensor]:
    """Logits of every decode step of a conversation of three turns, on one seeded decoder."""
    run, found = CacheRun(seeded_decoder(3), parse(spec)), []
    for number, (tokens, spans) in enumerate(TURNS):
        run.prefill(embeddings(tokens, number), spans, 8)
        found += [run.decode(embeddings(1, 100 * number + step)) for step in range(7)]
    return found


# -- 16 bits in pages are what they are in slots ---------------------------------------------------


@pytest.mark.parametrize(
    ("paged", "plain"),
    [
        ("sift:format=k16v16,skip=0", "full"),
        (f"{AVL},format=k16v16", AVL),
        ("avl:secondary=0.5,core=none,prefill=1,text=1,minor=k16v16", "full"),
        (
            "avl:secondary=0.5,core=none,prefill=1,text=1,format=k16v16,minor=k16v16",
            "full",
        ),
        ("avl:secondary=1,core=0.3,every=3,prefill=1,text=1,format=k16v16",
         "avl:secondary=1,core=0.3,every=3,prefill=1,text=1"),
    ],
)  # fmt: skip
def test_where_numbers_lie_changes_nothing(paged: str, plain: str) -> None:
    """Tiers in another pool, ranked again there, through turns with and without pictures."""
    for got, want in zip(outputs(paged), outputs(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_fewer_bits_are_further_from_the_full_cache() -> None:
    want = torch.stack(outputs("full"))
    errors = [
        float((torch.stack(outputs(f"sift:format={form},skip=0")) - want).norm()) for form in FEW
    ]
    assert 0 < errors[0] < errors[1] < errors[2] < errors[3]
    skipping = float((torch.stack(outputs("sift:format=k8v8,skip=0.3")) - want).norm())
    assert errors[0] < skipping


# -- turns ----------------------------------------------------------------------------------------


def test_what_a_turn_has_packed_stays_where_it_is() -> None:
    """The next turn holds the same extents; only they are shared, and all come back at the end."""
    run = CacheRun(seeded_decoder(3), parse("sift"))
    run.prefill(embeddings(90, 0), SPANS, 8)
    before = [[part.extent for part in stored.parts] for stored in run.row.layers]
    data = [pool.of("k4v4").data.clone() for pool in run.pools]
    run.decode(embeddings(1, 1))
    run.prefill(embeddings(12, 2), [], 8)
    run.prefill(embeddings(50, 3), [(5, 39)], 8)
    for layer, stored in enumerate(run.row.layers):
        assert [part.extent for part in stored.parts[:1]] == before[layer]
        assert len(stored.parts) == 2
        pages = slice(0, len(data[layer]))
        first = before[layer][0]
        used = slice(first.start // 32, (first.start + first.size) // 32)
        assert torch.equal(run.pools[layer].of("k4v4").data[pages][used], data[layer][used])
    run.row.give()
    for pool in run.pools:
        for each in (pool, pool.of("k4v4")):
            size = each.slots if each is pool else len(each.data)
            assert each.holes.free == [(0, size)]


def test_another_policy_takes_up_what_it_keeps_as_plain_numbers(
    engine_of: Callable[..., Engine],
) -> None:
    """A later turn under another policy may keep less than a part; what it keeps is plain then."""
    run = CacheRun(seeded_decoder(3), parse("sift:format=k8v8"))
    run.prefill(embeddings(90, 0), SPANS, 8)
    run.policy = parse("h2o")
    run.prefill(embeddings(12, 2), [], 8)
    assert not any(stored.parts for stored in run.row.layers)
    assert run.decode(embeddings(1, 5)).isfinite().all()
    run.policy = parse("full")
    run.prefill(embeddings(12, 3), [], 8)
    assert run.decode(embeddings(1, 6)).isfinite().all()


def test_a_later_turn_under_the_full_cache_keeps_parts_whole() -> None:
    run = CacheRun(seeded_decoder(3), parse("sift"))
    run.prefill(embeddings(90, 0), SPANS, 8)
    run.policy = parse("full")
    run.prefill(embeddings(12, 2), [], 8)
    assert all([part.tokens for part in stored.parts] == [73] for stored in run.row.layers)


# -- rows of one step -----------------------------------------------------------------------------

TOGETHER = (
    "full",
    "sift",
    "sift:format=k8v8,skip=0",
    f"{AVL},format=k4v2,minor=k2v2",
    AVL,
    "avl:secondary=0.5,core=none,minor=k4v4,skip=0.2,prefill=1",
    "sift:format=k4v4,skip=0.3",
    "zipvl:tau=0.8,every=4",
    "h2o",
)


def request(number: int, tokens: int = 9) -> dict[str, object]:
    return {
        "prompt": f"What is in picture {number}?" + " And why?" * number,
        "images": [noise(40 + 9 * number, 60, number)],
        "max_new_tokens": tokens + number,
        "ignore_eos": True,
    }


def test_rows_of_any_formats_are_decoded_together(engine_of: Callable[..., Engine]) -> None:
    """Each answer is what it is alone, whoever comes and goes."""
    engine = engine_of(SHAPE)
    engines = [engine.with_cache(spec) for spec in TOGETHER]
    alone = [
        mine.generate(**request(n)).token_ids  # type: ignore[arg-type]
        for n, mine in enumerate(engines)
    ]
    scheduler = engine.scheduler(rows=3)
    jobs = [scheduler.submit(job_of(mine, request(n))) for n, mine in enumerate(engines)]
    while not scheduler.idle:
        scheduler.step()
    assert [job.answer.token_ids for job in jobs] == alone  # type: ignore[attr-defined]
    for pool in scheduler.pools:
        for each in pool.paged.values():
            assert each.holes.free == [(0, len(each.data))]


def test_formats_share_what_a_budget_has_claimed(engine_of: Callable[..., Engine]) -> None:
    """Pools of all formats lie in the plain one's memory; nothing moves, and all comes back."""
    engine = engine_of(SHAPE)
    engines = [engine.with_cache(spec) for spec in TOGETHER]
    alone = [
        mine.generate(**request(n)).token_ids  # type: ignore[arg-type]
        for n, mine in enumerate(engines)
    ]
    per_slot = engine.model.decoder.config.kv_bytes_per_token * 4
    scheduler = engine.scheduler(rows=8, budget=300 * per_slot)
    where = [pool.claimed.data_ptr() for pool in scheduler.pools]
    jobs = [scheduler.submit(job_of(mine, request(n))) for n, mine in enumerate(engines)]
    most = 0
    while not scheduler.idle:
        scheduler.step()
        most = max(most, len(scheduler.running))
    assert 2 <= most < 8
    assert [job.answer.token_ids for job in jobs] == alone  # type: ignore[attr-defined]
    assert [pool.claimed.data_ptr() for pool in scheduler.pools] == where
    for pool in scheduler.pools:
        assert pool.holes.free == [(0, 600)]
        assert all(
            paged.data.untyped_storage().data_ptr() == pool.claimed.untyped_storage().data_ptr()
            for paged in pool.paged.values()
        )


def test_what_can_never_fit_is_refused_with_its_formats(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(SHAPE).with_cache("sift")
    per_slot = engine.model.decoder.config.kv_bytes_per_token * 4
    scheduler = engine.scheduler(budget=24 * per_slot)
    job = scheduler.submit(job_of(engine, request(0)))
    while not scheduler.idle:
        scheduler.step()
    assert isinstance(job.failed, CapacityError)
    assert "slots of cache in a layer and 64 in k4v4" in str(job.failed)


@pytest.mark.parametrize("spec", TOGETHER)
def test_no_layer_writes_more_than_was_promised(spec: str) -> None:
    run, past = CacheRun(seeded_decoder(3), parse(spec)), Row()
    for number, (tokens, spans) in enumerate(TURNS):
        layout = Layout.of_tokens(tokens, spans, torch.device("cpu"))
        slots = most_slots(run.policy, layout, 8, past)
        packed = most_packed(run.policy, layout, past)
        old = {id(part.extent) for stored in past.layers for part in stored.parts}
        run.prefill(embeddings(tokens, number), spans, 8)
        past = run.row or past
        for stored in past.layers:
            assert stored.extent.size <= slots
            new = [part for part in stored.parts if id(part.extent) not in old]
            for name in {part.format for part in new}:
                mine = sum(part.tokens for part in new if part.format == name)
                assert mine <= packed[name]


# -- what is reported -----------------------------------------------------------------------------


def test_a_report_counts_bytes_by_format(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(SHAPE)
    result = engine.with_cache("sift:format=k4v4,skip=0.2").generate(**request(0))  # type: ignore[arg-type]
    cache, config = result.cache, engine.model.decoder.config
    token = 2 * 48  # keys and values of 2 heads: 16 bytes of codes and 4 of scales, in steps of 16
    assert (config.kv_heads, config.head_dim) == (2, 16)
    assert cache.formats == {"fp32": 0, "k4v4": 3 * 64 * token}
    assert cache.stored.mean == 64
    assert cache.stored_share == 1.0
    assert 0 < cache.values_read < 1
    assert 0 < cache.left_out <= 0.2
    stored = cache.formats["k4v4"] / (64 * config.kv_bytes_per_token * 4)
    assert cache.image_stored_share == pytest.approx(stored)
    assert cache.image_read_share < cache.image_stored_share
    full = engine.generate(**request(0)).cache  # type: ignore[arg-type]
    assert (full.image_stored_share, full.image_read_share) == (1.0, 1.0)
    assert (full.left_out, full.values_read) == (0.0, 1.0)
    assert cache.bytes_used < full.bytes_used
    assert cache.bytes_full == full.bytes_full


def test_a_report_of_tiers_weighs_steps_by_their_lists(engine_of: Callable[..., Engine]) -> None:
    spec = "avl:secondary=0.5,core=0.25,every=3,prefill=1,text=1"
    result = engine_of(SHAPE).with_cache(spec).generate(**request(0))  # type: ignore[arg-type]
    steps = len(result.token_ids) - 1
    full_steps = steps // 3
    share = (full_steps * 32 + (steps - full_steps) * 16) / (steps * 64)
    assert result.cache.image_read_share == pytest.approx(share)
    assert result.cache.image_stored_share == 0.5


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("sift:format=k5v4", "format is 'k5v4'"),
        ("sift:format=", "format is ''"),
        ("sift:skip=1.5", "skip is 1.5"),
        ("avl:format=freed", "format is 'freed'"),
        ("avl:minor=plain", "minor is 'plain'"),
        ("avl:skip=0.1", "nothing is in a format"),
        ("avl:skip=x", "skip='x' is not a number"),
        ("sift+avl", "both decide what is stored"),
    ],
)
def test_a_wrong_format_is_named(spec: str, named: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(spec)
    assert named in str(caught.value)


def test_every_format_answers(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(SHAPE)
    for k, v in itertools.product((16, 8, 4, 2), repeat=2):
        result = engine.with_cache(f"sift:format=k{k}v{v}").generate(**request(1, 3))  # type: ignore[arg-type]
        assert len(result.token_ids) == 4


# -- keys with large biases ------------------------------------------------------------------------


def spiked(layer: int, bias: float) -> Decoder:
    """A decoder one of whose layers has a bias of keys that stands out, as in Qwen2's."""
    decoder = seeded_decoder(3)
    decoder.layers[layer].k_proj.bias[5] = bias
    prepare(decoder, torch.device("cpu"))
    return decoder


def error(decoder: Decoder, spec: str, bits: list[int]) -> float:
    """How far three steps are from those of the full cache."""
    outs = []
    for each in ("full", spec):
        run = CacheRun(decoder, parse(each))
        for pool, least in zip(run.pools, bits, strict=True):
            pool.key_bits = least
        run.prefill(embeddings(90, 0), SPANS, 8)
        outs.append(torch.stack([run.decode(embeddings(1, 7 + n)) for n in range(3)]))
    return float((outs[1] - outs[0]).norm() / outs[0].norm())


@pytest.mark.parametrize(
    ("bias", "bits"), [(3.0, 0), (15.0, 0), (15.1, 8), (-100.0, 8), (300.0, 16)]
)
def test_keys_have_as_many_bits_as_their_biases_need(bias: float, bits: int) -> None:
    assert spiked(2, bias).key_bits() == [0, 0, bits, 0]


def test_a_layer_with_a_large_bias_is_as_near_as_the_others() -> None:
    decoder, spec = spiked(1, 200.0), "sift:format=k4v4,skip=0"
    usual = error(seeded_decoder(3), spec, [0, 0, 0, 0])
    assert error(decoder, spec, [0, 0, 0, 0]) > 2 * usual
    assert error(decoder, spec, decoder.key_bits()) < 1.2 * usual


def test_what_is_reported_has_the_bits_that_are_there() -> None:
    run = CacheRun(spiked(1, 200.0), parse("sift:format=k4v4,skip=0.1"))
    for pool, least in zip(run.pools, run.decoder.key_bits(), strict=True):
        pool.key_bits = least
    run.prefill(embeddings(90, 0), SPANS, 8)
    run.decode(embeddings(1, 1))
    row = run.settle()
    assert row is not None
    formats = report(row, run.pools).formats
    assert set(formats) == {"fp32", "k4v4", "k16v4"}
    assert formats["k4v4"] == 3 * 73 * run.pools[0].of("k4v4").slot_bytes


@pytest.mark.parametrize("spec", ["h2o", "snapkv:keep=0.4,window=4", "streaming", "random", "avl"])
def test_pictures_are_counted_wherever_they_lie(spec: str) -> None:
    """Policies that take pictures for text hold of them what their positions say."""
    run = CacheRun(seeded_decoder(3), parse(spec))
    run.prefill(embeddings(90, 0), SPANS, 8)
    run.decode(embeddings(1, 1))
    row = run.settle()
    assert row is not None
    inside = 0.0
    for stored in row.layers:
        heads = stored.layout.positions.tolist()
        inside += sum(any(s <= p < e for s, e in SPANS) for head in heads for p in head) / len(
            heads
        )
    counted = report(row, run.pools)
    assert counted.image_stored_share == pytest.approx(inside / (4 * 73), abs=1e-4)
    assert 0 < counted.image_stored_share < 1
