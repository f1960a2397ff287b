"""The small steps between a layer's products: every implementation against float64.

The torch twins, the CPU kernels for every instruction set of this machine, the CUDA kernels'
sources in the block emulator, and the kernels on a GPU (marker ``gpu``). Inputs lie between NaNs
and outputs between guards, so that what is read or written out of place shows.
"""

import importlib
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.ops import fused, native
from engine.ops.fused import Destination
from engine.ops.rotary import turned
from tests.emulated import ROOT, build

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ISAS = ["baseline", "avx2", "avx512"]
WAYS = ["torch", *ISAS, "emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
GUARD = 64  # numbers around every output: more than a thread moves at once


class Guarded:
    """Stands in for the allocation of outputs: poisons them and what lies around them."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []

    def __call__(
        self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        size = math.prod(shape)
        whole = torch.empty(size + 2 * GUARD, dtype=dtype or like.dtype, device=like.device)
        self.made.append(whole.fill_(-7 if dtype else math.nan))
        return whole[GUARD : GUARD + size].view(shape)

    def check(self) -> None:
        for whole in self.made:
            around = torch.cat([whole[:GUARD], whole[-GUARD:]])
            assert bool(((around == -7) | (around != around)).all()), "written beyond the end"


@pytest.fixture(params=WAYS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the tensors belong, with the operators served by one of the implementations."""
    guarded = Guarded()
    if request.param == "cuda":
        if native.backend().name != "cuda":
            pytest.skip("needs a CUDA device and the CUDA kernels")
        monkeypatch.setattr(fused, "switched_on", lambda: True)
    else:
        kernels = implementation(request)
        monkeypatch.setattr(fused, "_kernels", lambda x: kernels)
    if request.param != "torch":
        monkeypatch.setattr(fused, "_result", guarded)
    yield "cuda" if request.param == "cuda" else "cpu"
    guarded.check()


def implementation(request: pytest.FixtureRequest) -> Any:
    """The kernels of the fixture's parameter; None for the torch twins."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    if request.param == "torch":
        return None
    if not native.loaded() or not importlib.import_module("engine._native").has_isa(request.param):
        pytest.skip(f"needs the native module and a processor with {request.param}")
    return native.fused_kernels("cpu", request.param)


def among_nans(x: Tensor, gap: int, device: str) -> Tensor:
    """The same rows inside a wider tensor, ``gap`` NaNs before and behind each."""
    rows, size = x.shape
    wide = torch.full((rows, size + 2 * gap), math.nan, dtype=x.dtype, device=device)
    wide[:, gap : gap + size] = x
    return wide[:, gap : gap + size]


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (2 * torch.randn(shape, generator=generator)).to(dtype)


def assert_near(got: Tensor, want: Tensor, ulps: float) -> None:
    """``got`` within ``ulps`` units in the last place of the largest of ``want``, in float64."""
    assert want.dtype == torch.float64
    limit = ulps * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.cpu().double(), want, rtol=limit, atol=limit)


# -- add_norm -------------------------------------------------------------------------------------

SIZES = [(1, 1), (3, 7), (2, 64), (5, 333), (2, 2056), (1, 4096), (4, 5121)]


def check_add_norm(rows: int, size: int, gap: int, dtype: torch.dtype, device: str) -> None:
    hidden, delta = drawn(rows, size, dtype=dtype), drawn(rows, size, dtype=dtype, seed=1)
    weight = drawn(size, dtype=dtype, seed=2)
    placed = (among_nans(x, gap, device) for x in (hidden, delta))
    total, normed = fused.add_norm(*placed, weight.to(device), 1e-5)
    assert torch.equal(total.cpu(), hidden + delta)
    exact = (hidden + delta).double()
    scale = (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert_near(normed, exact * scale * weight.double(), 1 if dtype != torch.float32 else 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [0, 8, 3])
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_sanitize_add_norm(rows: int, size: int, gap: int, dtype: torch.dtype, device: str) -> None:
    check_add_norm(rows, size, gap, dtype, device)


# -- rope_write -----------------------------------------------------------------------------------

HEADS = [(1, 1, 1, 2), (3, 4, 2, 16), (2, 8, 8, 80), (1, 32, 32, 128), (5, 6, 1, 34)]


class Rope:
    """A case of ``rope_write``: inputs as one fused product, a poisoned pool, scattered places."""

    def __init__(
        self, sizes: tuple[int, int, int, int], dtype: torch.dtype, wide: bool, device: str
    ) -> None:
        tokens, heads, kv_heads, head_dim = self.sizes = sizes
        self.joined = drawn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
        placed = among_nans(self.joined.flatten(1), 8, device).unflatten(1, (-1, head_dim))
        self.parts = placed.split([heads, kv_heads, kv_heads], 1)
        self.positions = torch.arange(tokens) * 37 + 5
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        self.angles = self.positions[:, None].float() * frequencies
        tables = turned(self.angles, torch.float32 if wide else dtype)
        self.cos, self.sin = tables.cos.to(device), tables.sin.to(device)
        self.scale = drawn(tokens, 1, 1, dtype=dtype, seed=3).to(device) if wide else None
        slots = tokens * 3 + 2
        shape = (2, slots + 1, kv_heads, head_dim)  # behind each pool a slot that is not its own
        self.pools = torch.full(shape, math.nan, dtype=dtype, device=device)
        picked = torch.stack(
            [
                torch.randperm(slots, generator=torch.Generator().manual_seed(h))
                for h in range(kv_heads)
            ]
        )[:, :tokens].T
        write = picked * kv_heads + torch.arange(kv_heads)
        flag = torch.zeros(1, dtype=torch.int32, device=device)
        k, v = self.pools[:, :slots]
        self.to = Destination(k, v, write.flatten().to(device), flag)

    def run(self) -> Tensor:
        return fused.rope_write(*self.parts, self.cos, self.sin, self.scale, self.to)

    def rotated(self, x: Tensor) -> Tensor:
        """Rotation as it is defined: pairs as complex numbers times exp(i angle)."""
        half = x.shape[-1] // 2
        turns = torch.complex(*(t.cpu()[..., :half].double() for t in (self.cos, -self.sin)))
        out = torch.complex(x[..., :half].double(), x[..., half:].double()) * turns
        return torch.cat([out.real, out.imag], -1)

    def check(self, got: Tensor) -> None:
        _, heads, kv_heads, head_dim = self.sizes
        q, k, v = self.joined.split([heads, kv_heads, kv_heads], 1)
        want = self.rotated(q)
        if self.scale is not None:
            want = want * self.scale.cpu().double()
        assert_near(got, want, 8)
        for pool, new in ((self.to.k, self.rotated(k)), (self.to.v, v.double())):
            flat = pool.cpu().view(-1, head_dim)
            write = self.to.write.cpu()
            assert_near(flat[write], new.reshape(-1, head_dim), 4)
            untouched = torch.ones(len(flat), dtype=torch.bool).index_fill(0, write, False)
            assert bool(flat[untouched].isnan().all())
        assert bool(self.pools[:, -1].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["plain", "as Qwen-VL"])
@pytest.mark.parametrize("sizes", HEADS, ids=str)
def test_sanitize_rope_write(
    sizes: tuple[int, int, int, int], wide: bool, dtype: torch.dtype, device: str
) -> None:
    case = Rope(sizes, dtype, wide, device)
    case.check(case.run())
    assert not int(case.to.error)


@pytest.mark.parametrize("bad", [-1, 22, 1 << 40])
def test_sanitize_a_place_out_of_range_is_refused(
    bad: int, device: str, request: pytest.FixtureRequest
) -> None:
    case = Rope((3, 4, 2, 16), torch.float32, False, device)
    case.to.write[2] = bad  # of 11 slots with 2 heads
    if not isinstance(fused._kernels(case.parts[0]), ModuleType) and device == "cpu":
        with pytest.raises(IndexError):
            case.run()
        return
    case.run()
    assert int(case.to.error)
    written = ~case.to.k.cpu().view(-1, 16).isnan().any(-1)
    rest = case.to.write.cpu()[[0, 1, 3, 4, 5]]
    assert sorted(rest.tolist()) == written.nonzero().flatten().tolist()


# -- silu_mul -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [0, 8, 3])
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_sanitize_silu_mul(rows: int, size: int, gap: int, dtype: torch.dtype, device: str) -> None:
    gate, up = drawn(rows, size, dtype=dtype), drawn(rows, size, dtype=dtype, seed=1)
    gate[0, : min(4, size)] = torch.tensor([100.0, -100.0, 0.0, -3e4])[:size]
    got = fused.silu_mul(among_nans(gate, gap, device), among_nans(up, gap, device))
    assert_near(got, gate.double() * gate.double().sigmoid() * up.double(), 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, -0.37, 0.0])
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_sanitize_silu_mul_scaled(
    rows: int, size: int, factor: float, dtype: torch.dtype, device: str
) -> None:
    gate, up = drawn(rows, size, dtype=dtype), drawn(rows, size, dtype=dtype, seed=1)
    scale = drawn(rows, dtype=torch.float32, seed=2)
    scale[-1] = 0
    given = (among_nans(x, 8, device) for x in (gate, up))
    got = fused.silu_mul(*given, scale.to(device), factor)
    exact = gate.double() * gate.double().sigmoid() * up.double()
    assert_near(got, exact * scale.double()[:, None] * factor, 4)
    alone = fused.silu_mul(gate.to(device), up.to(device), factor=factor)
    assert_near(alone, exact * factor, 4)


def test_two_halves_of_one_product(device: str) -> None:
    joined = drawn(3, 2 * 40, dtype=torch.bfloat16).to(device)
    gate, up = joined.split([40, 40], -1)
    assert torch.equal(fused.silu_mul(gate, up), fused.silu_mul(gate.clone(), up.clone()))


# -- argmax ---------------------------------------------------------------------------------------


def first_highest(row: list[float]) -> int:
    nans = [i for i, x in enumerate(row) if x != x]
    return nans[0] if nans else row.index(max(row))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 5, 1000, 1024, 1025, 8192, 32001])
@pytest.mark.parametrize("levels", [3, 1000])
def test_sanitize_argmax_takes_the_lowest_of_equals(
    size: int, levels: int, dtype: torch.dtype, device: str
) -> None:
    generator = torch.Generator().manual_seed(size)
    scores = torch.randint(-levels, levels, (3, size), generator=generator).to(dtype)
    scores[1] = -math.inf
    scores[2, size // 2 :: 7] = math.nan
    got = fused.argmax(among_nans(scores, 8 if size % 8 == 0 else 3, device))
    assert got.tolist() == [first_highest(row) for row in scores.tolist()]


# -- arguments ------------------------------------------------------------------------------------


@pytest.fixture
def served(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The operators served by the emulated kernels."""
    monkeypatch.setattr(fused, "_kernels", lambda x: emulated)
    return emulated


def test_wrong_tensors_are_named(served: ModuleType) -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    wrong: list[tuple[str, Callable[[], object]]] = [
        ("delta", lambda: fused.add_norm(x, x[:1], weight, 1e-5)),
        ("delta", lambda: fused.add_norm(x, x.half(), weight, 1e-5)),
        ("weight", lambda: fused.add_norm(x, x, weight[:7], 1e-5)),
        ("hidden", lambda: fused.add_norm(x.double(), x, weight, 1e-5)),
        ("hidden", lambda: fused.add_norm(x[0], x, weight, 1e-5)),
        ("up", lambda: fused.silu_mul(x, x[:, :7])),
        ("scale", lambda: fused.silu_mul(x, x, weight[:1])),
        ("scale", lambda: fused.silu_mul(x, x, weight[: len(x)].double())),
        ("scores", lambda: fused.argmax(x[0])),
        ("scores", lambda: fused.argmax(x[:, :0])),
    ]
    for name, call in wrong:
        with pytest.raises(ValueError, match=name):
            call()


def test_wrong_rotations_are_named(served: ModuleType) -> None:
    case = Rope((3, 4, 2, 16), torch.float32, True, "cpu")
    q, k, v = case.parts
    pool, write = case.to.k, case.to.write
    good = (q, k, v, case.cos, case.sin, case.scale, case.to)
    wrong: list[tuple[str, int, object]] = [
        ("q is", 0, q[..., :15]),
        ("k must", 1, k[:, :1]),
        ("v must", 2, v[:2]),
        ("cos", 3, case.cos[:2]),
        ("sin", 4, case.sin.half()),
        ("scale", 5, case.scale.half()),
        ("pool of v", 6, Destination(pool, pool[1:], write)),
        ("k must be contiguous", 6, Destination(pool.mT.contiguous().mT, pool, write)),
        ("error", 6, Destination(pool, pool, write, torch.zeros(1))),
        ("write", 6, Destination(pool, pool, write.int())),
        ("write", 6, Destination(pool, pool, write[1:])),
    ]
    for name, index, bad in wrong:
        given = [*good]
        given[index] = bad
        with pytest.raises(ValueError, match=name):
            fused.rope_write(*given)


def test_numbers_are_checked_again_in_the_module(served: ModuleType) -> None:
    """Below the wrapper: what reaches a launcher must be sound whoever calls."""
    wrong = [
        ("dtype", "silu_mul", (3, 1, 8, 16, 8, 16, 8, 0, 1.0, 16, 0, 0)),
        ("rows", "silu_mul", (0, 0, 8, 16, 8, 16, 8, 0, 1.0, 16, 0, 0)),
        ("size", "silu_mul", (0, 1, 1 << 29, 16, 1 << 29, 16, 1 << 29, 0, 1.0, 16, 0, 0)),
        ("gate must", "silu_mul", (0, 1, 8, 0, 8, 16, 8, 0, 1.0, 16, 0, 0)),
        ("up is a stride", "silu_mul", (0, 2, 8, 16, 8, 16, 7, 0, 1.0, 16, 0, 0)),
        ("normed", "add_norm", (0, 1, 8, 16, 8, 16, 8, 16, 16, 0, 1e-5, 0, 0)),
        ("eps", "add_norm", (0, 1, 8, 16, 8, 16, 8, 16, 16, 16, -1.0, 0, 0)),
        ("x must", "argmax", (0, 1, 8, 0, 8, 16, 0, 0)),
    ]
    sizes, rows = (0, True, 1, 2, 1, 8), (16, 16, 16, 8, 16, 8)
    rest = (16, 16, 0, 16, 16, 16, 4, 16, 16, 0, 0)
    wrong += [
        ("head_dim", "rope_write", ((*sizes[:5], 7), rows, rest)),
        ("kv_heads", "rope_write", ((0, True, 1, 2, 3, 8), rows, rest)),
        ("k is a stride", "rope_write", (sizes, (16, 16, 16, 4, 16, 8), rest)),
        ("write", "rope_write", (sizes, rows, (*rest[:7], 0, *rest[8:]))),
    ]
    for name, op, given in wrong:
        flat = [n for part in given for n in (part if isinstance(part, tuple) else (part,))]
        with pytest.raises(ValueError, match=name):
            getattr(served, op)(*flat)


# -- mistakes that must be noticed ----------------------------------------------------------------

# what is planted, the line of fused.cuh as it is, as it becomes
PLANTED = [
    ("a barrier removed before a sum is read", "= x;\n  __syncthreads();", "= x;"),
    (
        "one number too many in a row",
        "i < a.size; i += THREADS * N) {\n    Pack<T, N> x = load_pack<N>(hidden",
        "i <= a.size; i += THREADS * N) {\n    Pack<T, N> x = load_pack<N>(hidden",
    ),
    ("keys not rotated", "if (value) {", "if (!query) {"),
    (
        "values of the wrong head",
        "(query ? head : kv_head) * a.head_dim",
        "(query ? head : 0) * a.head_dim",
    ),
    ("a place one past the pool accepted", "place < a.places", "place <= a.places"),
    ("ties to the higher index", "return at < other;", "return at > other;"),
    (
        "a barrier removed between two rounds",
        "    __syncthreads();\n    const int other",
        "    const int other",
    ),
]


def noticed(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether one of a few cases of every operator fails, in one of the orders of threads."""
    guarded = Guarded()
    monkeypatch.setattr(fused, "_kernels", lambda x: module)
    monkeypatch.setattr(fused, "_result", guarded)
    tied = torch.zeros(1, 5000)
    try:
        for order in range(3):
            module.set_order(order)
            check_add_norm(2, 2056, 8, torch.bfloat16, "cpu")
            check_add_norm(2, 301, 3, torch.float32, "cpu")
            case = Rope((3, 4, 2, 16), torch.float32, False, "cpu")
            case.check(case.run())
            tied[0, [17, 4000, 4999]] = 1
            assert fused.argmax(tied).tolist() == [17]
            case.to.write[0] = len(case.to.k) * 2
            case.run()
            assert int(case.to.error)
        guarded.check()
    except (AssertionError, pytest.fail.Exception):
        return True
    finally:
        module.set_order(0)
    return False


def test_the_kernels_stand_every_order_of_threads(
    emulated: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not noticed(emulated, monkeypatch)


def planted(before: str, after: str, folder: Path) -> ModuleType:
    """The kernels with one mistake planted."""
    shutil.copytree(ROOT / "cuda", folder / "cuda")
    shutil.copytree(ROOT / "tests/native", folder / "tests/native")
    source = folder / "cuda/fused.cuh"
    text = source.read_text()
    assert text.count(before) == 1, before
    source.write_text(text.replace(before, after))
    return build(folder, folder)


@pytest.mark.slow
def test_planted_mistakes_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / str(number) for number in range(len(PLANTED))]
    with ThreadPoolExecutor(2) as pool:
        changes = [(before, after) for _, before, after in PLANTED]
        modules = list(pool.map(lambda c, f: planted(*c, f), changes, folders))
    missed = [
        what
        for (what, _, _), module in zip(PLANTED, modules, strict=True)
        if not noticed(module, monkeypatch)
    ]
    assert not missed
