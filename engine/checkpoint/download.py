"""Downloads a hub model: says its size first, takes only what is read, checks what has come.

The client library keeps finished files, so that an interrupted download goes on with the next file
when the same command is given again; within a file it takes up a broken connection by itself.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ..errors import CheckpointError
from .folder_files import INDEX, SINGLE

# Everything the engine reads; weights in other formats stay where they are.
FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.tiktoken", "*.jinja"]
PICKLED = "pytorch_model*.bin"

AGAIN = "give the same command again: finished files are kept"

_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a hub repository; ``sha256`` is "" where the hub does not state it."""

    name: str
    size: int
    sha256: str = ""


def download(name: str, revision: str | None = None, pickled: bool = False) -> Path:
    """Download a model into the hub's cache; returns its snapshot folder.

    With ``pickled``, pickled weights are taken where there are no others.

    Raises CheckpointError in one line for whatever goes wrong, and keeps what has come whole.
    """
    from huggingface_hub import snapshot_download

    try:
        commit, listed = _list(name, revision)
        files = choose(name, listed, pickled)
        fresh = _announce(name, commit, files)
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=[f.name for f in files])
        )
    except CheckpointError:
        raise
    except Exception as error:  # the client's errors have no common base below Exception
        raise explain(name, revision, error) from error
    _verify(folder, fresh)
    return folder


def _list(name: str, revision: str | None) -> tuple[str, list[RemoteFile]]:
    """The commit behind a revision, and its files."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(name, revision=revision, files_metadata=True)
    files = [
        RemoteFile(item.rfilename, item.size or 0, item.lfs.sha256 if item.lfs else "")
        for item in info.siblings or ()
    ]
    return info.sha or "main", files


def choose(name: str, files: Sequence[RemoteFile], pickled: bool = False) -> list[RemoteFile]:
    """The files of a repository that the engine reads: none in folders, no weights twice.

    Raises CheckpointError where there are no safetensors, unless ``pickled`` weights are asked for
    and there are some: loading those could run code, only a conversion reads them.
    """
    plain = [file for file in files if "/" not in file.name]
    wanted = [file for file in plain if any(fnmatch(file.name, pattern) for pattern in FILES)]
    if not any(file.name.endswith(".safetensors") for file in wanted):
        if any(file.name == "adapter_config.json" for file in plain):
            raise CheckpointError(
                f"{name} is an adapter (LoRA), as its adapter_config.json says, and no model",
                hint="merge it into its base first (peft: merge_and_unload)",
            )
        instead = [file for file in plain if fnmatch(file.name, PICKLED)]
        if pickled and instead:
            return wanted + instead
        command = f"--model {name} --convert {name.split('/')[1]}-safetensors"
        raise CheckpointError(
            f"{name} has no .safetensors weights" + (f" and no {PICKLED}" if pickled else ""),
            hint="name another model"
            if pickled
            else f"convert them once: python main.py {command}",
        )
    if any(file.name == SINGLE for file in wanted):
        return [f for f in wanted if f.name != INDEX and not _SHARD.fullmatch(f.name)]
    return wanted


def _announce(name: str, commit: str, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Say what will be downloaded, if the disk can take it; returns the files that are not here."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    snapshot = cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    fresh = [file for file in files if not (snapshot / file.name).exists()]
    needed = sum(file.size for file in fresh)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"{name} needs {needed / 1e9:,.1f} GB, and {cache} has {free / 1e9:,.1f} GB free",
            hint="free some space, or set HF_HUB_CACHE to a folder on another disk",
        )
    # As the client's progress bars, and switched off with them.
    if fresh and not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        size = f"{needed / 1e9:,.1f} GB" if needed >= 10**9 else f"{needed / 1e6:,.1f} MB"
        print(f"downloading {name}: {len(fresh)} files, {size}, to {cache}", file=sys.stderr)
    return fresh


def _verify(folder: Path, files: Sequence[RemoteFile]) -> None:
    """Compare what has just come with the hub's checksums; what differs is deleted."""
    wrong = [
        file.name for file in files if file.sha256 and _sha256(folder / file.name) != file.sha256
    ]
    for name in wrong:
        (folder / name).resolve().unlink(missing_ok=True)
        (folder / name).unlink(missing_ok=True)
    if wrong:
        raise CheckpointError(
            f"{', '.join(wrong)} arrived damaged: the checksum is not the one the hub states",
            hint=AGAIN,
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def explain(name: str, revision: str | None, error: Exception) -> CheckpointError:
    """What a failed download means, in one line, and what to do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return CheckpointError(
            f"{name} is gated: its owners let in whom they have approved",
            hint="ask for access on the model's page, then set HF_TOKEN to your token",
        )
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(
            f"{name} is not a folder, and the hub has no such model, or it is private",
            hint="check the spelling; for a private model set HF_TOKEN to your token",
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(
            f"{name} has no revision {revision}", hint="name a branch, a tag or a full commit"
        )
    chain = list(_chain(error))
    if any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in chain):
        return CheckpointError(
            f"{name} cannot be stored: the disk of {constants.HF_HUB_CACHE} is full",
            hint=f"free some space or set HF_HUB_CACHE, then {AGAIN}",
        )
    if any(_is_connection(e) for e in chain):
        return CheckpointError(
            f"{name} is not a folder, and could not be downloaded: the connection to the hub "
            f"failed ({_first_line(chain[-1])})",
            hint=f"check the network, then {AGAIN}",
        )
    return CheckpointError(
        f"{name} is not a folder, and could not be downloaded: {_first_line(error)}",
        hint=f"check the name and the network, then {AGAIN}",
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it, the cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_connection(error: BaseException) -> bool:
    """Whether the network failed; the client's transport has error classes of its own."""
    transport = type(error).__module__.split(".")[0].startswith(("httpx", "httpcore"))
    unfinished = isinstance(error, OSError) and "size" in str(error).lower()
    return transport or unfinished or isinstance(error, (ConnectionError, TimeoutError))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
