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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError
from .formats import FORMATS, PLAIN
from .pages import PAGE, Pages

# As cuda/cpu/dispatch.cpp names them.
ISAS = ("baseline", "avx2", "avx512", "neon", "neon_bf16")
_HEAD_DIMS = (16, 32, 64, 80, 96, 128)
_NAMES = (
    "AttentionPlan",
    "PolicyPlan",
    "cpu_fused",
    "cpu_isa",
    "formats",
    "gemm",
    "has_isa",
    "read",
    "with_cuda",
)
_MAX_GROUP = 64  # query heads that may share a kv head
MAX_TIERS = 8  # of one call, as cuda/args.h has it


class Backend(NamedTuple):
    """Which kernels serve: ``cuda``, ``cpu`` or ``torch``, and why in one line."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Sifting:
    """Of a tier only the values that matter are read; what is left out is given to their mean.

    A head leaves out the lightest of the tier's tokens, by its own weights: at most the share
    ``most`` of what the tier gets. A threshold lies a whole number of sixteenths of a nat below the
    heaviest's logit, the nearest that leaves out no more, and at most 255; who is not below it is
    read. Heads that share a KV head read what any of them needs.

    Attributes:
        most: fp32 ``[rows]``; 0: everything is read.
        mean: fp32 ``[rows, kv_heads, head_dim]``, the mean of a row's values in the tier.
        spent: fp32 ``[rows, kv_heads, 2]``, added to: the share of a head's whole attention that
            was left out, mean of those that share the KV head, and values that were read.
    """

    most: Tensor
    mean: Tensor
    spent: Tensor


@dataclass(frozen=True, eq=False)
class Tier:
    """A pool and the lists of its slots that rows attend to: shapes as in ``ops.attention``.

    With ``pages`` k and v are the two sides of ``[pages, bytes]`` uint8 that it describes.
    """

    k: Tensor | None
    v: Tensor | None
    slots: Tensor | None = None
    count: Tensor | None = None
    pages: Pages | None = None
    sifting: Sifting | None = None

    @property
    def pool(self) -> Tensor:
        """Keys, or values where a call takes no keys."""
        pool = self.k if self.k is not None else self.v
        assert pool is not None
        return pool

    @property
    def pool_slots(self) -> int:
        """Slots of the pool."""
        return len(self.pool) * (PAGE if self.pages else 1)

    @property
    def heads(self) -> tuple[int, int]:
        """KV heads and numbers of each."""
        if self.pages:
            return self.pages.key.heads, self.pages.key.head_dim
        return self.pool.shape[1], self.pool.shape[2]

    @property
    def width(self) -> int:
        """Entries in each list."""
        return self.pool_slots if self.slots is None else self.slots.shape[-1]


class AttentionResult(NamedTuple):
    """What one attention call returns: out, and logits and lse when asked for."""

    out: Tensor  # [rows, heads, head_dim], dtype of q
    logits: Tensor | None = None  # [rows, heads, all widths] fp32 scaled q.k; -inf beyond count
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


def cpu_isa() -> str | None:
    """The instruction set that the CPU kernels use here; None where there are no kernels."""
    module, _ = load()
    return None if module is None else str(module.cpu_isa())


def loaded(kind: str = "cpu") -> bool:
    """Whether the native module is there, not switched off, and built for ``cpu`` or ``cuda``."""
    module, _ = load()
    return module is not None and (kind == "cpu" or (kind == "cuda" and bool(module.with_cuda)))


@functools.cache
def codes() -> dict[torch.dtype | str, int]:
    """The numbers by which the module knows formats, rows of its table: by name, and plain ones by
    their dtype too.
    """
    module, _ = load()
    names = list(FORMATS) if module is None else [name for name, *_ in module.formats]
    known: dict[torch.dtype | str, int] = {name: code for code, name in enumerate(names)}
    return known | {row.dtype: known[row.name] for row in PLAIN}


@functools.cache
def fused_kernels(kind: str, isa: str = "") -> Any:
    """The native kernels of ``ops.fused`` for a ``cpu`` or ``cuda``; None where they are not."""
    module, _ = load()
    if module is None or not loaded(kind):
        return None
    return module.cuda_fused if kind == "cuda" else module.cpu_fused(isa)


def usable(q: Tensor, pool: Tensor) -> bool:
    """Whether a native attention kernel exists for these tensors' device, dtype and sizes."""
    return _usable(q, pool.dtype, pool.shape[1], pool.shape[-1])


