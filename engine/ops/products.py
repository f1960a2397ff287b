"""Linear layers: a native product for few rows, and for many torch's or a native one.

A decode step reads every weight once and computes little with it. Torch's product for a matrix
reaches half of the memory's speed there; ``gemv`` reads at the speed of memory. Many rows are a
matter of arithmetic: torch is as fast as the processor where it has instructions for the dtype, and
``gemm`` multiplies where torch is not. Who multiplies what is decided here and nowhere else.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .few_bits import FewBits, seen
from .formats import BF16, FP16, FP32
from .native import address, codes, cpu_isa, describe, load, loaded
from .tape import alive

GEMV_ROWS = 32  # rows that the native product takes
GPU_ROWS = 8  # and that of few bits on a GPU
_UNEVEN_ROWS = 256  # from here on up to three rows more cost nothing
_BLOCK = 1 << 22  # weights converted to float32 at once: 16 MB
_SHORT = (BF16.dtype, FP16.dtype)
_SHORT_OR_WIDE = (*_SHORT, FP32.dtype)

# The weight [out, in] and bias [out] of a linear layer.
Weight = Tensor | FewBits
Weights = tuple[Weight, Tensor | None]


def few_rows(x: Tensor, weight: Weight) -> bool:
    """Whether ``gemv`` shall multiply x ``[..., in]`` by this weight: it is faster there.

    That is: on a CPU, with weights in 16 bits or fewer, for at most 32 rows; on a GPU with weights
    in few bits, for at most 8.
    """
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if isinstance(weight, FewBits):
        return 1 <= rows <= (GPU_ROWS if x.is_cuda else GEMV_ROWS) and loaded(x.device.type)
    if weight.dtype not in _SHORT or weight.device.type != "cpu" or not 1 <= rows <= GEMV_ROWS:
        return False
    return not _training(x, weight) and _native_pays()


def many_rows(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``, x ``[..., in]``, weight ``[out, in]``; who is fastest multiplies."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if isinstance(weight, FewBits):
        flat = x.reshape(rows, -1)
        on_cpu = x.device.type == "cpu" and rows > 0 and loaded()
        y = gemm(flat, (weight, bias))[0] if on_cpu else by_blocks(flat, weight, bias)
        return y.view(*x.shape[:-1], -1)
    if x.device.type != "cpu" or _training(x, weight) or rows <= GEMV_ROWS:
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, -1)
    if _multiplies_fast(x.dtype):
        y = _uneven(flat, weight, bias)
    elif _native_pays():
        (y,) = gemm(flat, (weight.contiguous(), bias))
    else:
        y = by_blocks(flat, weight, bias)
    return y.view(*x.shape[:-1], -1)


def _uneven(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Torch's product of x ``[rows, in]``, which in bfloat16 likes row counts that four divides.

    It takes about 1.3 times as long for some others, such as the 577 of CLIP (``bench.kernels``),
    so that x gets up to three rows more.
    """
    rows = len(x)
    if x.dtype is not torch.bfloat16 or rows < _UNEVEN_ROWS or rows % 4 == 0:
        return F.linear(x, weight, bias)
    return F.linear(F.pad(x, (0, 0, 0, -rows % 4)), weight, bias)[:rows]


