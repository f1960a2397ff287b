"""The one door to the compiled kernels in ``_native``: checks tensors, passes addresses.

The module is optional. ``backend()`` says which of three is active and why: ``cuda`` (kernels for
the GPU and the CPU), ``cpu`` (for the CPU alone) or ``torch`` (none: the twins in
``ops.attention`` serve). Setting the environment variable ``AVL_NATIVE=0`` selects ``torch``;
``AVL_ISA=avx2`` (or ``baseline``, ``avx512``) forces the CPU's kernels for that instruction set.

An operator is checked once, when its plan is made, and then runs many times on the same tensors;
the plan holds them, so that an address can never outlive its tensor.
"""

import functools
import importlib
import math
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError
from .formats import FORMATS

ISAS = ("baseline", "avx2", "avx512")  # as cuda/cpu/dispatch.cpp names them
_HEAD_DIMS = (16, 32, 64, 80, 96, 128)
_NAMES = (
    "AttentionPlan",
    "PolicyPlan",
    "cpu_fused",
    "cpu_isa",
    "formats",
    "has_isa",
    "read",
    "with_cuda",
)
_MAX_GROUP = 64  # query heads that may share a kv head


class Backend(NamedTuple):
    """Which kernels serve: ``cuda``, ``cpu`` or ``torch``, and why in one line."""

    name: str
    reason: str


class AttentionResult(NamedTuple):
    """What one attention call returns: out, and logits and lse when asked for."""

    out: Tensor  # [rows, heads, head_dim], dtype of q
    logits: Tensor | None = None  # [rows, heads, max] fp32, scaled q.k; -inf beyond count
    lse: Tensor | None = None  # [rows, heads] fp32, log(sum(exp(logits))); -inf for an empty list


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """Give the module, or None and why there is none."""
    wanted = os.environ.get("AVL_NATIVE", "")
    if wanted not in ("", "0", "1"):
        raise OptionError(
            f"AVL_NATIVE={wanted:.40}: 0 is plain torch", hint="use 0, or leave it out"
        )
    if wanted == "0":
        return None, "AVL_NATIVE=0 in the environment"
    try:
        module = importlib.import_module(".._native", __package__)
    except Exception as error:  # a foreign module may do anything when it is run
        return None, f"_native cannot be imported ({error})"
    lacking = [name for name in _NAMES if not hasattr(module, name)]
    if lacking:
        return None, f"_native is another module: it has no {', '.join(lacking)}"
    _check_isa(module)
    return module, ""


def _check_isa(module: ModuleType) -> None:
    """Refuse an instruction set that this processor, or this build, does not have."""
    wanted = os.environ.get("AVL_ISA", "")
    if wanted and not module.has_isa(wanted):
        there = [isa for isa in ISAS if module.has_isa(isa)]
        raise OptionError(
            f"AVL_ISA={wanted}: this processor has no such kernels",
            hint=f"use {' or '.join(there)}",
        )


def backend() -> Backend:
    """Say which kernels are active on this machine and why."""
    module, problem = load()
    if module is None:
        return Backend("torch", f"{problem}; plain torch computes attention")
    cpu = f"CPU kernels for {module.cpu_isa()}"
    if not module.with_cuda:
        return Backend("cpu", f"{cpu}; built without a CUDA compiler")
    if not torch.cuda.is_available():
        return Backend("cpu", f"{cpu}; CUDA kernels are built in, but no CUDA device was found")
    return Backend("cuda", f"{cpu}; CUDA kernels for {torch.cuda.get_device_name()}")


def loaded(kind: str = "cpu") -> bool:
    """Whether the native module is there, not switched off, and built for ``cpu`` or ``cuda``."""
    module, _ = load()
    return module is not None and (kind == "cpu" or (kind == "cuda" and bool(module.with_cuda)))


@functools.cache
def codes() -> dict[torch.dtype, int]:
    """The numbers by which the module knows formats: rows of its table, by what they store."""
    module, _ = load()
    names = list(FORMATS) if module is None else [name for name, *_ in module.formats]
    return {FORMATS[name].dtype: code for code, name in enumerate(names) if name in FORMATS}


@functools.cache
def fused_kernels(kind: str, isa: str = "") -> Any:
    """The native kernels of ``ops.fused`` for a ``cpu`` or ``cuda``; None where they are not."""
    module, _ = load()
    if module is None or not loaded(kind):
        return None
    return module.cuda_fused if kind == "cuda" else module.cpu_fused(isa)


def usable(q: Tensor, pool: Tensor) -> bool:
    """Whether a native attention kernel exists for these tensors' device, dtype and sizes."""
    if not loaded(q.device.type) or (q.requires_grad and torch.is_grad_enabled()):
        return False
    group = q.shape[1] // max(1, pool.shape[1])
    return pool.dtype in codes() and pool.shape[-1] in _HEAD_DIMS and group <= _MAX_GROUP


