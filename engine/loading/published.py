"""How a checkpoint's publisher draws its answers; here they are greedy unless told otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.folder_files import read_json
from ..errors import CheckpointError, OptionError
from ..options import Sampling

_FLAGS = {
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "repetition_penalty": "--repetition-penalty",
}


def published_sampling(folder: Path) -> dict[str, float]:
    """What generation_config.json says of ``options.Sampling``, as far as it changes anything.

    A penalty of repetitions counts without drawing, too; who draws without naming a temperature
    draws at 1. Raises CheckpointError for numbers out of range.
    """
    path = folder / "generation_config.json"
    values = read_json(path) if path.exists() else {}
    drawn = values.get("do_sample") is True
    values = {"temperature": 1.0} | values if drawn else values
    named = list(_FLAGS) if drawn else ["repetition_penalty"]
    numbers: dict[str, Any] = {
        name: values[name] for name in named if type(values.get(name)) in (int, float)
    }
    try:
        Sampling(**numbers)
    except OptionError as error:
        raise CheckpointError(
            f"{path.name}: {error}", hint="correct it, or leave out --as-published"
        ) from None
    plain = {"top_k": 0, "top_p": 1, "repetition_penalty": 1}
    return {name: value for name, value in numbers.items() if value != plain.get(name)}


def told_sampling(folder: Path) -> str:
    """The same as flags, for a reader; "" if it says nothing."""
    try:
        found = [f"{_FLAGS[name]} {value:g}" for name, value in published_sampling(folder).items()]
    except CheckpointError as error:
        return f", published with numbers that are none ({error}): --as-published is refused"
    return f", published with {' '.join(found)} (taken with --as-published)" if found else ""
