"""The folder that a conversion writes to: whether it can be written, and whose it is.

It is the conversion's own: a new or an empty folder, in which a marker says what is converted.
Without torch, so that a wrong name fails before that is imported.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import OptionError
from ..files import UNFINISHED, lock, probe, write_whole
from ..naming import display_name

MARKER = ".avl-conversion"  # in the target: what is converted there
NEW_FOLDER = "name a folder that does not exist"


class MadeFrom(NamedTuple):
    """What is converted: a folder, a vision tower to join in, and what its weights become."""

    source: Path
    tower: Path | None = None
    weights: str = "auto"

    def described(self) -> bytes:
        """What the marker says."""
        tower = str(self.tower.resolve()) if self.tower else None
        found = {"source": str(self.source.resolve()), "tower": tower}
        if self.weights != "auto":
            found["weights"] = self.weights
        return json.dumps(found, indent=2).encode()


def check_folder(target: Path, source: Path) -> None:
    """Refuse at once what no conversion could be written to; nothing is changed.

    Raises OptionError: no folder, no place to write, or a folder that holds something else.
    """
    place = next(path for path in (target, *target.parents) if os.path.lexists(path))
    if not place.is_dir():
        what = "a link to nothing" if place.is_symlink() and not place.exists() else "no folder"
        raise OptionError(f"{target} cannot take a conversion: {place} is {what}", hint=NEW_FOLDER)
    with suppress(OSError):
        if target.samefile(source):
            raise OptionError(f"{target} is the folder that is converted", hint=NEW_FOLDER)
    try:
        target.exists()  # raises where there can be no such name
        probe(place)
        foreign = place == target and not _is_empty(target) and not (target / MARKER).is_file()
    except OSError as error:
        raise _unfit(target, error) from None
    if foreign:
        raise OptionError(f"{target} holds something else already", hint=NEW_FOLDER)


@contextmanager
def claimed(target: Path, made_from: MadeFrom) -> Iterator[None]:
    """Make ``target`` the folder of this conversion, or find that it is; one process works in it.

    Where nothing was written, nothing is left.
    """
    marker, is_new = target / MARKER, not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        if _is_empty(target):
            write_whole(marker, made_from.described())
    except OSError as error:
        raise _unfit(target, error) from None
    check_owner(target, made_from)
    with marker.open("rb") as file:
        if not lock(file):
            raise OptionError(f"another process converts into {target}", hint="wait for it to end")
        for leftover in target.glob(UNFINISHED):
            leftover.unlink()
        try:
            yield
        finally:
            if [path.name for path in target.iterdir()] == [MARKER]:
                marker.unlink()
                if is_new:
                    target.rmdir()


def check_owner(target: Path, made_from: MadeFrom) -> None:
    """Refuse a folder with the marker of another conversion."""
    marker = target / MARKER
    if marker.is_file() and marker.read_bytes() != made_from.described():
        raise OptionError(f"{target} holds another conversion already", hint=NEW_FOLDER)


def _is_empty(target: Path) -> bool:
    """Whether a folder has nothing but what a killed process left."""
    return all(path.match(UNFINISHED) for path in target.iterdir())


def _unfit(target: Path, error: OSError) -> OptionError:
    return OptionError(
        f"{display_name(str(target))} cannot be written: {error.strerror}",
        hint="name a place where you may write",
    )
