"""Reads what a weight file says about itself: its safetensors header.

A safetensors file is ``<8 bytes: header length n, little endian><n bytes of JSON><tensor data>``;
the JSON maps each tensor's name to its dtype, shape and byte range. The ``safetensors`` library has
the last word on every header; our own checks come first because its messages name neither file nor
tensor.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from .folder_files import (
    DOWNLOAD_AGAIN,
    MAX_HEADER_BYTES,
    UNQUANTISED,
    open_file,
    parse_object,
    refuse_foreign,
    regular_file_size,
    show,
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes ``[start, stop)`` of ``file``, row-major, little endian.

    With ``columns``, (first, all): of a matrix of all columns only ``shape``'s from the first on.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int
    columns: tuple[int, int] | None = field(default=None, kw_only=True)

    @property
    def nbytes(self) -> int:
        """Size of the tensor in the file, in bytes."""
        return self.stop - self.start

    def split(self, count: int) -> list["TensorInfo"]:
        """Cut the tensor into ``count`` pieces of equally many rows, one behind the other.

        Raises CheckpointError where the rows do not divide.
        """
        if count == 1:
            return [self]
        if not self.shape or self.shape[0] % count:
            raise CheckpointError(
                f"{show(self.name)} is {list(self.shape)}: "
                f"its rows do not split into {count} pieces"
            )
        shape = (self.shape[0] // count, *self.shape[1:])
        size = self.nbytes // count
        starts = [self.start + index * size for index in range(count)]
        return [replace(self, shape=shape, start=at, stop=at + size) for at in starts]

    def part(self, dim: int, rank: int, size: int) -> "TensorInfo":
        """One of ``size`` equal parts along ``dim``, 0 or 1."""
        if dim == 0:
            return self.split(size)[rank]
        rows, columns = self.shape
        own = columns // size
        return replace(self, shape=(rows, own), columns=(rank * own, columns))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Check one safetensors file and list its tensors by name, in order of their bytes.

    After this every byte range is inside the file, ranges neither overlap nor leave holes, and
    each is as long as its shape and dtype say. The tensor data itself is not read.

    Raises CheckpointError naming the file, and the tensor where there is one.
    """
    size = regular_file_size(path)
    with open_file(path) as file:
        data_start = 8 + _header_length(path, file.read(64), size)
        file.seek(8)
        text = file.read(data_start - 8)
    entries = parse_object(text, f"{path}: invalid safetensors header")
    entries.pop("__metadata__", None)
    tensors = [_tensor(path, name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda t: (t.start, t.stop))
    _check_coverage(path, tensors, data_start, size)
    _ask_library(path)
    return {tensor.name: tensor for tensor in tensors}


def _header_length(path: Path, head: bytes, size: int) -> int:
    if size == 0:
        message = f"{path} is empty (0 bytes): the download did not start"
        raise CheckpointError(message, hint=DOWNLOAD_AGAIN)
    refuse_foreign(path, head)
    if size < 8:
        message = f"{path} is truncated: it has {size} bytes, a header alone needs more"
        raise CheckpointError(message, hint=DOWNLOAD_AGAIN)
    length = int.from_bytes(head[:8], "little")
    if not head.strip(b"\0"):
        message = f"{path} is not a safetensors file: it starts with zeros, a download never filled"
        raise CheckpointError(message, hint=DOWNLOAD_AGAIN)
    if not 2 <= length <= MAX_HEADER_BYTES or head[8:9] not in (b"", b"{"):
        raise CheckpointError(f"{path} is not a safetensors file", hint=DOWNLOAD_AGAIN)
    if 8 + length > size:
        message = f"{path} is truncated: it has {size:,} of at least {8 + length:,} bytes"
        raise CheckpointError(message, hint=DOWNLOAD_AGAIN)
    return length


def _tensor(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {show(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} has no proper dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(
            f"{where} has dtype {show(str(code))}, which is not read",
            hint=UNQUANTISED,
        )
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has a shape or data_offsets that are not lists of sizes")
    start, stop = offsets
    needed = math.prod(shape) * DTYPES[code].itemsize
    if stop - start != needed:
        raise CheckpointError(
            f"{where} needs {needed:,} bytes for its shape and dtype, not {stop - start:,}"
        )
    return TensorInfo(name, DTYPES[code], tuple(shape), path, data_start + start, data_start + stop)


def _is_sizes(value: object) -> bool:
    # 64 dimensions is what torch can hold; bool is an int in Python, but not a size.
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def _check_coverage(path: Path, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    covered = data_start
    for tensor in tensors:
        if tensor.start != covered:
            kind = "overlaps the one before it" if tensor.start < covered else "leaves a hole"
            raise CheckpointError(f"{path}: tensor {show(tensor.name)} {kind} in the file")
        covered = tensor.stop
    if size != covered:
        kind = "is truncated" if size < covered else "has trailing bytes"
        message = f"{path} {kind}: it has {size:,} bytes, its header says {covered:,}"
        raise CheckpointError(message, hint=DOWNLOAD_AGAIN)


def _ask_library(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        # What the library quotes of the file may be as long as the file.
        raise CheckpointError(f"{path}: {str(error)[:200]}", hint=DOWNLOAD_AGAIN) from error
