"""The small steps between a decoder layer's products, each of them one native kernel.

Plain torch starts about twenty operations a layer for what four do here: ``add_norm``,
``rope_write``, ``silu_mul``, and ``argmax`` over the vocabulary. Each has a torch twin
(``*_torch``), which defines it and runs where no kernel serves. On a CPU the kernels serve where
the native module is there; on a GPU only if the environment says ``AVL_FUSED=1``, until their
benchmark has run on one. Nothing here waits for a GPU, so that all four can be captured in a CUDA
graph.

With ``AVL_FUSED=1`` the decoder takes its fused form everywhere, through the twins if need be, and
``loading.loading`` lays the weights of q, k, v and of gate, up side by side on a CPU too.
"""

import functools
import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .native import address, codes, describe
from .rotary import rotate
from .tape import alive


class Destination(NamedTuple):
    """Where a step's new keys and values go.

    A pool's rows are counted over slots and heads: ``write`` ``[tokens * kv_heads]`` int64 holds
    ``slot * kv_heads + head`` for each head of each token. On a GPU, where nothing is written to a
    place out of range, the flag ``error`` (int32 ``[1]``) is set to 1 there.
    """

    k: Tensor  # [slots, kv_heads, head_dim]
    v: Tensor
    write: Tensor
    error: Tensor | None = None

    def store(self, k: Tensor, v: Tensor) -> None:
        """Write ``k, v [tokens, kv_heads, head_dim]`` there."""
        for pool, new in ((self.k, k), (self.v, v)):
            pool.view(-1, k.shape[-1]).index_copy_(0, self.write, new.reshape(-1, k.shape[-1]))


@functools.cache
def switched_on() -> bool:
    """Whether the environment asks for the fused kernels and weights."""
    return os.environ.get("AVL_FUSED") == "1"


def serves(x: Tensor) -> bool:
    """Whether a decoder with states ``x`` shall take its fused form."""
    return switched_on() or _kernels(x) is not None


def add_norm(hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``hidden + delta`` and its root-mean-square norm, both ``[tokens, size]``; weight ``[size]``.

    One dtype for all. Raises ValueError where a tensor does not fit.

    >>> total, normed = add_norm(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([1.0, 3.0]), 0)
    >>> total.tolist(), normed.tolist()
    ([[2.0, 2.0]], [[1.0, 3.0]])
    """
    kernels = _kernels(hidden)
    if kernels is None:
        return add_norm_torch(hidden, delta, weight, eps)
    hidden, delta = _rows(hidden=hidden, delta=delta)
    _refuse("delta", delta, hidden, hidden.shape)
    _refuse("weight", weight, hidden, hidden.shape[1:])
    total, normed = _result(hidden.shape, hidden), _result(hidden.shape, hidden)
    if hidden.numel():
        pairs = (*_at(hidden), *_at(delta))
        results = (weight.contiguous().data_ptr(), total.data_ptr(), normed.data_ptr())
        kernels.add_norm(*_sizes(hidden), *pairs, *results, eps, *_where(hidden))
    return total, normed


def rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: Tensor | None,
    to: Destination,
) -> Tensor:
    """Rotate q and return it ``[tokens, heads, head_dim]``; rotate k and store it and v in ``to``.

    k and v ``[tokens, kv_heads, head_dim]``; cos and sin ``[tokens, 1, head_dim]`` in the dtype of
    q or in float32, the sine's first half negated; scale ``[tokens, 1, 1]`` multiplies the rotated
    queries. No two tokens may go to the same place. Raises ValueError where a tensor does not fit;
    a place out of range raises IndexError on a CPU and sets the flag of ``to`` on a GPU.
    """
    kernels = _kernels(q)
    if kernels is None:
        return rope_write_torch(q, k, v, cos, sin, scale, to)
    _check_rope(q, k, v, cos, sin, scale, to)
    tokens, heads, head_dim = q.shape
    q, k, v = _rows(q=q.flatten(1), k=k.flatten(1), v=v.flatten(1))
    out = _result((tokens, heads, head_dim), q)
    if tokens:
        sizes = (codes()[q.dtype], cos.dtype is torch.float32, tokens, heads, to.k.shape[1])
        places = (to.k.shape[0] * to.k.shape[1], to.write.data_ptr(), address(to.error))
        tables = (cos.data_ptr(), sin.data_ptr(), address(scale))
        pools = (out.data_ptr(), to.k.data_ptr(), to.v.data_ptr())
        rows = (*_at(q), *_at(k), *_at(v))
        kernels.rope_write(*sizes, head_dim, *rows, *tables, *pools, *places, *_where(q))
    return out


def silu_mul(gate: Tensor, up: Tensor, scale: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """``silu(gate) * up``, ``[tokens, size]``: the two halves of a gated MLP's first product.

    It is multiplied by ``factor``, and by each token's ``scale``, fp32 ``[tokens]``.

    >>> silu_mul(torch.tensor([[0.0, 100.0]]), torch.tensor([[7.0, 2.0]])).tolist()
    [[0.0, 200.0]]
    """
    kernels = _kernels(gate)
    if kernels is None:
        return silu_mul_torch(gate, up, scale, factor)
    gate, up = _rows(gate=gate, up=up)
    _refuse("up", up, gate, gate.shape)
    if scale is not None and not _fits(scale, gate):
        raise ValueError(f"scale must be [{len(gate)}] float32, got {describe(scale)}")
    out = _result(gate.shape, gate)
    if out.numel():
        rows = (*_at(gate), *_at(up), address(scale), factor)
        kernels.silu_mul(*_sizes(gate), *rows, out.data_ptr(), *_where(gate))
    return out


def argmax(scores: Tensor) -> Tensor:
    """Where each row of ``scores [rows, size]`` is largest: int64 ``[rows]``.

    Ties go to the lowest index; NaN counts as larger than every number, as in torch. Raises
    ValueError for rows of nothing.
    """
    if scores.ndim != 2 or not scores.shape[1]:
        raise ValueError(f"scores must be rows of something, got {describe(scores)}")
    kernels = _kernels(scores)
    if kernels is None:
        return argmax_torch(scores)
    (scores,) = _rows(scores=scores)
    out = _result((len(scores),), scores, torch.int64)
    if len(scores):
        kernels.argmax(*_sizes(scores), *_at(scores), out.data_ptr(), *_where(scores))
    return out


# -- the torch twins ------------------------------------------------------------------------------


def add_norm_torch(
    hidden: Tensor, delta: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Define ``add_norm``."""
    total = hidden + delta
    return total, torch.rms_norm(total, weight.shape, weight, eps)


def rope_write_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: Tensor | None,
    to: Destination,
) -> Tensor:
    """Define ``rope_write``."""
    to.store(rotate(k, cos, sin), v)
    rotated = rotate(q, cos, sin)
    return rotated if scale is None else rotated * scale


