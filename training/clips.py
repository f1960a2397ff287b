"""Short clips: a few moving objects, one that changes colour, one that comes later, a number that
is shown in a single frame; with questions that no single frame answers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from training.fonts import face
from training.page import SIZE, Box, Page, Question, Thing
from training.scene_questions import NUMBERS
from training.scenes import COLOURS, KINDS, SCALE, ZONE, paint

FRAMES = 4
TASKS = ("becomes", "first", "when", "order", "count", "number")
_STEP = 5.0  # pixels that an object moves at most from frame to frame
_INK, _PAPER = (20, 20, 20), (246, 246, 240)


@dataclass
class Clip:
    """Frames in their order, each with what stands in it, and questions about all of them.

    ``label`` is the box of a number, in the one frame (from 0) that shows it.
    """

    frames: list[Page]
    questions: list[Question]
    label: tuple[int, Box]

    @property
    def images(self) -> list[Image.Image]:
        """The frames as pictures."""
        return [frame.image for frame in self.frames]


@dataclass(frozen=True)
class _Plan:
    """What happens: ``things`` as they are at first, and in which frames (from 0)."""

    things: list[Thing]  # the first changes, the last comes later
    colour: str  # that the first one becomes
    change: int  # the frame in which it has
    late: int  # the frame in which the last one comes
    number: str
    shown: int  # the frame in which the number stands
    zone: int  # and where


def make_clip(seed: int, frames: int = FRAMES) -> Clip:
    """A clip with its questions; the same seed gives the same clip."""
    rng = random.Random(seed)
    plan = _plan(rng, frames)
    background, drift = rng.random(), {t: _drift(rng) for t in plan.things}
    pages = [_frame(plan, number, background, drift) for number in range(frames)]
    return Clip(pages, _asked(plan, frames, rng), (plan.shown, _label(plan.zone)))


def _plan(rng: random.Random, frames: int) -> _Plan:
    count = rng.choice((2, 3, 3))
    *zones, number_zone = rng.sample(range(9), count + 1)
    kinds = rng.sample(KINDS, count)
    colours = rng.sample(list(COLOURS), count + 1)
    things = []
    for kind, colour, zone in zip(kinds, colours, zones, strict=False):
        radius = rng.uniform(28, 40)
        x, y = ((part + 0.5) * ZONE for part in (zone % 3, zone // 3))
        box = x - radius, y - radius, x + radius, y + radius
        things.append(Thing(kind, colour, zone, box))
    digits = str(rng.randint(100, 999))
    change, late = rng.randint(1, frames - 1), rng.randint(1, frames - 1)
    return _Plan(things, colours[-1], change, late, digits, rng.randrange(frames), number_zone)


def _drift(rng: random.Random) -> tuple[float, float]:
    """Pixels that an object goes on in every frame."""
    return rng.uniform(-_STEP, _STEP), rng.uniform(-_STEP, _STEP)


def _frame(
    plan: _Plan, number: int, background: float, drift: dict[Thing, tuple[float, float]]
) -> Page:
    """One frame: the background and the light are those of the clip."""
    there = plan.things if number >= plan.late else plan.things[:-1]
    shown = [_moved(thing, drift[thing], number) for thing in there]
    if number >= plan.change:
        shown[0] = replace(shown[0], colour=plan.colour)
    image = paint(shown, random.Random(background))
    if number == plan.shown:
        _print(image, plan.number, plan.zone)
    return Page(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC), [], things=shown)


def _moved(thing: Thing, drift: tuple[float, float], frames: int) -> Thing:
    x, y = (step * frames for step in drift)
    left, top, right, bottom = thing.box
    return replace(thing, box=(left + x, top + y, right + x, bottom + y))


def _label(zone: int) -> Box:
    """Where a number stands, in pixels of the frame."""
    x, y = ((part + 0.5) * ZONE for part in (zone % 3, zone // 3))
    return x - 44, y - 20, x + 44, y + 20


def _print(image: Image.Image, text: str, zone: int) -> None:
    """A number on a paper label, on the enlarged picture."""
    draw, box = ImageDraw.Draw(image), [edge * SCALE for edge in _label(zone)]
    draw.rectangle(box, fill=_PAPER)
    centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    draw.text(centre, text, fill=_INK, font=face("DejaVuSans-Bold.ttf", 30 * SCALE), anchor="mm")


def _asked(plan: _Plan, frames: int, rng: random.Random) -> list[Question]:
    """One question of every task, in random order."""
    first, last = plan.things[0].kind, plan.things[-1].kind
    early = rng.choice(plan.things[:-1]).kind
    pair = [early, last]
    rng.shuffle(pair)
    frame = rng.randrange(frames)
    count = len(plan.things) - (frame < plan.late)
    there = "is one object" if count == 1 else f"are {NUMBERS[count]} objects"
    questions = [
        Question(
            "becomes",
            f"Which colour does the {first} become?",
            f"The {first} becomes {plan.colour}.",
        ),
        Question(
            "first",
            f"Which colour is the {first} at first?",
            f"The {first} is {plan.things[0].colour} at first.",
        ),
        Question(
            "when",
            f"When does the {first} change?",
            f"In picture {NUMBERS[plan.change + 1]}.",
        ),
        Question("order", f"Which comes first, the {pair[0]} or the {pair[1]}?", f"The {early}."),
        Question(
            "count", f"How many objects are in picture {NUMBERS[frame + 1]}?", f"There {there}."
        ),
        Question("number", "Which number is shown?", f"The number is {plan.number}."),
    ]
    rng.shuffle(questions)
    return questions
