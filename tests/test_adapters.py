"""Adapters and quantised weights are refused for what they are, by every door."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.qwen_checkpoint import QwenShape, write_qwen
from tests.asking import Ask, refused
from tests.checkpoints import Shape, edit_json, write_json, write_llava, write_original_with_tower
from tests.next_checkpoints import write_next

BASE = "llava-hf/llava-1.5-7b-hf"


def adapt(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    write_json(
        folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": BASE}
    )
    save_file({"base_model.x.lora_A.weight": torch.zeros(8, 64)}, folder / "adapter.safetensors")


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_names_its_base_and_what_to_do(
    with_config: bool, ask: Ask, tmp_path: Path
) -> None:
    if with_config:
        write_original_with_tower(tmp_path, Shape())
        (tmp_path / "model.safetensors").unlink()
    adapt(tmp_path)
    refused(ask("--model", tmp_path, "-p", "x"), 4, "LoRA", BASE, "merge it")
    asked = ask("--check", "--model", tmp_path, "-q")
    assert asked.code == 4
    assert "config: FAILED" in asked.out
    assert "LoRA" in asked.out


def test_a_merged_model_that_kept_the_adapters_settings_loads(ask: Ask, tmp_path: Path) -> None:
    adapt(write_llava(tmp_path, Shape()))
    assert ask("--model", tmp_path, "-p", "Hi", "-n", "1", "-q").code == 0


QUANTISED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "(bitsandbytes, 4 bits)"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "(bitsandbytes, 8 bits)"),
    ({"quant_method": "awq", "bits": 4}, "(awq, 4 bits)"),
    ({"quant_method": "gptq", "bits": 4}, "(gptq, 4 bits)"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "(compressed-tensors)"),
    ({"bits": "4\n\x1b"}, "(method unknown)"),
]


@pytest.mark.parametrize(("settings", "named"), QUANTISED, ids=str)
def test_a_quantised_model_is_refused_by_its_method(
    settings: dict[str, Any], named: str, ask: Ask, tmp_path: Path
) -> None:
    write_llava(tmp_path, Shape())
    edit_json(tmp_path / "config.json", quantization_config=settings)
    refused(ask("--model", tmp_path, "-p", "x"), 4, "quantised", named, "bf16, fp16 or fp32")
    asked = ask("--check", "--model", tmp_path, "-q")
    assert asked.code == 4
    assert named in asked.out


def test_every_family_refuses_quantised_weights_in_one_way(ask: Ask, tmp_path: Path) -> None:
    folders = [
        write_original_with_tower(tmp_path / "original", Shape()),
        write_next(tmp_path / "next", "vicuna"),
        write_next(tmp_path / "next-original", "vicuna", "original"),
        write_qwen(tmp_path / "qwen", QwenShape()),
    ]
    for folder in folders:
        edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
        refused(ask("--model", folder, "-p", "x"), 4, "quantised (gptq, 4 bits)")
    folder = write_llava(tmp_path / "nested", Shape())
    for key, method in (("quantization_config", "awq"), ("compression_config", "int-quantized")):
        edit_json(folder / "config.json", text_config={key: {"quant_method": method}})
        refused(ask("--model", folder, "-p", "x"), 4, f"quantised ({method})")


@pytest.mark.parametrize("leaf", ["weight.absmax", "weight.quant_map", "qweight", "weight_packed"])
def test_tensors_alone_tell_where_config_is_silent(leaf: str, ask: Ask, tmp_path: Path) -> None:
    write_llava(tmp_path, Shape())
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name.removesuffix("weight") + leaf] = torch.zeros(8, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    refused(ask("--model", tmp_path, "-p", "x"), 4, "quantised (tensor", leaf)
