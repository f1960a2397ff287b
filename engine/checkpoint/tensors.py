"""A folder of safetensors files as one checked set of tensors, read one by one.

Each tensor is read through a memory map of just its own bytes, straight to the device and dtype
where it will live, so that beside the model itself never more than one tensor is in memory.
"""

import mmap
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import torch
from torch import nn

from ..errors import CheckpointError
from .folder import read_folder
from .folder_files import first_five, open_file, read_json, show
from .header import TensorInfo
from .layouts import Stored
from .names import Rename, target_names
from .packed import PackedInfo, grouped, settings_of

__all__ = ["Checkpoint", "Fit", "TensorInfo", "fit_weights", "load_weights", "read_json"]

# Smaller tensors are copied: a map of its own costs more than they do.
MAPPED_FROM = 1 << 16


class Checkpoint:
    """The tensors of one folder, by the names they have on disk.

    Attributes:
        tensors: what a model is made of; a weight in few bits is one ``PackedInfo``.
        on_disk: the tensors of the files, those of such a weight one by one.
        settings: what config.json says about weights in few bits.

    >>> with Checkpoint.open(Path("weights/tiny")) as checkpoint:      # doctest: +SKIP
    ...     weight = checkpoint.read("lm_head.weight", "cpu", torch.float32)
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self.on_disk = tensors
        self.total_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self._files: dict[Path, tuple[BinaryIO, int]] = {}
        for path in sorted({tensor.file for tensor in tensors.values()}):
            file = open_file(path)
            self._files[path] = file, os.fstat(file.fileno()).st_size
        config = folder / "config.json"
        try:
            self.settings = settings_of(folder, read_json(config) if config.exists() else {})
            self.tensors = grouped(tensors, self._lazily)
        except CheckpointError:
            self.close()
            raise

    @property
    def packed(self) -> bool:
        """Whether any weight is in few bits."""
        return any(isinstance(info, PackedInfo) for info in self.tensors.values())

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Find the weight files of a folder and check all their headers; reads no tensor yet.

        Accepts what ``checkpoint.folder.read_folder`` accepts; raises CheckpointError otherwise.
        """
        return cls(folder, read_folder(folder))

    def read(
        self, name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Copy one tensor to a device and dtype (default: as stored), shape as in ``tensors``.

        Raises CheckpointError if the file has changed size since it was opened.
        """
        return self.read_at(self.tensors[name], device, dtype)

    def read_at(
        self,
        info: TensorInfo,
        device: str | torch.device,
        dtype: torch.dtype | None,
        mapped: bool = False,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Copy what ``info`` describes: a tensor, or rows of one (``TensorInfo.split``).

        With ``mapped``, a large tensor that a CPU can use as it lies in the file is not copied: it
        stays a private map of the file for as long as it lives. With ``into``, it is copied there.
        """
        assert not isinstance(info, PackedInfo), "its numbers are what ``stored`` says"
        dtype = dtype or info.dtype
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype, device=device)
        view, source = self._map(info)
        usable = torch.device(device).type == "cpu" and dtype == info.dtype and not info.columns
        if mapped and into is None and usable and info.nbytes >= MAPPED_FROM:
            return source
        target = torch.empty(info.shape, dtype=dtype, device=device) if into is None else into
        target.copy_(source)
        del source  # nothing may point into the map when it is closed
        view.close()
        return target

    def stored(self, info: TensorInfo) -> Stored:
        """What ``info`` describes as it is stored, large tensors as maps of the file."""
        if isinstance(info, PackedInfo):
            return info.stored(self._lazily, self.settings)
        return self._lazily(info)

    def _lazily(self, info: TensorInfo) -> torch.Tensor:
        return self.read_at(info, "cpu", None, mapped=True)

    def equal(self, one: str, other: str, chunk: int = 16 << 20) -> bool:
        """Tell whether two tensors hold the same dtype, shape and bytes; reads 16 MB at a time."""
        a, b = self.tensors[one], self.tensors[other]
        if isinstance(a, PackedInfo) and isinstance(b, PackedInfo) and a.layout == b.layout:
            return a.parts.keys() == b.parts.keys() and all(
                self._same_bytes(a.parts[leaf], b.parts[leaf], chunk) for leaf in a.parts
            )
        packed = isinstance(a, PackedInfo) or isinstance(b, PackedInfo)
        return not packed and self._same_bytes(a, b, chunk)

    def _same_bytes(self, a: TensorInfo, b: TensorInfo, chunk: int) -> bool:
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        fd_a, fd_b = (self._files[info.file][0].fileno() for info in (a, b))
        return all(
            os.pread(fd_a, size, a.start + at) == os.pread(fd_b, size, b.start + at)
            for at in range(0, a.nbytes, chunk)
            for size in [min(chunk, a.nbytes - at)]
        )

    def close(self) -> None:
        """Close the files; tensors that were read stay valid: copies, or maps of their own."""
        for file, _ in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _map(self, info: TensorInfo) -> tuple[mmap.mmap, torch.Tensor]:
        """A map of just the tensor's bytes, and the tensor as it lies there.

        Touching a map beyond the end of its file kills the process (SIGBUS): the size is checked
        just before.
        """
        file, size = self._files[info.file]
        now = os.fstat(file.fileno()).st_size
        if now != size:
            raise CheckpointError(
                f"{info.file} changed while it was read: it had {size:,} bytes, now {now:,}",
                hint="wait until nothing writes to it, then start again",
            )
        offset = info.start % mmap.ALLOCATIONGRANULARITY
        start = info.start - offset
        # A private writable map, never written to: torch warns about read-only memory.
        view = mmap.mmap(file.fileno(), info.stop - start, access=mmap.ACCESS_COPY, offset=start)
        raw = torch.frombuffer(view, dtype=torch.uint8, count=info.nbytes, offset=offset)
        if offset % info.dtype.itemsize:  # legal in the format, but not for a typed view
            raw = raw.clone()
        numbers = raw.view(info.dtype)
        if info.columns is None:
            return view, numbers.view(info.shape)
        first, columns = info.columns
        return view, numbers.view(-1, columns)[:, first : first + info.shape[1]]


