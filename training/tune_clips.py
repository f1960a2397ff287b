"""Teach the embedded model clips: `python -m training.tune_clips runs/clips --minutes 30`.

Its decoder learns on from `weights/tiny`; the tower and the projector stay. A clip is so many
pictures of one prompt, exactly as the engine shows a video to a model without videos: first with
the patches that show something, then, for the last part of the time, with all 576 of each frame.
Checkpoints every few minutes; the same command goes on. What comes out is a model folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from training.clips import Clip, make_clip
from training.data import PREFIX, TRAINING_SEEDS, covered, needed_patches, pack, page_pixels
from training.evaluate import load_model
from training.export import export
from training.losses import packed_mask
from training.model import TinyLlava
from training.muon import Muon, split_parameters
from training.page import GRID
from training.tokenizer import load

TINY = Path(__file__).resolve().parent.parent / "weights" / "tiny"
PATCHES = GRID * GRID
TEXT = 110  # tokens of all questions of a clip
RATES = (0.008, 0.0005)  # Muon's, from the first step to the last
ADAM_SHARE = 0.1
WHOLE_FROM = 0.75  # the share of the time from which all patches are fed
SAVE_EVERY = 240.0


def chosen(clip: Clip, frame: int, count: int, rng: random.Random) -> list[int]:
    """``count`` patches of a frame in order: what is shown where it fits, and others."""
    if count >= PATCHES:
        return list(range(PATCHES))
    shown = needed_patches(clip.frames[frame])
    if clip.label[0] == frame:
        shown |= covered(*clip.label[1])
    must, rest = list(shown), list(set(range(PATCHES)) - shown)
    rng.shuffle(must)
    rng.shuffle(rest)
    return sorted((must[: count - 6] + rest)[:count])


def sample(seed: int, count: int, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The arrays of one clip: patches of every frame, and its questions packed."""
    clip, rng = make_clip(seed), random.Random(seed + 1)
    index = [chosen(clip, frame, count, rng) for frame in range(len(clip.frames))]
    both = zip(clip.frames, index, strict=True)
    row = pack(clip.questions, {}, TEXT, tokenizer)
    return {
        "pixels": np.stack([page_pixels(page, picked) for page, picked in both]),
        "index": np.array(index, dtype=np.int64),
        "ids": row.ids,
        "segment": row.segment,
        "offset": row.offset,
        "target": row.target,
    }