def silu_mul_torch(
    gate: Tensor, up: Tensor, scale: Tensor | None = None, factor: float = 1.0
) -> Tensor:
    """Define ``silu_mul``."""
    product = F.silu(gate) * up
    if scale is None:
        return product if factor == 1 else product * factor
    return product * (scale * factor).to(gate.dtype)[:, None]


def argmax_torch(scores: Tensor) -> Tensor:
    """Define ``argmax``."""
    return scores.argmax(-1)


# -- checking tensors -----------------------------------------------------------------------------


def _kernels(x: Tensor) -> Any:
    """The native kernels that serve ``x``; None where its twin does."""
    if x.is_cuda:
        return native.fused_kernels("cuda") if switched_on() else None
    if x.dtype not in codes() or (x.requires_grad and torch.is_grad_enabled()):
        return None
    return native.fused_kernels(x.device.type)  # None on devices that have no kernels


def _rows(**named: Tensor) -> list[Tensor]:
    """Tensors ``[rows, size]`` whose rows are contiguous, copied where they are not."""
    for name, x in named.items():
        if x.ndim != 2 or x.dtype not in codes():
            raise ValueError(f"{name} must be 2-dimensional and float, got {describe(x)}")
    return [x if x.stride(1) == 1 else x.contiguous() for x in named.values()]


def _refuse(name: str, x: Tensor, like: Tensor, shape: torch.Size) -> None:
    """Raise ValueError unless ``x`` has this shape, and dtype and device of ``like``."""
    if x.shape != shape or x.dtype != like.dtype or x.device != like.device:
        wanted = f"{list(shape)} {str(like.dtype).removeprefix('torch.')} on {like.device}"
        raise ValueError(f"{name} must be {wanted}, got {describe(x)}")


def _fits(scale: Tensor, like: Tensor) -> bool:
    """Whether this is a number for each row of ``like``."""
    same = scale.dtype is torch.float32 and scale.shape == like.shape[:1]
    return same and scale.device == like.device and scale.is_contiguous()


def _check_rope(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: Tensor | None,
    to: Destination,
) -> None:
    if q.ndim != 3 or q.shape[-1] % 2 or to.k.ndim != 3:
        raise ValueError(f"q is {describe(q)}, the pool {describe(to.k)}")
    tokens, _, head_dim = q.shape
    kv_heads = to.k.shape[1]
    for name, x in (("k", k), ("v", v)):
        _refuse(name, x, q, torch.Size((tokens, kv_heads, head_dim)))
    for name, x in (("the pool of k", to.k), ("the pool of v", to.v)):
        _refuse(name, x, q, torch.Size((len(to.k), kv_heads, head_dim)))
    table = cos if cos.dtype is torch.float32 else q
    for name, x in (("cos", cos), ("sin", sin)):
        _refuse(name, x, table, torch.Size((tokens, 1, head_dim)))
    if scale is not None:
        _refuse("scale", scale, q, torch.Size((tokens, 1, 1)))
    if to.write.dtype is not torch.int64 or to.write.shape != (tokens * kv_heads,):
        raise ValueError(f"write must be [{tokens * kv_heads}] int64, got {describe(to.write)}")
    read = {"cos": cos, "sin": sin, "scale": scale, **to._asdict()}
    for name, tensor in read.items():
        if tensor is not None and (not tensor.is_contiguous() or tensor.device != q.device):
            raise ValueError(f"{name} must be contiguous on {q.device}, got {describe(tensor)}")
    if to.error is not None and to.error.dtype is not torch.int32:
        raise ValueError(f"error must be int32, got {describe(to.error)}")


def _result(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What a kernel writes in full: memory with anything in it."""
    return alive(like.new_empty(shape, dtype=dtype))


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return codes()[x.dtype], x.shape[0], x.shape[1]


def _at(x: Tensor) -> tuple[int, int]:
    """Address and stride of the rows; a single row may claim any stride."""
    return x.data_ptr(), x.stride(0) if len(x) > 1 else x.shape[1]


def _where(x: Tensor) -> tuple[int, int]:
    """Number of the GPU and handle of torch's current stream there; on a CPU threads and 0."""
    if not x.is_cuda:
        return torch.get_num_threads(), 0
    return x.device.index or 0, torch.cuda.current_stream(x.device).cuda_stream
