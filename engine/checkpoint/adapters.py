"""Folders that are no model yet: adapters."""

from pathlib import Path

from ..errors import CheckpointError
from .folder_files import BIN_INDEX, BIN_SINGLE, INDEX, SINGLE, read_json, show

# What such a repository writes beside adapter_config.json if it has been merged into its base.
_WHOLE = (SINGLE, INDEX, BIN_SINGLE, BIN_INDEX)


def refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError for a folder of LoRA weights: they change a model, they are none."""
    path = folder / "adapter_config.json"
    if not path.exists() or any((folder / name).exists() for name in _WHOLE):
        return
    base = read_json(path).get("base_model_name_or_path")
    raise CheckpointError(
        f"{folder} is an adapter (LoRA) of {show(str(base))}, as adapter_config.json says, and no "
        "model",
        hint="merge it into its base first (peft: merge_and_unload), and give the merged folder",
    )
