"""Reads pickled weights (``pytorch_model*.bin``) without running what a pickle could run.

A pickle is a program. ``torch.load(weights_only=True)`` runs only the few steps that build tensors
and stops at any other one; here that becomes an error which names the file.
"""

import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .folder_files import (
    BIN_INDEX,
    BIN_SINGLE,
    DOWNLOAD_AGAIN,
    UNQUANTISED,
    first_five,
    open_file,
    read_json,
    regular_file_size,
    show,
)
from .header import DTYPES
from .layouts import Stored


@dataclass(frozen=True)
class Piece:
    """One tensor of a shard, read when it is needed."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Stored]

    def numbers(self) -> Tensor:
        """Read a tensor that is stored as it is written."""
        found = self.read()
        assert isinstance(found, Tensor), "a packer reads the others"
        return found

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta").nbytes


def read_pickle(path: Path) -> list[Piece]:
    """List the tensors of one file; their data is mapped and not read.

    Raises CheckpointError naming the file, and the entry where there is one.
    """
    return [_checked(path, *item) for item in _load(path).items()]


def pickled_names(folder: Path) -> set[str]:
    """The names of all tensors in a folder of pickled weights; reads no tensor."""
    if (folder / BIN_INDEX).exists():
        return set(_weight_map(folder))
    return {piece.name for piece in read_pickle(pickled_files(folder)[0])}


def pickled_files(folder: Path) -> list[Path]:
    """The pickled weight files of a folder, in the order of their names."""
    if (folder / BIN_INDEX).exists():
        names = sorted(set(_weight_map(folder).values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of {len(names)} files of {BIN_INDEX}: "
                f"{first_five(missing)}",
                hint=f"download {first_five(missing)}",
            )
        return [folder / name for name in names]
    if (folder / BIN_SINGLE).exists():
        return [folder / BIN_SINGLE]
    if any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has safetensors weights already", hint="load it as it is with --model"
        )
    raise CheckpointError(f"{folder} has neither {BIN_SINGLE} nor {BIN_INDEX}")


def _weight_map(folder: Path) -> dict[str, str]:
    """Names to files, as the index says; the files' names must stay in the folder."""
    path = folder / BIN_INDEX
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{path} has no weight_map", hint=DOWNLOAD_AGAIN)
    for name in listed.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.bin", name, re.ASCII):
            raise CheckpointError(f"{path} names {show(str(name))}, not a plain .bin file")
    return listed


def _load(path: Path) -> Mapping[object, object]:
    """The dictionary in a pickled file, its tensors mapped and not read."""
    regular_file_size(path)
    with open_file(path) as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        # Files of before torch 1.6 are no archives and cannot be mapped: they are read whole.
        with warnings.catch_warnings(action="ignore"):  # what it warns of, it reads or refuses
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks to run {found[1]}" if found else "holds more than tensors"
        raise CheckpointError(
            f"{path} {what}: refused, nothing of it was run",
            hint="get the model from a source that you trust, best as safetensors",
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # there is nothing that damaged bytes could not raise in there
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{path} cannot be read: {reason}", hint=DOWNLOAD_AGAIN) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds no dictionary of tensors but {type(content).__name__}")
    return content


def _checked(path: Path, name: object, value: object) -> Piece:
    """Check one entry of a pickled file: a named, plain tensor that the file can really hold."""
    where = f"{path}: {show(str(name))}"
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise CheckpointError(f"{where} is a {type(value).__name__}, not a named tensor")
    tensor = value.detach()
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES.values():
        raise CheckpointError(
            f"{where} is {tensor.layout} {tensor.dtype}: only plain, unquantised tensors are known",
            hint=UNQUANTISED,
        )
    # A view that repeats one element may claim any size.
    if tensor.nbytes > path.stat().st_size:
        raise CheckpointError(f"{where} claims {tensor.nbytes:,} bytes, more than its file has")
    return Piece(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)
