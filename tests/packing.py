"""Weights as publishers pack them, number by number from the definition of each layout.

Every function draws a matrix ``[out, in]``: what it is in float64, and the tensors of its layout by
what follows the layer's name.
"""

import json
from collections.abc import Callable

import torch
from torch import Tensor

Packed = tuple[Tensor, dict[str, Tensor]]
G = torch.Generator().manual_seed(20)


def words(numbers: Tensor, bits: int) -> Tensor:
    """Whole numbers ``[rows, n]`` in int32 words along the last dimension, the lowest first."""
    each, rows = 32 // bits, []
    for row in numbers.tolist():
        row += [0] * (-len(row) % each)
        packed = []
        for at in range(0, len(row), each):
            word = sum(number << bits * i for i, number in enumerate(row[at : at + each]))
            packed.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(packed)
    return torch.tensor(rows, dtype=torch.int32)


def draw(out: int, size_in: int, group: int, bits: int, low: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[out, in]``, scales and zeros ``[out, groups]``, zeros from ``low`` on."""
    most, groups = 1 << bits, size_in // group
    codes = torch.randint(0, most, (out, size_in), generator=G)
    scale = ((torch.rand(out, groups, generator=G) + 0.5) / most / 8).half()
    return codes, scale, torch.randint(low, most, (out, groups), generator=G)


def affine(codes: Tensor, scale: Tensor, zero: Tensor, group_of: list[int]) -> Tensor:
    """scale * (code - zero), number by number."""
    numbers = torch.empty(codes.shape, dtype=torch.float64)
    for i, g in enumerate(group_of):
        numbers[:, i] = scale[:, g].double() * (codes[:, i] - zero[:, g]).double()
    return numbers


def gptq(version: int = 1, bits: int = 4, ordered: bool = True) -> Callable[..., Packed]:
    def packed(out: int, size_in: int, group: int = 32) -> Packed:
        codes, scale, zero = draw(out, size_in, group, bits, low=1)
        group_of = [i // group for i in range(size_in)]
        if not ordered:
            group_of = [group_of[i] for i in torch.randperm(size_in, generator=G).tolist()]
        parts = {
            "qweight": words(codes, bits).T.contiguous(),  # words run along the inputs
            "qzeros": words(zero.T - int(version == 1), bits),
            "scales": scale.T.contiguous(),
            "g_idx": torch.tensor(group_of, dtype=torch.int32),
        }
        return affine(codes, scale, zero, group_of), parts

    return packed


def awq(out: int, size_in: int, group: int = 32) -> Packed:
    codes, scale, zero = draw(out, size_in, group, 4, low=0)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def mixed(numbers: Tensor) -> Tensor:
        columns = [8 * (i // 8) + order[i % 8] for i in range(numbers.shape[1])]
        return words(numbers[:, columns], 4)

    parts = {"qweight": mixed(codes.T), "qzeros": mixed(zero.T), "scales": scale.T.contiguous()}
    return affine(codes, scale, zero, [i // group for i in range(size_in)]), parts


def compressed(bits: int = 4, signed: bool = False) -> Callable[..., Packed]:
    """``signed`` numbers have zeros of their own."""

    def packed(out: int, size_in: int, group: int = 32) -> Packed:
        codes, scale, zero = draw(out, size_in, group, bits, low=0)
        parts = {
            "weight_packed": words(codes, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor([out, size_in]),
        }
        if signed:
            parts["weight_zero_point"] = words(zero.T, bits).T.contiguous()
        else:
            zero.fill_(1 << (bits - 1))
        return affine(codes, scale, zero, [i // group for i in range(size_in)]), parts

    return packed


def by_rows(out: int, size_in: int, group: int = 0) -> Packed:
    """LLM.int8 of bitsandbytes."""
    codes = torch.randint(-127, 128, (out, size_in), generator=G)
    largest = torch.rand(out, generator=G) / 8
    numbers = codes.double() * largest.double()[:, None] / 127
    return numbers, {"weight": codes.to(torch.int8), "SCB": largest}


def by_book(kind: str = "nf4", nested: bool = False) -> Callable[..., Packed]:
    """Four bits of bitsandbytes: a list of 16 numbers, and the largest of each 64."""

    def packed(out: int, size_in: int, group: int = 64) -> Packed:
        count = out * size_in
        book = torch.rand(16, generator=G) * 2 - 1
        codes = torch.randint(0, 16, (count,), generator=G)
        state = {
            "quant_type": kind,
            "blocksize": group,
            "dtype": "float16",
            "shape": [out, size_in],
        }
        parts = {"weight": (codes[::2] * 16 + codes[1::2]).to(torch.uint8)[:, None]}
        blocks = count // group
        if nested:
            inner = torch.randint(0, 256, (blocks,), generator=G)
            outer_book = torch.rand(256, generator=G)
            outer = torch.rand(-(-blocks // 256), generator=G) / 8
            state |= {"nested_blocksize": 256, "nested_offset": 0.03, "nested_dtype": "float32"}
            parts["weight.nested_absmax"], parts["weight.nested_quant_map"] = outer, outer_book
            parts["weight.absmax"] = inner.to(torch.uint8)
            scales = [outer_book[c].double() * outer[i // 256] + 0.03 for i, c in enumerate(inner)]
            scale = torch.stack(scales)
        else:
            scale = torch.rand(blocks, generator=G) / 8
            parts["weight.absmax"] = scale
        parts["weight.quant_map"] = book
        text = json.dumps(state).encode()
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(
            list(text), dtype=torch.uint8
        )
        numbers = book[codes].double() * scale.double().repeat_interleave(group)
        return numbers.view(out, size_in), parts

    return packed


LAYOUTS: dict[str, tuple[Callable[..., Packed], dict[str, object], str | None]] = {
    # layout: what packs it, what config.json says, and the format that holds the same numbers
    "gptq": (gptq(), {"quant_method": "gptq", "bits": 4}, "q4"),
    "gptq-v2": (gptq(2), {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, "q4"),
    "gptq-act-order": (gptq(ordered=False), {"quant_method": "gptq", "desc_act": True}, None),
    "gptq-8": (gptq(bits=8), {"quant_method": "gptq", "bits": 8}, None),
    "awq": (awq, {"quant_method": "awq", "version": "gemm"}, "q4"),
    "w4a16": (compressed(), {"quant_method": "compressed-tensors"}, "q4"),
    "w4a16-asym": (
        compressed(signed=True),
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "q4",
    ),
    "w8a16": (compressed(8), {"quant_method": "compressed-tensors"}, None),
    "int8": (by_rows, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "q8"),
    "nf4": (by_book(), {"quant_method": "bitsandbytes", "load_in_4bit": True}, None),
    "nf4-nested": (by_book(nested=True), {"quant_method": "bitsandbytes"}, None),
    "fp4": (by_book("fp4"), {"quant_method": "bitsandbytes"}, None),
}
