"""Formats of features, values left unread, and A-VL's core in cross layers.

What the steps say is compared with the same model whose keys and values were rounded before
anything was stored, and with a transcription of the core's rule that knows nothing of lists.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.cache.cross_steps import CrossStepView
from engine.cache.looking import LookView
from engine.cache.observe import Observed
from engine.engine import Engine
from engine.errors import CapacityError, OptionError
from engine.models.cross_layer import CrossLayer
from engine.ops import native, products
from engine.ops.pages import Pages
from engine.options import make_options
from engine.policies.specs import parse
from engine.running import taped
from engine.running.batch import job_of
from engine.running.stepping import Stepping
from tests.mllama_checkpoint import DEFAULT, write_mllama
from tests.noise import noise
from tests.test_mllama_cache import (
    FEATURES,
    SMALL,
    WIDE,
    WORDS,
    alone,
    decoded,
    request,
    run,
)
from tests.test_transactions import taken

CROSS = len(DEFAULT.cross)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mllama(tmp_path_factory.mktemp("mllama") / "m")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.load(folder, device="cpu", dtype="float32", cache="full")


def rounded(format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on every feature's keys and values are what the format would make of them."""
    plain = CrossLayer.project

    def project(layer: CrossLayer, features: Tensor) -> tuple[Tensor, Tensor]:
        k, v = plain(layer, features)
        pages = Pages.of(format_, k.shape[1], k.shape[2], k.dtype)
        again = pages.unpack(pages.pack(k, v))
        return again[0][: len(k)], again[1][: len(v)]

    monkeypatch.setattr(CrossLayer, "project", project)


# -- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["k8v8", "k8v4", "k4v4", "k4v2", "k2v2", "k16v4"])
@pytest.mark.parametrize("serves", [True, False], ids=["native", "torch"])
def test_features_in_a_format_are_attended_as_they_are_written(
    format_: str, serves: bool, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(2, 8)
    continuation = engine.generate(**asked).token_ids
    prompt, images = asked["prompt"], asked["images"]
    plain = engine.logits(prompt, images, continuation)
    if not serves:
        monkeypatch.setattr(native, "serves", lambda *_: False)
    ours = engine.with_cache(f"sift:format={format_},skip=0")
    found = ours.logits(prompt, images, continuation)
    rounded(format_, monkeypatch)
    expected = engine.logits(prompt, images, continuation)
    # Queries are rounded too where keys are: tests/test_pages.py says how far.
    near = 0.02 * float(plain.std())
    torch.testing.assert_close(found[1:], expected[1:], rtol=0, atol=near)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=2e-5)
    assert (found - plain).abs().max() > 1e-4


def test_bytes_and_shares_are_those_of_the_format(engine: Engine) -> None:
    cache = engine.with_cache("sift:format=k4v4,skip=0").generate(**request(2, 5)).cache
    head_dim = DEFAULT.hidden // DEFAULT.heads
    pages = Pages.of("k4v4", DEFAULT.kv_heads, head_dim, torch.float32)
    assert cache.features == cache.features_whole == 5 * FEATURES
    assert cache.feature_bytes == 5 * FEATURES * CROSS * pages.nbytes // 32
    assert cache.formats == {"fp32": 0, "k4v4": cache.feature_bytes}
    full = 5 * FEATURES * CROSS * 2 * DEFAULT.kv_heads * head_dim * 4
    assert cache.image_stored_share == cache.image_read_share == cache.feature_bytes / full
    assert cache.values_read == 1


def test_what_is_left_out_is_bounded_and_counted(engine: Engine) -> None:
    kept = engine.with_cache("sift:format=k8v8,skip=0").generate(**request(2, 9)).cache
    last = kept
    for skip in (0.05, 0.2, 0.6):
        cache = engine.with_cache(f"sift:format=k8v8,skip={skip}").generate(**request(2, 9)).cache
        assert last.left_out < cache.left_out <= skip
        assert last.values_read > cache.values_read > 0
        assert cache.image_read_share < last.image_read_share
        last = cache
    key_share = 0.5 * kept.image_read_share
    expected = key_share * (1 + last.values_read)
    assert last.image_read_share == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("spec", ["sift:format=k8v4,skip=0.3", "avl:format=k4v4,cross=0.4,text=1"])
def test_text_alone_passes_a_policy_of_features_by(spec: str, engine: Engine) -> None:
    result = engine.with_cache(spec).generate(**request(1, 6))
    assert result.token_ids == alone(engine, request(1, 6))
    assert result.cache.features == 0


# -- A-VL's core ----------------------------------------------------------------------------------