def _usable(q: Tensor, dtype: torch.dtype, kv_heads: int, head_dim: int) -> bool:
    if not loaded(q.device.type) or (q.requires_grad and torch.is_grad_enabled()):
        return False
    group = q.shape[1] // max(1, kv_heads)
    return dtype in codes() and head_dim in _HEAD_DIMS and group <= _MAX_GROUP


def serves(q: Tensor, tier: Tier) -> bool:
    """Whether a native attention kernel exists for a tier."""
    return _usable(q, q.dtype if tier.pages else tier.pool.dtype, *tier.heads)


class Scratch:
    """Memory on a GPU for plans that never run at the same time, such as those of a step's layers.

    What one run leaves there no other reads. It grows; plans made before keep what they have.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def lend(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """At least ``count`` numbers, to everybody the same; a name has one dtype and device."""
        held = self._held.get(name)
        if held is None or len(held) < count:
            held = self._held[name] = torch.empty(max(1, count), dtype=dtype, device=device)
        return held


class AttentionPlan:
    """One native attention call, validated once; ``run`` may be repeated as the tensors change.

    Arguments as in ``ops.attention.tiered_attention``; out, logits and lse are allocated unless
    given. ``op`` is ``attention``, or over one tier ``qk`` (writes logits, unscaled) or ``pv`` (p
    in place of q and k; writes a float32 out). Raises ValueError naming the argument that is wrong.
    Slots and counts are read anew by every run: on a CPU one that is out of range raises ValueError
    there; on a GPU it sets a flag that ``check`` reads, since reading it waits for the device.
    Over pages and where a tier is sifted a GPU needs ``scratch``, its own where none is given.
    """

    def __init__(
        self,
        q: Tensor | None,
        tiers: Sequence[Tier],
        *,
        scale: float | None = None,
        want_logits: bool = False,
        out: Tensor | None = None,
        logits: Tensor | None = None,
        lse: Tensor | None = None,
        op: str = "attention",
        p: Tensor | None = None,
        isa: str = "",
        scratch: Scratch | None = None,
    ) -> None:
        module, problem = load()
        if module is None:
            raise RuntimeError(problem)
        lead = q if q is not None else p
        assert lead is not None
        check_tiers(lead, q, tiers)
        _check_kernel(lead, tiers)
        width = sum(tier.width for tier in tiers)
        rows, heads = lead.shape[:2]
        kv_heads, head_dim = tiers[0].heads
        made = functools.partial(_output, device=lead.device)
        if op != "qk":
            size = (rows, heads, head_dim)
            out = made("out", out, size, lead.dtype if op == "attention" else torch.float32)
        if want_logits or op == "qk":
            logits = made("logits", logits, (rows, heads, width), torch.float32)
        if want_logits:
            lse = made("lse", lse, (rows, heads), torch.float32)
        if p is not None:
            p = _weights(p, width)
        self.out, self.logits, self.lse = out, logits, lse
        self._several = len(tiers) > 1
        self._cuda = _on_gpu(lead)
        self._device = lead.device
        tensors = {"q": q, "out": out, "logits": logits, "lse": lse, "p": p}
        splits, beside = (
            _beside(lead, tiers, width, scratch or Scratch()) if self._cuda else (1, {})
        )
        tensors |= dict.fromkeys(_BESIDE) | beside
        self._error = tensors["error"]
        self._alive = tensors, tuple(tiers)  # addresses stay valid as long as this plan
        fields: dict[str, Any] = {name: address(t) for name, t in tensors.items()}
        fields |= {"tiers": [_tier_fields(tier) for tier in tiers]}
        dtype = q.dtype if q is not None else tiers[0].pool.dtype
        fields |= {"dtype": codes()[dtype], "kv_heads": kv_heads, "head_dim": head_dim}
        fields |= _sizes(q, lead.device) | {"rows": rows, "heads": heads, "splits": splits}
        fields["scale"] = 1 / math.sqrt(head_dim) if scale is None else scale
        self._plan = module.AttentionPlan(op, self._cuda, isa, fields)

    def run(self, stream: int | None = None) -> None:
        """Start the operator on a stream's handle (CUDA; None: torch's current) or do it (CPU)."""
        if stream is None:
            stream = torch.cuda.current_stream(self._device).cuda_stream if self._cuda else 0
        self._plan.run(stream)

    def check(self) -> None:
        """Raise ValueError if a run on a GPU met a slot or count out of range; waits for it."""
        wrong = 0 if self._error is None else int(self._error.item())
        if wrong:
            whose = f" of tier {wrong - 1}" if self._several else ""
            raise ValueError(f"attention: a slot or a count{whose} is out of range")

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


def check_tiers(lead: Tensor, q: Tensor | None, tiers: Sequence[Tier]) -> None:
    """Raise ValueError where shapes, dtypes or devices do not fit; lead is q, or p where q is None.

    Reads no values: whether slots and counts are in range shows when the operator runs.
    """
    if not 1 <= len(tiers) <= MAX_TIERS:
        raise ValueError(f"a call takes 1 to {MAX_TIERS} tiers, got {len(tiers)}")
    for number, tier in enumerate(tiers):
        with naming_tier(number, tiers):
            _check_tier(lead, q, tier)
            if tier.heads[0] != tiers[0].heads[0]:
                raise ValueError(f"its pool is {describe(tier.pool)}: other kv heads than tier 0")


@contextmanager
def naming_tier(number: int, tiers: Sequence[Tier]) -> Iterator[None]:
    """Let a ValueError say which tier it is about, where there are several."""
    try:
        yield
    except ValueError as error:
        if len(tiers) == 1:
            raise
        raise ValueError(f"tier {number}: {error}") from None


def _check_tier(lead: Tensor, q: Tensor | None, tier: Tier) -> None:
    pool, name = tier.pool, "q" if q is not None else "p"
    k, v, slots, count = tier.k, tier.v, tier.slots, tier.count
    if lead.ndim != 3 or pool.ndim != (2 if tier.pages else 3):
        raise ValueError(f"{name}, k and v need 3 dimensions: {describe(lead)}, {describe(pool)}")
    kv_heads, head_dim = tier.heads
    if not kv_heads or lead.shape[1] % kv_heads:
        raise ValueError(f"{name} has {lead.shape[1]} heads, the pool {kv_heads} kv heads")
    if q is not None and q.shape[2] != head_dim:
        raise ValueError(f"q is {describe(q)} but k is {describe(pool)}")
    if tier.pages:
        _check_pages(tier.pages, k, v)
    elif q is not None and q.dtype != pool.dtype:
        raise ValueError(f"q is {describe(q)} but k is {describe(pool)}")
    elif k is not None and v is not None and (k.shape != v.shape or k.dtype != v.dtype):
        raise ValueError(f"v is {describe(v)} but k is {describe(k)}")
    for label, t in ((name, lead), ("v", v), ("slots", slots), ("count", count)):
        if t is not None and t.device != pool.device:
            raise ValueError(f"{label} is on {t.device}, the pool on {pool.device}")
    _check_lists("slots", slots, 3, lead.shape[0], kv_heads)
    _check_lists("count", count, 2, lead.shape[0], kv_heads)
    if tier.sifting:
        _check_sifting(tier.sifting, lead, kv_heads, head_dim)


def _check_pages(pages: Pages, k: Tensor | None, v: Tensor | None) -> None:
    for label, side, t in (("k", pages.key, k), ("v", pages.value, v)):
        if t is None or t.dtype != torch.uint8 or t.ndim != 2 or t.shape[1] != side.nbytes:
            has = "missing" if t is None else describe(t)
            raise ValueError(f"{label} must be uint8 [pages, {side.nbytes}] ({pages.name}): {has}")


def _check_sifting(sifting: Sifting, lead: Tensor, kv_heads: int, head_dim: int) -> None:
    rows = len(lead)
    shapes = {"most": (rows,), "mean": (rows, kv_heads, head_dim), "spent": (rows, kv_heads, 2)}
    for label, shape in shapes.items():
        t: Tensor = getattr(sifting, label)
        if t.dtype != torch.float32 or t.shape != shape or t.device != lead.device:
            raise ValueError(f"{label} must be float32 {list(shape)}, got {describe(t)}")
        if not (t if t.ndim == 1 else t[:1]).is_contiguous():
            raise ValueError(f"{label} must be contiguous for each row")


def _check_kernel(lead: Tensor, tiers: Sequence[Tier]) -> None:
    """Refuse what the definition allows and no kernel can do."""
    _check_strides(q=lead)
    for number, tier in enumerate(tiers):
        with naming_tier(number, tiers):
            dtype = lead.dtype if tier.pages else tier.pool.dtype
            if dtype not in codes() or tier.heads[1] not in _HEAD_DIMS:
                raise ValueError(f"no native kernel for a pool of {describe(tier.pool)}")
            _check_strides(k=tier.k, v=tier.v, slots=tier.slots)
            if tier.pages and len({t.stride(0) for t in (tier.k, tier.v) if t is not None}) > 1:
                raise ValueError("k and v must be the two sides of the same pages")


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


def _stride(t: Tensor | None, dim: int) -> int:
    """A stride in elements; 0 where there is no tensor, or one list for all heads."""
    return 0 if t is None or (dim == 1 and t.shape[1] == 1) else t.stride(dim)


def _sizes(q: Tensor | None, device: torch.device) -> dict[str, int]:
    """How queries lie and where the work is done, as cuda/args.h names it."""
    return {
        "q_row": _stride(q, 0),
        "q_head": _stride(q, 1),
        "threads": torch.get_num_threads(),
        "device": device.index or 0,
    }


def _page_fields(tier: Tier) -> dict[str, Any]:
    """How a tier's pages lie; zeros where it has none."""
    pages = tier.pages
    if pages is None:
        return {"paged": 0, "page": 0, "key": (0, 0, 0, 0), "value": (0, 0, 0, 0)}
    sides = {"key": pages.key, "value": pages.value}
    return {"paged": 1, "page": tier.pool.stride(0)} | {
        name: (codes()[side.format], side.block, side.codes, side.scales)
        for name, side in sides.items()
    }


