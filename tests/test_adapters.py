"""Adapters are refused for what they are, by every door."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.asking import Ask, refused
from tests.checkpoints import Shape, write_json, write_llava, write_original_with_tower

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
