"""From a conversation to token ids and segments.

Text is encoded without any special token; those, and pictures, come from the template's structure.
Each stretch of text between them is encoded by itself, as the published processors do:
"USER: <image>\\nHi" gives ... 29871 32000 29871 13 ... with Llama's tokenizer.

``Segment``s record which positions hold text and which hold a picture. Whoever needs to know reads
them; nothing later searches the ids.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import OptionError
from .messages import EXAMPLE, ImagePlace, Message, check_count, parse_messages
from .templates import STYLES, Alone, Piece, Special, Style, find_style
from .tokenizer import Tokenizer

__all__ = [
    "STYLES",
    "ImagePlace",
    "Message",
    "Prompt",
    "Segment",
    "build_prompt",
    "continue_prompt",
    "parse_messages",
    "raw_prompt",
]

# How a picture's place is spelled in rendered and raw prompts.
IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Segment:
    """Positions ``start`` up to (not including) ``end`` hold text, or picture number ``image``."""

    kind: Literal["text", "image"]
    start: int
    end: int
    image: int = -1


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the model.

    ``token_ids`` has each picture's place filled with its number of image tokens; ``segments``
    cover all positions in order; ``text`` is the rendering, with one ``<image>`` per picture, for
    people.
    """

    token_ids: list[int]
    segments: tuple[Segment, ...]
    text: str

    @property
    def image_count(self) -> int:
        """How many pictures the prompt holds."""
        return sum(segment.kind == "image" for segment in self.segments)


def build_prompt(
    messages: Sequence[Message],
    style: str | Style,
    tokenizer: Tokenizer,
    image_token_id: int,
    image_token_counts: Sequence[int],
    window: int | None = None,
    image_marks: Sequence[str] = (),
) -> Prompt:
    """Render a conversation in the named style and encode it, with exactly one BOS in front.

    Picture i takes ``image_token_counts[i]`` tokens, all of them ``image_token_id``. The prompt
    ends where the assistant's answer begins. ``image_marks`` are special tokens before and behind a
    picture's place. With a ``window``, the oldest turns are left out so that what stands before the
    last question has fewer tokens; their pictures then have no segment.
    """
    _check_places(messages, image_token_counts)
    if window is not None:
        messages = _newest(messages, style, tokenizer, image_token_counts, window)
    pieces = find_style(style).opening(messages)
    pieces = _between(pieces, image_marks)
    return _encode(pieces, tokenizer, image_token_id, image_token_counts, bos=True)


def continue_prompt(
    messages: Sequence[Message],
    style: str | Style,
    tokenizer: Tokenizer,
    image_token_id: int,
    image_token_counts: Sequence[int],
    ended: bool,
    earlier: int = 0,
    image_marks: Sequence[str] = (),
) -> Prompt:
    """Encode only what follows an answer: its closing token if the style has one, and new turns.

    ``ended`` says that the closing token already stands in the sequence; ``earlier`` is how many
    pictures do, for styles that number them. Positions, and the pictures of segments, count from 0
    here: the caller adds how many it already has. Appended to the earlier
    prompt and the answer's ids this equals ``build_prompt`` of the whole conversation, as long as
    the answer's own ids are what the tokenizer would choose.
    """
    chosen = find_style(style)
    closing: list[Piece] = [Special(chosen.closing)] if chosen.closing and not ended else []
    _check_places(messages, image_token_counts)
    pieces = closing + chosen.turns([message.after(earlier) for message in messages])
    pieces = _between(pieces, image_marks)
    return _encode(pieces, tokenizer, image_token_id, image_token_counts, bos=False)


def raw_prompt(
    text: str, tokenizer: Tokenizer, image_token_id: int, image_token_counts: Sequence[int]
) -> Prompt:
    """Encode a text verbatim: special tokens spelled in it are special, BOS as the tokenizer adds.

    Each ``<image>`` in it is the place of the next picture. A BOS spelled behind pictures that come
    first stays there, alone.
    """
    texts = text.split(IMAGE_MARK)
    first = next(filter(None, texts), "")
    spelled = tokenizer.encode_with_specials(first, bos=False)[:1] == [tokenizer.bos_id]
    check_count(len(texts) - 1, len(image_token_counts), f"one {IMAGE_MARK} for each picture")
    builder = _Builder(image_token_id, image_token_counts)
    for number, between in enumerate(texts):
        if number:
            builder.add_image(number - 1)
        bos = number == 0 and not spelled
        builder.add_text(tokenizer.encode_with_specials(between, bos=bos))
    if not builder.token_ids:
        raise OptionError("the prompt is empty", hint=EXAMPLE)
    return builder.prompt(text)


