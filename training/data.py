"""Pages to tensors: patches and their labels, packed questions, guidance targets."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.documents import DocumentStyle, make_document
from training.page import GRID, PATCH, Page, Question
from training.scenes import COLOURS, KINDS, SceneStyle, make_scene
from training.tokenizer import load

TRAINING_SEEDS = 1_000_000  # training pages use this seed and up, held-out pages stay below
GUIDES = 4  # patches at most that a token's attention may be guided to
CHARS = [chr(c) for c in range(33, 127)]
CHAR_SLOTS = 3
# How often a kind of question comes early in a row of packed text, against 1 for all others.
OFTEN = {"count": 3.0, "yesno": 2.0, "relation": 4.0, "which": 2.0}


@dataclass(frozen=True)
class Form:
    """How a question is written around its picture, and the token that ends an answer."""

    tokenizer: Callable[[], Tokenizer]
    prefix: str  # before the picture, BOS not counted, and the picture's own token if it is one
    head: str  # between the picture and the answer, "{}" being the question
    gap: str  # before the answer
    end: int


LLAVA = Form(load, "USER: ", "\n{} ASSISTANT:", " ", 2)
PREFIX = LLAVA.prefix

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class PageMix:
    """Which pages a stage draws and how much of them is fed."""

    patches: int = 576
    text: int = 144
    scenes: float = 0.5
    scene: SceneStyle = field(default_factory=SceneStyle)
    document: DocumentStyle = field(default_factory=DocumentStyle)
    form: Form = LLAVA
    long_share: float = 0.6  # how often the description / transcription is among the questions


def draw(seed: int, mix: PageMix) -> Page:
    """A scene or a document, decided by the seed; pages that need too many patches are redrawn."""
    rng = random.Random(seed)
    if rng.random() < mix.scenes:
        return make_scene(seed, mix.scene)
    for attempt in range(20):
        page = make_document(seed + attempt * 1_000_000_007, mix.document)
        if len(needed_patches(page)) <= mix.patches:
            return page
    raise ValueError(f"no page of seed {seed} fits into {mix.patches} patches")


def patch_of(x: float, y: float) -> int:
    column = min(GRID - 1, max(0, int(x // PATCH)))
    return min(GRID - 1, max(0, int(y // PATCH))) * GRID + column


def covered(left: float, top: float, right: float, bottom: float) -> set[int]:
    """The patches that a box lies on."""
    columns = range(max(0, int(left // PATCH)), min(GRID - 1, int(right // PATCH)) + 1)
    rows = range(max(0, int(top // PATCH)), min(GRID - 1, int(bottom // PATCH)) + 1)
    return {r * GRID + c for r in rows for c in columns}


def needed_patches(page: Page) -> set[int]:
    """Patches that show print or an object."""
    out: set[int] = set()
    for g in page.glyphs:
        out |= covered(g.x - 6, g.y - 9, g.x + 6, g.y + 9)
    for t in page.things:
        out |= covered(*t.box)
    return out


def _middle(page: Page) -> set[int]:
    """The patches at the centre of the objects, which are never left out."""
    out: set[int] = set()
    for t in page.things:
        x, y = (t.box[0] + t.box[2]) / 2, (t.box[1] + t.box[3]) / 2
        out |= covered(x - PATCH / 2, y - PATCH / 2, x + PATCH / 2, y + PATCH / 2)
    return out


def choose_patches(page: Page, n: int, rng: random.Random) -> list[int]:
    """`n` patches in grid order: all needed ones where possible, then random others."""
    if n >= GRID * GRID:
        return list(range(GRID * GRID))
    must = _middle(page)
    needed = list(needed_patches(page) - must)
    rng.shuffle(needed)
    rest = list(set(range(GRID * GRID)) - must - set(needed))
    rng.shuffle(rest)
    spare = max(6, n - len(must) - len(needed))  # some background is always there
    picked = list(must) + needed[: n - len(must) - spare] + rest[:spare]
    return sorted((picked + needed[n - len(must) - spare :] + rest[spare:])[:n])


def page_pixels(page: Page, index: list[int]) -> np.ndarray:
    """The chosen patches as `[n, 588]` uint8, channel-major as a convolution sees them."""
    pixels = np.asarray(page.image, dtype=np.uint8)
    grid = pixels.reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 4, 1, 3)
    return grid.reshape(GRID * GRID, -1)[index]


def patch_labels(page: Page) -> tuple[np.ndarray, np.ndarray]:
    """Per patch: up to three characters (1 + index, 0 = none); kind and colour (0 = none)."""
    chars = np.zeros((GRID * GRID, CHAR_SLOTS), dtype=np.int64)
    objects = np.zeros((GRID * GRID, 2), dtype=np.int64)
    inside: dict[int, list[tuple[float, str]]] = {}
    for g in page.glyphs:
        inside.setdefault(patch_of(g.x, g.y), []).append((g.x, g.char))
    for p, found in inside.items():
        for slot, (_, char) in enumerate(sorted(found)[:CHAR_SLOTS]):
            chars[p, slot] = 1 + CHARS.index(char)
    for t in page.things:
        cut = 0.2 * (t.box[2] - t.box[0])
        left, top, right, bottom = t.box
        for p in covered(left + cut, top + cut, right - cut, bottom - cut):
            objects[p] = 1 + KINDS.index(t.kind), 1 + list(COLOURS).index(t.colour)
    return chars, objects


@dataclass
class Row:
    """The packed text of one page, `[text]` each; guide is `[text, GUIDES]` patch slots or -1."""

    ids: np.ndarray
    segment: np.ndarray
    offset: np.ndarray  # position after the picture; restarts with every question
    target: np.ndarray  # next token where it belongs to an answer, else -100
    guide: np.ndarray


def empty_row(length: int) -> Row:
    def full(value: int, *more: int) -> np.ndarray:
        return np.full((length, *more), value, dtype=np.int64)

    return Row(full(0), full(-1), full(0), full(-100), full(-1, GUIDES))


def encode_question(
    q: Question, tokenizer: Tokenizer, form: Form = LLAVA
) -> tuple[list[int], int, list[tuple[int, int]]]:
    """Token ids of question and answer with its end, the answer's first index, and offsets."""
    head = form.head.format(q.text)
    encoding = tokenizer.encode(f"{head}{form.gap}{q.answer}", add_special_tokens=False)
    start = len(tokenizer.encode(head, add_special_tokens=False).ids)
    # Characters of the answer that each token covers.
    shift = len(head) + len(form.gap)
    offsets = [(a - shift, b - shift) for a, b in encoding.offsets]
    return [*encoding.ids, form.end], start, [*offsets, (10**6, 10**6)]