def _sifting_fields(sifting: Sifting | None) -> dict[str, int]:
    """What a tier leaves unread; zeros where nothing."""
    if sifting is None:
        return dict.fromkeys(("most", "mean", "spent", "mean_row", "spent_row"), 0)
    rows = {"mean_row": sifting.mean.stride(0), "spent_row": sifting.spent.stride(0)}
    return {name: address(t) for name, t in vars(sifting).items()} | rows


def _tier_fields(tier: Tier) -> dict[str, Any]:
    """One tier's addresses, sizes and strides, as cuda/args.h names them."""
    k, v, slots, count = tier.k, tier.v, tier.slots, tier.count
    plain = (None, None) if tier.pages else (k, v)
    return {
        "width": tier.width,
        "pool_slots": tier.pool_slots,
        "k": address(k),
        "v": address(v),
        "slots": address(slots),
        "count": address(count),
        **{f"{side}_slot": _stride(t, 0) for side, t in zip("kv", plain, strict=True)},
        **{f"{side}_head": _stride(t, 1) for side, t in zip("kv", plain, strict=True)},
        **_page_fields(tier),
        **_sifting_fields(tier.sifting),
        "slots_row": _stride(slots, 0),
        "slots_list": _stride(slots, 1),
        "count_row": _stride(count, 0),
        "count_list": _stride(count, 1),
    }