class Transcribed:
    """The core's rule for one row, layer by layer: weights over plain keys, lists of features."""

    def __init__(self, share: float, every: int) -> None:
        self.share, self.every, self.step = share, every, 0
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self.sizes: list[int] = []
        self.core: dict[int, list[int]] = {}

    def weights(self, layer: int, q: Tensor, among: list[int]) -> Tensor:
        k = self.pairs[layer][0][among].double().repeat_interleave(q.shape[1] // 2, 1)
        logits = torch.einsum("hd,nhd->hn", q[0].double(), k) * q.shape[2] ** -0.5
        return logits.softmax(-1)

    def choose(self, layer: int, q: Tensor) -> None:
        """The best of each picture, by the mean over heads."""
        every = list(range(sum(self.sizes)))
        mean, start = self.weights(layer, q, every).mean(0), 0
        chosen: list[int] = []
        for size in self.sizes:
            mine = mean[start : start + size].argsort(descending=True)[: int(self.share * size)]
            chosen += (mine + start).sort().values.tolist()
            start += size
        self.core[layer] = chosen

    def attend(self, layer: int, q: Tensor) -> Tensor:
        if layer == 0:
            self.step += 1
        all_ = self.step % self.every == 0
        among = list(range(sum(self.sizes))) if all_ else self.core[layer]
        v = self.pairs[layer][1][among].double().repeat_interleave(q.shape[1] // 2, 1)
        out = torch.einsum("hn,nhd->hd", self.weights(layer, q, among), v)[None]
        if all_:
            self.choose(layer, q)
        return out.to(q.dtype)


def transcribe(share: float, every: int, monkeypatch: pytest.MonkeyPatch) -> Transcribed:
    """Steps of one row attend by the transcription from now on."""
    rule, look = Transcribed(share, every), LookView.attend

    def looked(view: LookView, q: Tensor, project: Any) -> tuple[Tensor, Tensor]:
        result = look(view, q, project)
        pairs = view._pairs_of(view._ranges[-1][2])
        rule.pairs[view._layer] = tuple(torch.cat(x) for x in zip(*pairs, strict=True))
        rule.sizes = [len(k) for k, _ in pairs]
        rule.choose(view._layer, q[-1:])
        return result

    def stepped(view: CrossStepView, q: Tensor, project: Any) -> tuple[Tensor, Tensor]:
        return rule.attend(view._layer, q), view._sees

    monkeypatch.setattr(LookView, "attend", looked)
    monkeypatch.setattr(CrossStepView, "attend", stepped)
    return rule


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize(("share", "every"), [(0.3, 3), (0.1, 2), (0.5, 4), (1.0, 2)])
def test_the_core_of_cross_layers_is_the_transcriptions(
    share: float, every: int, number: int, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, steps = request(number), list(range(3, 43))
    prompt, images = asked["prompt"], asked["images"]
    spec = f"avl:core=none,text=1,prefill=1,cross={share},every={every}"
    found = engine.with_cache(spec).logits(prompt, images, steps)
    plain = engine.logits(prompt, images, steps)
    rule = transcribe(share, every, monkeypatch)
    expected = engine.logits(prompt, images, steps)
    assert rule.step == len(steps) - 1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    if share < 1:
        assert (found - plain).abs().max() > 1e-3
    else:
        torch.testing.assert_close(found, plain, rtol=0, atol=2e-5)


def test_a_core_is_read_and_all_is_stored(engine: Engine) -> None:
    spec = "avl:core=none,text=1,prefill=1,cross=0.25,every=3"
    cache = engine.with_cache(spec).generate(**request(0, 10)).cache
    assert cache.features == 3 * FEATURES
    core = int(0.25 * 3 * FEATURES) / (3 * FEATURES)
    assert cache.image_stored_share == 1
    assert cache.image_read_share == pytest.approx((3 + 6 * core) / 9)


# -- rows together --------------------------------------------------------------------------------

SPECS = (
    *("sift:format=k4v4,skip=0.1", "avl:cross=0.3,text=0.5,floor=2", "full"),
    *("avl:format=k8v8,cross=0.2,every=2", "trimmed:ratio=0.2+sift:format=k8v4,skip=0.2"),
    "trimmed:ratio=0.3+avl:cross=0.2,text=1",
)


def jobs_of(engine: Engine, requests: list[dict[str, Any]]) -> Iterator[tuple[Any, list[int]]]:
    """A job of each request under a policy of its own, and what it says alone."""
    for number, asked in enumerate(requests):
        other = engine.with_cache(SPECS[number % len(SPECS)])
        yield job_of(other, asked), alone(other, asked)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("rows", [2, 6])
def test_rows_of_any_policies_answer_as_alone(rows: int, graphs: bool, engine: Engine) -> None:
    numbers = [0, 2, 1, 3, 5, 0, 2, 4, 3, 2, 0, 5]
    requests = [request(n, 7 + 4 * (i % 3)) for i, n in enumerate(numbers)]
    jobs, expected = zip(*jobs_of(engine, requests), strict=True)
    other = engine.with_cache("full")
    other.stepping = Stepping(graphs=graphs)
    scheduler = other.scheduler(rows, slices=2)
    submitted = [scheduler.submit(job) for job in jobs]
    assert run(scheduler, submitted) == list(expected)


@pytest.mark.skipif(not native.loaded(), reason="needs the native module")
@pytest.mark.parametrize("cache", SPECS)
@pytest.mark.parametrize("numbers", [[0], [0, 1], [1, 2, 3]])
def test_a_tape_repeats_steps_over_tiers(
    numbers: list[int], cache: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_native_pays", lambda: True)
    bf16 = Engine.load(folder, device="cpu", dtype="bfloat16", cache=cache)
    repeated, stepper = decoded(bf16, numbers, 14)
    tapes = list(stepper._taped._tapes.values())
    assert tapes
    assert all(tapes), stepper.eager_because
    monkeypatch.setattr(taped, "obstacle", lambda *_: "a test asks for it")
    made_anew, _ = decoded(bf16, numbers, 14)
    for ours, theirs in zip(repeated, made_anew, strict=True):
        assert torch.equal(ours, theirs)


def test_a_picture_in_a_format_is_shared_by_those_who_ask_for_it(engine: Engine) -> None:
    sift, image = engine.with_cache("sift"), engine.encode(noise(*WIDE))
    scheduler = sift.scheduler(4)
    asked = [{"prompt": f"{n} {WORDS}", "images": [image]} for n in range(4)]
    options = {"max_new_tokens": 6, "ignore_eos": True}
    engines = [sift, sift, engine, engine]
    each = list(zip(engines, asked, strict=True))
    jobs = [scheduler.submit(job_of(one, ask | options)) for one, ask in each]
    while len(scheduler.running) < 4:
        scheduler.step()
    first, second, third, fourth = (job.row.pictures[0] for job in jobs if job.row)
    assert first is second
    assert third is fourth
    assert first.format != third.format
    assert run(scheduler, jobs) == [alone(one, ask | options) for one, ask in each]


def test_turns_see_what_earlier_ones_have_written(engine: Engine) -> None:
    """A later question under a format or a core: as if asked with the conversation so far."""
    for spec in ("sift:format=k8v8,skip=0", "avl:core=none,text=1,prefill=1,cross=0.3"):
        chat = engine.with_cache(spec).chat()
        options = {"max_new_tokens": 7, "ignore_eos": True}
        for sizes in ([WIDE], [], [SMALL], []):
            result = chat.send(WORDS, [noise(*size) for size in sizes], **options)
            assert result.cache.features in (3 * FEATURES, FEATURES)


def test_a_budget_counts_features_in_their_format(engine: Engine) -> None:
    """What a budget refuses plain fits in four bits."""
    asked = request(2, 4)
    need = 5 * FEATURES * CROSS * 2 * DEFAULT.hidden // DEFAULT.heads * DEFAULT.kv_heads * 4
    budget = int(1.9 * need)
    with pytest.raises(CapacityError, match="features of the request's pictures"):
        run_with(engine, budget, asked)
    sift = engine.with_cache("sift:format=k4v2")
    assert run_with(sift, budget, asked) == alone(sift, asked)


def run_with(engine: Engine, budget: int, asked: dict[str, Any]) -> list[int]:
    scheduler = engine.scheduler(1, budget=budget)
    job = scheduler.submit(job_of(engine, asked))
    while not scheduler.idle:
        scheduler.step()
    if job.failed:
        raise job.failed
    (answer,) = run(scheduler, [job])
    return answer


def test_an_observer_that_fails_costs_no_slot(engine: Engine) -> None:
    class Fails:
        def observe(self, seen: Observed) -> None:
            if seen.across:
                raise ValueError("enough")

    scheduler = engine.scheduler(2)
    assert scheduler.cross is not None
    for _ in range(3):
        job = engine.job(WORDS, [noise(*WIDE)], make_options(max_new_tokens=3), observer=Fails())
        scheduler.submit(job)
        while not scheduler.idle:
            scheduler.step()
        assert isinstance(job.failed, ValueError)
        for pool in (*scheduler.pools, *scheduler.cross.pools):
            assert taken([pool]) == [[]]


def test_what_a_waiting_job_begins_behind_is_given_back(engine: Engine) -> None:
    """Cancelled, a job that goes on behind somebody's beginning holds it no longer."""
    scheduler = engine.scheduler(1)
    first = job_of(engine, {"prompt": WORDS, "images": [noise(*WIDE)], "max_new_tokens": 4})
    first.keeps = True
    run(scheduler, [scheduler.submit(first)])
    assert first.row is not None
    held = [taken([pool]) for pool in (*scheduler.pools, *scheduler.cross.pools)]
    for _ in range(3):
        later = job_of(engine, {"prompt": "And?", "max_new_tokens": 4})
        later.past = first.row.share()
        scheduler.submit(later)
        scheduler.cancel(later)
    first.row.give()
    assert held != [[[]]] * len(held)
    for pool in (*scheduler.pools, *scheduler.cross.pools):
        assert taken([pool]) == [[]]


def test_a_core_is_asked_of_models_that_have_cross_layers() -> None:
    with pytest.raises(OptionError, match=r"avl: cross is 0\.3, and this model has no cross"):
        parse("avl:cross=0.3").check_depth(32, 0)
    with pytest.raises(OptionError, match=r"cross is 1\.3"):
        parse("avl:cross=1.3")
    with pytest.raises(OptionError, match="features have no such tier"):
        parse("avl:minor=k2v2,skip=0.1").check_depth(32, 8)