def _guides(q: Question, offset: tuple[int, int], slot_of: dict[int, int]) -> list[int]:
    """Patch slots that show what the token stands for."""
    for span in q.spans:
        if span.start < offset[1] and offset[0] < span.end:
            x, y = (span.box[0] + span.box[2]) / 2, (span.box[1] + span.box[3]) / 2
            reach = PATCH / 2 if span.box[2] - span.box[0] > PATCH else 2
            near = covered(x - reach, y - reach, x + reach, y + reach)
            return [slot_of[p] for p in sorted(near) if p in slot_of][:GUIDES]
    return []


def pack(
    questions: list[Question],
    slot_of: dict[int, int],
    length: int,
    tokenizer: Tokenizer,
    form: Form = LLAVA,
) -> Row:
    """As many questions as fit into `length` tokens, each its own segment."""
    row, used = empty_row(length), 0
    for segment, q in enumerate(questions):
        ids, start, offsets = encode_question(q, tokenizer, form)
        if used + len(ids) > length:
            continue
        end = used + len(ids)
        row.ids[used:end], row.segment[used:end] = ids, segment
        row.offset[used:end] = np.arange(len(ids))
        for i in range(start, len(ids)):
            row.target[used + i - 1] = ids[i]
            slots = _guides(q, offsets[i], slot_of)
            row.guide[used + i - 1, : len(slots)] = slots
        used = end
    return row


def sample(
    seed: int, mix: PageMix, tokenizer: Tokenizer
) -> tuple[dict[str, np.ndarray], list[Question]]:
    """The arrays of one page, and its questions: segment i answers question i."""
    page, rng = draw(seed, mix), random.Random(seed + 1)
    index = choose_patches(page, mix.patches, rng)
    chars, objects = patch_labels(page)
    long, *short = page.questions
    short.sort(key=lambda q: rng.random() ** (1 / OFTEN.get(q.task, 1.0)), reverse=True)
    questions = [long, *short] if rng.random() < mix.long_share else short
    slot_of = {p: i for i, p in enumerate(index)}
    row = pack(questions, slot_of, mix.text, tokenizer, mix.form)
    arrays = {
        "pixels": page_pixels(page, index),
        "index": np.array(index, dtype=np.int64),
        "chars": chars[index],
        "objects": objects[index],
        **vars(row),
    }
    return arrays, questions


def stack(samples: list[dict[str, np.ndarray]]) -> Batch:
    return {k: torch.from_numpy(np.stack([s[k] for s in samples])) for k in samples[0]}


def build_batch(seeds: list[int], mix: PageMix, tokenizer: Tokenizer) -> Batch:
    """One training batch; every array's first axis is the page."""
    return stack([sample(seed, mix, tokenizer)[0] for seed in seeds])


class PageBatches(torch.utils.data.Dataset[Batch]):
    """Batch number i of a run, drawn from seeds of its own; resumes at any number."""

    def __init__(self, mix: PageMix, batch: int, first_seed: int, start: int, stop: int) -> None:
        self.mix, self.batch, self.first_seed = mix, batch, first_seed
        self.start, self.stop = start, stop
        self.tokenizer = mix.form.tokenizer()

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> Batch:
        first = self.first_seed + (self.start + i) * self.batch
        return build_batch(list(range(first, first + self.batch)), self.mix, self.tokenizer)
