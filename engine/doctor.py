"""``--check``: what this machine offers, and whether a model folder is whole.

Every check is one line; what fails does not keep the next one from running. Files are read in
pieces of 16 MB, so that a folder of any size needs little memory.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import resource
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from engine.errors import CheckpointError, EngineError
from engine.families import Family, recognise
from engine.native import backend
from engine.terminal import printable
from engine.tokenizer import Tokenizer
from weights.checkpoint import Checkpoint, TensorInfo, fit_weights
from weights.hub import TINY, resolve
from weights.names import target_names

T = TypeVar("T")

CHUNK = 16 << 20
PACKAGES = ("torch", "safetensors", "tokenizers", "pillow", "huggingface-hub", "tqdm")

# The hub's cache names a file by its content: sha256 of large ones, git's sha1 of small ones.
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def check(
    name: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    quiet: bool = False,
) -> int:
    """Print the state of this machine and of a model (None: the embedded one).

    Returns 0, or the exit code of damaged weights. Raises CheckpointError if ``name`` is no model.
    """
    for line in environment():
        print(line)
    if name is None and not (TINY / "config.json").exists():
        print("model: the embedded model is not installed; name one with --model")
        return 0
    folder = resolve(None if name is None else Path(name), revision, offline)
    print(f"model: {folder}")
    damage = Examination(folder, quiet).run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if _MAC else 1024)
    print(f"peak memory of this check: {peak / 1e6:,.0f} MB")
    print(f"{damage} of the checks failed" if damage else "the model folder is whole")
    return CheckpointError.exit_code if damage else 0


_MAC = sys.platform == "darwin"  # which counts bytes where others count kilobytes


def environment() -> Iterator[str]:
    """Versions, backend, devices and memory, a line each."""
    yield f"avl-engine {_version('avl-engine')}, Python {platform.python_version()}"
    yield f"system: {platform.platform()}, {os.cpu_count()} CPUs, {_memory()}"
    yield "packages: " + ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
    active = backend()
    yield f"backend: {active.name} - {active.reason}"
    yield from _devices()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _memory() -> str:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return "memory unknown"
    return f"{free / 1e9:.1f} of {total / 1e9:.1f} GB memory free"


def _devices() -> Iterator[str]:
    if not torch.version.cuda:
        yield "device: cpu (this torch is built without CUDA)"
        return
    if not torch.cuda.is_available():
        yield f"device: cpu (torch is built for CUDA {torch.version.cuda}, but finds no device)"
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found = torch.cuda.get_device_properties(number)
        yield (
            f"device: cuda:{number} {found.name}, compute {found.major}.{found.minor}, "
            f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        )


class Examination:
    """The checks of one model folder."""

    def __init__(self, folder: Path, quiet: bool = False) -> None:
        self.folder, self.quiet = folder, quiet
        self._damage = 0

    def run(self) -> int:
        """Run all checks, printing a line for each; returns how many failed."""
        family = self._try("config", lambda: recognise(self.folder, None), _describe)
        self._try("tokenizer", self._tokenizer, str)
        self._try("hashes", self._hashes, str)
        checkpoint = self._try("headers", lambda: Checkpoint.open(self.folder), _sizes)
        if checkpoint:
            with checkpoint:
                if family:
                    self._try("shapes", lambda: _shapes(family, checkpoint), str)
                self._try("values", lambda: self._values(checkpoint), str)
        return self._damage

    def _try(self, what: str, action: Callable[[], T], words: Callable[[T], str]) -> T | None:
        """Run one check and say how it went."""
        try:
            result = action()
        except EngineError as error:
            self._damage += 1
            hint = f" ({error.hint})" if error.hint else ""
            print(f"{what}: FAILED - {printable(str(error))}{hint}")
            return None
        print(f"{what}: ok - {words(result)}")
        return result

    def _tokenizer(self) -> str:
        tokenizer = Tokenizer.from_folder(self.folder)
        return f"'What is this?' is {len(tokenizer.encode('What is this?'))} tokens"

    def _hashes(self) -> str:
        """Compare files with the checksums that the hub's cache has in their names."""
        paths = sorted(path for path in self.folder.iterdir() if blob_name(path))
        wrong = []
        total = sum(path.stat().st_size for path in paths)
        with self._bar("hashes", total) as bar:
            for path in paths:
                if not has_its_hash(path, bar.update):
                    wrong.append(path.name)
        if wrong:
            raise CheckpointError(
                f"{', '.join(wrong)}: the content is not what was published",
                hint="delete what these links point to, and download again",
            )
        if not paths:
            return "nothing to compare with: not a folder of the hub's cache"
        return f"{len(paths)} files, {total / 1e6:,.1f} MB, are what the hub published"

    def _values(self, checkpoint: Checkpoint) -> str:
        """Look for NaN and infinity in every floating-point tensor."""
        wrong = []
        with self._bar("values", checkpoint.total_bytes) as bar:
            for info in checkpoint.tensors.values():
                if count := _not_finite(info, bar.update):
                    wrong.append(f"{info.name} ({count:,})")
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise CheckpointError(
                f"NaN or infinity in {', '.join(wrong[:5])}{more}",
                hint="download the weights again",
            )
        return f"{len(checkpoint.tensors)} tensors, all numbers finite"

    def _bar(self, what: str, total: int) -> tqdm[object]:
        hidden = True if self.quiet else None  # None: shown on a terminal only
        return tqdm(
            total=total, desc=what, unit="B", unit_scale=True, disable=hidden, file=sys.stderr
        )