Placement = Callable[[str, torch.dtype], torch.Tensor | None]


def anywhere(name: str, dtype: torch.dtype) -> None:
    """Every parameter has memory of its own."""


# Takes a parameter by its name, given whether it is packed and a way to read it; whether it did.
Taker = Callable[[str, bool, Callable[[], Stored]], bool]


def nobody(name: str, packed: bool, read: Callable[[], Stored]) -> bool:
    """Every parameter is filled as it is."""
    return False


# What of a stored tensor the parameter of a name holds.
Part = Callable[[str, TensorInfo], TensorInfo]


def whole(name: str, info: TensorInfo) -> TensorInfo:
    """All of it."""
    return info


def load_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    rename: Rename,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    tied: Mapping[str, str] | None = None,
    mapped: bool = False,
    placement: Placement = anywhere,
    taker: Taker = nobody,
    part: Part = whole,
) -> list[str]:
    """Fill the parameters of a module built on the meta device, one tensor at a time.

    Args:
        module: parameters and persistent buffers still on "meta" are filled; others are left alone,
            so that a second checkpoint can supply what the first one lacks.
        checkpoint: where the tensors come from.
        rename: name on disk -> name in ``module``, or None for a tensor known to be unused, or
            several names, which share the rows of a fused tensor equally and in this order.
        device: where the parameters will live.
        dtype: of all floating-point parameters; a submodule with the attribute
            ``keep_float32 = True`` keeps its own ones in float32.
        tied: name -> name of the parameter it shares, where the config ties them. The first may be
            absent from the file; if it is present it must be equal.
        mapped: leave large tensors in the file's map where a CPU can use them as they lie.
        placement: name in ``module`` and dtype -> where on ``device`` to read it into, of the
            parameter's shape; None: memory of its own.
        taker: is offered every parameter first; what it takes is left to it.
        part: what of a tensor a parameter holds, where several processes share it.

    Returns:
        The names on disk that ``rename`` said are unused.

    Raises:
        CheckpointError: with the missing, unexpected and mis-shaped tensors in three lists.
    """
    fit = fit_weights(module, checkpoint, rename, tied, part=part)
    # In the order of the file: sequential reading is what a disk does best.
    for name, info in sorted(fit.sources.items(), key=lambda item: (item[1].file, item[1].start)):
        if taker(name, isinstance(info, PackedInfo), partial(checkpoint.stored, info)):
            continue
        own = _dtype(module, name, dtype)
        tensor = checkpoint.read_at(info, device, own, mapped, placement(name, own))
        _assign(module, name, tensor)
    for name, other in fit.shared.items():
        if taker(name, False, partial(module.get_parameter, other)):
            continue
        owner, leaf = _owner(module, name)
        owner._parameters[leaf] = module.get_parameter(other)
    return fit.ignored


