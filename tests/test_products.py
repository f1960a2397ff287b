"""The native products of linear layers against float64, on every instruction set of the machine."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from engine.models.layers import Patches
from engine.ops import native, products
from engine.ops.attention import whole_attention
from engine.ops.few_bits import laid_out, quantise, seen, separate
from engine.ops.formats import FORMATS

needs_native = pytest.mark.skipif(not native.loaded(), reason="the native module is not built")
ISAS = [pytest.param(isa, marks=needs_native) for isa in ("baseline", "avx2", "avx512")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set of the CPU kernels."""
    from engine import _native

    if not _native.has_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return str(request.param)


@pytest.fixture(autouse=True)
def nan_where_nothing_is_written() -> Iterator[None]:
    """Fresh tensors are full of NaN; numbers are drawn anew for each test, and always the same."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 31, 32])
@pytest.mark.parametrize(
    ("size_in", "size_out"), [(1, 1), (31, 5), (64, 4), (257, 130), (4096, 6), (1024, 300)]
)
def test_gemv_matches_float64(isa, dtype, rows, size_in, size_out):
    g = torch.Generator().manual_seed(size_in)
    x = torch.randn(rows, 2 * size_in, generator=g).to(dtype)[:, :size_in]  # strided rows
    w = torch.randn(size_out, size_in, generator=g).to(dtype)
    for bias in (None, torch.randn(size_out, generator=g).to(dtype)):
        wide = None if bias is None else bias.double()
        want = F.linear(x.double(), w.double(), wide)
        (got,) = products.gemv(x, (w, bias), isa=isa)
        theirs = (F.linear(x, w, bias).double() - want).abs().max()
        floor = torch.finfo(dtype).eps * want.abs().max() / 2 + 1e-6 * size_in**0.5
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= 2 * theirs + floor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 7, 18])
@pytest.mark.parametrize(("size_in", "size_out"), [(1, 1), (31, 5), (257, 130), (1024, 300)])
def test_gemv_of_16_bit_weights_is_float32s(isa, dtype, rows, size_in, size_out):
    g = torch.Generator().manual_seed(size_in)
    x = torch.randn(rows, 2 * size_in, generator=g)[:, :size_in]
    w = torch.randn(size_out, size_in, generator=g).to(dtype)
    bias = torch.randn(size_out, generator=g)
    (got,) = products.gemv(x, (w, bias), isa=isa)
    want = F.linear(x.double(), w.double(), bias.double())
    theirs = (F.linear(x, w.float(), bias).double() - want).abs().max()
    assert got.dtype == torch.float32
    assert (got.double() - want).abs().max() <= 2 * theirs + 1e-6 * size_in**0.5


@needs_native
def test_gemv_refuses_what_does_not_fit():
    x, w = torch.randn(2, 8), torch.randn(3, 8)
    for x_given, *layers in (
        (x[:, :4], (w, None)),
        (torch.randn(33, 8), (w, None)),
        (x.bfloat16(), (w, None)),
        (x, (w.T.contiguous().T, None)),
        (x, (w, torch.randn(4))),
        (x.double(), (w.double(), None)),
        (x, (w, None), (w.bfloat16(), None)),
        (x, (w, None), (w[:, :4], None)),
    ):
        with pytest.raises(ValueError, match=r"x|weight|bias"):
            products.gemv(x_given, *layers)


@pytest.mark.parametrize("product", [products.gemv, products.gemm])
@pytest.mark.parametrize("rows", [1, 3, 8, 11])
def test_several_layers_in_one_call_are_each_alone(isa, rows, product):
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 67, generator=g).bfloat16()
    layers = [
        (torch.randn(n, 67, generator=g).bfloat16(), torch.ones(n).bfloat16() if n % 2 else None)
        for n in (1, 130, 7, 64)
    ]
    together = product(x, *layers, isa=isa)
    for layer, got in zip(layers, together, strict=True):
        assert torch.equal(got, product(x, layer, isa=isa)[0])


# Around the tiles (6 and 12 rows; 8, 16 and 32 outputs), chunks (96 and 384 rows), panels (192
# outputs) and stretches (256 inputs, or 512).
SIZES = [(1, 1, 1), (7, 3, 5), (33, 31, 300), (97, 513, 193), (385, 48, 33), (800, 1, 17)]
SIZES += [(13, 1030, 385), (12, 256, 192), (590, 512, 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_gemm_matches_float64(isa, dtype, size, threads):
    rows, size_in, size_out = size
    g = torch.Generator().manual_seed(size_in)
    x = torch.randn(rows, 2 * size_in, generator=g).to(dtype)[:, :size_in]  # strided rows
    w = torch.randn(size_out, size_in, generator=g).to(dtype)
    for bias in (None, torch.randn(size_out, generator=g).to(dtype)):
        want = F.linear(x.double(), w.double(), None if bias is None else bias.double())
        (got,) = products.gemm(x, (w, bias), isa=isa)
        rounding = torch.finfo(dtype).eps / 2 * want.abs() * 1.01
        terms = 1 + F.linear(x.double().abs(), w.double().abs())
        assert got.dtype == dtype
        assert ((got.double() - want).abs() <= rounding + 1e-6 * terms).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES[2:5])
def test_gemm_of_16_bit_weights_is_float32s(isa, dtype, size):
    rows, size_in, size_out = size
    x, w, bias = torch.randn(rows, size_in), torch.randn(size_out, size_in).to(dtype), torch.ones(1)
    (got,) = products.gemm(x, (w, bias.expand(size_out).contiguous()), isa=isa)
    want = F.linear(x.double(), w.double()) + 1
    assert got.dtype == torch.float32
    assert ((got.double() - want).abs() <= 1e-6 * (1 + x.double().abs() @ w.double().abs().T)).all()


FEW = [FORMATS["q8"], FORMATS["q4"]]


def few_drawn(row, size_out, size_in):
    g = torch.Generator().manual_seed(size_in + size_out)
    return quantise(torch.randn(size_out, size_in, generator=g), row.name)


def test_what_lies_interleaved_is_the_same():
    for size_out, size_in in [(1, 32), (8, 64), (13, 96), (70, 256)]:
        few = FORMATS["q4"].pack(torch.randn(size_out, size_in))
        for part, again in zip(few, separate(laid_out(few, "q4")), strict=True):
            assert torch.equal(part, again)
        whole = laid_out(few, "q4")
        assert whole.nbytes == -(-size_out // 8) * size_in // 32 * 160
        assert torch.equal(whole.rows(8, size_out).numbers(), whole.numbers()[8:])


@pytest.mark.parametrize("row", FEW, ids=lambda row: row.name)
def test_a_matrix_is_rounded_by_blocks_as_at_once(row):
    weight = torch.randn(70, 96)
    whole, parts = quantise(weight, row.name), quantise(weight, row.name, block=96 * 8)
    assert torch.equal(whole.numbers(), parts.numbers())
    assert torch.equal(whole.numbers(), row.unpack(row.pack(weight)))


@pytest.mark.parametrize("row", FEW, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 18, 32])
def test_products_of_few_rows_and_few_bits(isa, row, dtype, rows):
    for size_out, size_in in [(1, 32), (13, 96), (70, 256), (24, 2080)]:
        g = torch.Generator().manual_seed(size_in)
        x = torch.randn(rows, 2 * size_in, generator=g).to(dtype)[:, :size_in]  # strided rows
        few, bias = few_drawn(row, size_out, size_in), torch.randn(size_out, generator=g).to(dtype)
        inputs = seen(x, row.name)
        want = F.linear(inputs.double(), few.numbers().double(), bias.double())
        terms = 1 + F.linear(x.double().abs(), few.numbers().double().abs())
        rounding = torch.finfo(dtype).eps / 2 * want.abs() * 1.01
        (got,) = products.gemv(x, (few, bias), isa=isa)
        assert got.dtype == dtype
        assert ((got.double() - want).abs() <= rounding + 1e-6 * terms).all()
        twin = products.by_blocks_of_few(x, few, bias)
        assert ((twin.double() - want).abs() <= rounding + 1e-6 * terms).all()


@pytest.mark.parametrize("row", FEW, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 32, 1), (33, 96, 300), (97, 544, 193), (800, 32, 17)])
def test_products_of_many_rows_and_few_bits(isa, row, dtype, size, threads):
    rows, size_in, size_out = size
    x = torch.randn(rows, 2 * size_in).to(dtype)[:, :size_in]
    few, bias = few_drawn(row, size_out, size_in), torch.randn(size_out).to(dtype)
    want = F.linear(x.double(), few.numbers().double(), bias.double())
    terms = 1 + F.linear(x.double().abs(), few.numbers().double().abs())
    # Beside 16-bit inputs, numbers of q4 are 16-bit numbers.
    weights = torch.finfo(dtype).eps / 2 if row.name == "q4" else 0
    rounding = torch.finfo(dtype).eps / 2 * want.abs() * 1.01
    (got,) = products.gemm(x, (few, bias), isa=isa)
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= rounding + (1e-6 + weights) * terms).all()


@pytest.mark.parametrize("row", FEW, ids=lambda row: row.name)
def test_few_bits_and_numbers_that_are_none(isa, row):
    """A row that has one is lost where it meets weights, and no other is."""
    few = few_drawn(row, 40, 64)
    for product, rows in ((products.gemv, 4), (products.gemm, 40)):
        x = torch.randn(rows, 64)
        clean = product(x, (few, None), isa=isa)[0]
        x[1, 5], x[2, 40] = torch.nan, torch.inf
        got = product(x, (few, None), isa=isa)[0]
        assert not got[1].isfinite().any()
        assert not got[2].isfinite().all()
        others = [r for r in range(rows) if r not in (1, 2)]
        assert torch.equal(got[others], clean[others])


@needs_native
@pytest.mark.parametrize("row", FEW, ids=lambda row: row.name)
def test_products_of_few_bits_refuse_what_does_not_fit(row):
    few, x = few_drawn(row, 16, 64), torch.randn(2, 64)
    other = few_drawn(FEW[row.name == "q8"], 16, 64)
    for given, *layers in (
        (x[:, :32], (few, None)),
        (x.double(), (few, None)),
        (x, (few, torch.randn(17))),
        (x, (few, torch.randn(16).bfloat16())),
        (x, (few, None), (other, None)),
        (x, (few, None), (torch.randn(16, 64), None)),
        (x, (replace(few, codes=few.codes.transpose(0, 1)), None)),
    ):
        for product in (products.gemv, products.gemm):
            with pytest.raises(ValueError, match=r"x|weight|bias"):
                product(given, *layers)


@needs_native
def test_gemm_refuses_what_does_not_fit():
    x, w = torch.randn(40, 8), torch.randn(3, 8)
    for x_given, layer in (
        (x[:, :4], (w, None)),
        (x[:0], (w, None)),
        (x.bfloat16(), (w, None)),
        (x, (w.T.contiguous().T, None)),
        (x, (w, torch.randn(4))),
    ):
        with pytest.raises(ValueError, match=r"x|weight|bias"):
            products.gemm(x_given, layer)


def test_numbers_that_are_none_stay_where_they_are(isa):
    """Infinity and NaN reach the rows and outputs that meet them, and no others."""
    x, w = torch.zeros(50, 40).bfloat16(), torch.ones(70, 40).bfloat16()
    x[7, 3], x[20, 5], w[33, 9] = torch.inf, torch.nan, torch.nan
    (got,) = products.gemm(x, (w, None), isa=isa)
    want = F.linear(x.double(), w.double()).bfloat16()
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whoever_multiplies_many_rows_gives_the_same(monkeypatch, dtype):
    x, w, bias = torch.randn(5, 67, 40), torch.randn(30, 40), torch.randn(30)
    given = x.to(dtype), w.to(dtype), bias.to(dtype)
    results = []
    for fast, pays in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(products, "_multiplies_fast", lambda dtype, fast=fast: fast)
        pays = pays and native.loaded()
        monkeypatch.setattr(products, "_native_pays", lambda pays=pays: pays)
        results.append(products.many_rows(*given))
    assert all(got.shape == (5, 67, 30) and got.dtype == dtype for got in results)
    for got in results[1:]:
        torch.testing.assert_close(got, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fast", [True, False])
def test_what_torch_multiplies_is_float64s_rounded(monkeypatch, dtype, fast):
    """Attention of many queries and a tower's patches, whether torch is fast in 16 bits or not."""
    monkeypatch.setattr(products, "_multiplies_fast", lambda dtype: fast)
    q, k, v = (torch.randn(1, heads, 40, 16).to(dtype) for heads in (4, 2, 2))
    got = whole_attention(q, k, v, causal=True, grouped=True)
    want = F.scaled_dot_product_attention(
        *(x.double() for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max() + 5e-5
    patches, pixels = Patches(7, 24).to(dtype), torch.randn(2, 3, 21, 31).to(dtype)
    torch.nn.init.normal_(patches.weight)
    weight = patches.weight.double()
    want = F.conv2d(pixels.double(), weight, stride=7).flatten(2).transpose(1, 2)
    got = patches(pixels)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max() + 5e-5
