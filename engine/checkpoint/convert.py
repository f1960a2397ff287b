"""Converts pickled weights (`pytorch_model*.bin`) to safetensors shards.

Each source file becomes one shard. A shard is written under a temporary name, brought to the disk
and only then renamed, and the index comes last: at every moment a shard either is whole or has not
its name. Started again, the conversion keeps the shards that are done.

The target is a folder of the conversion's own: a new or an empty one, in which a marker says what
is converted. Nothing is written into a folder that holds something else, and no file that was
changed since is written over.
"""

import ctypes
import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from ..errors import CheckpointError
from ..files import PARTS, lock, write_whole, written_whole
from .folder_files import INDEX, first_five, read_json
from .header import DTYPES
from .hub import resolve
from .pickled import Piece, pickled_files, pickled_names, read_pickle
from .tensors import Checkpoint

Progress = Callable[[str, int, int], None]

TOWER = "vision_tower"  # the folder in the result that holds a joined tower's config.json
TOWER_PREFIX = "model.vision_tower.vision_tower."
BESIDE = ["*.json", "tokenizer.model", "*.tiktoken", "*.jinja"]
MARKER = ".avl-conversion"  # in the target: what is converted there
TAIL = 4 << 20

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_OURS = b'{"__metadata__":{"format":"pt","source":'  # how the header of every shard begins
_NEW_FOLDER = "name a folder that does not exist"
_ELSEWHERE = f"or {_NEW_FOLDER}"


@dataclass(frozen=True)
class Source:
    """A file to convert; of a vision tower's file only the tower is taken."""

    path: Path
    is_tower: bool = False


def convert(
    source: Path, target: Path, tower: Path | None = None, progress: Progress | None = None
) -> Path:
    """Convert a folder of pickled weights to a folder that the engine loads.

    At most one source file is mapped at a time, and one tensor copied.

    Args:
        source: config, tokenizer and `pytorch_model*.bin`.
        target: a new or empty folder, or one that a conversion of `source` and `tower` left.
        tower: folder of the vision tower to join in, where the checkpoint has none of its own.
        progress: called with a source file's name, the bytes of it that are done, and all of them.

    Returns:
        `target`.

    Raises:
        CheckpointError: nothing to convert, a file that is damaged or holds more than tensors, a
            vision tower that is missing or not wanted, a target that holds something else.
    """
    config = read_json(source / "config.json")
    sources = _sources(source, target, tower)
    with _claimed(source, target, tower):
        index = _write_shards(sources, target, progress or (lambda *_: None))
        _copy_beside(source, target, config, tower)
        _put(target / INDEX, json.dumps(index, indent=2).encode())
    return target


def _write_shards(sources: list[Source], target: Path, progress: Progress) -> dict[str, object]:
    """One shard for each source; returns their index."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, item in enumerate(sources, 1):
        shard = f"model-{number:05}-of-{len(sources):05}.safetensors"
        with _open(item) as pieces:
            _refuse_repeats(item, pieces, weight_map)
            _write_shard(target / shard, pieces, item, progress)
            weight_map |= {piece.name: shard for piece in pieces}
            total += sum(piece.nbytes for piece in pieces)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


# --- what to convert -----------------------------------------------------------------------------


def _sources(source: Path, target: Path, tower: Path | None) -> list[Source]:
    if target.exists() and (not target.is_dir() or target.samefile(source)):
        raise CheckpointError(f"{target} cannot take the converted model", hint=_NEW_FOLDER)
    sources = [Source(path) for path in pickled_files(source)]
    if tower is None:
        return sources
    if any("vision_tower." in name for name in pickled_names(source)):
        raise CheckpointError(
            f"{source} has a vision tower of its own; another one would change the model",
            hint="leave out --vision-tower",
        )
    found = sorted(tower.glob("*.safetensors"))[:1] or pickled_files(tower)
    return [*sources, *(Source(path, is_tower=True) for path in found)]


@contextmanager
def _claimed(source: Path, target: Path, tower: Path | None) -> Iterator[None]:
    """Make `target` this conversion's folder, or find that it is; one process works in it."""
    marker, tower_name = target / MARKER, str(tower.resolve()) if tower else None
    wanted = json.dumps({"source": str(source.resolve()), "tower": tower_name}, indent=2).encode()
    target.mkdir(parents=True, exist_ok=True)
    if all(path.match(PARTS) for path in target.iterdir()):
        write_whole(marker, wanted)
    if not marker.is_file() or marker.read_bytes() != wanted:
        what = "another conversion" if marker.is_file() else "something else"
        raise CheckpointError(f"{target} holds {what} already", hint=_NEW_FOLDER)
    with marker.open("rb") as file:
        if not lock(file):
            raise CheckpointError(
                f"another process converts into {target}", hint="wait for it to end"
            )
        for leftover in target.glob(PARTS):
            leftover.unlink()
        yield


@contextmanager
def _open(source: Source) -> Iterator[list[Piece]]:
    """The tensors of one file, under the names that they will have."""
    if source.path.suffix == ".safetensors":
        with Checkpoint.open(source.path.parent) as checkpoint:
            yield _of_tower([_stored(checkpoint, name) for name in checkpoint.tensors], source)
        return
    yield _of_tower(read_pickle(source.path), source)