class Fit(NamedTuple):
    """How a checkpoint fills a module: by our names, where each tensor comes from.

    ``shared`` are tied parameters and what they share; ``ignored`` the unused names on disk.
    """

    sources: dict[str, TensorInfo]
    shared: dict[str, str]
    ignored: list[str]


def fit_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    rename: Rename,
    tied: Mapping[str, str] | None = None,
    elsewhere: str = "",
    part: Part = whole,
) -> Fit:
    """Check names, shapes and kinds of all tensors against a module, and read none of them.

    Arguments and errors are those of ``load_weights``; what begins with ``elsewhere`` is not wanted
    here, because another checkpoint supplies it.
    """
    wanted = {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if tensor.is_meta and not (elsewhere and name.startswith(elsewhere))
    }
    sources, ignored, unexpected = _match_names(checkpoint, rename, wanted)
    sources = {name: part(name, info) for name, info in sources.items()}
    shared = {name: other for name, other in (tied or {}).items() if name in wanted}
    for name, other in shared.items():
        _check_tied(checkpoint, sources.pop(name, None), sources.get(other))
    missing = [name for name in wanted if name not in sources and name not in shared]
    misfits = [_misfit(info, wanted[name]) for name, info in sources.items()]
    _refuse_differences(checkpoint, missing, unexpected, list(filter(None, misfits)))
    return Fit(sources, shared, ignored)


def _match_names(
    checkpoint: Checkpoint, rename: Rename, wanted: Mapping[str, object]
) -> tuple[dict[str, TensorInfo], list[str], list[str]]:
    """Sort the tensors on disk into: by the name they fill, known to be unused, unexpected."""
    sources: dict[str, TensorInfo] = {}
    ignored: list[str] = []
    unexpected: list[str] = []
    for info in checkpoint.tensors.values():
        names = target_names(rename(info.name))
        if not names:
            ignored.append(info.name)
            continue
        if any(name not in wanted for name in names):
            (ignored if _is_idle_bias(checkpoint, info) else unexpected).append(show(info.name))
            continue
        for name, piece in zip(names, info.split(len(names)), strict=True):
            if name in sources:
                both = f"{show(sources[name].name)} and {show(info.name)}"
                raise CheckpointError(f"{checkpoint.folder}: {both} are both {name}")
            sources[name] = piece
    return sources, ignored, unexpected


def _is_idle_bias(checkpoint: Checkpoint, info: TensorInfo) -> bool:
    """Whether this is the bias of zeros that GPTQ gives layers that have none."""
    layer, _, leaf = info.name.rpartition(".")
    packed = isinstance(checkpoint.tensors.get(f"{layer}.weight"), PackedInfo)
    return leaf == "bias" and packed and not checkpoint.read(info.name).any()


def _check_tied(checkpoint: Checkpoint, info: TensorInfo | None, other: TensorInfo | None) -> None:
    """A tied parameter may be stored a second time, but not with other values."""
    if info and other and not checkpoint.equal(info.name, other.name):
        raise CheckpointError(
            f"{checkpoint.folder}: {show(info.name)} differs from {show(other.name)}, "
            "but the config ties them",
            hint="set tie_word_embeddings to false in config.json if they are meant to differ",
        )


def _refuse_differences(
    checkpoint: Checkpoint, missing: list[str], unexpected: list[str], misshaped: list[str]
) -> None:
    # A fused tensor that does not fit is mis-shaped for each of its pieces.
    misshaped = list(dict.fromkeys(misshaped))
    lists = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped}
    found = [f"{len(names)} {kind} ({first_five(names)})" for kind, names in lists.items() if names]
    if found:
        raise CheckpointError(
            f"{checkpoint.folder}: the tensors do not fit the model: {'; '.join(found)}",
            hint="config.json and the weights may be of different models",
        )


def _misfit(info: TensorInfo, target: torch.Tensor) -> str | None:
    """Why a stored tensor cannot fill a parameter, or None if it can."""
    if info.shape != tuple(target.shape):
        return f"{info.name} is {list(info.shape)}, the model needs {list(target.shape)}"
    if target.is_floating_point() and not info.dtype.is_floating_point:
        return f"{info.name} has {info.dtype}: no weight, and none in a form that is read"
    return None


def _dtype(module: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    owner, leaf = _owner(module, name)
    own: torch.dtype = getattr(owner, leaf).dtype
    if not own.is_floating_point:
        return own
    return torch.float32 if getattr(owner, "keep_float32", False) else dtype


def _assign(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor where the meta tensor of that name was, as parameter or buffer alike."""
    owner, leaf = _owner(module, name)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
