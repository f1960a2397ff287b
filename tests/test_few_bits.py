"""Weights in few bits: rounded as they are read, multiplied as they are, and said where asked."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from bench.qwen_checkpoint import QwenShape, write_qwen
from engine.checkpoint.tensors import Checkpoint
from engine.engine import Engine
from engine.errors import OptionError
from engine.loading.families import recognise
from engine.loading.quantising import bytes_of, held_as
from engine.models.matrix import Linear
from engine.ops import native
from engine.ops.few_bits import FewBits
from engine.ops.formats import FORMATS
from engine.options import WEIGHTS
from engine.running.batch import job_of
from tests.asking import Ask, refused
from tests.checkpoints import Shape, write_llava, write_original_with_tower
from tests.test_packed import pack_layers

FEW = [name for name in WEIGHTS if name != "auto"]
SHAPE = Shape(hidden=64, mlp=96, kv_heads=2)
GROUPED = Shape(family="qwen2", hidden=64, mlp=96, kv_heads=2)
PACKABLE = Shape(hidden=64, mlp=128, kv_heads=2)
needs_native = pytest.mark.skipif(not native.loaded(), reason="the native module is not built")


@pytest.fixture
def load(checkpoint: Callable[..., Path]) -> Callable[..., Engine]:
    """``load(weights, shape, dtype)``: an engine with the exact cache."""

    def made(weights: str, shape: Shape = SHAPE, dtype: str = "float32") -> Engine:
        folder = checkpoint(shape)
        return Engine.load(folder, device="cpu", dtype=dtype, cache="full", weights=weights)

    return made


def linears(engine: Engine) -> dict[str, Linear]:
    found = engine.model.named_modules()
    return {name: layer for name, layer in found if isinstance(layer, Linear)}


def picture() -> Image.Image:
    return Image.radial_gradient("L").resize((77, 77)).convert("RGB")


def test_layers_are_rounded_and_the_rest_is_not(load: Callable[..., Engine]) -> None:
    exact = linears(load("auto"))
    for wanted in FEW:
        name, _, more = wanted.partition("+")
        for path, layer in linears(load(wanted)).items():
            rounded = path.startswith("decoder.layers.") or (bool(more) and path == "decoder.head")
            assert (layer.few_bits is not None) == rounded, (wanted, path)
            if layer.few_bits is not None:
                format_ = FORMATS[name]
                want = format_.unpack(format_.pack(exact[path].weight.float()))
                assert torch.equal(layer.few_bits.numbers(), want)
                assert layer.weight is None


@pytest.mark.parametrize("shape", [SHAPE, GROUPED], ids=lambda shape: shape.family)
@pytest.mark.parametrize("wanted", ["q8", "q8+head"])
def test_answers_are_those_of_the_rounded_numbers(
    wanted: str, shape: Shape, load: Callable[..., Engine]
) -> None:
    """8 bits change little else: the same model with what they stand for gives the same tokens."""
    few, plain = load(wanted, shape), load("auto", shape)
    for path, layer in linears(few).items():
        if layer.few_bits is not None:
            number = nn.Parameter(layer.few_bits.numbers(), requires_grad=False)
            there = linears(plain)[path]
            there.matrix._joined.clear()
            there.matrix._short, there.weight = None, number
    for pictures in ([], [picture()]):
        asked = {"max_new_tokens": 24, "ignore_eos": True, "logprobs": True}
        a, b = (engine.generate("What is it?", pictures, **asked) for engine in (few, plain))
        assert a.token_ids == b.token_ids
        torch.testing.assert_close(
            torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-3
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_4_bits_stay_near_the_rounded_numbers(dtype: str, load: Callable[..., Engine]) -> None:
    """Decoding rounds inputs to 8 bits as well: the first token has none of it."""
    few = load("q4", dtype=dtype).generate("What is it?", [picture()], max_new_tokens=1)
    again = load("q4", dtype=dtype).generate("What is it?", [picture()], max_new_tokens=1)
    assert few.token_ids == again.token_ids
    engine = load("q4", dtype=dtype)
    layer = linears(engine)["decoder.layers.1.gate_proj"]
    x = torch.randn(1, SHAPE.hidden).to(engine.dtype)
    assert layer.few_bits is not None
    got, want = layer(x).float(), x.float() @ layer.few_bits.numbers().T
    assert (got - want).norm() < 0.02 * want.norm()


@needs_native
@pytest.mark.parametrize("wanted", FEW)
def test_steps_are_recorded(wanted: str, load: Callable[..., Engine]) -> None:
    engine = load(wanted, dtype="bfloat16")
    scheduler = engine.scheduler()
    scheduler.submit(job_of(engine, {"prompt": "What?", "max_new_tokens": 9, "ignore_eos": True}))
    for _ in range(6):
        scheduler.step()
    taped = scheduler._stepper._taped
    assert taped is not None
    assert taped.eager_because is None
    assert any(taped._tapes.values())


@pytest.mark.parametrize("wanted", FEW)
def test_bytes_are_known_before_and_after(
    wanted: str, load: Callable[..., Engine], checkpoint: Callable[..., Path]
) -> None:
    engine, model = load(wanted), recognise(checkpoint(SHAPE)).model
    expected = bytes_of(model, 4, wanted)
    held = engine.weights
    assert set(held) == {"fp32", wanted.partition("+")[0]}
    rows = sum(layer.out_features for layer in linears(engine).values())
    assert abs(sum(held.values()) - expected) <= 4 * rows * (wanted[:2] == "q8")


def test_answers_of_other_weights_are_not_taken_up(load: Callable[..., Engine]) -> None:
    """What is resumed was answered by the same numbers."""
    assert len({load(wanted).fingerprint() for wanted in WEIGHTS}) == len(WEIGHTS)


def test_unknown_weights_are_refused_by_name(checkpoint: Callable[..., Path], ask: Ask) -> None:
    with pytest.raises(OptionError, match="unknown weights 'q5'") as caught:
        Engine.load(checkpoint(SHAPE), weights="q5")
    assert "q8, q4" in caught.value.hint
    refused(ask("-p", "x", "--weights", "q5"), 2, "invalid choice: 'q5'")


def test_stats_name_formats_and_bytes(checkpoint: Callable[..., Path], ask: Ask) -> None:
    asked = ask(
        *("--model", str(checkpoint(SHAPE)), "--device", "cpu", "-p", "What?", "-n", "2"),
        *("--weights", "q4", "--stats"),
    )
    assert re.search(r"weights fp32 [\d.]+ MB, q4 [\d.]+ MB", asked.err)


PEAK = """
import re, sys
from pathlib import Path
from engine import Engine

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