class AttentionPlan:
    """One native attention call, validated once; ``run`` may be repeated as the tensors change.

    Arguments as in ``ops.attention.selective_attention``; out, logits and lse are allocated
    unless given. ``op`` is ``attention``, ``qk`` (writes logits, unscaled) or ``pv`` (p in place of
    q and k; writes a float32 out). Raises ValueError naming the argument that is wrong. Slots and
    counts are read anew by every run: on a CPU one that is out of range raises ValueError there;
    on a GPU it sets a flag that ``check`` reads, since reading it waits for the device.
    """

    def __init__(
        self,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        slots: Tensor | None = None,
        count: Tensor | None = None,
        *,
        scale: float | None = None,
        want_logits: bool = False,
        out: Tensor | None = None,
        logits: Tensor | None = None,
        lse: Tensor | None = None,
        op: str = "attention",
        p: Tensor | None = None,
        isa: str = "",
    ) -> None:
        module, problem = load()
        if module is None:
            raise RuntimeError(problem)
        lead = q if q is not None else p
        pool = k if k is not None else v
        assert lead is not None
        assert pool is not None
        check_inputs(lead, q, k, v, slots, count)
        if pool.dtype not in codes() or pool.shape[2] not in _HEAD_DIMS:
            raise ValueError(f"no native kernel for a pool of {describe(pool)}")
        _check_strides(q=q, k=k, v=v, slots=slots)
        width = pool.shape[0] if slots is None else slots.shape[-1]
        rows, heads = lead.shape[:2]
        made = functools.partial(_output, device=lead.device)
        if op != "qk":
            size = (rows, heads, pool.shape[2])
            out = made("out", out, size, pool.dtype if op == "attention" else torch.float32)
        if want_logits or op == "qk":
            logits = made("logits", logits, (rows, heads, width), torch.float32)
        if want_logits:
            lse = made("lse", lse, (rows, heads), torch.float32)
        if p is not None:
            p = _weights(p, width)
        self.out, self.logits, self.lse = out, logits, lse
        self._cuda = lead.is_cuda
        self._device = lead.device
        splits, scratch = _scratch(lead, pool, width) if lead.is_cuda else (1, {})
        tensors = {"q": q, "k": k, "v": v, "slots": slots, "count": count, "out": out}
        tensors |= {"logits": logits, "lse": lse, "p": p, "error": None, "partials": None}
        tensors |= {"tickets": None, **scratch}
        self._error = tensors["error"]
        self._alive = tensors  # the addresses below stay valid as long as this plan lives
        fields: dict[str, Any] = {name: address(t) for name, t in tensors.items()}
        fields |= _sizes(q, k, v, slots, count, pool)
        fields |= {"rows": rows, "heads": heads, "width": width, "splits": splits}
        fields |= {"device": lead.device.index or 0}
        fields["scale"] = 1 / math.sqrt(pool.shape[2]) if scale is None else scale
        self._plan = module.AttentionPlan(op, self._cuda, isa, fields)

    def run(self, stream: int | None = None) -> None:
        """Start the operator on a stream's handle (CUDA; None: torch's current) or do it (CPU)."""
        if stream is None:
            stream = torch.cuda.current_stream(self._device).cuda_stream if self._cuda else 0
        self._plan.run(stream)

    def check(self) -> None:
        """Raise ValueError if a run on a GPU met a slot or count out of range; waits for it."""
        if self._error is not None and int(self._error.item()):
            raise ValueError("attention: a slot or a count is out of range")

    def result(self) -> AttentionResult:
        """Give the tensors that run writes."""
        assert self.out is not None
        return AttentionResult(self.out, self.logits, self.lse)


class PolicyPlan:
    """One call of ``rank`` or ``age`` of ``ops.ranking``, which has checked the tensors.

    ``run`` may be repeated as the tensors change. An entry that does not fit raises ValueError on a
    CPU; on a GPU it sets ``error`` (int32 [1]) to 1.
    """

    def __init__(
        self,
        op: str,
        tensors: dict[str, Tensor],
        sizes: dict[str, int],
        error: Tensor | None = None,
        isa: str = "",
    ) -> None:
        module, problem = load()
        if module is None:
            raise RuntimeError(problem)
        self._device = tensors["logits"].device
        self._cuda = self._device.type == "cuda"
        self._alive = tensors, error  # the addresses stay valid as long as this plan lives
        fields = {name: t.data_ptr() for name, t in tensors.items()} | sizes
        fields |= {"error": address(error), "threads": torch.get_num_threads()}
        fields["device"] = self._device.index or 0
        self._plan = module.PolicyPlan(op, self._cuda, isa, fields)

    def run(self, stream: int | None = None) -> None:
        """See ``AttentionPlan.run``."""
        if stream is None:
            stream = torch.cuda.current_stream(self._device).cuda_stream if self._cuda else 0
        self._plan.run(stream)


def read_all(data: Tensor) -> float:
    """Sum a contiguous float32 CPU tensor: times what reading memory costs and nothing else."""
    module, problem = load()
    if module is None:
        raise RuntimeError(problem)
    if data.dtype != torch.float32 or data.is_cuda or not data.is_contiguous():
        raise ValueError(f"data must be contiguous float32 on the CPU, got {describe(data)}")
    return float(module.read(data.data_ptr(), data.numel(), torch.get_num_threads()))