def _of_tower(pieces: list[Piece], source: Source) -> list[Piece]:
    """Of a CLIP only its vision half, with the prefix of the original layout."""
    if not source.is_tower:
        return pieces
    kept = [piece for piece in pieces if piece.name.startswith("vision_model.")]
    if not kept:
        raise CheckpointError(f"{source.path} holds no vision tower (no tensor vision_model.*)")
    return [Piece(TOWER_PREFIX + p.name, p.dtype, p.shape, p.read) for p in kept]


def _stored(checkpoint: Checkpoint, name: str) -> Piece:
    info = checkpoint.tensors[name]
    return Piece(name, info.dtype, info.shape, lambda: checkpoint.read(name))


def _refuse_repeats(source: Source, pieces: list[Piece], seen: Mapping[str, str]) -> None:
    twice = [piece.name for piece in pieces if piece.name in seen]
    if twice:
        raise CheckpointError(f"{source.path} holds {first_five(twice)} a second time")


# --- writing -------------------------------------------------------------------------------------


def _write_shard(path: Path, pieces: list[Piece], source: Source, progress: Progress) -> None:
    """Write one safetensors file, unless it is there and whole."""
    # Wide elements first, so that every tensor is aligned.
    ordered = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)
    header = _header(ordered, _fingerprint(source.path))
    total = sum(piece.nbytes for piece in ordered)
    if _is_whole(path, header, total):
        progress(source.path.name, total, total)
        return
    _refuse_foreign(path)
    (path.parent / INDEX).unlink(missing_ok=True)  # of an earlier run: not true any more
    done = 0
    with written_whole(path) as file:
        file.write(header)
        progress(source.path.name, done, total)
        for piece in ordered:
            _write_tensor(file, piece.read())
            done += piece.nbytes
            progress(source.path.name, done, total)


def _header(pieces: list[Piece], fingerprint: str) -> bytes:
    """Length and JSON of a safetensors header; it also tells what the shard was made from."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", "source": fingerprint}}
    start = 0
    for piece in pieces:
        stop = start + piece.nbytes
        entries[piece.name] = {
            "dtype": _CODES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _fingerprint(path: Path) -> str:
    """Tells two source files apart: size and end, where an archive keeps all its check sums."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - TAIL))
        return f"{size}-{hashlib.sha256(file.read()).hexdigest()}"


def _is_whole(path: Path, header: bytes, total: int) -> bool:
    if not path.exists() or path.stat().st_size != len(header) + total:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _refuse_foreign(path: Path) -> None:
    """Only what a conversion has written may be written again: its header says so."""
    if not path.exists():
        return
    with path.open("rb") as file:
        start = file.read(64)
    if not start[8:].startswith(_OURS):
        raise CheckpointError(f"{path} is not of a conversion", hint=f"move it away, {_ELSEWHERE}")


def _write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    tensor = tensor.contiguous()
    if tensor.nbytes:
        file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def _put(path: Path, content: bytes) -> None:
    """Write a small file, unless it is there; one that says something else was changed since."""
    if not path.exists():
        write_whole(path, content)
    elif path.read_bytes() != content:
        raise CheckpointError(
            f"{path} is not what the conversion writes there", hint=f"move it away, {_ELSEWHERE}"
        )


def _copy_beside(
    source: Path, target: Path, config: Mapping[str, object], tower: Path | None
) -> None:
    """Copy configuration and tokenizer; with a joined tower, its configuration as well."""
    for path in sorted(source.iterdir()):
        wanted = any(fnmatch.fnmatch(path.name, pattern) for pattern in BESIDE)
        own = path.name == "config.json" or path.name.endswith(".index.json")
        if wanted and path.is_file() and not own:
            _put(target / path.name, path.read_bytes())
    changed = config if tower is None else {**config, "mm_vision_tower": TOWER}
    _put(target / "config.json", json.dumps(changed, indent=2).encode())
    if tower is None:
        return
    joined = target / TOWER
    joined.mkdir(exist_ok=True)
    _put(joined / "config.json", (tower / "config.json").read_bytes())
    pictures = tower / "preprocessor_config.json"
    if pictures.exists() and not (source / pictures.name).exists():
        _put(target / pictures.name, pictures.read_bytes())


# --- by name -------------------------------------------------------------------------------------


def find_source(name: str | Path, revision: str | None = None, offline: bool = False) -> Path:
    """The folder of a model with pickled weights: a folder, or a hub name, downloaded if needed."""
    return resolve(name, revision, offline, pickled=True)


def find_tower(source: Path, given: str | None, offline: bool = False) -> Path | None:
    """The vision tower to join into `source`: the given one, or the one that its config names.

    None where the checkpoint needs none: it names none, or holds its own.
    """
    if given is not None:
        return find_source(given, offline=offline)
    named = read_json(source / "config.json").get("mm_vision_tower")
    if not isinstance(named, str) or any("vision_tower." in name for name in pickled_names(source)):
        return None
    beside = source / named
    try:
        return beside if beside.is_dir() else find_source(named, offline=offline)
    except CheckpointError as error:
        raise CheckpointError(
            f"{source} leaves out its vision tower {named}, and it is not at hand: {error}",
            hint="name its folder with --vision-tower",
        ) from error
