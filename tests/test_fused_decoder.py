"""The whole decoder on fused operators and fused weights: the same answers, no second copy."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import Tensor

from bench.qwen_checkpoint import QwenShape, write_qwen
from engine.checkpoint.tensors import Checkpoint, anywhere, load_weights
from engine.engine import Engine
from engine.loading.families import recognise
from engine.loading.preparing import side_by_side
from engine.models.decoder import Decoder
from engine.models.matrix import matrices
from engine.ops import fused, native
from engine.result import Timings
from tests.checkpoints import Shape
from tests.session import Session

QUESTION = "What is in this image?"
TOLERANCE = 2e-4  # of logits whose deviation is about 2, in float32
SHAPES = {
    "llama": Shape(),
    "mistral-gqa": Shape(family="mistral", kv_heads=1, seed=2),
    "qwen2-bias": Shape(family="qwen2", kv_heads=2, seed=3),
}


@pytest.fixture
def folder_of(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """The folder of a model: one of SHAPES, or Qwen-VL with its tables in float32."""
    return lambda name: (
        write_qwen(tmp_path / name, QwenShape()) if name == "qwen-vl" else checkpoint(SHAPES[name])
    )


def picture(width: int, height: int) -> Image.Image:
    return Image.radial_gradient("L").resize((width, height)).convert("RGB")


def load(folder: Path, cache: str = "full", device: str = "cpu") -> Engine:
    return Engine.load(folder, device=device, dtype="float32", cache=cache)


def decoded(engine: Engine) -> Tensor:
    """Logits after a prompt and after each of a few prescribed tokens behind it."""
    turn = engine.turn(QUESTION, [picture(77, 77)], Timings())
    session = Session(engine.model, engine.policy)
    rows = [session.prefill(turn, 8)]
    rows += [session.decode(token) for token in range(11, 17)]
    return torch.stack(rows).cpu()


WAYS = ["torch", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=WAYS)
def switch_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Call it to switch the fused operators on: twins, emulated kernels, or those on a GPU."""
    device = "cpu"
    if request.param == "cuda":
        device = "cuda"
        if native.backend().name != "cuda":
            pytest.skip("needs a CUDA device and the CUDA kernels")
    module = request.getfixturevalue("emulated") if request.param == "emulated" else None

    def switch() -> str:
        monkeypatch.setattr(fused, "switched_on", lambda: True)
        if device == "cpu":
            monkeypatch.setattr(fused, "_kernels", lambda x: module)
        return device

    return switch


CASES = [("llama", cache) for cache in ("full", "avl", "h2o:heavy=0.125", "fastv")]
CASES += [(name, "avl") for name in ("mistral-gqa", "qwen2-bias", "qwen-vl")]


@pytest.mark.parametrize(("name", "cache"), CASES)
def test_logits_stay_the_same(
    name: str, cache: str, folder_of: Callable[[str], Path], switch_on: Callable[[], str]
) -> None:
    folder = folder_of(name)
    plain = decoded(load(folder, cache))
    device = switch_on()
    engine = load(folder, cache, device)
    torch.testing.assert_close(decoded(engine), plain, rtol=0, atol=TOLERANCE)


def test_rows_of_a_batch_stay_the_same(
    folder_of: Callable[[str], Path], switch_on: Callable[[], str]
) -> None:
    folder = folder_of("qwen2-bias")
    requests = [
        {"prompt": QUESTION, "images": [picture(50 + n, 40)], "max_new_tokens": 6 + n}
        for n in range(3)
    ]
    plain = load(folder, "avl").generate_batch(requests)
    want = {r.index: r.token_ids for r in plain}
    device = switch_on()
    got = load(folder, "avl", device).generate_batch(requests)
    assert {r.index: r.token_ids for r in got} == want


