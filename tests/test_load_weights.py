"""Filling a module from a checkpoint: what differs is listed, nothing is kept twice in memory."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engine.checkpoint.tensors import Checkpoint, load_weights
from engine.errors import CheckpointError


class Toy(nn.Module):
    """Stands in for a model: parameters, a buffer, a part kept in float32, an untied head."""

    counter: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.norm.keep_float32 = True  # type: ignore[assignment]
        self.head = nn.Linear(4, 6, bias=False)
        self.register_buffer("counter", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("computed", torch.zeros(3), persistent=False)


def toy_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "embed.weight": torch.randn(6, 4, generator=generator).bfloat16(),
        "norm.weight": torch.randn(4, generator=generator).bfloat16(),
        "norm.bias": torch.randn(4, generator=generator).bfloat16(),
        "head.weight": torch.randn(6, 4, generator=generator).bfloat16(),
        "counter": torch.tensor([3, 4]),
    }


@contextmanager
def opened(folder: Path, tensors: dict[str, torch.Tensor]) -> Iterator[Checkpoint]:
    save_file(tensors, folder / "model.safetensors")
    with Checkpoint.open(folder) as checkpoint:
        yield checkpoint


def meta_toy() -> Toy:
    with torch.device("meta"):
        return Toy()


def same(name: str) -> str:
    return name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_parameter_is_filled_in_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = toy_tensors()
    with opened(tmp_path, tensors | {"extra": torch.ones(1)}) as checkpoint:
        toy = meta_toy()
        ignored = load_weights(
            toy, checkpoint, lambda name: None if name == "extra" else name, dtype=dtype
        )
    assert ignored == ["extra"]
    for name, tensor in toy.state_dict().items():
        kept = torch.int64 if name == "counter" else torch.float32 if "norm" in name else dtype
        assert tensor.dtype == kept
        assert torch.equal(tensor, tensors[name].to(kept))
    assert not any(parameter.requires_grad for parameter in toy.parameters())
    assert isinstance(toy.embed.weight, nn.Parameter)
    assert "counter" in dict(toy.named_buffers())


def test_differences_are_three_lists_with_five_names_and_the_count(tmp_path: Path) -> None:
    tensors = toy_tensors()
    tensors = {f"other.{i}": torch.ones(1) for i in range(7)} | tensors
    tensors["head.weight"] = torch.ones(6, 5)
    del tensors["embed.weight"], tensors["norm.bias"]
    toy = meta_toy()
    with (
        opened(tmp_path, tensors) as checkpoint,
        pytest.raises(CheckpointError) as caught,
    ):
        load_weights(toy, checkpoint, same)
    unexpected = ", ".join(f"'other.{i}'" for i in range(5))
    assert str(caught.value) == (
        f"{tmp_path}: the tensors do not fit the model: 2 missing (embed.weight, norm.bias); "
        f"7 unexpected ({unexpected} and 2 more); "
        "1 mis-shaped (head.weight is [6, 5], the model needs [6, 4])"
    )
    assert all(parameter.is_meta for parameter in toy.parameters())  # refused before any was read


def test_two_tensors_for_one_parameter_are_refused(tmp_path: Path) -> None:
    tensors = toy_tensors()
    tensors["model.embed.weight"] = tensors["embed.weight"].clone()
    with (
        opened(tmp_path, tensors) as checkpoint,
        pytest.raises(CheckpointError, match=r"embed.weight' and '.*embed.weight' are both embed"),
    ):
        load_weights(meta_toy(), checkpoint, lambda name: name.removeprefix("model."))


def test_integers_for_weights_are_refused(tmp_path: Path) -> None:
    tensors = toy_tensors() | {"head.weight": torch.ones(6, 4, dtype=torch.int8)}
    with (
        opened(tmp_path, tensors) as checkpoint,
        pytest.raises(CheckpointError, match=r"head.weight has torch.int8: no weight"),
    ):
        load_weights(meta_toy(), checkpoint, same)


TIED = {"head.weight": "embed.weight"}


def test_tied_head_absent_or_equal_shares_memory(tmp_path: Path) -> None:
    tensors = toy_tensors()
    tensors["head.weight"] = tensors["embed.weight"].clone()
    for folder in ("present", "absent"):
        (tmp_path / folder).mkdir()
        with opened(tmp_path / folder, tensors) as checkpoint:
            toy = meta_toy()
            load_weights(toy, checkpoint, same, tied=TIED)
        assert toy.head.weight is toy.embed.weight
        assert torch.equal(toy.head.weight, tensors["embed.weight"].float())
        tensors.pop("head.weight", None)


@pytest.mark.parametrize("change", ["one value", "shape", "dtype"])
def test_tied_head_that_differs_is_refused(change: str, tmp_path: Path) -> None:
    tensors = toy_tensors()
    head = tensors["embed.weight"].clone()
    if change == "one value":
        head[5, 3] += 1
    tensors["head.weight"] = {"shape": head[:5].clone(), "dtype": head.float()}.get(change, head)
    with (
        opened(tmp_path, tensors) as checkpoint,
        pytest.raises(CheckpointError, match=r"'head.weight' differs from 'embed.weight', but"),
    ):
        load_weights(meta_toy(), checkpoint, same, tied=TIED)


def test_untied_head_that_is_absent_is_missing(tmp_path: Path) -> None:
    tensors = toy_tensors()
    del tensors["head.weight"]
    with (
        opened(tmp_path, tensors) as checkpoint,
        pytest.raises(CheckpointError, match=r"1 missing \(head.weight\)"),
    ):
        load_weights(meta_toy(), checkpoint, same)


def test_mapped_weights_are_the_file_and_may_be_changed_privately(tmp_path: Path) -> None:
    """What fits as it lies is not copied; writing to it leaves the file alone."""
    values = {"large": torch.randn(300, 100), "small": torch.randn(3, 3)}
    with opened(tmp_path, values) as checkpoint:
        read = {
            name: checkpoint.read_at(checkpoint.tensors[name], "cpu", torch.float32, mapped=True)
            for name in values
        }
        other = checkpoint.read_at(checkpoint.tensors["large"], "cpu", torch.bfloat16, mapped=True)
    assert all(torch.equal(read[name], values[name]) for name in values)
    assert torch.equal(other, values["large"].bfloat16())
    maps = Path("/proc/self/maps").read_text()
    assert maps.count(str(tmp_path / "model.safetensors")) == 1
    read["large"].zero_()
    with Checkpoint.open(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("large"), values["large"])


def test_a_second_checkpoint_supplies_what_the_first_lacks(tmp_path: Path) -> None:
    tensors = toy_tensors()
    tower = {"weight": tensors.pop("norm.weight"), "bias": tensors.pop("norm.bias")}
    (tmp_path / "tower").mkdir()
    toy = meta_toy()
    with opened(tmp_path / "tower", tower) as checkpoint:
        load_weights(toy.norm, checkpoint, same)
    with opened(tmp_path, tensors) as checkpoint:
        load_weights(toy, checkpoint, same)
    assert torch.equal(toy.norm.weight, tower["weight"].float())
    assert torch.equal(toy.head.weight, tensors["head.weight"].float())
    assert not any(tensor.is_meta for tensor in toy.state_dict().values())


PEAK = """
import re, sys
from pathlib import Path
import torch
from torch import nn
from engine.checkpoint.tensors import Checkpoint, load_weights

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
torch.empty(1 << 20).to(torch.bfloat16)
with torch.device("meta"):
    module = nn.ParameterList(nn.Parameter(torch.empty(20, 1 << 20)) for _ in range(5))
base = status("VmRSS")
with Checkpoint.open(Path(sys.argv[1])) as checkpoint:
    load_weights(module, checkpoint, str, dtype=getattr(torch, sys.argv[2]))
print(status("VmHWM") - base, status("VmRSS") - base)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_is_the_model_and_one_tensor(dtype: str, tmp_path: Path) -> None:
    largest = 20 << 21  # 42 MB in bf16, five of them: 210 MB
    tensor = torch.ones(20, 1 << 20, dtype=torch.bfloat16)
    with opened(tmp_path, {str(i): tensor.clone() for i in range(5)}):
        command = [sys.executable, "-c", PEAK, str(tmp_path), dtype]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, after = map(int, result.stdout.split())
    model = 5 * largest * (2 if dtype == "float32" else 1)
    assert model <= after < model + 20e6  # nothing but the model stays
    assert peak - model < 1.2 * largest + 20e6
