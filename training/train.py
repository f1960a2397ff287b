"""Train the tiny model: `python -m training.train --out runs/tiny`.

Checkpoints every few minutes and on SIGTERM, resumes where it stopped, logs JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from training.data import TRAINING_SEEDS, Batch, PageBatches
from training.losses import Trainee, total
from training.model import ModelConfig, parameters_in
from training.monitor import held_out
from training.muon import Muon, split_parameters
from training.recipe import PLANS, Stage
from training.tokenizer import load, vocabulary_rows

HEAD_STEPS = 150  # batches that teach the label head on weights that come without one
ADAM_SHARE = 0.1  # AdamW's learning rate in units of Muon's


class Run:
    """A training run: model, optimisers, how far it has come, and its files."""

    def __init__(self, out: Path, plan: tuple[Stage, ...], args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.out, self.plan, self.args = out, plan, args
        self.device = torch.device(args.device)
        self.trainee = self.make_trainee().to(self.device)
        matrices, others = split_parameters(self.trainee)
        self.muon = Muon(matrices, lr=0.02)
        self.adam = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
        self.progress: dict[str, Any] = {"stage": plan[0].name, "seconds": 0.0, "pages": 0}
        self.stop = False
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint.pt").exists():
            self.resume(out / "checkpoint.pt")
        elif args.start:
            self.begin(Path(args.start))

    def make_trainee(self) -> Trainee:
        """The model and what its training needs."""
        return Trainee(ModelConfig(vocab=vocabulary_rows(load())))

    def log(self, **record: Any) -> None:
        """One JSON line to log.jsonl and to the terminal."""
        line = json.dumps({"time": round(time.time(), 1), **self.progress, **record})
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def save(self, name: str = "checkpoint.pt") -> None:
        """Write the checkpoint beside the old one, then replace it in one step."""
        state = {
            "trainee": self.trainee.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "progress": self.progress,
        }
        part = self.out / "checkpoint.part"
        torch.save(state, part)
        os.replace(part, self.out / name)

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: weights, optimisers and how far it had come."""
        state = torch.load(checkpoint, map_location=self.device)
        self.trainee.load_state_dict(state["trainee"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.progress = state["progress"]

    def begin(self, source: Path) -> None:
        """Start at stage `--stage` from another run's checkpoint or from exported weights."""
        stage = next(s for s in self.plan if s.name == self.args.stage)
        if source.is_file():
            self.resume(source)
        self.progress["seconds"], self.progress["stage"] = 0.0, stage.name
        self.progress["pages"] = max(self.progress["pages"], self.args.first_page)
        if source.is_dir():
            self.teach_labels(source, stage)

    def teach_labels(self, folder: Path, stage: Stage) -> None:
        """Exported weights come without the label head: it alone is learnt anew."""
        from safetensors.torch import load_file

        from training.export import load_tensors

        load_tensors(self.trainee.model, load_file(folder / "model.safetensors"))
        head = torch.optim.AdamW(self.trainee.labels.parameters(), lr=1e-2)
        for _, batch in zip(range(HEAD_STEPS), self.batches(stage), strict=False):
            batch = {k: v.to(self.device) for k, v in batch.items()}
            with torch.autocast(self.device.type, torch.bfloat16):
                with torch.no_grad():
                    features = self.trainee.model.vision(batch["pixels"], batch["index"])
                loss, right = self.trainee.patch_loss(features.float(), batch)
            head.zero_grad()
            loss.backward()
            head.step()
            self.progress["pages"] += stage.batch
        self.log(start=str(folder), patch=loss.item(), patch_right=right.item())

    def batches(self, stage: Stage) -> DataLoader[Batch]:
        """Batches of pages that this run has not seen yet."""
        first = TRAINING_SEEDS * (1 + self.args.seed * 1000) + self.progress["pages"]
        pages = PageBatches(stage.mix, stage.batch, first, 0, 10**7)
        workers = self.args.workers
        ahead = 4 if workers else None
        return DataLoader(pages, batch_size=None, num_workers=workers, prefetch_factor=ahead)

    def set_rates(self, stage: Stage) -> float:
        """Learning rates by the share of the stage's time that has passed."""
        share = min(1.0, self.progress["seconds"] / (60 * stage.minutes))
        rate = stage.lr[0] + (stage.lr[1] - stage.lr[0]) * share
        for group in self.muon.param_groups:
            group["lr"] = rate
        for group in self.adam.param_groups:
            group["lr"] = rate * ADAM_SHARE
        return rate

    def step(self, forward: Any, batch: Batch, stage: Stage) -> dict[str, float]:
        """One update; returns the losses."""
        batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16):
            losses = forward(batch, stage.vision_only)
            loss = total(losses, stage.weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        for optimiser in (self.muon, self.adam):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return {k: v.item() for k, v in losses.items() if v.ndim == 0}

    def train_stage(self, stage: Stage) -> None:
        """Steps until the stage's time is over; the time of compiling is not counted."""
        forward = torch.compile(self.trainee, dynamic=False) if self.args.compile else self.trainee
        sums: dict[str, float] = defaultdict(float)
        saved = scored = last = time.time()
        for steps, batch in enumerate(self.batches(stage), start=1):
            rate = self.set_rates(stage)
            for name, value in self.step(forward, batch, stage).items():
                sums[name] += value
            now = time.time()
            self.progress["seconds"] += now - last if steps > 1 else 0.0
            self.progress["pages"] += stage.batch
            last = now
            if steps % self.args.log_every == 0:
                means = {k: round(v / self.args.log_every, 4) for k, v in sums.items()}
                self.log(step=steps, lr=round(rate, 5), **means)
                sums.clear()
            if now - scored > self.args.score_every and not stage.vision_only:
                self.score(stage)
                scored = last = time.time()
            if now - saved > self.args.save_every:
                self.save()
                saved = time.time()
            if self.stop or self.progress["seconds"] > 60 * stage.minutes:
                return

    def score(self, stage: Stage) -> None:
        """Log exact-match shares on held-out pages of the stage's kind."""
        scores = held_out(self.trainee, stage.mix, self.args.score_pages)
        self.log(held_out={k: round(v, 4) for k, v in scores.items()})

    def run(self) -> None:
        """All stages from the present one on."""
        names = [stage.name for stage in self.plan]
        self.log(start=names, parameters=parameters_in(self.trainee.model), args=vars(self.args))
        for stage in self.plan[names.index(self.progress["stage"]) :]:
            self.progress["stage"] = stage.name
            self.train_stage(stage)
            if self.stop:
                self.save()
                return
            if not stage.vision_only:
                self.score(stage)
                self.snapshot(stage)
            self.save(f"after-{stage.name}.pt")
            following = names.index(stage.name) + 1
            self.progress["seconds"] = 0.0
            self.progress["stage"] = names[following] if following < len(names) else "done"
            self.save()
            if self.progress["stage"] == "done":
                return

    def snapshot(self, stage: Stage) -> None:
        """A usable checkpoint in the published layout at the end of every stage."""
        from training.export import export

        export(self.trainee.model, Path(self.args.export))
        self.log(exported=str(self.args.export), after=stage.name)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/tiny", help="folder of checkpoint and log")
    parser.add_argument("--export", default="runs/export", help="folder of the exported model")
    parser.add_argument(
        "--start", default=None, help="exported weights or a checkpoint to begin from"
    )
    parser.add_argument("--stage", default="documents", help="the stage that --start begins with")
    parser.add_argument("--first-page", type=int, default=0, help="pages earlier runs have used")
    parser.add_argument("--plan", default="two-cores", choices=sorted(PLANS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pages")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-every", type=float, default=240, help="seconds")
    parser.add_argument("--score-every", type=float, default=240, help="seconds")
    parser.add_argument("--score-pages", type=int, default=64)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    run = Run(Path(args.out), PLANS[args.plan], args)
    signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stop", True))
    run.run()


if __name__ == "__main__":
    main()