def test_every_operator_serves_a_step(
    folder_of: Callable[[str], Path], emulated: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine launches a layer: four of them here, the others products and attention."""
    engine, calls = load(folder_of("llama")), []

    class Counting:
        def __getattr__(self, op: str) -> Callable[..., None]:
            calls.append(op)
            return getattr(emulated, op)

    monkeypatch.setattr(fused, "switched_on", lambda: True)
    turn = engine.turn(QUESTION, [], Timings())
    session = Session(engine.model, engine.policy)
    session.prefill(turn, 4)
    monkeypatch.setattr(fused, "_kernels", lambda x: Counting())
    session.decode(11)
    layers = engine.model.decoder.config.layers
    a_layer = ["add_norm", "rope_write", "add_norm", "silu_mul"]
    assert sorted(calls) == sorted([*a_layer * layers, "add_norm"])


# -- weights --------------------------------------------------------------------------------------


def joined(decoder: Decoder) -> list[list[Tensor]]:
    """The weights that may lie side by side, group by group."""
    return [
        [layer.get_parameter(f"{name}_proj.weight") for name in group]
        for layer in decoder.layers
        for group in (("q", "k", "v"), ("gate", "up"))
    ]


@pytest.mark.parametrize("name", [*SHAPES, "qwen-vl"])
def test_weights_lie_side_by_side_and_once(
    name: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(name)
    apart = load(folder).model.decoder
    monkeypatch.setattr(fused, "switched_on", lambda: True)
    together = load(folder).model.decoder
    for group in joined(together):
        whole = torch.cat(group)
        lying = torch.empty(0).set_(group[0].untyped_storage()).view(whole.shape)
        assert torch.equal(lying, whole)
        assert len({part.untyped_storage().data_ptr() for part in group}) == 1
    parameters = dict(together.named_parameters())
    for key, value in apart.named_parameters():
        assert torch.equal(parameters[key], value)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in parameters.values()}
    held = sum(storage.nbytes() for storage in storages.values())
    assert held == sum(p.nbytes for p in {id(p): p for p in parameters.values()}.values())


def peak_of_loading(folder: Path, *, in_place: bool) -> tuple[int, int]:
    """Bytes of a model's parameters, and the most that was allocated while they were loaded."""
    family = recognise(folder)
    model = family.model
    placement = side_by_side(model, torch.device("cpu")) if in_place else anywhere
    with (
        Checkpoint.open(folder) as checkpoint,
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        load_weights(model, checkpoint, family.rename, placement=placement)
        for matrix in matrices(model.decoder):
            matrix.join()
    held = peak = 0
    results = profile.profiler.kineto_results
    for event in results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return sum(p.nbytes for p in model.parameters()), peak


def test_loading_side_by_side_needs_no_second_copy(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "switched_on", lambda: True)
    size, peak = peak_of_loading(folder_of("llama"), in_place=True)
    assert size <= peak < 1.01 * size
    # Moved there afterwards, one group of weights is in memory twice: this would be noticed.
    size, peak = peak_of_loading(folder_of("llama"), in_place=False)
    assert peak > 1.01 * size


@pytest.mark.gpu
def test_loading_on_a_gpu_needs_no_second_copy(folder_of: Callable[[str], Path]) -> None:
    if native.backend().name != "cuda":
        pytest.skip("needs a CUDA device and the CUDA kernels")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine = load(folder_of("llama"), device="cuda")
    size = sum(p.nbytes for p in engine.model.parameters())
    # Every allocation is rounded up to 512 bytes.
    assert torch.cuda.max_memory_allocated() - before < 1.1 * size
    assert all(
        len({part.untyped_storage().data_ptr() for part in group}) == 1
        for group in joined(engine.model.decoder)
    )


@pytest.mark.gpu
def test_operators_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured once, replayed on other numbers in the same places."""
    if native.backend().name != "cuda":
        pytest.skip("needs a CUDA device and the CUDA kernels")
    monkeypatch.setattr(fused, "switched_on", lambda: True)
    hidden, delta, weight = torch.randn(3, 2, 64, device="cuda")
    weight = weight[0]

    def step() -> Tensor:
        normed = fused.add_norm(hidden, delta, weight, 1e-5)[1]
        return fused.argmax(fused.silu_mul(normed, delta))

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    hidden.copy_(torch.randn(2, 64))
    graph.replay()
    assert torch.equal(out, step())
