"""Checkpoints in few bits: the numbers of each layout, refusals by name, and whole answers."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.qwen_checkpoint import QwenShape, write_qwen
from engine.checkpoint.tensors import Checkpoint
from engine.engine import Engine
from engine.errors import CheckpointError
from engine.loading.quantising import held_as
from engine.ops.few_bits import FewBits
from tests.asking import Ask, refused
from tests.checkpoints import Shape, edit_json, write_llava, write_original_with_tower
from tests.next_checkpoints import write_next
from tests.noise import noise
from tests.packing import LAYOUTS

SHAPE = Shape(hidden=64, mlp=128, kv_heads=2)
EVERY = pytest.mark.parametrize("layout", LAYOUTS)


def save_one(folder: Path, parts: dict[str, Tensor], settings: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    edit_json(folder / "config.json", quantization_config=settings)
    save_file({f"one.{leaf}": part for leaf, part in parts.items()}, folder / "model.safetensors")
    return folder


def numbers(weight: FewBits | Tensor) -> Tensor:
    return weight.numbers() if isinstance(weight, FewBits) else weight


@EVERY
@pytest.mark.parametrize("shape", [(8, 64, 32), (72, 192, 64), (40, 256, 128)], ids=str)
def test_numbers_are_those_of_the_definition(
    layout: str, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    pack, settings, format_ = LAYOUTS[layout]
    want, parts = pack(*shape)
    with Checkpoint.open(save_one(tmp_path, parts, settings)) as checkpoint:
        assert list(checkpoint.tensors) == ["one.weight"]
        info = checkpoint.tensors["one.weight"]
        assert info.shape == tuple(want.shape)
        assert info.nbytes == sum(part.nbytes for part in parts.values())
        weight = held_as(checkpoint.stored(info), None)
        assert getattr(weight, "format", None) == format_
        torch.testing.assert_close(numbers(weight).double(), want, rtol=1e-6, atol=1e-9)
        pieces = [held_as(checkpoint.stored(piece), None) for piece in info.split(1)]
        whole = torch.cat([numbers(piece) for piece in pieces])
        assert torch.equal(whole, numbers(weight))


@EVERY
def test_a_fused_weight_is_cut_by_rows(layout: str, tmp_path: Path) -> None:
    pack, settings, _ = LAYOUTS[layout]
    want, parts = pack(96, 64, 64)
    with Checkpoint.open(save_one(tmp_path, parts, settings)) as checkpoint:
        pieces = checkpoint.tensors["one.weight"].split(3)
        assert [piece.shape for piece in pieces] == [(32, 64)] * 3
        found = torch.cat([numbers(held_as(checkpoint.stored(piece), None)) for piece in pieces])
        torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-9)


PAIRS = ("ab", "ac", "ad", "da")

# The matrices of a decoder's layers, of LLaVA and of Qwen-VL.
PACKED = re.compile(
    r"language_model\.model\.layers\..*_proj\.weight|transformer\.h\..*\.(c_attn|c_proj|w1|w2)\.weight"
)


def pack_layers(folder: Path, layout: str) -> dict[str, Tensor]:
    """Pack the layers of a written LLaVA; returns what their weights are, by name."""
    pack, settings, _ = LAYOUTS[layout]
    tensors, want = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if PACKED.fullmatch(name)]:
        want[name], parts = pack(*tensors.pop(name).shape, 32 if layout != "nf4" else 64)
        tensors |= {name.removesuffix("weight") + leaf: part for leaf, part in parts.items()}
        if layout.startswith("gptq"):  # which gives every layer a bias
            bias = name.removesuffix("weight") + "bias"
            tensors.setdefault(bias, torch.zeros(len(want[name])))
    save_file(tensors, folder / "model.safetensors")
    edit_json(folder / "config.json", quantization_config=settings)
    return want


@pytest.mark.parametrize("layout", ["gptq", "gptq-act-order", "awq", "w4a16", "int8", "nf4"])
def test_a_packed_model_answers_as_its_numbers_do(layout: str, tmp_path: Path) -> None:
    """Beside the same model with those numbers in float32; prompts of many rows round no input."""
    packed, plain = (write_llava(tmp_path / name, SHAPE) for name in ("packed", "plain"))
    want = pack_layers(packed, layout)
    tensors = load_file(plain / "model.safetensors")
    save_file(tensors | {n: w.float() for n, w in want.items()}, plain / "model.safetensors")
    few, exact = (
        Engine.load(folder, device="cpu", dtype="float32", cache="full")
        for folder in (packed, plain)
    )
    got, known = (engine.logits("What is it? " * 20) for engine in (few, exact))
    torch.testing.assert_close(got, known, rtol=0, atol=1e-3)
    held = LAYOUTS[layout][2]
    assert set(few.weights) == {"fp32", *([held] if held else [])}


@pytest.mark.parametrize("layout", ["gptq", "int8", "nf4"])
def test_a_packed_qwen_shares_its_fused_weights_out(layout: str, tmp_path: Path) -> None:
    """As ``Qwen/Qwen-VL-Chat-Int4``: queries, keys and values are one weight, with a bias."""
    packed, plain = (write_qwen(tmp_path / name, QwenShape()) for name in ("packed", "plain"))
    want = pack_layers(packed, layout)
    tensors = load_file(plain / "model.safetensors")
    assert any(name.endswith("c_attn.weight") for name in want)
    save_file(tensors | {n: w.float() for n, w in want.items()}, plain / "model.safetensors")
    few, exact = (Engine.load(folder, device="cpu", dtype="float32") for folder in (packed, plain))
    got, known = (engine.logits("What is it? " * 20) for engine in (few, exact))
    torch.testing.assert_close(got, known, rtol=0, atol=1e-3)
    assert (LAYOUTS[layout][2] or "fp32") in few.weights


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_packed_weights_are_rounded_to_what_is_asked_for(weights: str, tmp_path: Path) -> None:
    pack_layers(write_llava(tmp_path, SHAPE), "nf4")
    assert weights in Engine.load(tmp_path, device="cpu", weights=weights).weights


def test_a_packed_tower_of_its_own_is_read_by_its_numbers(tmp_path: Path) -> None:
    pack, settings, _ = LAYOUTS["int8"]
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    for folder in (packed, plain):
        write_original_with_tower(folder, SHAPE)
    tensors = load_file(packed / "tower" / "model.safetensors")
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    want, parts = pack(*tensors[name].shape)
    save_file(tensors | {name: want.float()}, plain / "tower" / "model.safetensors")
    del tensors[name]
    prefix = name.removesuffix("weight")
    tensors |= {prefix + leaf: part for leaf, part in parts.items()}
    save_file(tensors, packed / "tower" / "model.safetensors")
    edit_json(packed / "tower" / "config.json", quantization_config=settings)
    few, exact = (Engine.load(folder, device="cpu", dtype="float32") for folder in (packed, plain))
    got, known = (engine.logits("Hello", [noise(56, 56)]) for engine in (few, exact))
    torch.testing.assert_close(got, known, rtol=0, atol=1e-3)


def test_equal_means_the_same_layout_and_bytes(tmp_path: Path) -> None:
    pack, settings, _ = LAYOUTS["gptq"]
    want, parts = pack(64, 64, 32)
    other = pack(64, 64, 32)[1]
    same = {f"{name}.{leaf}": part.clone() for name in ("a", "b") for leaf, part in parts.items()}
    more = {f"c.{leaf}": part for leaf, part in other.items()} | {"d.weight": want.half()}
    (tmp_path / "config.json").write_text("{}")
    edit_json(tmp_path / "config.json", quantization_config=settings)
    save_file(same | more, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        pairs = {pair: checkpoint.equal(*(f"{name}.weight" for name in pair)) for pair in PAIRS}
    assert pairs == {pair: pair == "ab" for pair in PAIRS}


# --- refusals ------------------------------------------------------------------------------------

UNREAD = {
    "hqq": ({"quant_method": "hqq"}, "(hqq)"),
    "fp8": ({"quant_method": "fbgemm_fp8"}, "(fbgemm_fp8)"),
    "awq gemv": ({"quant_method": "awq", "version": "gemv"}, "(awq gemv)"),
    "marlin": ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "(gptq marlin)"),
    "w8a8": ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "int-quantized"),
    "no method": ({"bits": "4\n\x1b"}, "(method unknown)"),
    "no settings": ("4 bits", "(quantization_config)"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_is_not_read_is_refused_by_name(case: str, ask: Ask, tmp_path: Path) -> None:
    settings, named = UNREAD[case]
    write_llava(tmp_path, Shape())
    edit_json(tmp_path / "config.json", quantization_config=settings)
    refused(ask("--model", tmp_path, "-p", "x"), 4, "quantised", named, "q8 or q4")
    asked = ask("--check", "--model", tmp_path, "-q")
    assert asked.code == 4
    assert named in asked.out


def test_every_family_refuses_in_one_way(ask: Ask, tmp_path: Path) -> None:
    folders = [
        write_original_with_tower(tmp_path / "original", Shape()),
        write_next(tmp_path / "next", "vicuna"),
        write_next(tmp_path / "next-original", "vicuna", "original"),
        write_qwen(tmp_path / "qwen", QwenShape()),
    ]
    for folder in folders:
        edit_json(folder / "config.json", quantization_config={"quant_method": "hqq"})
        refused(ask("--model", folder, "-p", "x"), 4, "not read (hqq)")
    folder = write_llava(tmp_path / "nested", Shape())
    for key, method in (("quantization_config", "hqq"), ("compression_config", "int-quantized")):
        edit_json(folder / "config.json", text_config={key: {"quant_method": method}})
        refused(ask("--model", folder, "-p", "x"), 4, f"not read ({method})")


def _without(leaf: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda parts: parts.pop(leaf)


def _shaped(leaf: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda parts: parts.update({leaf: torch.zeros(shape, dtype=parts[leaf].dtype)})


STATE = "weight.quant_state.bitsandbytes__nf4"
DAMAGED: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "no scales": (
        "gptq",
        _without("scales"),
        "'one.qweight' is quantised (GPTQ or AWQ) without 'one.scales'",
    ),
    "no zeros": ("awq", _without("qzeros"), "(GPTQ or AWQ) without 'one.qzeros'"),
    "no shape": ("w4a16", _without("weight_shape"), "without 'one.weight_shape'"),
    "no book": ("nf4", _without("weight.quant_map"), "without 'one.weight.quant_map'"),
    "no state": (
        "nf4",
        _without("weight.quant_state.bitsandbytes__nf4"),
        "quantised (bitsandbytes, 4 bits), but its tensors do not fit",
    ),
    "no nested": (
        "nf4-nested",
        _without("weight.nested_absmax"),
        "quantised (bitsandbytes, 4 bits), but its tensors do not fit",
    ),
    "no weight": (
        "int8",
        _without("weight"),
        "'one.SCB' is quantised (bitsandbytes, 8 bits) without 'one.weight'",
    ),
    "3 bits": ("gptq", _shaped("qweight", 6, 8), "4 and 8 bits are read"),
    "zeros": ("gptq", _shaped("qzeros", 2, 3), "qzeros [2, 3]"),
    "groups": (
        "awq",
        _shaped("scales", 3, 8),
        "quantised (GPTQ or AWQ), but its tensors do not fit",
    ),
    "scale": (
        "w4a16",
        _shaped("weight_scale", 8, 3),
        "(compressed-tensors), but its tensors do not fit",
    ),
    "points": ("w4a16-asym", _shaped("weight_zero_point", 2, 2), "weight_zero_point [2, 2]"),
    "largest": ("int8", _shaped("SCB", 7), "SCB [7]"),
    "twice": (
        "gptq",
        lambda parts: parts.update({"weight": torch.zeros(8, 64)}),
        "'one.weight' and 'one.qweight' are the same weight twice",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_parts_that_do_not_fit_are_named_with_their_layout(case: str, tmp_path: Path) -> None:
    layout, damage, message = DAMAGED[case]
    pack, settings, _ = LAYOUTS[layout]
    parts = pack(8, 64, 64 if layout.startswith("nf4") else 32)[1]
    damage(parts)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(save_one(tmp_path, parts, settings))
    assert message in f"{caught.value} {caught.value.hint}"


def test_a_bias_of_zeros_is_no_surprise_and_another_one_is(ask: Ask, tmp_path: Path) -> None:
    write_llava(tmp_path, SHAPE)
    pack_layers(tmp_path, "gptq")
    assert ask("--model", tmp_path, "-p", "Hi", "-n", "1", "-q").code == 0
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("q_proj.bias") and "language" in name)
    tensors[name][3] = 1.0
    save_file(tensors, path)
    refused(ask("--model", tmp_path, "-p", "x"), 4, "1 unexpected", "q_proj.bias")


# --- the publishers' own tools -------------------------------------------------------------------


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="extra: layouts")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_reads_the_same(kind: str, nested: bool, tmp_path: Path) -> None:
    from bitsandbytes import functional

    weight = torch.randn(96, 128)
    args: dict[str, Any] = {"quant_type": kind, "compress_statistics": nested}
    packed, state = functional.quantize_4bit(weight, blocksize=64, **args)
    want = functional.dequantize_4bit(packed, state)
    beside = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    folder = save_one(tmp_path, {"weight": packed, **beside}, {"quant_method": "bitsandbytes"})
    with Checkpoint.open(folder) as checkpoint:
        found = checkpoint.stored(checkpoint.tensors["one.weight"])
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not importlib.util.find_spec("compressed_tensors"), reason="extra: layouts")
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 64), (8, 256)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors_writes_what_is_read(
    bits: int, group: int, symmetric: bool, tmp_path: Path
) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (96, 256), dtype=torch.int8)
    zero = torch.randint(-half, half, (96, 256 // group), dtype=torch.int8)
    scale = torch.rand(96, 256 // group).half() / half
    parts = {
        "weight_packed": pack_to_int32(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([96, 256]),
    }
    if symmetric:
        zero.zero_()
    else:
        parts["weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0).contiguous()
    want = (codes.double() - zero.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)
    with Checkpoint.open(save_one(tmp_path, parts, LAYOUTS["w4a16"][1])) as checkpoint:
        weight = held_as(checkpoint.stored(checkpoint.tensors["one.weight"]), None)
    torch.testing.assert_close(numbers(weight).double(), want, rtol=1e-6, atol=1e-9)
    row_wise = symmetric and bits == 8 and group == 256
    assert isinstance(weight, FewBits) == (bits == 4 or row_wise)
