"""Finds the weight files of a model folder: one file, shards with an index, or a clear refusal."""

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError
from ..refusals import hint_for
from .folder_files import DOWNLOAD_AGAIN, INDEX, SINGLE, first_five, read_json, show
from .header import TensorInfo, read_header


def read_folder(folder: Path) -> dict[str, TensorInfo]:
    """Check the headers of all weight files of a folder and list their tensors by name.

    Accepts ``model.safetensors``, shards with ``model.safetensors.index.json``, or exactly one
    .safetensors file of any name, in this order. Raises CheckpointError for everything else.
    """
    names = _list_folder(folder)
    if SINGLE in names:
        return read_header(folder / SINGLE)
    if INDEX in names:
        return _read_shards(folder)
    return read_header(folder / _only_file(folder, names))


def _list_folder(folder: Path) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError as error:
        raise CheckpointError(f"folder {folder} does not exist") from error
    except NotADirectoryError as error:
        message = f"{folder} is a file, a model is a folder"
        raise CheckpointError(message, hint=f"give its folder: {folder.parent}") from error
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror}", hint_for(error)) from error
    if not names:
        raise CheckpointError(
            f"folder {folder} is empty",
            hint="download a model's config.json, tokenizer.json and .safetensors files into it",
        )
    return names


def _only_file(folder: Path, names: Iterable[str]) -> str:
    """The one .safetensors file of a folder that has neither of the two usual names."""
    names = list(names)
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1 and not re.search(r"-\d+-of-0*[2-9]\d*\.", found[0]):
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder} has shards ({first_five(found)}) but no {INDEX}",
            hint=f"download {INDEX} as well",
        )
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickled:
        source, target = folder, folder.with_name(folder.name + "-safetensors")
        command = f"--model {shlex.quote(str(source))} --convert {shlex.quote(str(target))}"
        raise CheckpointError(
            f"{folder} has only pickled weights, which could run code: {first_five(pickled)}",
            hint=f"convert them once: python main.py {command}",
        )
    raise CheckpointError(
        f"{folder} has no .safetensors file, only {first_five(names)}",
        hint=f"download {SINGLE}, or the shards and {INDEX}",
    )


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    """Read the index and every shard it names, and check that they tell the same story."""
    path = folder / INDEX
    index = read_json(path)
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{path} has no weight_map", hint=DOWNLOAD_AGAIN)
    tensors: dict[str, TensorInfo] = {}
    for shard in _shard_names(path, listed):
        for name, info in read_header(folder / shard).items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {show(name)} is in two shards: {tensors[name].file.name} and {shard}"
                )
            tensors[name] = info
    for name, shard in listed.items():
        if name not in tensors or tensors[name].file.name != shard:
            message = f"{path} lists tensor {show(name)} in {shard}, but it is not there"
            raise CheckpointError(message, hint="download index and shards again, from one version")
    _check_total(path, index, sum(info.nbytes for info in tensors.values()))
    return tensors


def _shard_names(path: Path, listed: Mapping[str, object]) -> list[str]:
    """The distinct shards of an index: plain .safetensors names that exist beside it."""
    for shard in listed.values():
        if not _is_plain_name(shard):
            raise CheckpointError(
                f"{path} names {show(str(shard))}, which is not a plain file name"
            )
    names = list(dict.fromkeys(map(str, listed.values())))
    missing = [name for name in names if not os.path.exists(path.parent / name)]
    if missing:
        count = f"{len(missing)} of {len(names)} shards"
        message = f"{path.parent} lacks {count} of {INDEX}: {first_five(missing)}"
        raise CheckpointError(message, hint=f"download {first_five(missing)}")
    return names


def _is_plain_name(shard: object) -> bool:
    """Tell whether an index, which comes from strangers, stays in its folder with this name."""
    return (
        isinstance(shard, str)
        and shard.endswith(".safetensors")
        and PurePosixPath(shard).name == shard
        and "\\" not in shard
        and shard.isprintable()
        and len(shard) < 256
    )


def _check_total(path: Path, index: Mapping[str, object], total: int) -> None:
    """Compare the size an index states with what is there.

    Only a factor above two is refused: published indices count tied tensors twice, or the bytes
    of another dtype.
    """
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(stated, int) and not total <= 2 * stated <= 4 * total:
        message = f"{path} says {stated:,} bytes of tensors, the shards have {total:,}"
        raise CheckpointError(message, hint="download index and shards again, from one version")
