"""From a model's name to a model in memory: where it lies, on which device, in which dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from time import perf_counter

import torch

from ..checkpoint.hub import resolve
from ..checkpoint.names import target_names
from ..checkpoint.tensors import Checkpoint, Part, TensorInfo, anywhere, load_weights
from ..errors import OptionError
from ..ops.formats import FORMATS
from ..ops.ranks import ALONE, Ranks
from ..options import DTYPES
from ..prompts.templates import find_style
from ..prompts.tokenizer import Tokenizer
from .capacity import memory_for
from .device import pick_device
from .families import Family, Wishes, recognise
from .own_prompts import with_own_prompts
from .preparing import prepare, side_by_side
from .quantising import bytes_of, check_weights, taker
from .splitting import split

# With fewer bytes of weights all but CUDA runs in fp32: exact, and small models are fast anyway.
FP32_LIMIT = 2_000_000_000


@dataclass(frozen=True)
class Loaded:
    """A model ready to run; ``seconds`` is how long loading took."""

    folder: Path
    family: Family
    tokenizer: Tokenizer
    seconds: float


def load(
    name: str | PathLike[str] | None,
    device: str,
    dtype: str,
    revision: str | None,
    weights: str,
    wishes: Wishes,
    ranks: Ranks = ALONE,
) -> Loaded:
    """Load a model; see ``Engine.load``."""
    began = perf_counter()
    target = pick_device(device)
    wanted = pick_dtype(dtype)
    check_weights(weights)
    if target.type == "mps" and wanted is torch.bfloat16:
        raise OptionError("bfloat16 is not offered on mps", hint="use fp16 or fp32")
    folder = resolve(None if name is None else Path(name), revision, wishes.offline)
    family = recognise(folder, wishes)
    tokenizer = Tokenizer.from_folder(folder, family.new_tokens)
    family = with_own_prompts(family, folder, tokenizer)
    cuts = split(family.model.decoder, ranks) if ranks.size > 1 else {}

    def part(name: str, info: TensorInfo) -> TensorInfo:
        return info.part(cuts[name], ranks.rank, ranks.size) if name in cuts else info

    _fill(family, folder, target, wanted, weights, part)
    return Loaded(folder, _with_ends(family, tokenizer), tokenizer, perf_counter() - began)


def _with_ends(family: Family, tokenizer: Tokenizer) -> Family:
    """With the tokenizer's own end where no file names one, and the style's closing token."""
    ends = set(family.end_tokens or filter(None, [tokenizer.eos_id]))
    closing = tokenizer.token_id(find_style(family.prompts).closing)
    if closing is not None:
        ends.add(closing)
    return replace(family, end_tokens=frozenset(ends))


def pick_dtype(name: str) -> torch.dtype | None:
    """The dtype called ``name``; None is auto."""
    if name not in DTYPES:
        raise OptionError(f"unknown dtype {name!r}", hint=f"use one of {', '.join(DTYPES)}")
    return FORMATS[name].dtype if name in FORMATS else getattr(torch, name, None)


def _fill(
    family: Family,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    weights: str,
    part: Part,
) -> None:
    """Read the weights tensor by tensor into the model that was built on the meta device."""
    model = family.model
    with Checkpoint.open(folder) as checkpoint:
        dtype = dtype or _auto_dtype(checkpoint, device)
        stays = weights == "auto" and checkpoint.packed
        needed = checkpoint.total_bytes if stays else bytes_of(model, dtype.itemsize, weights)
        with memory_for("loading the weights", needed, device):
            _load_all(family, checkpoint, device, dtype, weights, part)
            prepare(model.decoder, device)
    model.eval()


def _load_all(
    family: Family,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    weights: str,
    part: Part,
) -> None:
    """Fill the model, its vision tower from a checkpoint of its own where it has one."""
    model, rename = family.model, family.rename
    tied = {"decoder.head.weight": "decoder.embed.weight"}
    held = [ours for name in checkpoint.tensors for ours in target_names(rename(name))]
    if family.tower and not any(name.startswith("vision.") for name in held):
        tower, names = family.tower
        with Checkpoint.open(tower) as tower_checkpoint:
            load_weights(
                model.vision,
                tower_checkpoint,
                names,
                device,
                dtype,
                mapped=True,
                taker=taker(model.vision, "auto", device, dtype),
            )
    shared = tied if model.decoder.config.tied_head else {}
    plain = weights == "auto" and not checkpoint.packed
    placement = side_by_side(model, device) if plain else anywhere
    load_weights(
        model,
        checkpoint,
        rename,
        device,
        dtype,
        shared,
        mapped=True,
        placement=placement,
        taker=taker(model, weights, device, dtype),
        part=part,
    )


def _auto_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The checkpoint's own dtype on CUDA; elsewhere fp32 for small models, else 16 bits."""
    if device.type == "cuda":
        sizes: dict[torch.dtype, int] = {}
        for info in checkpoint.tensors.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return max(sizes, key=lambda kind: sizes[kind])
    large = torch.float16 if device.type == "mps" else torch.bfloat16
    return torch.float32 if checkpoint.total_bytes < FP32_LIMIT else large