# What calls on a GPU need besides what they are given, as cuda/args.h names it.
_BESIDE = ("error", "partials", "tickets", "sieve", "chosen", "rest")


def _on_gpu(tensor: Tensor) -> bool:
    """Whether it is a GPU's kernels that serve."""
    return tensor.is_cuda


def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _beside(
    lead: Tensor, tiers: Sequence[Tier], width: int, scratch: Scratch
) -> tuple[int, dict[str, Tensor]]:
    """Choose thread blocks per list so that the GPU is full, and find memory to work in."""
    (rows, heads), (kv_heads, head_dim), device = lead.shape[:2], tiers[0].heads, lead.device
    full = 3 * _multiprocessors(device)
    splits = max(1, min(-(-full // max(1, rows * kv_heads)), width // 64))
    size = (rows, heads, splits, head_dim + 2)
    found = {
        "error": torch.zeros(1, dtype=torch.int32, device=device),
        "partials": torch.empty(size, dtype=torch.float32, device=device),
        "tickets": torch.zeros(rows, heads, dtype=torch.int32, device=device),
    }
    lend = functools.partial(scratch.lend, device=device)
    sifts = any(tier.sifting for tier in tiers)
    if sifts or any(tier.pages for tier in tiers):
        found["sieve"] = lend("sieve", rows * heads * width, torch.float32)
    if sifts:
        found["chosen"] = lend("chosen", rows * kv_heads * width, torch.int32)
        found["rest"] = lend("rest", rows * heads * (MAX_TIERS + 1) * 2, torch.float32)
    return splits, found
