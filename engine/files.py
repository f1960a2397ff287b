"""Files that are written: beside their place first, then moved there, so that a failure on the way
leaves what was there before; and whether they can be, asked before the work is done."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from .errors import OptionError
from .naming import display_name

_STREAMS = ("/dev/", "/proc/")
PAGE_SIGNATURE = b'content="avl-engine --attention"'  # in every attention page
_ENDS = 1 << 20  # bytes at both ends of a file in which its signature is looked for
UNFINISHED = ".avl-*.part"  # what a killed process may leave of a file it was writing


@contextmanager
def named(name: str) -> Iterator[None]:
    """What the system refuses meanwhile has this name, whatever file or pipe it was in the end."""
    try:
        yield
    except OSError as error:
        error.filename = name
        raise


@contextmanager
def written_whole(path: str | os.PathLike[str], ours: bytes | None = None) -> Iterator[BinaryIO]:
    """A file that takes its name only when it is complete and on the disk.

    A link is followed; a file that is replaced keeps its permissions. With a signature ``ours``, a
    file that has appeared there meanwhile and lacks it stays: OptionError says where this one is.
    """
    _refuse_unfit(path)
    target = Path(os.path.realpath(path))
    unfinished = _beside(target)
    try:
        with named(os.fspath(path)):
            with unfinished.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            foreign = ours is not None and not _holds(target, ours)
            there = free_name(target) if foreign else target
            if target.exists() and not foreign:
                shutil.copymode(target, unfinished)
            unfinished.replace(there)
    finally:
        unfinished.unlink(missing_ok=True)
    _sync_folder(target.parent)
    if foreign:
        raise OptionError(
            f"{display_name(os.fspath(path))} was written by somebody else meanwhile",
            hint=f"it stays as it is; what was to be there is in {there}",
        )


def write_whole(path: str | os.PathLike[str], content: bytes, ours: bytes | None = None) -> None:
    """``written_whole`` for content that is at hand."""
    with written_whole(path, ours) as file:
        file.write(content)


def free_name(path: Path) -> Path:
    """A name beside a file that is somebody's, of the same kind."""
    return path.with_name(f"{path.stem}.{secrets.token_hex(4)}{path.suffix}")


def check_target(
    flag: str,
    path: str | os.PathLike[str],
    endings: tuple[str, ...] = (),
    inputs: Iterable[str | os.PathLike[str]] = (),
    ours: bytes = b"",
) -> None:
    """Refuse what ``written_whole`` could not write, or should not.

    That is one of the ``inputs``, and a file of the user's: one that holds something else than what
    has the signature ``ours``. Raises OptionError that begins with ``flag``; an empty ``endings``
    allows every name.
    """
    name = f"{flag} {display_name(os.fspath(path))}"
    if endings and not os.fspath(path).lower().endswith(endings):
        raise OptionError(f"{name}: the name of another kind of file", f"end it in {_or(endings)}")
    target = Path(os.path.realpath(path))
    if not os.path.isdir(target.parent):  # Path.is_dir raises for what is too long
        folder = display_name(str(target.parent))
        raise OptionError(f"{name}: no folder {folder}", hint="name a folder that exists")
    for source in inputs:
        with suppress(OSError, ValueError):
            if target.samefile(source):
                raise OptionError(f"{name} is a file that is read", hint="give another name")
    try:
        _refuse_unfit(path)
        probe(target.parent)
        foreign = not _holds(target, ours)
    except OSError as error:
        raise OptionError(
            f"{name} cannot be written: {error.strerror}", hint="name a place where you may write"
        ) from None
    if foreign:
        raise OptionError(
            f"{name} exists and is not of {flag}", hint="give another name, or move it away"
        )


def _holds(path: Path, signature: bytes) -> bool:
    """Whether a file has ``signature`` near one of its ends; one without content, or none, may."""
    if not path.exists() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        start = file.read(_ENDS)
        file.seek(-min(_ENDS, path.stat().st_size), os.SEEK_END)
        return signature in start or signature in file.read()


def probe(folder: Path) -> None:
    """Try whether files can be made in a folder; raises OSError."""
    unfinished = _beside(folder / "any")
    unfinished.open("xb").close()
    unfinished.unlink()


def lock(file: IO[Any]) -> bool:
    """Reserve an open file for this process, until it is closed; whether that could be done.

    Where the file system knows no locks, every process may write.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def is_regular(path: str | os.PathLike[str]) -> bool:
    """Whether a name means a file on a disk; ``/dev/stdin`` does not, even where it leads to one.

    Raises OSError if there is nothing.
    """
    return stat.S_ISREG(os.stat(path).st_mode) and not os.fspath(path).startswith(_STREAMS)


def _refuse_unfit(path: str | os.PathLike[str]) -> None:
    """A folder, a device or a pipe is nothing that a file could take the place of."""
    if not os.path.exists(path):
        return
    if os.path.isdir(path):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not is_regular(path):
        raise OSError(errno.EINVAL, "not a regular file", path)
    if not os.access(path, os.W_OK):  # a renaming would not ask
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)


def _beside(path: Path) -> Path:
    """A name of its own: whatever else lies in the folder is somebody's."""
    return path.with_name(UNFINISHED.replace("*", secrets.token_hex(6)))


def _sync_folder(folder: Path) -> None:
    """Bring a renaming to the disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