# --- encoding ------------------------------------------------------------------------------------


def _between(pieces: Sequence[Piece], marks: Sequence[str]) -> list[Piece]:
    """Put each picture's place between two special tokens, if there are any."""
    if not marks:
        return list(pieces)
    start, end = map(Special, marks)
    result: list[Piece] = []
    for piece in pieces:
        result += [start, piece, end] if isinstance(piece, ImagePlace) else [piece]
    return result


def _encode(
    pieces: Sequence[Piece],
    tokenizer: Tokenizer,
    image_token_id: int,
    image_token_counts: Sequence[int],
    bos: bool,
) -> Prompt:
    builder = _Builder(image_token_id, image_token_counts)
    if bos and tokenizer.bos_id is not None:
        builder.add_text([tokenizer.bos_id])
    for piece in _join_texts(pieces):
        if isinstance(piece, ImagePlace):
            builder.add_image(piece.index)
        else:
            builder.add_text(_ids(piece, tokenizer))
    return builder.prompt("".join(map(_spelled, pieces)))


def _check_places(messages: Sequence[Message], image_token_counts: Sequence[int]) -> None:
    places = sum(len(message.places) for message in messages)
    check_count(places, len(image_token_counts), "one place for each picture")


def _ids(piece: str | Alone | Special, tokenizer: Tokenizer) -> list[int]:
    if isinstance(piece, Special):
        return [_special_id(tokenizer, piece.token)]
    return tokenizer.encode(piece.text if isinstance(piece, Alone) else piece)


def _newest(
    messages: Sequence[Message],
    style: str | Style,
    tokenizer: Tokenizer,
    image_token_counts: Sequence[int],
    window: int,
) -> list[Message]:
    """The system message, as many of the newest turns as stay below ``window``, the last question.

    A turn is a user message and what follows it.
    """
    chosen = find_style(style)
    starts = [n for n, message in enumerate(messages) if message.role == "user"]
    system, question = list(messages[: starts[0]]), list(messages[starts[-1] :])

    def size(pieces: Sequence[Piece]) -> int:
        return sum(
            image_token_counts[piece.index]
            if isinstance(piece, ImagePlace)
            else len(_ids(piece, tokenizer))
            for piece in _join_texts(pieces)
        )

    generation = size(chosen.turns([]))
    used = size(chosen.opening([*system, *question])) - size(chosen.turns(question))
    fitting: list[Message] = []
    for start, end in reversed(list(itertools.pairwise(starts))):
        turn = list(messages[start:end])
        used += size(chosen.turns(turn)) - generation
        if used >= window:
            break
        fitting = turn + fitting
    return [*system, *fitting, *question]


def _join_texts(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Join neighbouring texts: a token may reach across the border between template and user."""
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        if text:
            yield text
        text = ""
        yield piece
    if text:
        yield text


def _special_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_id(token)
    if found is None:
        raise OptionError(
            f"the tokenizer has no {token}, which this prompt style needs",
            hint=f"choose another prompt style: {', '.join(STYLES)}",
        )
    return found


def _spelled(piece: Piece) -> str:
    if isinstance(piece, str):
        return piece
    if isinstance(piece, Alone):
        return piece.text
    return piece.token if isinstance(piece, Special) else IMAGE_MARK


class _Builder:
    """Collects ids and the segments over them."""

    def __init__(self, image_token_id: int, image_token_counts: Sequence[int]) -> None:
        self.token_ids: list[int] = []
        self.segments: list[Segment] = []
        self._image_token_id, self._counts = image_token_id, image_token_counts

    def add_text(self, ids: Sequence[int]) -> None:
        if not ids:
            return
        start = len(self.token_ids)
        if self.segments and self.segments[-1].kind == "text":
            start = self.segments.pop().start
        self.token_ids += ids
        self.segments.append(Segment("text", start, len(self.token_ids)))

    def add_image(self, index: int) -> None:
        start = len(self.token_ids)
        self.token_ids += [self._image_token_id] * self._counts[index]
        self.segments.append(Segment("image", start, len(self.token_ids), index))

    def prompt(self, text: str) -> Prompt:
        return Prompt(self.token_ids, tuple(self.segments), text)
