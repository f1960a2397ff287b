"""The GPU's products of few rows and few bits: the kernels' sources in the emulator, and on a GPU.

Inputs lie between NaNs and outputs between guards: what is read or written out of place shows.
"""

import math
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import native, products
from engine.ops.few_bits import FewBits, quantise
from tests.emulated import build

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GUARD = 16
SIZES = [(1, 32), (8, 64), (13, 96), (70, 544), (24, 2080)]
OTHER_SIZES = [(3, 7), (9, 33), (17, 528), (64, 1000)]  # of q8 alone


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return build(tmp_path_factory.mktemp("products"))


def drawn(rows: int, size_in: int, dtype: torch.dtype, gap: int = 16) -> Tensor:
    """Rows inside a wider tensor, NaNs before and behind each."""
    wide = torch.full((rows, size_in + 2 * gap + -size_in % 8), math.nan, dtype=dtype)
    wide[:, gap : gap + size_in] = torch.randn(rows, size_in)
    return wide[:, gap : gap + size_in]


def assert_product(got: Tensor, x: Tensor, few: FewBits, bias: Tensor | None) -> None:
    want = F.linear(x.double(), few.numbers().double(), None if bias is None else bias.double())
    terms = 1 + F.linear(x.double().abs(), few.numbers().double().abs())
    rounding = torch.finfo(x.dtype).eps / 2 * want.abs() * 1.01
    assert ((got.double() - want).abs() <= rounding + 1e-6 * terms).all()


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", ["q8", "q4"])
def test_emulated_kernels_are_float64s(
    name: str, rows: int, dtype: torch.dtype, order: int, emulated: ModuleType
) -> None:
    emulated.set_order(order)
    for out, size_in in SIZES if name == "q4" else SIZES + OTHER_SIZES:
        x, few = drawn(rows, size_in, dtype), quantise(torch.randn(out, size_in), name)
        for bias in (None, torch.randn(out).to(dtype)):
            whole = torch.full((rows * out + 2 * GUARD,), math.nan, dtype=dtype)
            y = whole[GUARD:-GUARD].view(rows, out)
            sizes = (rows, size_in, x.data_ptr(), x.stride(0))
            parts = products.as_parts([(few, bias)], [y])
            codes = native.codes()
            emulated.cuda_gemv(codes[few.format], codes[dtype], *sizes, parts, 0, 0)
            assert_product(y, x, few, bias)
            assert torch.cat([whole[:GUARD], whole[-GUARD:]]).isnan().all()


def test_emulated_kernels_refuse_what_they_cannot_read(emulated: ModuleType) -> None:
    few, y = quantise(torch.randn(8, 64), "q8"), torch.empty(1, 8)
    x, wide = torch.randn(9, 64), torch.randn(1, 72)
    codes, parts = native.codes(), products.as_parts([(few, None)], [y])
    q8, fp32 = codes["q8"], codes["fp32"]
    with pytest.raises(ValueError, match="no kernel"):
        emulated.cuda_gemv(q8, fp32, 9, 64, x.data_ptr(), 64, parts, 0, 0)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        emulated.cuda_gemv(q8, fp32, 1, 64, wide[:, 1:].data_ptr(), 72, parts, 0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 40])
@pytest.mark.parametrize("name", ["q8", "q4"])
def test_sanitize_products_of_few_bits(name: str, rows: int, dtype: torch.dtype) -> None:
    """More rows than eight are dequantised by blocks: by torch, in its own precision."""
    if native.backend().name != "cuda":
        pytest.skip("needs a CUDA device and the CUDA kernels")
    for out, size_in in SIZES if name == "q4" else SIZES + OTHER_SIZES:
        x = drawn(rows, size_in, dtype).cuda()
        few, bias = quantise(torch.randn(out, size_in), name), torch.randn(out).to(dtype)
        on_gpu = few.to(x.device)
        takes = products.few_rows(x, on_gpu)
        assert takes == (rows <= products.GPU_ROWS)
        if takes:
            (y,) = products.gemv(x, (on_gpu, bias.cuda()))
            assert_product(y.cpu(), x.cpu(), few, bias)
        else:
            got = products.many_rows(x, on_gpu, bias.cuda()).cpu().double()
            want = F.linear(x.cpu().double(), few.numbers().double(), bias.double())
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * size_in**0.5)
