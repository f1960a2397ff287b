"""Converts pickled weights (``pytorch_model*.bin``) to safetensors shards, or any to few bits.

Each source file becomes one shard. All of them are looked through first, their data unread: what
is damaged, and what was changed in the target since, is refused before anything is written. A
shard is written under a temporary name, brought to the disk and only then renamed, and the index
comes last: at every moment a shard either is whole or has not its name. Started again, the
conversion keeps the shards that are done, if the checksum in their header is still that of their
data.

See ``target`` for the folder that is written to. No file that was changed since is written over.
"""

import ctypes
import fnmatch
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, OptionError
from ..files import write_whole, written_whole
from .folder import read_folder
from .folder_files import INDEX, first_five, read_file, read_json
from .header import DTYPES, TensorInfo
from .hub import resolve
from .pickled import Piece, pickled_files, pickled_names, read_pickle
from .target import MadeFrom, check_folder, check_owner, claimed
from .tensors import Checkpoint

Progress = Callable[[str, int, int], None]
Packer = Callable[[Piece], list[Piece]]  # what is written of a tensor

TOWER = "vision_tower"  # the folder in the result that holds a joined tower's config.json
TOWER_PREFIX = "model.vision_tower.vision_tower."
BESIDE = ["*.json", "tokenizer.model", "*.tiktoken", "*.jinja"]
TAIL = 4 << 20

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_OURS = b'{"__metadata__":{"format":"pt","source":'  # how the header of every shard begins
_DIGEST = b'"sha256":"'  # and what stands in it before the checksum of the data
_UNKNOWN = b"0" * 64


@dataclass(frozen=True)
class Source:
    """A file to convert; of a vision tower's file only the tower is taken."""

    path: Path
    packed: Packer
    is_tower: bool = False


@dataclass(frozen=True)
class Shard:
    """A file to write: its place, its header but for the checksum, and how long it will be."""

    path: Path
    source: Source
    header: bytes
    size: int


def as_it_is(piece: Piece) -> list[Piece]:
    """A tensor stays what it is."""
    return [piece]


def convert(
    source: Path,
    target: Path,
    tower: Path | None = None,
    progress: Progress | None = None,
    weights: str = "auto",
    packer: Packer = as_it_is,
) -> Path:
    """Convert a folder of pickled weights, or of any in few bits, to one that the engine loads.

    At most one source file is mapped at a time, and one tensor copied.

    Args:
        source: config, tokenizer and ``pytorch_model*.bin``.
        target: a new or empty folder, or one that a conversion of ``source`` and ``tower`` left.
        tower: folder of the vision tower to join in, where the checkpoint has none of its own.
        progress: called with a source file's name, the bytes of it that are done, and all of them.
        weights: what ``packer`` rounds weights to; "auto": nothing.

    Returns:
        ``target``.

    Raises:
        CheckpointError: nothing to convert, a file that is damaged or holds more than tensors, a
            vision tower that is missing or not wanted.
        OptionError: a target that cannot be written, or holds something else.
    """
    check_folder(target, source)
    made_from = MadeFrom(source, tower, weights)
    check_owner(target, made_from)
    shards, index = _laid_out(_sources(made_from, packer), target)
    beside = _beside(made_from, target) | {target / INDEX: index}
    with claimed(target, made_from):
        _refuse_changed(shards, beside, finished=(target / INDEX).exists())
        for shard in shards:
            _write_shard(shard, progress or (lambda *_: None))
        for path, content in beside.items():
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                write_whole(path, content)
    return target


# --- what to convert -----------------------------------------------------------------------------


def _sources(made_from: MadeFrom, packer: Packer) -> list[Source]:
    source, tower, weights = made_from
    if _takes_pickled(source, weights):
        files = pickled_files(source)
    else:
        files = sorted({info.file for info in read_folder(source).values()})
    sources = [Source(path, packer) for path in files]
    if tower is None:
        return sources
    if _has_tower(source, weights):
        raise CheckpointError(
            f"{source} has a vision tower of its own; another one would change the model",
            hint="leave out --vision-tower",
        )
    found = sorted(tower.glob("*.safetensors"))[:1] or pickled_files(tower)
    return [*sources, *(Source(path, as_it_is, is_tower=True) for path in found)]


