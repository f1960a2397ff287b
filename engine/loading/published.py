"""How a checkpoint's publisher draws its answers; here answers are greedy unless flags say more."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.folder_files import read_json

_FLAGS = {
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "repetition_penalty": "--repetition-penalty",
}


def published_sampling(folder: Path) -> str:
    """The flags that say what generation_config.json does, for a reader; "" if it has none of them.

    A penalty of repetitions counts without drawing, too. Values that are no numbers are not shown.
    """
    path = folder / "generation_config.json"
    values = read_json(path) if path.exists() else {}
    named = list(_FLAGS) if values.get("do_sample") is True else ["repetition_penalty"]
    found = [
        f"{_FLAGS[name]} {values[name]:g}"
        for name in named
        if type(values.get(name)) in (int, float) and values[name] not in (0, 1)
    ]
    return f", published with {' '.join(found)} (not applied unless given)" if found else ""
