"""Linear layers: the native matrix-vector product for few rows, torch's for many.

A decode step reads every weight once and computes little with it. Torch's product for a matrix
reaches half of the memory's speed there; ``gemv`` reads at the speed of memory. Many rows are
torch's, in float32 where the processor has no fast product of 16-bit matrices.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import BF16, FP16, FP32, format_of
from .native import address, codes, describe, load
from .tape import alive

GEMV_ROWS = 32  # rows that the native product takes
_UNEVEN_ROWS = 256  # from here on up to three rows more cost nothing
_BLOCK = 1 << 22  # weights converted to float32 at once: 16 MB
_SHORT = (BF16.dtype, FP16.dtype)

# The weight [out, in] and bias [out] of a linear layer.
Weights = tuple[Tensor, Tensor | None]


def few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether ``gemv`` shall multiply x ``[..., in]`` by this weight: it is faster there.

    That is: on a CPU, with weights in 16 bits, for at most 32 rows.
    """
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if weight.dtype not in _SHORT or weight.device.type != "cpu" or not 1 <= rows <= GEMV_ROWS:
        return False
    return not _training(x, weight) and _gemv_pays()


def many_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` by torch, x ``[..., in]``, weight ``[out, in]``.

    On a CPU its bfloat16 product likes row counts that four divides.

    It takes about 1.3 times as long for some others, such as the 577 of CLIP (``bench.kernels``),
    so that x gets up to three rows more.
    """
    if x.device.type != "cpu" or x.dtype is torch.float32 or _training(x, weight):
        return F.linear(x, weight, bias)
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if rows > GEMV_ROWS and not _multiplies_fast(x.dtype):
        return _by_blocks(x.reshape(rows, -1), weight, bias).view(*x.shape[:-1], -1)
    if x.dtype is not torch.bfloat16 or rows < _UNEVEN_ROWS or rows % 4 == 0:
        return F.linear(x, weight, bias)
    padded = F.pad(x.reshape(rows, -1), (0, 0, 0, -rows % 4))
    return F.linear(padded, weight, bias)[:rows].view(*x.shape[:-1], -1)


def _by_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [rows, in]`` by 16-bit weights in float32, a block of outputs at a time; rounded once.

    The blocks bound the memory of converted weights: no second copy of a model ever exists.
    """
    wide, out = x.float(), x.new_empty(len(x), len(weight))
    dot = format_of(weight.dtype).dot
    block = max(1, _BLOCK // max(1, x.shape[1]))
    for start in range(0, len(weight), block):
        outputs = slice(start, start + block)
        out[:, outputs] = dot(weight[outputs], wide, None if bias is None else bias[outputs])
    return out


@functools.cache
def _multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether torch has a fast product of 16-bit matrices for this processor.

    AVX2 alone has none: 576 rows by 2048 x 6144 take 4 times as long in bfloat16 as in float32
    there, 1.0 to 1.2 times by blocks (a Zen 3, two threads). Telling torch to use no more than AVX2
    (ATEN_CPU_CAPABILITY) is believed.
    """
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return torch.backends.cpu.get_cpu_capability() != "AVX2" and bool(supported[dtype]())


def _training(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def in_16_bits(weight: Tensor) -> Tensor | None:
    """A float32 weight in bfloat16 where that loses nothing and halves what ``gemv`` reads.

    Checkpoints are stored in 16 bits: run in float32 their products are the same numbers.
    """
    if weight.dtype is not FP32.dtype or weight.device.type != "cpu" or not _gemv_pays():
        return None
    short = BF16.pack(weight)
    return short if torch.equal(BF16.unpack(short), weight) else None


@functools.cache
def _gemv_pays() -> bool:
    """Whether this processor has the instructions that keep up with memory: AVX2 or better.

    Small matrices gain most: only steps of native products can be recorded (``running.taped``).
    """
    module, _ = load()
    return module is not None and module.cpu_isa() != "baseline"


def gemv(x: Tensor, *layers: Weights, isa: str = "") -> list[Tensor]:
    """``x @ weight.T + bias`` on the CPU for 1 to 32 rows, sums in fp32: ``[rows, out]`` each.

    x ``[rows, in]`` (rows may be strided), every layer's weight ``[out, in]`` contiguous and bias
    ``[out]`` or None; one dtype of float32, float16, bfloat16, or x and bias in float32 whatever
    the weights are. Reads the weights once, at the speed of memory. Raises ValueError for other
    arguments.
    """
    module, problem = load()
    if module is None:
        raise RuntimeError(problem)
    if x.ndim != 2 or not 1 <= x.shape[0] <= GEMV_ROWS or x.device.type != "cpu":
        raise ValueError(f"x must have 1 to {GEMV_ROWS} rows on the CPU, got {describe(x)}")
    dtype, rows = layers[0][0].dtype, len(x)
    for weight, bias in layers:
        _check_layer(x, dtype, weight, bias)
    if x.stride(1) != 1:
        x = x.contiguous()
    out = [alive(x.new_empty(rows, len(weight))) for weight, _ in layers]
    calls = [
        (len(weight), weight.data_ptr(), address(bias), y.data_ptr())
        for (weight, bias), y in zip(layers, out, strict=True)
    ]
    sizes = (codes()[dtype], x.dtype is torch.float32, rows, x.shape[1], x.data_ptr(), x.stride(0))
    module.gemv(*sizes, calls, torch.get_num_threads(), isa)
    return out


def _check_layer(x: Tensor, dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless ``gemv`` can multiply x with this weight of this dtype."""
    known = dtype in codes() and (x.dtype in (torch.float32, dtype))
    if not known or weight.dtype != dtype or weight.device.type != "cpu":
        raise ValueError(f"x is {describe(x)} but weight is {describe(weight)}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"x is {describe(x)}, which does not fit weight {describe(weight)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"bias is {describe(bias)} but weight is {describe(weight)}")
    if not weight.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        raise ValueError("weight and bias must be contiguous")
