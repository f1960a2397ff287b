"""The losses of `weights/cross`: as tiny's, and its tower learns from tiny's tower."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.cross_model import TILES, CrossConfig, TinyMllama
from training.cross_tokenizer import IMAGE, load_cross, special
from training.data import Batch, Form
from training.losses import GUIDED_HEADS, Labelled, guide_loss, packed_mask
from training.model import TinyLlava

USER = "<|start_header_id|>user<|end_header_id|>\n\n"
ANSWER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA3 = Form(load_cross, USER + IMAGE, "{}" + ANSWER, "", special("<|eot_id|>"))


class CrossTrainee(Labelled):
    """The model and its teacher."""

    def __init__(self, config: CrossConfig, teacher: TinyLlava) -> None:
        super().__init__(TinyMllama(config), config.width, LLAMA3)
        self.to_teacher = nn.Linear(config.width, teacher.config.vision_dim)
        self.teacher = [teacher]  # not among the parameters

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
        mask, order = packed_mask(batch["segment"], p)
        position = torch.cat([order[:p].expand(b, -1), p + batch["offset"]], 1)
        sees = (order >= p - 1)[:, None].float()
        out, looked = self.model(ids, projected, position, mask, sees)
        return out[:, p:], [weights[:, :GUIDED_HEADS, p:, TILES:] for weights in looked]

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
        following = guide_loss(looked[-1], guide)
        return found | {
            "text": loss,
            "guide": following + 0.5 * guide_loss(looked[-2], present),
            "next": following.detach(),
            "right": scores.argmax(-1) == batch["target"],
        }
