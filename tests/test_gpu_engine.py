"""The engine on a CUDA device: the CPU's tokens, races, captured graphs, the peak of a prefill."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from engine.cache.listed import ListedAttention
from engine.cache.pool import Pool
from engine.cache.prefill import Prefill
from engine.cache.report import allocated_bytes
from engine.cache.streams import Beside
from engine.engine import Engine
from engine.loading.preparing import prepare
from engine.models.decoder import Decoder, DecoderConfig
from engine.ops import native, ranking
from engine.policies.layout import Layout
from engine.policies.specs import parse
from tests.rows import FORMATS, Rows, state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.backend().name != "cuda", reason="needs the CUDA kernels"),
]

EXAMPLES = Path(__file__).parents[1] / "examples"
POLICIES = ["full", "avl:floor=3", "avl:every=1,floor=3,text=0.5", "avl:text=1,every=2", "h2o"]
STEPS = 100


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 means float32: no TensorFloat-32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


# -- the same tokens ------------------------------------------------------------------------------


@functools.cache
def tiny(device: str, graphs: bool = False, selection: str = "branch") -> Engine:
    return Engine.load(device=device, dtype="float32", graphs=graphs, selection=selection)


def answers(engine: Engine) -> list[list[int]]:
    """Two pictures, a short and a long answer each."""
    return [
        engine.generate(question, [EXAMPLES / picture], max_new_tokens=40).token_ids
        for picture in ("car.jpg", "receipt.png")
        for question in ("What is in the picture?", "Read all the text.")
    ]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("cache", ["full", "avl"])
def test_the_embedded_model_says_what_it_says_on_a_cpu(cache: str, graphs: bool) -> None:
    ours = answers(tiny("cuda", graphs).with_cache(cache))
    assert ours
    assert ours == answers(tiny("cpu").with_cache(cache))


@functools.cache
def eager(spec: str, prompts: tuple[int, ...]) -> Any:
    """Tokens and what is kept, with selection in order."""
    rows = Rows(spec, list(prompts), STEPS + 1, device="cuda", selection="sync")
    return rows.go(STEPS), state(rows.settle())


def without_scores(kept: list[Any]) -> list[Any]:
    """``state`` without the attention that text has received."""
    return [(*row[:2], [layer[:-1] for layer in row[2]]) for row in kept]


@pytest.mark.parametrize("spec", POLICIES)
def test_rows_on_the_device_are_those_on_a_cpu(spec: str) -> None:
    rows = Rows(spec, [0, 1, 2, 3], STEPS + 1, selection="sync")
    assert eager(spec, (0, 1, 2, 3))[0] == rows.go(STEPS)


@pytest.mark.parametrize("spec", FORMATS)
def test_formats_on_the_device_are_those_on_a_cpu(spec: str) -> None:
    """Replayed and eager; a number that lies between two codes may become either."""
    want = Rows(spec, [0, 1, 2, 3], 20).forced(15)
    eager = Rows(spec, [0, 1, 2, 3], 20, device="cuda", selection="sync")
    replayed = Rows(spec, [0, 1, 2, 3], 20, device="cuda", graphs=True)
    got = eager.forced(15)
    torch.testing.assert_close(got, want, rtol=0, atol=0.05)
    torch.testing.assert_close(replayed.forced(15), got, rtol=0, atol=0.01)
    assert replayed.stepper.eager_because is None
    for mine, theirs in zip(replayed.settle(), eager.settle(), strict=True):
        assert (mine.step, mine.attended_share) == (theirs.step, theirs.attended_share)
        if mine.spent is not None:
            torch.testing.assert_close(mine.spent, theirs.spent, rtol=0.02, atol=0.02)


# -- selection beside the model -------------------------------------------------------------------


@contextmanager
def delays(seed: int) -> Iterator[None]:
    """Up to about a millisecond of waiting on either stream before and after what it shares."""
    random = Random(seed)

    def delayed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            torch.cuda._sleep(random.choice((0, 10_000, 2_000_000)))
            result = call(*args, **options)
            torch.cuda._sleep(random.choice((0, 10_000)))
            return result

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ListedAttention, "__call__", delayed(ListedAttention.__call__))
        for name in ("plan_rank", "plan_age"):
            plan = getattr(ranking, name)
            patch.setattr(ranking, name, lambda *a, plan=plan, **k: delayed(plan(*a, **k)))
        yield


@pytest.mark.parametrize("form", ["branch", "layers"])
@pytest.mark.parametrize("spec", POLICIES)
def test_selection_beside_the_model_changes_nothing(spec: str, form: str) -> None:
    for seed, prompts in enumerate([(0,), (0, 1, 2, 3)]):
        rows = Rows(spec, list(prompts), STEPS + 1, device="cuda", selection=form)
        assert isinstance(rows.stepper._side, Beside)
        with delays(seed):
            said = rows.go(STEPS)
        assert (said, state(rows.settle())) == eager(spec, prompts)


# -- captured steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["branch", "sync"])
@pytest.mark.parametrize("spec", [*POLICIES, "fastv:layer=2", "streaming", "snapkv:window=4"])
def test_replayed_graphs_equal_eager_steps(spec: str, selection: str) -> None:
    for prompts in [(0,), (0, 1, 2, 3)]:
        rows = Rows(spec, list(prompts), STEPS + 1, device="cuda", selection=selection, graphs=True)
        said = rows.go(STEPS)
        assert rows.stepper.eager_because is None
        # Lists have room for other rows, so that sums are split elsewhere: scores differ in bits.
        tokens, kept = eager(spec, prompts)
        assert said == tokens
        assert without_scores(state(rows.settle())) == without_scores(kept)


def test_a_captured_branch_waits_and_is_awaited() -> None:
    """Delays that are captured too, on both branches, change nothing."""
    rows = Rows("avl:floor=3", [0, 2], 31, device="cuda", graphs=True)
    with delays(5):
        said = rows.go(30)
    plain = Rows("avl:floor=3", [0, 2], 31, device="cuda", selection="sync")
    assert said == plain.go(30)


def test_other_rows_are_loaded_into_captured_buffers() -> None:
    rows = Rows("avl:floor=3", [0], 20, device="cuda", graphs=True)
    rows.go(10)
    first = rows.stepper._captured._step
    [row] = rows.settle()
    row.give()
    rows.rows = [rows.admit(3)]
    assert rows.go(15) == Rows("avl:floor=3", [3], 20, device="cuda").go(15)
    assert rows.stepper._captured._step is first


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("spec", ["avl:floor=3", *FORMATS])
def test_the_host_never_waits_within_a_step(spec: str, graphs: bool) -> None:
    """Sampling reads a token; nothing else makes the host wait for the device."""
    rows = Rows(spec, [0, 2], 40, device="cuda", graphs=graphs)
    rows.go(4)
    tokens = torch.tensor([5, 6], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(12):
            rows.stepper.step(tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- memory ---------------------------------------------------------------------------------------


def wide_decoder(layers: int) -> Decoder:
    """Large enough that what is measured is not rounding: 1 MB of keys per 1,000 tokens a layer."""
    config = DecoderConfig(
        vocab=64,
        hidden=512,
        layers=layers,
        heads=8,
        kv_heads=8,
        head_dim=64,
        mlp=1024,
        rope_theta=10000.0,
        norm_eps=1e-5,
        qkv_bias=False,
        tied_head=False,
        context=8192,
    )
    decoder = Decoder(config).to("cuda", torch.bfloat16).requires_grad_(False)
    generator = torch.Generator("cuda").manual_seed(1)
    for parameter in decoder.parameters():
        parameter.normal_(0, 0.05, generator=generator)
    prepare(decoder, torch.device("cuda"))
    return decoder


@torch.inference_mode()
def beside_pools(layers: int, spec: str, tokens: int = 4096) -> tuple[int, int]:
    """Peak of a prefill without the weights and the pools, and the pools, in bytes."""
    decoder = wide_decoder(layers)
    config, device = decoder.config, torch.device("cuda")
    pools = [Pool(config.kv_heads, config.head_dim, torch.bfloat16, device) for _ in range(layers)]
    hidden = torch.randn(tokens, config.hidden, dtype=torch.bfloat16, device=device)
    layout = Layout.of_tokens(tokens, [(32, tokens - 32)], device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    decoder(hidden, Prefill(pools, parse(spec), layout, 16))
    torch.cuda.synchronize()
    held = allocated_bytes(pools)
    return torch.cuda.max_memory_allocated() - before - held, held


def test_the_peak_of_a_prefill_is_the_pools_and_one_layer() -> None:
    """What is needed beside weights and pools does not grow with the layers."""
    spec = "avl:prefill=1,text=1"
    beside_pools(2, spec)  # what libraries keep is allocated now
    (few, _), (many, held) = beside_pools(4, spec), beside_pools(20, spec)
    layer = 2 * 4096 * 8 * 64 * 2  # bytes of one layer's keys and values
    assert held < 0.5 * 20 * layer
    assert many < few + 0.2 * layer  # rows of indices do grow
    assert many < 0.6 * 20 * layer, "the full cache of all layers would not fit in this"


def test_answers_leave_no_memory_behind() -> None:
    engine = tiny("cuda", graphs=True).with_cache("avl")
    picture = EXAMPLES / "car.jpg"

    def left() -> int:
        engine.generate("What is in the picture?", [picture], max_new_tokens=8, ignore_eos=True)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    first = [left() for _ in range(3)][-1]
    assert [left() for _ in range(3)][-1] <= first
