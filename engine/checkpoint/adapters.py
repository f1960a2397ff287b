"""Folders that are no model yet, or one in a form that is not read: adapters, quantised weights."""

from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointError
from .folder_files import BIN_INDEX, BIN_SINGLE, INDEX, SINGLE, read_json, show

# What such a repository writes beside adapter_config.json if it has been merged into its base.
_WHOLE = (SINGLE, INDEX, BIN_SINGLE, BIN_INDEX)
UNQUANTISED = "use the bf16, fp16 or fp32 version of this model"

# The ends of tensor names that only quantised layers have: bitsandbytes, GPTQ and AWQ,
# compressed-tensors.
_QUANTISED = (
    *(".absmax", ".quant_map", ".SCB", ".weight_format"),
    *(".qweight", ".qzeros", ".g_idx"),
    *(
        ".weight_packed",
        ".weight_scale",
        ".weight_shape",
        ".weight_zero_point",
        ".weight_scale_inv",
    ),
)


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


def refuse_quantised(folder: Path, config: Mapping[str, object]) -> None:
    """Raise CheckpointError where a config.json says that the weights are quantised."""
    sections = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    for section in sections:
        for key in ("quantization_config", "compression_config"):
            if section.get(key):
                raise quantised(folder, _method(section[key]))


def quantised(folder: Path, how: str) -> CheckpointError:
    """The error for weights in a few bits; the caller raises it."""
    return CheckpointError(
        f"{folder}: the weights are quantised ({how}): quantised checkpoints are not supported",
        hint=UNQUANTISED,
    )


def is_quantised(name: str) -> bool:
    """Tell whether a tensor's name is one that only quantised layers have."""
    return name.endswith(_QUANTISED)


def _method(settings: object) -> str:
    """The method by its name, with its bits where they are said."""
    if not isinstance(settings, Mapping):
        return "quantization_config"
    method = str(settings.get("quant_method", "method unknown"))
    flags = {"load_in_4bit": 4, "load_in_8bit": 8}
    named = next((bits for flag, bits in flags.items() if settings.get(flag) is True), None)
    bits = settings.get("bits", named)
    return show(method)[1:-1] + (f", {bits} bits" if isinstance(bits, int) else "")
