"""The losses of `weights/cross`: as tiny's, and its tower learns from tiny's tower."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.cross_model import TILES, CrossConfig, TinyMllama
from training.cross_tokenizer import IMAGE, load_cross, special
from training.data import Batch, Form
from training.losses import GUIDED_HEADS, LABELS, Trainee
from training.model import TinyLlava

USER = "<|start_header_id|>user<|end_header_id|>\n\n"
ANSWER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA3 = Form(load_cross, USER + IMAGE, "{}" + ANSWER, "", special("<|eot_id|>"))


class CrossTrainee(nn.Module):
    """The model, the teacher, and the helper heads that only training needs."""

    prefix: Tensor
    char_ids: Tensor
    patch_loss = Trainee.patch_loss
    read_loss = Trainee.read_loss

    def __init__(self, config: CrossConfig, teacher: TinyLlava) -> None:
        super().__init__()
        self.model = TinyMllama(config)
        self.labels = nn.Linear(config.width, LABELS)
        self.to_teacher = nn.Linear(config.width, teacher.config.vision_dim)
        self.teacher = [teacher]  # not among the parameters
        self.form = LLAMA3
        tokenizer = load_cross()
        ids = [-100] + [tokenizer.token_to_id(chr(c)) for c in range(33, 127)]
        self.register_buffer("prefix", torch.tensor(tokenizer.encode(LLAMA3.prefix).ids))
        self.register_buffer("char_ids", torch.tensor(ids), persistent=False)

    def teach(self, features: Tensor, batch: Batch) -> Tensor:
        """How far the features, as the teacher's, are from the teacher's, in its deviations."""
        with torch.no_grad():
            teacher = self.teacher[0].to(features.device)
            wanted = teacher.vision(batch["pixels"], batch["index"]).float()
        scale = wanted.std((0, 1), keepdim=True)
        return F.smooth_l1_loss(self.to_teacher(features).float() / scale, wanted / scale)

    def states(self, projected: Tensor, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Decoder states of the text, and every cross layer's weights on patches."""
        b, p = len(batch["index"]), len(self.prefix)
        ids = torch.cat([self.prefix.expand(b, -1), batch["ids"]], 1)
        before = torch.arange(p, device=ids.device)
        position = torch.cat([before.expand(b, -1), p + batch["offset"]], 1)
        segment = torch.cat([torch.full((b, p), -2, device=ids.device), batch["segment"]], 1)
        order = torch.arange(ids.shape[1], device=ids.device)
        same = segment[:, :, None] == segment[:, None]
        mask = ((order[:, None] >= order) & (same | (segment == -2)[:, None]))[:, None]
        sees = (order >= p - 1)[:, None].float()
        out, looked = self.model(ids, projected, position, mask, sees)
        return out[:, p:], [weights[:, :GUIDED_HEADS, p:, TILES:] for weights in looked]

    def guide_loss(self, weights: Tensor, guide: Tensor) -> Tensor:
        """How little the guided heads look at the patches they are guided to."""
        index = guide.clamp(min=0)[:, None].expand(-1, GUIDED_HEADS, -1, -1)
        hit = weights.float().gather(-1, index) * (guide >= 0)[:, None]
        asked = (guide >= 0).any(-1)[:, None].float()
        miss = -(hit.sum(-1) + 1e-4).log() * asked
        return miss.sum() / (asked.sum() * GUIDED_HEADS).clamp(min=1)

    def forward(self, batch: Batch, vision_only: bool = False) -> dict[str, Tensor]:
        """All losses; `right` marks answer tokens whose arg-max is exact."""
        features = self.model.vision(batch["pixels"], batch["index"]).float()
        patches = features[:, TILES:]
        patch, patch_right = self.patch_loss(patches, batch)
        projected = self.model.project(features).float()
        read = self.read_loss(self.model.head(projected[:, TILES:]).float(), batch)
        found = {"patch": patch, "patch_right": patch_right, "read": read}
        if vision_only:
            return found | {"teach": self.teach(patches, batch)}
        text, looked = self.states(projected, batch)
        scores = self.model.head(text).float()
        loss = F.cross_entropy(scores.flatten(0, 1), batch["target"].flatten())
        # The last cross layer's guided heads look at what comes next, those before at what is.
        guide, present = batch["guide"], torch.full_like(batch["guide"], -1)
        same = (batch["segment"][:, 1:] == batch["segment"][:, :-1])[..., None]
        present[:, 1:] = torch.where(same, guide[:, :-1], -1)
        following = self.guide_loss(looked[-1], guide)
        return found | {
            "text": loss,
            "guide": following + 0.5 * self.guide_loss(looked[-2], present),
            "next": following.detach(),
            "right": scores.argmax(-1) == batch["target"],
        }
