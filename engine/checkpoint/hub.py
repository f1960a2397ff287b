"""From what a user calls a model to a folder on this machine: a folder, a cached or a hub model."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import CheckpointError, OptionError
from ..naming import display_name
from .folder_files import BIN_INDEX, BIN_SINGLE, INDEX, SINGLE, read_json

# The models that ship: beside the package in a checkout, inside it where it is installed.
_PACKAGE = Path(__file__).resolve().parent.parent
_SHIPPED = next(
    (p for p in (_PACKAGE.parent, _PACKAGE) if (p / "weights" / "tiny").is_dir()), _PACKAGE
)
TINY = _SHIPPED / "weights" / "tiny"

# The hub gives none of more than 96 characters; a revision is the name of a file in its cache.
_HUB_NAME = re.compile(r"(?!.{97})[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"(?!.{250})[\w./-]+")


def resolve(
    name_or_folder: str | Path | None = None,
    revision: str | None = None,
    offline: bool = False,
    pickled: bool = False,
) -> Path:
    """Find the folder of a model.

    Args:
        name_or_folder: a folder; or a hub name such as "llava-hf/llava-1.5-7b-hf", taken from the
            local hub cache if it is complete there, else downloaded. None is the embedded model.
        revision: branch, tag or commit of a hub model.
        offline: never download; the environment variable HF_HUB_OFFLINE says the same.
        pickled: take pickled weights where there are no others, to convert them.

    Raises:
        CheckpointError: saying where it was looked for.
        OptionError: a revision of what is a folder.
    """
    folder = TINY if name_or_folder is None else Path(os.path.expanduser(name_or_folder))
    _refuse_unreadable(folder)
    if folder.is_dir() or name_or_folder is None:
        if revision is not None:
            raise OptionError(
                f"--revision {revision} is of a hub model, but {folder} is a folder",
                hint="leave it out, or give the model's hub name",
            )
        return folder
    if folder.exists():
        raise CheckpointError(
            f"{folder} is a file, a model is a folder", hint=f"try {folder.parent}"
        )
    name = str(name_or_folder)
    if not _HUB_NAME.fullmatch(name):
        raise CheckpointError(
            f"folder {display_name(str(folder))} does not exist",
            hint="give a model's folder, or its hub name such as llava-hf/llava-1.5-7b-hf (14 GB)",
        )
    return _from_hub(name, revision, offline, pickled)


def _refuse_unreadable(folder: Path) -> None:
    """Raise CheckpointError for what is no name of a folder that can be looked into."""
    try:
        next(folder.iterdir(), None)
    except (FileNotFoundError, NotADirectoryError):
        pass  # no folder: it may be a hub name
    except PermissionError as error:
        raise _unfit(folder, error, "check who may read this folder") from None
    except (OSError, ValueError) as error:  # a ValueError is of a name that none can have
        raise _unfit(folder, error, "give another path to it") from None


def _unfit(folder: Path, error: Exception, hint: str) -> CheckpointError:
    reason = getattr(error, "strerror", None) or error
    return CheckpointError(f"{display_name(str(folder))} cannot be read: {reason}", hint=hint)


def _from_hub(name: str, revision: str | None, offline: bool, pickled: bool) -> Path:
    from huggingface_hub import constants  # imported here: a folder does not need it

    try:
        cached = find_cached(name, revision)
        if cached is not None and is_complete(cached, pickled):
            return cached
    except OSError as error:
        raise CheckpointError(
            f"the hub cache {constants.HF_HUB_CACHE} cannot be read: {error.strerror}",
            hint="check who may read it, or set HF_HOME to another folder",
        ) from None
    if offline or constants.HF_HUB_OFFLINE:
        state = "is not" if cached is None else "is only partly"
        raise CheckpointError(
            f"{name} is not a folder, and {state} in the hub cache {constants.HF_HUB_CACHE}",
            hint="download it first, or allow downloads (no --offline, no HF_HUB_OFFLINE)",
        )
    from .download import download

    return download(name, revision, pickled)


def find_cached(name: str, revision: str | None = None) -> Path | None:
    """The snapshot of a model in the hub's cache, complete or not; None if there is none.

    The layout is ``models--org--name/refs/<revision>``, a file that holds the commit, and
    ``snapshots/<commit>/``, links to blobs.
    """
    from huggingface_hub import constants

    revision = revision or "main"
    if ".." in revision or not _REVISION.fullmatch(revision):
        raise CheckpointError(f"{revision!r:.40} is no revision", hint="a branch, tag or commit")
    repo = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    ref = repo / "refs" / revision
    snapshot = repo / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision)
    return snapshot if snapshot.is_dir() else None


def is_complete(folder: Path, pickled: bool = False) -> bool:
    """Tell whether a folder has its config and all weight files it speaks of, unread."""
    if not (folder / "config.json").exists():
        return False
    whole = _has_all(folder, SINGLE, INDEX, "*.safetensors")
    return whole or (pickled and _has_all(folder, BIN_SINGLE, BIN_INDEX, BIN_SINGLE))


def _has_all(folder: Path, single: str, index: str, pattern: str) -> bool:
    """Whether one file, all that an index names, or without both any that fits is there."""
    if (folder / single).exists() or not (folder / index).exists():
        return any(path.exists() for path in folder.glob(pattern))
    shards = read_json(folder / index).get("weight_map")
    return isinstance(shards, dict) and all(
        (folder / str(shard)).exists() for shard in set(map(str, shards.values()))
    )
