"""Which cells each part of the GPU benchmark has: the most important first, ten minutes at most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bench import predict
from bench.gpu_cells import Cell, MemoryCell, Rounds, StepCell
from bench.gpu_formats import format_cell
from bench.gpu_fused import fused_cells
from bench.gpu_kernels import attention_cell, policy_cell, product_cell
from bench.predict import SEVEN, THIRTEEN, TOY, Prompt, Shape, Way

FULL, AVL = Way(policy="full"), Way(policy="avl")
TRANSFORMERS = Way(side="transformers")

# Goals of A-VL's step / full's, by model, image tokens and batch.
STEP_GOALS = {
    **dict(zip((("7B", 2880, n) for n in (1, 8, 32)), (0.96, 0.74, 0.54), strict=True)),
    **dict(zip((("7B", 2144, n) for n in (1, 8, 32)), (0.97, 0.78, 0.57), strict=True)),
    **dict(zip((("7B", 576, n) for n in (1, 8, 32)), (1.00, 0.93, 0.77), strict=True)),
    **dict(zip((("13B", 2880, n) for n in (1, 8, 32)), (0.97, 0.77, 0.56), strict=True)),
}
# Goals of our step / transformers', by policy and batch, 7B at 2,880 image tokens.
PEER_GOALS = {
    **dict(zip((("full", n) for n in (1, 8, 32)), (0.50, 0.65, 0.50), strict=True)),
    **dict(zip((("avl", n) for n in (1, 8, 32)), (0.50, 0.50, 0.30), strict=True)),
}
EQUAL_MEMORY_GOAL = 1 / 2.2  # time per token, A-VL / full: 2.2 times the tokens per second


@dataclass(frozen=True)
class Scale:
    """Real sizes, or toy ones to walk through everything on a CPU."""

    dry: bool
    small: Shape
    large: Shape
    images: Sequence[int]
    batches: Sequence[int]
    text: int
    rounds: Rounds

    def prompt(self, image: int, rounds: Rounds | None = None) -> Prompt:
        """A prompt around a picture of ``image`` tokens, with room for the measured steps."""
        return Prompt(self.text, image, self.text, (rounds or self.rounds).total)

    def cell(self, shape: Shape, image: int, ways: Sequence[Way], goal: float | None) -> StepCell:
        """A cell of decode steps."""
        return StepCell(shape, self.prompt(image), tuple(ways), self.rounds, goal)


REAL = Scale(False, SEVEN, THIRTEEN, (2880, 576, 2144), (1, 8, 32), 32, Rounds())
DRY = Scale(
    True, TOY, replace(TOY, name="toy, larger", layers=3), (24,), (1, 2), 24, Rounds(2, 1, 3)
)


def kernel_cells(scale: Scale) -> list[Cell]:
    """Part 1: attention over LLaVA's shapes, products of few bits, policy launch, small kernels."""
    tokens = (48,) if scale.dry else (2880, 576, 2144)
    cells: list[Cell] = [
        attention_cell(rows, count, scale.dry) for count in tokens for rows in scale.batches
    ]
    cells += [product_cell(rows, scale.small, scale.dry) for rows in (1, 4, 8)]
    image = scale.images[0]
    for rows in scale.batches:
        cells.append(policy_cell(rows, image, 2 * scale.text, scale.small, scale.dry))
        cells += fused_cells(rows, scale.small, scale.dry)
    return cells


def decode_cells(scale: Scale, shape: Shape, images: Sequence[int]) -> list[Cell]:
    """A-VL beside full on our engine, with graphs and without."""
    return [
        scale.cell(
            shape,
            image,
            [replace(way, batch=batch, graphs=graphs) for way in (FULL, AVL)],
            STEP_GOALS.get((shape.name, image, batch)) if graphs else None,
        )
        for image in images
        for graphs in (True, False)
        for batch in scale.batches
    ]


