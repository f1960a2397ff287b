"""Train the small cross-attention model: `python -m training.train_cross --out runs/cross`.

The loop, the checkpoints and the log are those of `train.py`. The decoder starts from half the
layers of `weights/tiny`, the tower learns from its tower first.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from training.cross_export import export_cross
from training.cross_losses import LLAMA3, CrossTrainee
from training.cross_model import CrossConfig, CrossLayer, SelfLayer, TinyMllama
from training.cross_tokenizer import special
from training.evaluate import load_model
from training.losses import Weights
from training.model import DecoderLayer, TinyLlava
from training.recipe import Stage, mix_of
from training.train import Run, parse

TINY = Path(__file__).resolve().parent.parent / "weights" / "tiny"
SOURCES = (0, 1, 2, 4, 5, 6, 7)  # tiny's layer that each layer starts from

PLAN = tuple(
    replace(stage, mix=replace(stage.mix, form=LLAMA3))
    for stage in (
        Stage("tower", 10, 32, mix_of(112, 8, 0.35, 4, 6, 0.0), (0.02, 0.015), vision_only=True),
        Stage("print", 10, 32, mix_of(208, 8, 0.15, 8, 6, 0.0), (0.015, 0.006), vision_only=True),
        Stage(
            "point",
            16,
            32,
            mix_of(96, 112, 0.5, 4, 6, 0.6),
            (0.02, 0.014),
            Weights(patch=0.5, guide=0.25, read=0.1),
        ),
        Stage(
            "dense",
            34,
            32,
            mix_of(128, 128, 0.35, 6, 8, 0.6),
            (0.014, 0.004),
            Weights(patch=0.5, guide=0.15, read=0.1),
        ),
        Stage(
            "whole",
            26,
            8,
            mix_of(576, 144, 0.4, 6, 8, 0.6),
            (0.004, 0.0001),
            Weights(patch=0.3, read=0.05),
        ),
    )
)


class CrossRun(Run):
    """A run of the cross-attention model."""

    def make_trainee(self) -> CrossTrainee:
        """See ``Run``: the decoder starts from tiny's."""
        teacher = load_model(TINY).requires_grad_(False)
        trainee = CrossTrainee(CrossConfig(), teacher)
        begin_from(trainee.model, teacher)
        return trainee

    def snapshot(self, stage: Stage) -> None:
        """See ``Run``."""
        export_cross(self.trainee.model, Path(self.args.export))
        self.log(exported=str(self.args.export), after=stage.name)


@torch.no_grad()
def begin_from(model: TinyMllama, tiny: TinyLlava) -> None:
    """Fill embeddings, head and layers with what fits of tiny's."""
    pieces = special("<|begin_of_text|>")
    embed, head = tiny.decoder.embed.weight, tiny.head.weight
    model.embed.weight[:pieces] = embed[:pieces]
    model.head.weight[:pieces] = head[:pieces]
    for name, old in (("<|begin_of_text|>", 1), ("<|eot_id|>", 2)):
        model.embed.weight[special(name)] = embed[old]
    model.head.weight[special("<|eot_id|>")] = head[2]
    model.norm.weight.copy_(tiny.decoder.norm.weight)
    for block, source in zip(model.blocks, SOURCES, strict=True):
        old_layer = tiny.decoder.blocks[source]
        assert isinstance(old_layer, DecoderLayer)
        _begin_mlp(block, old_layer)
        if isinstance(block, SelfLayer):
            _begin_attention(block, old_layer)


def _begin_mlp(block: nn.Module, old: DecoderLayer) -> None:
    """The most heard of the old MLP's inner numbers."""
    assert isinstance(block, SelfLayer | CrossLayer)
    gate, up = old.gate_up.weight.chunk(2)
    heard = old.down.weight.norm(dim=0) * gate.norm(dim=1) * up.norm(dim=1)
    chosen = heard.topk(block.mlp.down.in_features).indices
    block.mlp.gate_up.weight.copy_(torch.cat([gate[chosen], up[chosen]]))
    block.mlp.down.weight.copy_(old.down.weight[:, chosen])
    block.mlp.norm2.weight.copy_(old.norm2.weight)


def _begin_attention(block: SelfLayer, old: DecoderLayer) -> None:
    """Key heads that share queries are the means of what they replace."""
    q, k, v = old.qkv.weight.chunk(3)

    def means(rows: Tensor) -> Tensor:
        heads = rows.unflatten(0, (block.kv_heads, block.heads // block.kv_heads, -1))
        return heads.mean(1).flatten(0, 1)

    block.q.weight.copy_(q)
    block.kv.weight.copy_(torch.cat([means(k), means(v)]))
    block.out.weight.copy_(old.out.weight)
    block.norm1.weight.copy_(old.norm1.weight)


def main(argv: list[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    args = parse(["--out", "runs/cross", "--export", "runs/cross-export", *given])
    if args.start or args.plan != "two-cores":
        raise SystemExit(
            "train_cross begins from weights/tiny and has one plan: no --start, --plan"
        )
    torch.set_num_threads(args.threads)
    run = CrossRun(Path(args.out), PLAN, args)
    signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stop", True))
    run.run()


if __name__ == "__main__":
    main()
