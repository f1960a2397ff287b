"""Matrices: the same product wherever the numbers lie, against torch's and float64."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.qwen_checkpoint import QwenShape, write_qwen
from engine.engine import Engine
from engine.models.matrix import Linear, Matrix, matrices
from engine.ops import products
from tests.checkpoints import Shape

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """A layer of these very tensors."""
    layer = Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def layers(dtype: torch.dtype, *, bias: bool) -> list[Linear]:
    """Three layers of one input whose numbers 16 bits can hold."""
    g = torch.Generator().manual_seed(4)
    drawn = lambda *size: torch.randn(*size, generator=g).bfloat16().to(dtype)  # noqa: E731
    return [linear(drawn(out, 48), drawn(out) if bias else None) for out in (64, 16, 7)]


def apart(*layers: Linear) -> Matrix:
    return Matrix(*layers)


def joined(*layers: Linear) -> Matrix:
    matrix = Matrix(*layers)
    matrix.join()
    return matrix


def short(*layers: Linear) -> Matrix:
    matrix = joined(*layers)
    matrix.shorten()
    return matrix


def placed(*layers: Linear) -> Matrix:
    """As the loader does it: numbers are read to where the matrix says."""
    matrix = Matrix(*layers)
    for layer in layers:
        for leaf, own in list(layer.named_parameters()):
            place = matrix.place(layer, leaf, own.dtype, "cpu")
            assert place is not None
            setattr(layer, leaf, nn.Parameter(place.copy_(own), requires_grad=False))
    return matrix


@pytest.mark.parametrize("lie", [apart, joined, short, placed])
@pytest.mark.parametrize("rows", [1, 5, 32, 33, 260])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_float64s_wherever_weights_lie(
    lie: Callable[..., Matrix], rows: int, dtype: torch.dtype, bias: bool
) -> None:
    given, x = layers(dtype, bias=bias), torch.randn(rows, 48).to(dtype)
    wants = [
        F.linear(x.double(), y.weight.double(), y.bias.double() if bias else None) for y in given
    ]
    theirs = [F.linear(x, layer.weight, layer.bias) for layer in given]
    got = lie(*given).product(x)
    for part, want, their in zip(got, wants, theirs, strict=True):
        assert part.dtype == dtype
        floor = torch.finfo(dtype).eps * want.abs().max() / 2 + 1e-5
        assert (part.double() - want).abs().max() <= 2 * (their.double() - want).abs().max() + floor
    assert torch.equal(given[1](x), got[1])


@pytest.mark.parametrize("lie", [joined, placed])
def test_weights_side_by_side_are_the_layers_own(lie: Callable[..., Matrix]) -> None:
    given = layers(torch.float32, bias=True)
    values = [layer.weight.clone() for layer in given]
    lie(*given)
    for leaf in ("weight", "bias"):
        owns = [layer.get_parameter(leaf) for layer in given]
        assert len({own.untyped_storage().data_ptr() for own in owns}) == 1
    assert all(torch.equal(y.weight, value) for y, value in zip(given, values, strict=True))


def test_a_weight_is_shortened_only_where_nothing_is_lost() -> None:
    exact = torch.randn(7, 48).bfloat16().float()
    found = products.in_16_bits(exact)
    assert found is None or torch.equal(found.float(), exact)
    assert products.in_16_bits(exact + 1e-3) is None
    assert products.in_16_bits(exact.bfloat16()) is None


def qwen_in_16_bits(folder: Path) -> Path:
    path = write_qwen(folder, QwenShape()) / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    return folder


@pytest.mark.parametrize("name", ["llama", "qwen2-bias", "qwen-vl"])
def test_every_decoder_is_prepared(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_native_pays", lambda: True)
    shapes = {"llama": Shape(), "qwen2-bias": Shape(family="qwen2", kv_heads=2, seed=3)}
    if name == "qwen-vl":
        folder = qwen_in_16_bits(tmp_path / name)
    else:
        folder = checkpoint(shapes[name], dtype=torch.bfloat16)
    decoder = Engine.load(folder, device="cpu", dtype="float32").model.decoder
    found = matrices(decoder)
    assert len(found) == 4 * decoder.config.layers + 1
    wide = [weight for weight in decoder.parameters() if weight.ndim == 2][1:]  # all but `embed`
    assert sum(matrix.bytes_read(33) for matrix in found) == sum(weight.nbytes for weight in wide)
    assert all(2 * matrix.bytes_read(32) == matrix.bytes_read(33) for matrix in found)


SHAPES = [(48,), (1, 48), (2, 1, 48), (4, 48), (8, 48), (9, 48), (32, 48), (33, 48), (0, 48)]
SHAPES += [(255, 48), (256, 48), (577, 48), (2, 289, 48), (1, 259, 48)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_is_torchs_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, w = torch.randn(*shape).to(dtype), torch.randn(7, 48).to(dtype)
    for bias in (torch.ones(7, dtype=dtype), None):
        got = linear(w, bias)(x)
        torch.testing.assert_close(got, F.linear(x, w, bias))
        assert got.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(33, 48, 7), (40, 31, 300), (2, 289, 64, 130), (1, 50, 1, 1)])
def test_products_by_blocks_are_float64s_rounded(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: tuple[int, ...]
) -> None:
    """Where neither torch nor the module has a fast product: converted weights stay few."""
    monkeypatch.setattr(products, "_multiplies_fast", lambda dtype: False)
    monkeypatch.setattr(products, "_native_pays", lambda: False)
    monkeypatch.setattr(products, "_BLOCK", 1000)
    *lead, size_in, size_out = size
    x, w = torch.randn(*lead, size_in).to(dtype), torch.randn(size_out, size_in).to(dtype)
    blocks = []
    torchs = F.linear

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        blocks.append(weight)
        return torchs(x, weight, bias)

    monkeypatch.setattr(products.F, "linear", multiply)
    for bias in (torch.randn(size_out).to(dtype), None):
        got = linear(w, bias)(x)
        wide = None if bias is None else bias.double()
        want = torchs(x.double(), w.double(), wide)
        assert got.dtype == dtype
        assert got.shape == want.shape
        rounding = torch.finfo(dtype).eps / 2 * want.abs().clamp(min=1.0) * 1.01
        assert ((got.double() - want).abs() <= rounding + 1e-5).all()
    assert all(block.dtype is torch.float32 and block.numel() <= 1000 for block in blocks)
    assert sum(map(len, blocks)) == 2 * size_out
