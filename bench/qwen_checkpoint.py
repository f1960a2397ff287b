"""A small Qwen-VL with seeded random weights and a vocabulary of its own, as it is published."""

import base64
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CORPUS = (
    "How many people are on the left? The man in the picture is holding the red umbrella. "
    "system user assistant You are a helpful assistant. Picture 1: there they're we'll don't "
    "describe the picture\n\nwhat is shown here\n 你好 世界 这是什么 你好 图中 12 2024 éàü "
)
MERGES, SPECIALS = 90, 217


@dataclass(frozen=True)
class QwenShape:
    """Sizes of the model; prompts beyond ``trained`` tokens change the rotary base.

    The larger ``gain``, the further attention is from uniform; rounding grows with it.
    """

    hidden: int = 128
    layers: int = 2
    heads: int = 2
    mlp: int = 96
    width: int = 32
    vision_layers: int = 2
    vision_heads: int = 2
    image: int = 448
    trained: int = 300
    chat_format: str = "chatml"
    seed: int = 5
    gain: float = 2.0
    vocab: int = 256 + MERGES + SPECIALS + 5


def toy_tokens(merges: int = MERGES) -> list[bytes]:
    """Byte tokens in a shuffled order, then the commonest pairs of the corpus, one by one."""
    order = torch.randperm(256, generator=torch.Generator().manual_seed(3)).tolist()
    tokens = [bytes([byte]) for byte in order]
    words = [[bytes([b]) for b in f" {word}".encode()] for word in CORPUS.split(" ")]
    while len(tokens) < 256 + merges:
        counts: dict[bytes, int] = {}
        for word in words:
            for a, b in itertools.pairwise(word):
                counts[a + b] = counts.get(a + b, 0) + 1
        best = max(counts, key=lambda pair: (counts[pair], pair))
        tokens.append(best)
        words = [_joined(word, best) for word in words]
    return tokens


def _joined(word: list[bytes], union: bytes) -> list[bytes]:
    out: list[bytes] = []
    for part in word:
        if out and out[-1] + part == union:
            out[-1] = union
        else:
            out.append(part)
    return out


def write_tiktoken(path: Path, tokens: list[bytes], newline: str = "\n") -> None:
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    path.write_bytes((newline.join(lines) + newline).encode())


def config_of(shape: QwenShape) -> dict[str, Any]:
    return {
        "model_type": "qwen",
        "hidden_size": shape.hidden,
        "intermediate_size": 2 * shape.mlp,
        "kv_channels": shape.hidden // shape.heads,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 8192,
        "no_bias": True,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "seq_length": shape.trained,
        "tie_word_embeddings": False,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "visual": {
            "heads": shape.vision_heads,
            "image_size": shape.image,
            "image_start_id": 256 + MERGES + 214,
            "layers": shape.vision_layers,
            "mlp_ratio": 4.9231,
            "output_dim": shape.hidden,
            "patch_size": 14,
            "width": shape.width,
        },
        "vocab_size": shape.vocab,
    }


def tensor_shapes(shape: QwenShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as the published checkpoints have them."""
    hidden, width = shape.hidden, shape.width
    for name in ("transformer.wte.weight", "lm_head.weight"):
        yield name, (shape.vocab, hidden)
    yield "transformer.ln_f.weight", (hidden,)
    for n in range(shape.layers):
        layer = f"transformer.h.{n}."
        yield from ((f"{layer}ln_{i}.weight", (hidden,)) for i in (1, 2))
        yield f"{layer}attn.c_attn.weight", (3 * hidden, hidden)
        yield f"{layer}attn.c_attn.bias", (3 * hidden,)
        yield f"{layer}attn.c_proj.weight", (hidden, hidden)
        yield from ((f"{layer}mlp.w{i}.weight", (shape.mlp, hidden)) for i in (1, 2))
        yield f"{layer}mlp.c_proj.weight", (hidden, shape.mlp)
    visual = "transformer.visual."
    yield f"{visual}conv1.weight", (width, 3, 14, 14)
    yield f"{visual}positional_embedding", (256, width)
    yield f"{visual}proj", (hidden, hidden)
    mlp = int(4.9231 * width)
    linears = [("attn.in_proj", 3 * width, width), ("attn.out_proj", width, width)]
    linears += [("mlp.c_fc", mlp, width), ("mlp.c_proj", width, mlp)]
    norms = [(f"{visual}ln_pre", width), (f"{visual}ln_post", hidden)]
    norms += [(f"{visual}attn_pool.{name}", hidden) for name in ("ln_q", "ln_kv")]
    for n in range(shape.vision_layers):
        layer = f"{visual}transformer.resblocks.{n}."
        norms += [(f"{layer}{name}", width) for name in ("ln_1", "ln_2")]
        for name, rows, columns in linears:
            yield f"{layer}{name}.weight", (rows, columns)
            yield f"{layer}{name}.bias", (rows,)
    for name, size in norms:
        yield f"{name}.weight", (size,)
        yield f"{name}.bias", (size,)
    pool = f"{visual}attn_pool."
    yield from ((f"{pool}{name}", (256, hidden)) for name in ("query", "pos_embed"))
    yield f"{pool}kv_proj.weight", (hidden, width)
    yield f"{pool}attn.in_proj_weight", (3 * hidden, hidden)
    yield f"{pool}attn.in_proj_bias", (3 * hidden,)
    yield f"{pool}attn.out_proj.weight", (hidden, hidden)
    yield f"{pool}attn.out_proj.bias", (hidden,)


def draw(shape: QwenShape) -> dict[str, Tensor]:
    """All tensors in fp32 by their published names; attention is far from uniform."""
    generator = torch.Generator().manual_seed(shape.seed)
    tensors = {}
    for name, size in tensor_shapes(shape):
        value = torch.empty(size).normal_(0, 1, generator=generator)
        if ".ln_" in name and name.endswith("weight"):
            value = 1 + 0.1 * value
        elif len(size) == 1:
            value *= 0.1
        elif name.endswith(("wte.weight", "positional_embedding", "query", "pos_embed")):
            pass
        else:
            gain = shape.gain if "_attn" in name else 2.0 if name.startswith("lm_head") else 1.0
            value *= gain / math.sqrt(math.prod(size[1:]))
        tensors[name] = value
    return tensors


def write_qwen(folder: Path, shape: QwenShape) -> Path:
    """Write the checkpoint; returns its folder."""
    folder.mkdir(parents=True)
    save_file(draw(shape), folder / "model.safetensors")
    write_around(folder, shape)
    return folder


def write_around(folder: Path, shape: QwenShape) -> None:
    """Write what a published folder has around its weights: configurations and vocabulary."""
    (folder / "config.json").write_text(json.dumps(config_of(shape)))
    generation = {"chat_format": shape.chat_format, "eos_token_id": 346, "max_window_size": 6144}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write_tiktoken(folder / "qwen.tiktoken", toy_tokens())
