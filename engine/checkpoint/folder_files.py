"""A model folder's files before anything is known of them: opened with care, JSON read strictly.

Without torch, so that a wrong name fails before that is imported.
"""

import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError
from ..refusals import hint_for

# What weights and their index are called.
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN_SINGLE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"

MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors; JSON files are held to it as well
DOWNLOAD_AGAIN = "download the file again"
UNQUANTISED = "use the bf16, fp16 or fp32 version of this model; weights q8 or q4 round it"

# What else is found under a weight file's name: its first bytes, what it is, what to do.
_FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run 'git lfs pull'"),
    (b"<!doctype html", "a web page, not weights", DOWNLOAD_AGAIN),
    (b"<html", "a web page, not weights", DOWNLOAD_AGAIN),
    (b"<?xml", "an XML page, not weights", DOWNLOAD_AGAIN),
    (b"gguf", "a GGUF file, not a safetensors file", "use the safetensors version of this model"),
    (b"pk\x03\x04", "a zip or PyTorch file, not a safetensors file", "convert it with --convert"),
)


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object from a file, strictly: no duplicate keys, no NaN, nothing but an object.

    Raises CheckpointError naming the file.
    """
    text = read_file(path)
    if not text:
        raise CheckpointError(f"{path} is empty (0 bytes)", hint=DOWNLOAD_AGAIN)
    refuse_foreign(path, text[:64])
    return parse_object(text, f"{path}: invalid JSON")


def read_file(path: Path) -> bytes:
    """Read a file beside the weights; refuses what is not regular, and more than 100 MB."""
    size = regular_file_size(path)
    if size > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} is too large for what it should be: {size:,} bytes")
    with open_file(path) as file:
        return file.read()


def regular_file_size(path: Path) -> int:
    """Size in bytes of a regular file, links followed; refuses anything else unopened."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", hint_for(error)) from error
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{path} is a folder")
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would block for ever
        raise CheckpointError(f"{path} is not a regular file")
    return status.st_size


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading; an operating system's refusal becomes a CheckpointError."""
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", hint_for(error)) from error


def show(name: str) -> str:
    """An untrusted name made safe to print on one line: quoted, escaped, at most 80 characters."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def first_five(names: Iterable[object]) -> str:
    """At most five different names, and how many more there are."""
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(str(name) for name in names[:5]) + more


def refuse_foreign(path: Path, head: bytes) -> None:
    """Raise CheckpointError where a file's first bytes are those of something else."""
    start = head.lstrip().lower()
    for magic, what, hint in _FOREIGN:
        if start.startswith(magic):
            raise CheckpointError(f"{path} is {what}", hint=hint)


def parse_object(text: bytes, complaint: str) -> dict[str, object]:
    """Parse strict JSON that must be an object; ``complaint`` begins the CheckpointError."""
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
        )
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8 and huge numbers
        raise CheckpointError(f"{complaint}: {error}", hint=DOWNLOAD_AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{complaint}: an object is needed, this is a {type(value).__name__}")
    return value


def _without_duplicates(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {show(key)}")
        result[key] = value
    return result


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
