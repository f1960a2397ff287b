"""Devices beside CPU and CUDA: plain torch alone; and hints that fit what a system refuses."""

from pathlib import Path

import pytest
import torch

from engine.checkpoint.folder_files import read_file
from engine.engine import Engine
from engine.errors import CheckpointError, ImageError, OptionError
from engine.loading.device import pick_device, why_no_mps
from engine.ops import fused, native, products
from engine.pictures.image import open_image
from engine.refusals import hint_for
from tests.asking import Ask, refused


def test_mps_is_a_device_where_it_is_there(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := why_no_mps():
        refused(ask("-p", "x", "--device", "mps"), 2, "device mps is not available", reason)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps") == torch.device("mps")
    for dtype in ("bf16", "bfloat16"):
        with pytest.raises(OptionError, match="not offered on mps"):
            Engine.load(device="mps", dtype=dtype)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(OptionError, match="no GPU of Apple's"):
        pick_device("mps")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_devices_run_on_plain_torch(dtype: torch.dtype) -> None:
    """The meta device stands for one: its addresses are none, so that a kernel would crash."""
    x = torch.empty(2, 16, dtype=dtype, device="meta")
    weight = torch.empty(8, 16, dtype=dtype, device="meta")
    assert not products.few_rows(x, weight)
    assert products.many_rows(x, weight, None).shape == (2, 8)
    assert products.in_16_bits(weight) is None
    assert fused.add_norm(x, x, x[0], 1e-5)[1].shape == x.shape
    assert fused.silu_mul(x, x).device.type == "meta"
    assert not native.loaded("mps")
    with pytest.raises(ValueError, match="on the CPU"):
        products.gemv(x, (weight, None))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied"), "change its permissions"),
        (FileNotFoundError(2, "No such file or directory"), "check the path"),
        (OSError(5, "Input/output error"), "disk or network drive"),
        (OSError(24, "Too many open files"), "close some"),
        (OSError(40, "Too many levels of symbolic links"), "another path"),
    ],
)
def test_hints_fit_what_the_system_says(
    error: OSError, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert words in hint_for(error)
    path = tmp_path / "config.json"
    path.write_text("{}")

    def refusing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(CheckpointError, match=error.strerror) as weights:
        read_file(path)
    monkeypatch.setattr("builtins.open", refusing)
    with pytest.raises(ImageError, match=error.strerror) as picture:
        open_image(path)
    assert words in weights.value.hint
    assert words in picture.value.hint
