"""A prompt style made of a checkpoint's own chat template, where none of ours is meant.

The template runs (``chat_template``) on a conversation of the same shape, in which every text is a
mark that nobody can type into a prompt. What it writes around the marks is the style: special
tokens and pictures are found there and nowhere else, so that no text of a user can become one, and
no template decides by what a user says. White space around a text goes where the template strips
it. A shape is rendered once; the texts of later conversations are put into what came of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import OptionError
from .chat_template import ChatTemplate, TemplateError, rendered
from .messages import ImagePlace, Message
from .templates import Piece, Special, Style
from .tokenizer import Tokenizer

# A mark is a number between characters of Unicode's private use, with a wide space at both ends
# that stripping takes away.
_SPACE, _START, _END = "\u2003", "\ue000", "\ue001"
_MARK = re.compile(f"{_SPACE}?{_START}[0-9]+{_END}{_SPACE}?")

Shape = tuple[tuple[str, tuple[bool, ...]], ...]  # of each message: role, which entries are texts


@dataclass(frozen=True)
class _Text:
    """Where text ``number`` of a conversation stands, and at which ends it is stripped."""

    number: int
    left: bool
    right: bool

    def of(self, texts: Sequence[str]) -> str:
        text = texts[self.number]
        text = text.lstrip() if self.left else text
        return text.rstrip() if self.right else text


@dataclass(frozen=True)
class _Picture:
    """Where picture ``number`` of a conversation stands."""

    number: int


_Part = str | Special | _Text | _Picture


def own_style(template: ChatTemplate, tokenizer: Tokenizer, picture: str) -> Style:
    """The style that a template makes; ``picture`` is how it spells a picture's place.

    Raises TemplateError if it cannot render a question and a later one.
    """
    writer = _Writer(template, tokenizer, picture)
    later = writer.turns([_said("user")])
    first = later[0] if later else ""
    closing = first.token if isinstance(first, Special) else ""

    def turns(messages: Sequence[Message]) -> list[Piece]:
        pieces = _refusing(template, lambda: writer.turns(messages))
        return pieces[1:] if closing and pieces[:1] == [Special(closing)] else pieces

    def opening(messages: Sequence[Message]) -> list[Piece]:
        return _refusing(template, lambda: writer.opening(messages))

    return Style(opening, turns, closing, picture)


def _refusing(template: ChatTemplate, write: Any) -> list[Piece]:
    try:
        pieces: list[Piece] = write()
        return pieces
    except TemplateError as error:
        raise OptionError(
            f"{template.file} of the checkpoint does not take this conversation: {error}",
            hint="write another one, or choose a --style",
        ) from None


def _said(role: Any) -> Message:
    return Message(role, ("x",))


class _Writer:
    """Renders shapes of conversations, and puts conversations into them."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, picture: str) -> None:
        self._template, self._tokenizer, self._picture = template, tokenizer, picture
        self._sides = tokenizer.special_tokens
        spellings = sorted({*self._sides, picture}, key=len, reverse=True)
        self._structure = re.compile(f"({_MARK.pattern}|{'|'.join(map(re.escape, spellings))})")
        self._parts = lru_cache(maxsize=64)(self._render)

    def opening(self, messages: Sequence[Message]) -> list[Piece]:
        """A conversation from its start."""
        return self._filled(self._parts(_shape(messages)), messages)

    def turns(self, messages: Sequence[Message]) -> list[Piece]:
        """What stands behind an answer: taken from a conversation of three messages or more."""
        messages = [_said("user"), _said("assistant"), *messages]
        parts = self._parts(_shape(messages))
        answer = next(n for n, part in enumerate(parts) if isinstance(part, _Text) and part.number)
        return self._filled(parts[answer + 1 :], messages)

    def _filled(self, parts: Sequence[_Part], messages: Sequence[Message]) -> list[Piece]:
        texts = [text for message in messages for text in message.texts]
        places = [place for message in messages for place in message.places]
        filled: list[Piece] = []
        for part in parts:
            if isinstance(part, _Picture):
                filled.append(places[part.number])
            else:
                filled.append(part.of(texts) if isinstance(part, _Text) else part)
        return list(self._stripped(filled))

    def _stripped(self, pieces: Sequence[Piece]) -> Iterator[Piece]:
        """Some special tokens swallow the white space beside them, whoever has written it."""
        swallows = False
        for piece, following in zip(pieces, [*pieces[1:], ""], strict=True):
            if isinstance(piece, str):
                piece = piece.lstrip() if swallows else piece
                behind = isinstance(following, Special) and self._sides[following.token][0]
                piece = piece.rstrip() if behind else piece
                swallows = swallows and not piece
            else:
                swallows = isinstance(piece, Special) and self._sides[piece.token][1]
            yield piece

    def _render(self, shape: Shape) -> tuple[_Part, ...]:
        """The parts of a shape: contents as lists of entries, or as texts where lists fail."""
        try:
            return self._parsed(shape, _as_lists(shape))
        except TemplateError as error:
            try:
                return self._parsed(shape, _as_texts(shape, self._picture))
            except TemplateError:
                raise error from None

    def _parsed(self, shape: Shape, messages: Sequence[dict[str, Any]]) -> tuple[_Part, ...]:
        plain = ChatTemplate(self._template.file, self._template.text)
        text = rendered(plain, messages, self._tokenizer)
        parts: list[_Part] = []
        pictures = 0
        for part in filter(None, self._structure.split(text)):
            if _MARK.fullmatch(part):
                number = int(part.strip(_SPACE)[1:-1])
                ends = part.startswith(_SPACE), part.endswith(_SPACE)
                parts.append(_Text(number, left=not ends[0], right=not ends[1]))
            elif part == self._picture:
                parts.append(_Picture(pictures))
                pictures += 1
            else:
                parts.append(Special(part) if part in self._sides else part)
        _check(shape, parts, pictures)
        return tuple(parts)


