"""The losses of a training step and the scores of a held-out batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data import CHAR_SLOTS, CHARS, LLAVA, Batch, Form
from training.model import ModelConfig, TinyLlava
from training.scenes import COLOURS, KINDS

GUIDED_HEADS = 2
LABELS = CHAR_SLOTS * (len(CHARS) + 1) + len(KINDS) + 1 + len(COLOURS) + 1


@dataclass(frozen=True)
class Weights:
    """Weights of the losses: `patch` labels the tower's features, `guide` points attention,
    `read` asks the head for a patch's first character."""

    text: float = 1.0
    patch: float = 0.5
    guide: float = 0.0
    read: float = 0.1
    teach: float = 1.0  # only where there is a teacher


def packed_mask(segment: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Who sees whom in a row of packed questions ``segment [B, text]`` behind ``shared`` tokens:
    causal, those and one's own question. Returns ``[B, 1, all, all]``, and the order ``[all]``.
    """
    segment = F.pad(segment, (shared, 0), value=-2)
    order = torch.arange(segment.shape[1], device=segment.device)
    same = segment[:, :, None] == segment[:, None]
    mask = (order[:, None] >= order) & (same | (segment == -2)[:, None])
    return mask[:, None], order


def guide_loss(weights: Tensor, guide: Tensor) -> Tensor:
    """How little heads ``weights [B, heads, text, patches]`` look at the patches that they are
    guided to, ``guide [B, text, GUIDES]`` or -1.
    """
    heads = weights.shape[1]
    index = guide.clamp(min=0)[:, None].expand(-1, heads, -1, -1)
    hit = weights.float().gather(-1, index) * (guide >= 0)[:, None]
    asked = (guide >= 0).any(-1)[:, None].float()
    miss = -(hit.sum(-1) + 1e-4).log() * asked
    return miss.sum() / (asked.sum() * heads).clamp(min=1)


class Labelled(nn.Module):
    """A model in training with a head that labels patches, which only training needs."""

    prefix: Tensor
    char_ids: Tensor

    def __init__(self, model: nn.Module, width: int, form: Form) -> None:
        """``width``: of the tower's features."""
        super().__init__()
        self.model, self.labels = model, nn.Linear(width, LABELS)
        tokenizer = form.tokenizer()
        prefix = torch.tensor(tokenizer.encode(form.prefix).ids)
        ids = [-100] + [tokenizer.token_to_id(c) for c in CHARS]
        self.register_buffer("prefix", prefix, persistent=False)
        self.register_buffer("char_ids", torch.tensor(ids), persistent=False)

    def patch_loss(self, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the patch labels, and which shown patches are labelled all right."""
        scores = self.labels(features).float()
        n = len(CHARS) + 1
        sizes = [n] * CHAR_SLOTS + [len(KINDS) + 1, len(COLOURS) + 1]
        target = torch.cat([batch["chars"], batch["objects"]], -1)
        shown = (target > 0).any(-1)
        weight = torch.where(shown, 1.0, 0.1)
        loss, right = features.new_zeros(()), torch.ones_like(shown)
        for i, part in enumerate(scores.split(sizes, -1)):
            each = F.cross_entropy(part.transpose(1, 2), target[..., i], reduction="none")
            loss = loss + (each * weight).sum() / weight.sum()
            right = right & (part.argmax(-1) == target[..., i])
        return loss, (right & shown).sum() / shown.sum().clamp(min=1)

    def read_loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of the first character of every patch that has one."""
        first = self.char_ids[batch["chars"][..., 0]].flatten()
        loss = F.cross_entropy(scores.flatten(0, 1), first, reduction="sum")
        return loss / (first >= 0).sum().clamp(min=1)


class Trainee(Labelled):
    """The embedded model in training."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(TinyLlava(config), config.vision_dim, LLAVA)
        self.guided_block = config.layers // 2

    def states(self, projected: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Decoder states of the text, and the guided block's weights."""
        b, n = batch["index"].shape
        p = len(self.prefix)
        embed = self.model.decoder.embed
        before = embed(self.prefix).expand(b, -1, -1)
        x = torch.cat([before, projected, embed(batch["ids"])], 1)
        mask, order = packed_mask(batch["segment"], p + n)
        picture = torch.cat([order[:p].expand(b, -1), p + batch["index"]], 1)
        position = torch.cat([picture, p + 576 + batch["offset"]], 1)
        out, weights, _ = self.model.decoder(x, position, mask, watch=self.guided_block)
        assert weights is not None
        return out[:, p + n :], weights[:, :GUIDED_HEADS, p + n :, p : p + n]

    def forward(self, batch: Batch, vision_only: bool = False) -> dict[str, Tensor]:
        """All losses; `right` marks answer tokens whose arg-max is exact."""
        features = self.model.vision(batch["pixels"], batch["index"]).float()
        patch, patch_right = self.patch_loss(features, batch)
        projected = self.model.project(features).float()
        if vision_only:
            read = self.read_loss(self.model.head(projected).float(), batch)
            return {"patch": patch, "patch_right": patch_right, "read": read}
        text, weights = self.states(projected, batch)
        n = projected.shape[1]
        scores = self.model.head(torch.cat([projected, text], 1)).float()
        loss = F.cross_entropy(scores[:, n:].flatten(0, 1), batch["target"].flatten())
        return {
            "text": loss,
            "patch": patch,
            "patch_right": patch_right,
            "read": self.read_loss(scores[:, :n], batch),
            "guide": guide_loss(weights, batch["guide"]),
            "right": scores[:, n:].argmax(-1) == batch["target"],
        }


def total(losses: dict[str, Tensor], weights: Weights) -> Tensor:
    """The weighted sum that is minimised; absent losses count nothing."""
    out = weights.patch * losses["patch"]
    for name in ("text", "read", "guide", "teach"):
        if name in losses:
            out = out + getattr(weights, name) * losses[name]
    return out