def batch_of(seeds: range, count: int, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """So many clips; every array's first axis is the clip."""
    samples = [sample(seed, count, tokenizer) for seed in seeds]
    return {key: torch.from_numpy(np.stack([s[key] for s in samples])) for key in samples[0]}


class Clips:
    """A model and what its prompt has around frames."""

    def __init__(self, model: TinyLlava, tokenizer: Tokenizer) -> None:
        self.model = model
        self.prefix = torch.tensor(tokenizer.encode(PREFIX).ids)
        self.between = torch.tensor(tokenizer.encode("\n", add_special_tokens=False).ids)

    def scores(self, batch: dict[str, Tensor]) -> Tensor:
        """Scores ``[clips, text, vocab]`` of the packed questions."""
        model, embed = self.model, self.model.decoder.embed
        clips, frames, _ = batch["index"].shape
        with torch.no_grad():
            flat = batch["pixels"].flatten(0, 1), batch["index"].flatten(0, 1)
            projected = model.project(model.vision(*flat)).float().unflatten(0, (clips, frames))
        gap, length = embed(self.between).expand(clips, -1, -1), len(self.between)
        parts, places = [embed(self.prefix).expand(clips, -1, -1)], [torch.arange(len(self.prefix))]
        at = len(self.prefix)
        for frame in range(frames):
            parts += [projected[:, frame], gap]
            places += [at + batch["index"][:, frame], at + PATCHES + torch.arange(length)]
            at += PATCHES + length
        # The new line behind the last frame is the question's own.
        parts[-1], places[-1] = embed(batch["ids"]), at - length + batch["offset"]
        x = torch.cat(parts, 1)
        position = torch.cat([place.expand(clips, -1) for place in places], 1)
        shared = x.shape[1] - batch["ids"].shape[1]
        mask, _ = packed_mask(batch["segment"], shared)
        states, _, _ = model.decoder(x, position, mask)
        return model.head(states[:, shared:]).float()

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
        """Cross-entropy of the answers, and the share of their tokens that are right."""
        scores, target = self.scores(batch), batch["target"]
        known = target != -100
        right = (scores.argmax(-1) == target)[known].float().mean().item()
        return F.cross_entropy(scores.flatten(0, 1), target.flatten()), right


class Tuning:
    """The decoder's training: optimisers, how far it has come, and its files."""

    def __init__(self, out: Path, minutes: float) -> None:
        self.out, self.limit, self.path = out, 60 * minutes, out / "checkpoint.pt"
        self.tokenizer, self.model = load(), load_model(TINY).train()
        for part in (self.model.vision, self.model.linear_1, self.model.linear_2):
            part.requires_grad_(False)
        self.clips = Clips(self.model, self.tokenizer)
        matrices, others = (
            [p for p in kind if p.requires_grad] for kind in split_parameters(self.model)
        )
        self.parameters = [*matrices, *others]
        self.muon = Muon(matrices, lr=RATES[0])
        self.adam = torch.optim.AdamW(others, lr=RATES[0] * ADAM_SHARE)
        self.spent, self.seen = 0.0, 0  # seconds and clips
        out.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.resume()

    def resume(self) -> None:
        """Go on from the checkpoint."""
        state = torch.load(self.path)
        for name in ("model", "muon", "adam"):
            getattr(self, name).load_state_dict(state[name])
        self.spent, self.seen = state["spent"], state["seen"]

    def save(self) -> None:
        """Write the checkpoint in one step, and the model's folder."""
        state = {name: getattr(self, name).state_dict() for name in ("model", "muon", "adam")}
        part = self.out / "checkpoint.part"
        torch.save(state | {"spent": self.spent, "seen": self.seen}, part)
        part.replace(self.path)
        export(self.model, self.out / "model")

    def set_rates(self) -> None:
        """By the share of the time that has passed; whole clips come one by one."""
        rate = RATES[0] + (RATES[1] - RATES[0]) * self.spent / self.limit
        rate *= 0.3 if self.whole else 1.0
        for optimiser, scale in ((self.muon, 1.0), (self.adam, ADAM_SHARE)):
            for group in optimiser.param_groups:
                group["lr"] = rate * scale

    @property
    def whole(self) -> bool:
        """Whether all patches are fed by now."""
        return self.spent >= WHOLE_FROM * self.limit

    def step(self, patches: int, many: int) -> tuple[float, float]:
        """One update on new clips; returns the loss, and the share of right tokens."""
        first = TRAINING_SEEDS + self.seen
        batch = batch_of(range(first, first + many), patches, self.tokenizer)
        self.set_rates()
        with torch.autocast("cpu", torch.bfloat16):
            loss, right = self.clips.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser in (self.muon, self.adam):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.seen += many
        return loss.item(), right

    def run(self, patches: int, size: int) -> None:
        """Steps until the time is over, whatever was interrupted between."""
        saved = began = time.time()
        for number in itertools.count(1):
            whole = self.whole
            loss, right = self.step(PATCHES if whole else patches, 1 if whole else size)
            now = time.time()
            self.spent, began = self.spent + now - began, now
            if number % 20 == 0:
                said = {"minutes": round(self.spent / 60, 1), "clips": self.seen, "whole": whole}
                said |= {"loss": round(loss, 3), "right": round(right, 3)}
                print(json.dumps(said), flush=True)
            if now - saved > SAVE_EVERY or self.spent >= self.limit:
                self.save()
                saved = began = time.time()
            if self.spent >= self.limit:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the checkpoint and the model")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--patches", type=int, default=56, help="of a frame, before all are fed")
    parser.add_argument("--batch", type=int, default=8, help="clips")
    args = parser.parse_args()
    torch.manual_seed(0)
    Tuning(args.out, args.minutes).run(args.patches, args.batch)
    print(args.out / "model")


if __name__ == "__main__":
    main()