Engine.load(sys.argv[1], device="cpu", dtype="bf16", weights=sys.argv[3], threads=1)
base = status("VmRSS")
engine = Engine.load(sys.argv[2], device="cpu", dtype="bf16", weights=sys.argv[3], threads=1)
print(status("VmHWM") - base, sum(engine.weights.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("wanted", ["q8", "q4"])
def test_the_model_never_exists_in_16_bits(
    wanted: str, tmp_path: Path, checkpoint: Callable[..., Path]
) -> None:
    """134 MB of layers in 16 bits, whose largest tensor has 8; 30 MB are left to the loader."""
    shape = Shape(hidden=1024, mlp=4096, heads=8, kv_heads=8, layers=4)
    folder = write_llava(tmp_path / "large", shape, dtype=torch.bfloat16)
    command = [sys.executable, "-c", PEAK, str(checkpoint(SHAPE)), str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, held = map(int, done.stdout.split())
    assert peak < held + 1.2 * 8.4e6 + 30e6


def llava(folder: Path) -> Path:
    return write_llava(folder, SHAPE)


def qwen(folder: Path) -> Path:
    return write_qwen(folder, QwenShape())


@pytest.mark.parametrize("wanted", FEW)
@pytest.mark.parametrize("write", [llava, qwen])
def test_a_converted_model_is_the_one_that_is_rounded_while_loading(
    write: Callable[[Path], Path], wanted: str, ask: Ask, tmp_path: Path
) -> None:
    source, target = write(tmp_path / "16 bits"), tmp_path / "few"
    asked = ask("--model", source, "--convert", target, "--weights", wanted, "-q")
    assert (asked.code, asked.err) == (0, "")
    few, rounded = (
        Engine.load(source, device="cpu", weights=wanted),
        Engine.load(target, device="cpu"),
    )
    assert few.weights == rounded.weights
    for path, layer in linears(few).items():
        other = linears(rounded)[path]
        if layer.few_bits is None:
            assert torch.equal(layer.weight, other.weight)
        else:
            assert other.few_bits is not None
            assert torch.equal(layer.few_bits.numbers(), other.few_bits.numbers())
    listed = ask("--check", "--model", target, "-q").out
    assert re.search(rf"formats: ok - .*layers [^;]*{wanted[:2]} [\d.]+ MB", listed)


def test_a_pickled_model_is_rounded_while_its_tower_is_joined(ask: Ask, tmp_path: Path) -> None:
    source, tower = tmp_path / "pickled", tmp_path / "clip"
    write_original_with_tower(source, SHAPE, tower)
    for folder in (source, tower):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    asked = ("--model", source, "--vision-tower", tower, "-q", "--convert")
    assert ask(*asked, tmp_path / "plain").code == 0
    assert ask(*asked, tmp_path / "few", "--weights", "q4").code == 0
    few, rounded = (
        Engine.load(tmp_path / "few", device="cpu"),
        Engine.load(tmp_path / "plain", device="cpu", weights="q4"),
    )
    assert few.weights == rounded.weights
    assert torch.equal(*(engine.logits("Hello", [picture()]) for engine in (few, rounded)))


def test_weights_that_no_layer_fits_are_refused(ask: Ask, tmp_path: Path) -> None:
    odd, rows = (
        write_llava(tmp_path / "odd", Shape(hidden=48, mlp=80)),
        write_llava(tmp_path / "rows", replace(SHAPE, hidden=32, heads=2, kv_heads=1, mlp=32)),
    )
    with pytest.raises(OptionError, match="no layer of this model fits q4: inputs in runs of 32"):
        Engine.load(odd, device="cpu", weights="q4")
    assert "q8" in Engine.load(odd, device="cpu", weights="q8").weights
    convert = ("--convert", tmp_path / "few", "--weights", "q4", "-q")
    refused(ask("--model", odd, *convert), 2, "no layer of this model fits q4")
    assert not (tmp_path / "few").exists()
    assert ask("--model", rows, *convert).code == 0


def test_published_weights_are_converted_as_they_are(ask: Ask, tmp_path: Path) -> None:
    """GPTQ's whole numbers are q4's; a conversion rounds none of them again."""
    source, target = write_llava(tmp_path / "gptq", PACKABLE), tmp_path / "few"
    want = pack_layers(source, "gptq")
    assert ask("--model", source, "--convert", target, "--weights", "q4", "-q").code == 0
    with Checkpoint.open(target) as checkpoint:
        for name, numbers in want.items():
            found = held_as(checkpoint.stored(checkpoint.tensors[name]), None)
            assert isinstance(found, FewBits)
            torch.testing.assert_close(found.numbers().double(), numbers, rtol=1e-6, atol=1e-9)


def test_a_folder_of_one_conversion_takes_no_other(ask: Ask, tmp_path: Path) -> None:
    source, target = write_llava(tmp_path / "16", SHAPE), tmp_path / "few"
    asked = ("--model", source, "--convert", target, "-q", "--weights")
    assert ask(*asked, "q4").code == ask(*asked, "q4").code == 0
    refused(ask(*asked, "q8"), 2, "holds another conversion already")