def _takes_pickled(source: Path, weights: str) -> bool:
    """Whether the pickled weights are converted: there is nothing else to do with others."""
    return weights == "auto" or not any(source.glob("*.safetensors"))


def _has_tower(source: Path, weights: str) -> bool:
    pickled = _takes_pickled(source, weights)
    names = pickled_names(source) if pickled else read_folder(source)
    return any("vision_tower." in name for name in names)


def _laid_out(sources: list[Source], target: Path) -> tuple[list[Shard], bytes]:
    """One shard for each source, and their index."""
    shards: list[Shard] = []
    weight_map: dict[str, str] = {}
    total = 0
    for number, item in enumerate(sources, 1):
        name = f"model-{number:05}-of-{len(sources):05}.safetensors"
        with _open(item) as pieces:
            _refuse_repeats(item, pieces, weight_map)
            header, size = _header(pieces, item), sum(piece.nbytes for piece in pieces)
            weight_map |= {piece.name: name for piece in pieces}
        shards.append(Shard(target / name, item, header, len(header) + size))
        total += size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return shards, json.dumps(index, indent=2).encode()


def _beside(made_from: MadeFrom, target: Path) -> dict[Path, bytes]:
    """Configuration and tokenizer; with a joined tower, its configuration as well."""
    source, tower, weights = made_from
    changed = read_json(source / "config.json")
    if tower is not None:
        changed["mm_vision_tower"] = TOWER
    if weights != "auto":
        changed["quantization_config"] = {"quant_method": "avl-engine", "weights": weights}
    files = {target / "config.json": json.dumps(changed, indent=2).encode()}
    for path in sorted(source.iterdir()):
        wanted = any(fnmatch.fnmatch(path.name, pattern) for pattern in BESIDE)
        own = path.name == "config.json" or path.name.endswith(".index.json")
        if wanted and path.is_file() and not own:
            files[target / path.name] = read_file(path)
    if tower is None:
        return files
    files[target / TOWER / "config.json"] = read_file(tower / "config.json")
    pictures = tower / "preprocessor_config.json"
    if pictures.exists():
        files.setdefault(target / pictures.name, read_file(pictures))
    return files


@contextmanager
def _open(source: Source) -> Iterator[list[Piece]]:
    """The tensors of one file, under the names that they will have."""
    if source.path.suffix == ".safetensors":
        with Checkpoint.open(source.path.parent) as checkpoint:
            infos = [i for i in checkpoint.tensors.values() if i.file == source.path]
            yield _chosen([_stored(checkpoint, info) for info in infos], source)
        return
    yield _chosen(read_pickle(source.path), source)


def _chosen(pieces: list[Piece], source: Source) -> list[Piece]:
    """Of a CLIP only its vision half, with the prefix of the original layout.

    Wide elements come first, so that every tensor is aligned.
    """
    pieces = [written for piece in pieces for written in source.packed(piece)]
    pieces = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)
    if not source.is_tower:
        return pieces
    tower = [piece for piece in pieces if piece.name.startswith("vision_model.")]
    if not tower:
        raise CheckpointError(f"{source.path} holds no vision tower (no tensor vision_model.*)")
    return [Piece(TOWER_PREFIX + p.name, p.dtype, p.shape, p.read) for p in tower]


def _stored(checkpoint: Checkpoint, info: TensorInfo) -> Piece:
    return Piece(info.name, info.dtype, info.shape, lambda: checkpoint.stored(info))


def _refuse_repeats(source: Source, pieces: list[Piece], seen: Mapping[str, str]) -> None:
    twice = [piece.name for piece in pieces if piece.name in seen]
    if twice:
        raise CheckpointError(f"{source.path} holds {first_five(twice)} a second time")


# --- what is there already ------------------------------------------------------------------------


