"""Formats of numbers: the torch definitions against numpy's and float64, and the kernels' table."""

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.loading.loading import pick_dtype
from engine.ops import native, products
from engine.ops.few_bits import laid_out, seen
from engine.ops.formats import (
    BF16,
    FORMATS,
    FP16,
    FP32,
    Q2_RUN,
    Q4_RUN,
    Q8_ROW,
    Affine,
    Few,
    Format,
    Packed,
    codes_of,
    few_of_codes,
)
from engine.options import DTYPES

ALL = list(FORMATS.values())
FLOATS = [FP32, FP16, BF16]  # the others are rounded by a rule of their own
module = native.load()[0]
needs_native = pytest.mark.skipif(module is None, reason="needs the native module")


def as_defined(row: Format, bits: np.ndarray) -> np.ndarray:
    """What these 16 bits are as a number: bfloat16 is the upper half of a float32."""
    if row is FP16:
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("row", [FP16, BF16], ids=lambda row: row.name)
def test_every_16_bit_number_is_read_as_defined_and_written_back(row: Format) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    packed = torch.from_numpy(bits.view(np.int16)).view(row.dtype)
    read = row.unpack(packed)
    assert read.dtype is torch.float32
    np.testing.assert_array_equal(read.numpy(), as_defined(row, bits))
    number = ~read.isnan()
    assert torch.equal(row.pack(read)[number].view(torch.int16), packed[number].view(torch.int16))


@pytest.mark.parametrize("row", ALL, ids=lambda row: row.name)
def test_what_was_read_is_written_back(row: Format) -> None:
    read = row.unpack(row.pack(torch.randn(7, 3 * row.run) * 8))
    torch.testing.assert_close(row.unpack(row.pack(read)), read, rtol=0, atol=0)


@pytest.mark.parametrize("row", FLOATS, ids=lambda row: row.name)
def test_no_other_number_is_nearer(row: Format) -> None:
    x = torch.randn(10_000) * 8
    read = row.unpack(row.pack(x)).double()
    for towards in (-torch.inf, torch.inf):
        there = torch.full_like(x, towards).to(row.dtype)
        neighbour = row.unpack(torch.nextafter(row.pack(x), there)).double()
        assert ((read - x.double()).abs() <= (neighbour - x.double()).abs()).all()


@pytest.mark.parametrize("row", ALL, ids=lambda row: row.name)
def test_a_run_takes_its_bytes(row: Format) -> None:
    of_rows = 3 * 4 if row is Q8_ROW else 0  # a row's scale
    assert row.pack(torch.randn(3, 5 * row.run)).nbytes == 3 * 5 * row.bytes + of_rows


def test_8_bits_are_the_nearest_of_255_even_steps() -> None:
    x = torch.randn(50, 96, dtype=torch.float64).float()
    x[3] = 0
    step = x.abs().amax(1, keepdim=True).double() / 127
    read = Q8_ROW.unpack(Q8_ROW.pack(x)).double()
    assert ((read - x).abs() <= step / 2 * (1 + 1e-6)).all()
    torch.testing.assert_close(read.abs().amax(1).float(), x.abs().amax(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("row", [Q4_RUN, Q2_RUN], ids=lambda row: row.name)
@pytest.mark.parametrize("offset", [0.0, 0.3, -5.0, 1000.0])
def test_few_bits_are_the_nearest_of_even_steps_between_the_extremes(
    offset: float, row: Affine
) -> None:
    """Or of steps of a 2,048th of their size, for numbers that are nearly alike."""
    x = torch.randn(50, 4 * 32) + offset
    x[3], x[4, :32] = 0, 7.5
    runs = x.double().unflatten(1, (-1, 32))
    size, span = runs.abs().amax(-1), runs.amax(-1) - runs.amin(-1)
    step = torch.maximum(span / (2**row.bits - 1), size / 2048)
    error = (row.unpack(row.pack(x)).double() - x).abs().unflatten(1, (-1, 32)).amax(-1)
    assert (error <= step / 2 + size * 2**-10 + span * 2**-10).all()


@pytest.mark.parametrize("row", [Q4_RUN, Q2_RUN], ids=lambda row: row.name)
@pytest.mark.parametrize("size", [1e-4, 1e-6, 3e-8, 1e-12])
def test_numbers_that_scales_of_16_bits_cannot_tell_from_zero(size: float, row: Affine) -> None:
    for x in (torch.full((1, 32), -size), torch.randn(1, 32) * size):
        assert (row.unpack(row.pack(x)) - x).abs().max() <= size * 8 / 2**row.bits + 2**-20


@pytest.mark.parametrize("row", [Q4_RUN, Q2_RUN], ids=lambda row: row.name)
def test_codes_are_read_as_written(row: Affine) -> None:
    codes = torch.randint(0, 1 << row.bits, (5, 96), dtype=torch.uint8)
    scale, zero = torch.rand(5, 3).half(), torch.randint(0, 1 << row.bits, (5, 3)).half()
    few = few_of_codes(codes, scale, zero, bits=row.bits)
    assert torch.equal(codes_of(few, row.bits), codes)
    runs = codes.double().unflatten(1, (-1, 32)) - zero.double()[..., None]
    assert torch.equal(row.unpack(few).double(), (runs * scale.double()[..., None]).flatten(1))
    parts = [int(few.codes[0, 1]) >> at & (1 << row.bits) - 1 for at in range(0, 8, row.bits)]
    assert parts == codes[0, 1 : 32 : 4 * row.bits].tolist()


def drawn(row: Format) -> tuple[Packed, Tensor, Tensor, Tensor]:
    """Packed rows, x, where sums start, and the sums in float64."""
    g = torch.Generator().manual_seed(1)
    w, x = torch.randn(70, 96, generator=g), torch.randn(4, 96, generator=g)
    start, packed = torch.randn(70, generator=g), row.pack(w)
    return packed, x, start, x.double() @ row.unpack(packed).double().T + start


@pytest.mark.parametrize("row", ALL, ids=lambda row: row.name)
def test_dot_is_float64s(row: Format) -> None:
    packed, x, start, want = drawn(row)
    torch.testing.assert_close(row.dot(packed, x, start).double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(row.dot(packed, x).double(), want - start, rtol=1e-5, atol=1e-5)


@needs_native
def test_the_kernels_table_is_the_same() -> None:
    """As far as the kernels know a format."""
    known = [FORMATS[name] for name, *_ in module.formats]
    assert module.formats == [(row.name, row.run, row.bytes) for row in known]


@needs_native
@pytest.mark.parametrize(
    "row",
    [row for row in ALL if row.name in native.codes() and row is not Q2_RUN],
    ids=lambda row: row.name,
)
def test_a_kernel_reads_the_format_that_its_code_names(row: Format) -> None:
    packed, x, start, want = drawn(row)
    if isinstance(packed, Few):
        packed = laid_out(packed, row.name)
        want = seen(x, row.name).double() @ packed.numbers().double().T + start
    (got,) = products.gemv(x, (packed, start))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_every_dtype_has_two_names() -> None:
    named = {name: pick_dtype(name) for name in DTYPES}
    want = {"fp32": FP32.dtype, "fp16": FP16.dtype, "bf16": BF16.dtype}
    assert named == {"auto": None} | want | {
        str(d).removeprefix("torch."): d for d in want.values()
    }