def blob_name(path: Path) -> str:
    """The checksum in the name of the blob that a hub snapshot's file links to; "" if none."""
    if not path.is_symlink():
        return ""
    target = Path(os.readlink(path))
    found = target.parent.name == "blobs" and _BLOB.fullmatch(target.name) and path.is_file()
    return target.name if found else ""


def has_its_hash(path: Path, progress: Callable[[int], object] = lambda _: None) -> bool:
    """Whether a snapshot's file has the content that its blob's name states."""
    name = blob_name(path)
    if len(name) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                progress(len(chunk))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    return digest.hexdigest() == name


def _not_finite(info: TensorInfo, progress: Callable[[int], object]) -> int:
    """How many numbers of a stored tensor are NaN or infinite."""
    count = 0
    buffer = bytearray(min(CHUNK, info.nbytes))
    try:
        with info.file.open("rb") as file:
            file.seek(info.start)
            for at in range(0, info.nbytes, CHUNK):
                size = min(CHUNK, info.nbytes - at)
                if file.readinto(memoryview(buffer)[:size]) != size:
                    raise CheckpointError(f"{info.file} became shorter while it was read")
                if info.dtype.is_floating_point:
                    values = torch.frombuffer(buffer, dtype=torch.uint8, count=size)
                    finite = torch.isfinite(values.view(info.dtype))
                    count += finite.numel() - int(finite.sum())
                progress(size)
    except OSError as error:
        raise CheckpointError(f"{info.file}: {error.strerror}") from error
    return count


def _describe(family: Family) -> str:
    model = family.model
    size = sum(parameter.numel() for parameter in model.parameters())
    return f"{type(model).__name__}, {size / 1e6:,.1f} M parameters, prompts as {family.style}"


def _sizes(checkpoint: Checkpoint) -> str:
    files = {info.file for info in checkpoint.tensors.values()}
    return (
        f"{len(files)} files, {len(checkpoint.tensors)} tensors, "
        f"{checkpoint.total_bytes / 1e6:,.1f} MB"
    )


def _shapes(family: Family, checkpoint: Checkpoint) -> str:
    """Compare names and shapes with what the configuration asks for, as loading does."""
    model, elsewhere = family.model, ""
    held = [ours for name in checkpoint.tensors for ours in target_names(family.rename(name))]
    if family.tower and not any(name.startswith("vision.") for name in held):
        tower, names = family.tower
        with Checkpoint.open(tower) as tower_checkpoint:
            fit_weights(model.vision, tower_checkpoint, names)
        elsewhere = "vision."
    tied = {"decoder.head.weight": "decoder.embed.weight"} if model.decoder.config.tied_head else {}
    fit = fit_weights(model, checkpoint, family.rename, tied, elsewhere)
    apart = f", the vision tower from {family.tower[0]}" if elsewhere and family.tower else ""
    return f"{len(fit.sources)} tensors fit the configuration, {len(fit.ignored)} are unused{apart}"