def _check(shape: Shape, parts: Sequence[_Part], pictures: int) -> None:
    """Every text must be there, in order, and every picture: nothing is left out in silence."""
    owners = [role for role, entries in shape for is_text in entries if is_text]
    found = [part.number for part in parts if isinstance(part, _Text)]
    wanted = len([entry for _, entries in shape for entry in entries if not entry])
    if found != list(range(len(owners))):
        lost = [owners[n] for n in range(len(owners)) if found.count(n) != 1]
        who = f"what the {lost[0]} says" if lost else "the order of texts"
        raise TemplateError(f"it does not keep {who}")
    if pictures != wanted:
        raise TemplateError(f"it has {pictures} places for {wanted} pictures")


def _shape(messages: Sequence[Message]) -> Shape:
    return tuple(
        (message.role, tuple(not isinstance(entry, ImagePlace) for entry in message.content))
        for message in messages
    )


def _marked(shape: Shape) -> Iterator[tuple[str, list[str | None]]]:
    """Each message's role, and a mark for each text or None for a picture."""
    number = 0
    for role, entries in shape:
        marks: list[str | None] = []
        for is_text in entries:
            marks.append(f"{_SPACE}{_START}{number}{_END}{_SPACE}" if is_text else None)
            number += is_text
        yield role, marks


def _as_lists(shape: Shape) -> list[dict[str, Any]]:
    def entry(mark: str | None) -> Mapping[str, str]:
        return {"type": "image"} if mark is None else {"type": "text", "text": mark}

    return [{"role": role, "content": [*map(entry, marks)]} for role, marks in _marked(shape)]


def _as_texts(shape: Shape, picture: str) -> list[dict[str, Any]]:
    """As templates of language models take them: a picture is its mark and a new line."""
    return [
        {"role": role, "content": "".join(f"{picture}\n" if m is None else m for m in marks)}
        for role, marks in _marked(shape)
    ]