def peer_cells(scale: Scale) -> list[Cell]:
    """Part 4: our policies beside transformers on the same weights.

    Blocks are half as long, so that two full caches of 32 rows fit beside each other.
    """
    image = scale.images[0]
    if not scale.dry:
        scale = replace(scale, rounds=replace(scale.rounds, steps=15))
    cells: list[Cell] = [
        scale.cell(
            scale.small,
            image,
            [replace(TRANSFORMERS, batch=batch), replace(way, batch=batch, graphs=True)],
            PEER_GOALS.get((way.policy, batch)),
        )
        for batch in scale.batches
        for way in (FULL, AVL)
    ]
    compiled = [replace(TRANSFORMERS, cache="static"), replace(FULL, graphs=True)]
    return [*cells, scale.cell(scale.small, image, compiled, None)]


def memory_cells(scale: Scale) -> list[Cell]:
    """Part 5: a prefill's peak, and tokens per second when either policy fills the card."""
    rounds = scale.rounds if scale.dry else replace(scale.rounds, blocks=6)
    image = scale.images[0]
    prompt = scale.prompt(image, rounds)
    ways = [
        replace(way, graphs=True, batch=_largest(scale, way.policy, prompt)) for way in (FULL, AVL)
    ]
    alone = scale.prompt(image)
    return [
        *(MemoryCell(scale.small, alone, policy) for policy in ("full", "avl")),
        StepCell(scale.small, prompt, tuple(ways), rounds, EQUAL_MEMORY_GOAL, per_token=True),
    ]


def _largest(scale: Scale, policy: str, prompt: Prompt) -> int:
    if scale.dry:
        return 3 if policy == "full" else 5
    return predict.largest_batch(scale.small, policy, prompt)


def form_cells(scale: Scale) -> list[Cell]:
    """Part 6: where selection runs, and the small kernels fused or not.

    Selection by layers runs on into the next step, which no graph can.
    """
    forms = {True: ("sync", "branch"), False: ("sync", "branch", "layers")}
    return [
        scale.cell(scale.small, scale.images[0], ways, None)
        for batch in scale.batches
        for graphs in (True, False)
        for way in [replace(FULL, batch=batch, graphs=graphs)]
        for ways in (
            [replace(way, policy="avl", selection=form) for form in forms[graphs]],
            [way, replace(way, fused=True)],
        )
    ]


def packed_cells(scale: Scale) -> list[Cell]:
    """Part 7: the cache in few bits, one layer's attention and whole steps.

    Steps leave no values unread: seeded weights attend to everything nearly alike.
    """
    tokens = (48,) if scale.dry else (2880, 576)
    cells: list[Cell] = [
        format_cell(rows, count, scale.dry) for count in tokens for rows in scale.batches
    ]
    packed = [Way(policy=policy) for policy in predict.PACKED]
    for batch in scale.batches:
        ways = [replace(way, batch=batch, graphs=True) for way in (FULL, *packed)]
        cells.append(scale.cell(scale.small, scale.images[0], ways, None))
    return cells


def check_cells(scale: Scale) -> list[Cell]:
    """The small table of `make gpu-check`."""
    tokens = 48 if scale.dry else 2880
    return [
        *(attention_cell(rows, tokens, scale.dry) for rows in scale.batches),
        format_cell(scale.batches[1], tokens, scale.dry),
        *decode_cells(replace(scale, batches=(1,)), scale.small, scale.images[:1]),
    ]


PARTS: dict[str, tuple[str, Callable[[Scale], list[Cell]]]] = {
    "check": ("a small table", check_cells),
    "1": ("kernels", kernel_cells),
    "2": ("decode, 7B", lambda scale: decode_cells(scale, scale.small, scale.images)),
    "3": ("decode, 13B", lambda scale: decode_cells(scale, scale.large, scale.images[:1])),
    "4": ("transformers beside ours", peer_cells),
    "5": ("memory, and throughput at equal memory", memory_cells),
    "6": ("forms of selection, fused kernels", form_cells),
    "7": ("the cache in few bits", packed_cells),
}