def _refuse_changed(shards: list[Shard], beside: Mapping[Path, bytes], finished: bool) -> None:
    """Refuse to go on where a file is not what the conversion has written or will write there.

    ``finished`` says that there is an index.
    """
    changed = [path for path, content in beside.items() if not _is_same(path, content)]
    changed += [shard.path for shard in shards if not _may_replace(shard, finished)]
    if changed:
        raise OptionError(
            f"{changed[0]} is not what the conversion writes there",
            hint="move it away, or name a folder that does not exist",
        )


def _is_same(path: Path, content: bytes) -> bool:
    """Whether a small file has its content, or is still to be written."""
    try:
        return path.read_bytes() == content
    except FileNotFoundError:
        return not path.is_symlink()
    except OSError:  # a folder in its place, or a file in its folder's
        return False


def _may_replace(shard: Shard, finished: bool) -> bool:
    """Whether a shard is missing or of this conversion, whole or not.

    Beside an index it must be of the same source file: replaced one by one, shards of two models
    would look like one.
    """
    if not os.path.lexists(shard.path):
        return True
    if not shard.path.is_file():
        return False
    with shard.path.open("rb") as file:
        found = file.read(len(shard.header))
    cut = _with_digest(found, _UNKNOWN)[: len(found)]  # all of the header, or of a torn file's
    return shard.header.startswith(cut) or (not finished and found[8:].startswith(_OURS))


def _is_whole(shard: Shard) -> bool:
    """Whether a shard is there with the data that its header has the checksum of."""
    if not shard.path.exists() or shard.path.stat().st_size != shard.size:
        return False
    with shard.path.open("rb") as file:
        header = file.read(len(shard.header))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return header == _with_digest(shard.header, digest.encode())


# --- writing -------------------------------------------------------------------------------------


def _write_shard(shard: Shard, progress: Progress) -> None:
    """Write one safetensors file, unless it is there and whole."""
    name, total, done = shard.source.path.name, shard.size - len(shard.header), 0
    if _is_whole(shard):
        progress(name, total, total)
        return
    digest = hashlib.sha256()
    with _open(shard.source) as pieces, written_whole(shard.path) as file:
        file.write(shard.header)
        progress(name, done, total)
        for piece in pieces:
            _give(piece.numbers(), file.write, digest.update)
            done += piece.nbytes
            progress(name, done, total)
        file.seek(0)
        file.write(_with_digest(shard.header, digest.hexdigest().encode()))


def _header(pieces: list[Piece], source: Source) -> bytes:
    """Length and JSON of a safetensors header, with what the shard is made from.

    The checksum of its data is left open.
    """
    made_from = {"source": _fingerprint(source.path), "sha256": _UNKNOWN.decode()}
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **made_from}}
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


def _with_digest(header: bytes, digest: bytes) -> bytes:
    """A header with the checksum in its place."""
    before, mark, after = header.partition(_DIGEST)
    return before + mark + digest + after[len(digest) :]


def _fingerprint(path: Path) -> str:
    """Tells two source files apart: size and end, where an archive keeps all its check sums."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - TAIL))
        return f"{size}-{hashlib.sha256(file.read()).hexdigest()}"


def _give(tensor: Tensor, *takers: Callable[[Any], object]) -> None:
    """Give the bytes of a tensor to all takers."""
    tensor = tensor.contiguous()
    if tensor.nbytes:
        data = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
        for take in takers:
            take(data)


# --- by name -------------------------------------------------------------------------------------


def find_tower(
    source: Path, given: str | None, offline: bool = False, weights: str = "auto"
) -> Path | None:
    """The vision tower to join into ``source``: the given one, or the one that its config names.

    None where the checkpoint needs none: it names none, or holds its own.
    """
    if given is not None:
        return resolve(given, offline=offline, pickled=True)
    named = read_json(source / "config.json").get("mm_vision_tower")
    if not isinstance(named, str) or _has_tower(source, weights):
        return None
    beside = source / named
    try:
        return beside if beside.is_dir() else resolve(named, offline=offline, pickled=True)
    except CheckpointError as error:
        raise CheckpointError(
            f"{source} leaves out its vision tower {named}, and it is not at hand: {error}",
            hint="name its folder with --vision-tower",
        ) from error
