"""A conversation as the caller writes it, checked and in one shape.

What is accepted is what transformers' chat templates take: a text, or messages with a role and a
content of texts and pictures.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import OptionError

Role = Literal["system", "user", "assistant"]
_ROLES: tuple[Role, ...] = ("system", "user", "assistant")

# What a caller may pass as a prompt, see `parse_messages`.
Messages = str | Sequence[Mapping[str, Any]]

EXAMPLE = 'ask something, for example "What is in the picture?"'


@dataclass(frozen=True)
class ImagePlace:
    """Where picture number ``index`` (from 0) stands, after ``earlier`` ones in earlier prompts."""

    index: int
    earlier: int = 0

    @property
    def number(self) -> int:
        """Its number in the conversation, from 1."""
        return self.earlier + self.index + 1


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and texts and pictures in their order."""

    role: Role
    content: tuple[str | ImagePlace, ...]

    @property
    def texts(self) -> list[str]:
        """The texts, in order."""
        return [entry for entry in self.content if isinstance(entry, str)]

    @property
    def places(self) -> list[ImagePlace]:
        """The places of pictures, in order."""
        return [entry for entry in self.content if isinstance(entry, ImagePlace)]

    def after(self, earlier: int) -> "Message":
        """The same message in a conversation that already holds ``earlier`` pictures."""
        entries = (
            replace(entry, earlier=earlier) if isinstance(entry, ImagePlace) else entry
            for entry in self.content
        )
        return replace(self, content=tuple(entries))


def parse_messages(prompt: Messages, image_count: int = 0) -> list[Message]:
    """Turn what a caller may pass as a prompt into messages with numbered places for pictures.

    A text is one user turn, its pictures first. Otherwise: messages ``{role, content}``, where
    content is a text or a list of ``{type: "text", text: ...}`` and ``{type: "image"}``; the
    pictures, given separately, fill the places in order. Raises ``OptionError`` for anything else,
    for an empty prompt, and when ``image_count`` is not the number of places.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise OptionError("the prompt is empty", hint=EXAMPLE)
        return [Message("user", (*map(ImagePlace, range(image_count)), prompt))]
    if not isinstance(prompt, Sequence) or not prompt:
        raise OptionError("the prompt is neither text nor a list of messages", hint=EXAMPLE)
    numbers = iter(range(10**9))
    messages = [_parse_message(item, number, numbers) for number, item in enumerate(prompt, 1)]
    places = sum(len(message.places) for message in messages)
    check_count(places, image_count, 'one {"type": "image"} in a user message for each picture')
    spoken = [message for message in messages if message.role == "user"]
    if not any(text.strip() for message in spoken for text in message.texts):
        raise OptionError("the prompt holds no text from the user", hint=EXAMPLE)
    return messages


def with_system(
    prompt: str, image_count: int, system: str | None, video_count: int = 0
) -> str | list[dict[str, Any]]:
    """One user turn, its pictures and videos first, behind a system message if there is one.

    >>> with_system("Hi", 0, None)
    'Hi'
    """
    if system is None:
        return prompt
    kinds = ["image"] * image_count + ["video"] * video_count
    places = [{"type": kind} for kind in kinds]
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": [*places, {"type": "text", "text": prompt}]},
    ]


def check_count(places: int, pictures: int, rule: str) -> None:
    """Raise ``OptionError`` unless every place has its picture; ``rule`` says how to write one."""
    if places != pictures:
        raise OptionError(
            f"the prompt has places for {places} pictures, but {pictures} are given",
            hint=f"write {rule}",
        )


def _parse_message(item: object, number: int, numbers: Iterator[int]) -> Message:
    """Read message ``number`` (from 1); ``numbers`` gives out the pictures' indices."""
    if not isinstance(item, Mapping) or not {"role", "content"} <= item.keys():
        raise OptionError(
            f"message {number} is not an object with role and content",
            hint='write messages as {"role": "user", "content": "What is this?"}',
        )
    _refuse_unknown(f"message {number}", item, "role", "content")
    role, content = item["role"], item["content"]
    if role not in _ROLES:
        known = f"roles are {', '.join(_ROLES)}"
        raise OptionError(f"message {number} has the unknown role {role!r:.40}", hint=known)
    entries = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(entries, Sequence) or isinstance(entries, bytes):
        raise OptionError(
            f"the content of message {number} is neither text nor a list of entries",
            hint='write {"role": "user", "content": "What is this?"}',
        )
    parsed = tuple(_parse_entry(entry, number, numbers) for entry in entries)
    message = Message(role, parsed)
    if message.places and role != "user":
        raise OptionError(
            f"message {number} ({role}) holds a picture", hint="only user messages may hold one"
        )
    if role == "user" and not message.places and not any(map(str.strip, message.texts)):
        raise OptionError(f"message {number} (user) is empty", hint=EXAMPLE)
    return message


def _parse_entry(entry: object, number: int, numbers: Iterator[int]) -> str | ImagePlace:
    values, name = entry if isinstance(entry, Mapping) else {}, f"an entry of message {number}"
    if values.get("type") == "text" and isinstance(values.get("text"), str):
        _refuse_unknown(name, values, "type", "text")
        return str(values["text"])
    if values.get("type") == "image":
        if set(values) & {"image", "url", "path", "base64"}:
            raise OptionError(
                f"message {number} names its picture inside the message",
                hint='write {"type": "image"} there and pass the picture in images=[...]',
            )
        _refuse_unknown(name, values, "type")
        return ImagePlace(next(numbers))
    if values.get("type") == "video":
        raise OptionError(
            f"message {number} names its video inside the message",
            hint='write {"type": "video"} there and pass the video in videos=[...]',
        )
    raise OptionError(
        f"message {number} has an entry of an unknown kind",
        hint='entries are {"type": "text", "text": ...}, {"type": "image"}, {"type": "video"}',
    )


def _refuse_unknown(name: str, values: Mapping[str, Any], *known: str) -> None:
    """Refuse a key that nobody would read; tables fill their gaps with keys of None."""
    for key, value in values.items():
        if key not in known and value is not None:
            hint = f"it has {' and '.join(known)}"
            raise OptionError(f"{name} has the unknown key {key!r:.40}", hint=hint)