def check_inputs(
    lead: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    slots: Tensor | None,
    count: Tensor | None,
) -> None:
    """Raise ValueError where shapes, dtypes or devices do not fit; lead is q, or p where q is None.

    Reads no values: whether slots and counts are in range shows when the operator runs.
    """
    pool = k if k is not None else v
    assert pool is not None
    name = "q" if q is not None else "p"
    if lead.ndim != 3 or pool.ndim != 3:
        raise ValueError(f"{name}, k and v need 3 dimensions: {describe(lead)}, {describe(pool)}")
    if not pool.shape[1] or lead.shape[1] % pool.shape[1]:
        raise ValueError(f"{name} has {lead.shape[1]} heads, the pool {pool.shape[1]} kv heads")
    if q is not None and (q.dtype != pool.dtype or q.shape[2] != pool.shape[2]):
        raise ValueError(f"q is {describe(q)} but k is {describe(pool)}")
    if k is not None and v is not None and (k.shape != v.shape or k.dtype != v.dtype):
        raise ValueError(f"v is {describe(v)} but k is {describe(k)}")
    for label, t in ((name, lead), ("v", v), ("slots", slots), ("count", count)):
        if t is not None and t.device != pool.device:
            raise ValueError(f"{label} is on {t.device}, the pool on {pool.device}")
    _check_lists("slots", slots, 3, lead.shape[0], pool.shape[1])
    _check_lists("count", count, 2, lead.shape[0], pool.shape[1])


def _check_lists(label: str, lists: Tensor | None, ndim: int, rows: int, kv_heads: int) -> None:
    if lists is None:
        return
    if lists.dtype != torch.int32 or lists.ndim != ndim or lists.shape[0] != rows:
        needed = f"{label} must be int32 with {ndim} dimensions and {rows} rows"
        raise ValueError(f"{needed}, got {describe(lists)}")
    if lists.shape[1] not in (1, kv_heads):
        raise ValueError(f"{label} must have 1 or {kv_heads} lists, got {describe(lists)}")


def _check_strides(**tensors: Tensor | None) -> None:
    for label, t in tensors.items():
        if t is not None and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(f"the last dimension of {label} must be contiguous")


def describe(t: Tensor) -> str:
    """Name a tensor's shape, dtype and device for an error message.

    >>> describe(torch.zeros(2, 3))
    '[2, 3] float32 on cpu'
    """
    return f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


def _weights(p: Tensor, width: int) -> Tensor:
    if p.shape[-1] != width:
        raise ValueError(f"p has {p.shape[-1]} weights for each head, the lists {width}")
    return p.float().contiguous()


def _output(
    name: str, given: Tensor | None, size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if given is None:
        return torch.empty(size, dtype=dtype, device=device)
    if given.shape != size or given.dtype != dtype or given.device != device:
        raise ValueError(f"{name} must be {list(size)} {dtype} on {device}, got {describe(given)}")
    if not given.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    return given


def address(t: Tensor | None) -> int:
    """Where a tensor's numbers lie; 0 for None."""
    return 0 if t is None else t.data_ptr()


def _sizes(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    slots: Tensor | None,
    count: Tensor | None,
    pool: Tensor,
) -> dict[str, int]:
    """Sizes and strides, in elements, as cuda/args.h names them; 0 where a tensor is absent."""
    strides = {
        "q_row": 0 if q is None else q.stride(0),
        "q_head": 0 if q is None else q.stride(1),
        "k_slot": 0 if k is None else k.stride(0),
        "k_head": 0 if k is None else k.stride(1),
        "v_slot": 0 if v is None else v.stride(0),
        "v_head": 0 if v is None else v.stride(1),
        "slots_row": 0 if slots is None else slots.stride(0),
        "slots_list": 0 if slots is None or slots.shape[1] == 1 else slots.stride(1),
        "count_row": 0 if count is None else count.stride(0),
        "count_list": 0 if count is None or count.shape[1] == 1 else count.stride(1),
    }
    pool_slots, kv_heads, head_dim = pool.shape
    return strides | {
        "dtype": codes()[pool.dtype],
        "pool_slots": pool_slots,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "threads": torch.get_num_threads(),
    }


def _scratch(lead: Tensor, pool: Tensor, width: int) -> tuple[int, dict[str, Tensor | None]]:
    """Choose thread blocks per list so that the GPU is full, and allocate what they meet in."""
    blocks = lead.shape[0] * pool.shape[1]
    full = 3 * torch.cuda.get_device_properties(lead.device).multi_processor_count
    splits = max(1, min(-(-full // max(1, blocks)), width // 64))
    size = (lead.shape[0], lead.shape[1], splits, pool.shape[2] + 2)
    device = lead.device
    return splits, {
        "error": torch.zeros(1, dtype=torch.int32, device=device),
        "partials": torch.empty(size, dtype=torch.float32, device=device),
        "tickets": torch.zeros(lead.shape[:2], dtype=torch.int32, device=device),
    }