def by_blocks(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """What ``gemm`` does, in torch: sums in float32, a block of outputs at a time; rounded once.

    The blocks bound the memory of converted weights: no second copy of a model ever exists.
    """
    wide, count = x.float(), len(weight)
    out = x.new_empty(len(x), count)
    block = max(8, _BLOCK // max(1, x.shape[1]) // 8 * 8)
    for start in range(0, count, block):
        stop = min(count, start + block)
        begin = None if bias is None else bias[start:stop].float()
        out[:, start:stop] = F.linear(wide, _rows_of(weight, start, stop), begin)
    return out


def by_blocks_of_few(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """What ``gemv`` does, in torch: ``by_blocks`` of what weights in few bits see of x."""
    if isinstance(weight, FewBits):
        return by_blocks(seen(x, weight.format), weight, bias).to(x.dtype)
    return by_blocks(x, weight, bias)


def _rows_of(weight: Weight, start: int, stop: int) -> Tensor:
    """Some rows of a weight in float32."""
    if isinstance(weight, FewBits):
        return weight.rows(start, stop).numbers()
    return weight[start:stop].float()


def faster_in_float32(x: Tensor) -> bool:
    """Whether torch's other products of 16-bit numbers like x are as fast or faster in float32.

    Its attention of 600 and 2,900 causal tokens, 32 heads of 128, takes 0.5 and 0.6 times as long
    so in float16, and 1.0 times in bfloat16 (a Zen 4 held to AVX2, one thread).
    """
    return x.device.type == "cpu" and x.dtype in _SHORT and not _multiplies_fast(x.dtype)


@functools.cache
def _multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether torch's product of many rows is as fast in this dtype as the processor is.

    GFLOPS of one thread of a Zen 4, 577 x 1024 -> 4096 to 640 x 4096 -> 11008: with AVX512 torch
    does 84-92 in float32 and 173-209 in bfloat16, ``gemm`` 93-100 and 192-203, so that torch keeps
    those (AMX makes it several times faster still); without AVX512-FP16 it does 21 in float16,
    ``gemm`` 102. With AVX2 alone torch does 84-94 in float32 and 20-24 in 16 bits, ``gemm`` 88-102
    in all three.
    Telling torch to use no more than AVX2 (ATEN_CPU_CAPABILITY) is believed.
    """
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return dtype is torch.float32 and not _native_pays()
    return dtype not in supported or bool(supported[dtype]())


def _training(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def in_16_bits(weight: Tensor) -> Tensor | None:
    """A float32 weight in bfloat16 where that loses nothing and halves what ``gemv`` reads.

    Checkpoints are stored in 16 bits: run in float32 their products are the same numbers.
    """
    if weight.dtype is not FP32.dtype or weight.device.type != "cpu" or not _native_pays():
        return None
    short = weight.to(BF16.dtype)
    return short if torch.equal(short.float(), weight) else None


@functools.cache
def _native_pays() -> bool:
    """Whether this processor has the instructions that native products need: AVX2 or better.

    Small matrices gain most: only steps of native products can be recorded (``running.taped``).
    """
    return cpu_isa() not in (None, "baseline")


def gemv(x: Tensor, *layers: Weights, isa: str = "") -> list[Tensor]:
    """``x @ weight.T + bias`` on the CPU for 1 to 32 rows, sums in fp32: ``[rows, out]`` each.

    x ``[rows, in]`` (rows may be strided), every layer's weight ``[out, in]`` contiguous and bias
    ``[out]`` or None; one dtype of float32, float16, bfloat16, or x and bias in float32 whatever
    the weights are, or any of the three beside weights in few bits, which round x, see
    ``by_blocks_of_few``. On a GPU: 1 to 8 rows, weights in few bits, and x is not rounded. Reads
    the weights once, at the speed of memory. Raises ValueError for other arguments.
    """
    most = GPU_ROWS if x.is_cuda else GEMV_ROWS
    if not 1 <= len(x) <= most:
        raise ValueError(f"x must have 1 to {most} rows, got {describe(x)}")
    return _native("gemv", x, layers, isa)


def gemm(x: Tensor, *layers: Weights, isa: str = "") -> list[Tensor]:
    """``gemv`` for any number of rows, at the speed of arithmetic: for many.

    Weights are converted as they are needed: half a megabyte for each thread is all it takes.
    """
    return _native("gemm", x, layers, isa)


def _native(name: str, x: Tensor, layers: Sequence[Weights], isa: str) -> list[Tensor]:
    """Call a product of the module, its arguments checked."""
    module, problem = load()
    if module is None:
        raise RuntimeError(problem)
    if x.ndim != 2 or not len(x) or (x.device.type, name) not in _PLACES:
        raise ValueError(f"x must be [rows, in] on the CPU, got {describe(x)}")
    format_, rows = _format(layers[0][0]), len(x)
    for weight, bias in layers:
        _check_layer(x, format_, weight, bias)
    if x.stride(1) != 1 or (x.is_cuda and (x.data_ptr() % 16 or x.stride(0) % 8)):
        x = x.clone(memory_format=torch.contiguous_format)
    out = [alive(x.new_empty(rows, len(weight))) for weight, _ in layers]
    sizes = (codes()[format_], codes()[x.dtype], rows, x.shape[1], x.data_ptr(), x.stride(0))
    if x.is_cuda:
        stream = torch.cuda.current_stream(x.device).cuda_stream
        module.cuda_gemv(*sizes, as_parts(layers, out), x.device.index, stream)
    else:
        getattr(module, name)(*sizes, as_parts(layers, out), torch.get_num_threads(), isa)
    return out


_PLACES = (("cpu", "gemv"), ("cpu", "gemm"), ("cuda", "gemv"))


def as_parts(layers: Sequence[Weights], out: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """What the module is told of every layer, ``out`` being where its result belongs."""
    return [
        (y.shape[1], _numbers(weight).data_ptr(), address(bias), y.data_ptr(), _scale(weight))
        for (weight, bias), y in zip(layers, out, strict=True)
    ]


def _numbers(weight: Weight) -> Tensor:
    return weight.codes if isinstance(weight, FewBits) else weight


def _scale(weight: Weight) -> int:
    return address(weight.scale) if isinstance(weight, FewBits) else 0


def _format(weight: Weight) -> torch.dtype | str:
    """As ``native.codes`` has it."""
    return weight.format if isinstance(weight, FewBits) else weight.dtype


def _check_layer(
    x: Tensor, format_: torch.dtype | str, weight: Weight, bias: Tensor | None
) -> None:
    """Raise ValueError unless ``gemv`` can multiply x with this weight of this format."""
    numbers, few = _numbers(weight), isinstance(weight, FewBits)
    known = format_ in codes() and x.dtype in (_SHORT_OR_WIDE if few else (torch.float32, format_))
    known = known and (few or not x.is_cuda)
    if not known or _format(weight) != format_ or numbers.device != x.device:
        raise ValueError(f"x is {describe(x)} but weight is {describe(numbers)}")
    shape = (weight.out, weight.size_in) if isinstance(weight, FewBits) else tuple(weight.shape)
    if len(shape) != 2 or shape[1] != x.shape[1]:
        raise ValueError(f"x is {describe(x)}, which does not fit weight {describe(numbers)}")
    if bias is not None and (tuple(bias.shape) != shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"bias is {describe(bias)} but weight is {describe(numbers)}")
    if not numbers.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        raise ValueError("weight and bias must be contiguous")
