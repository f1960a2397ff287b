"""How each family of checkpoints writes a conversation: one small function per style, one table.

A template renders messages into pieces: text, special tokens, and places for pictures. Special
tokens and pictures come from this structure alone, so nothing a user types can become one.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import OptionError
from .messages import ImagePlace, Message


@dataclass(frozen=True)
class Special:
    """A special token that a template places, by its spelling."""

    token: str


@dataclass(frozen=True)
class Alone:
    """A text that is encoded by itself, not joined with the texts beside it."""

    text: str


Piece = str | Special | Alone | ImagePlace


@dataclass(frozen=True)
class Style:
    """How a family of checkpoints writes a conversation.

    ``opening`` renders a conversation from its start, ``turns`` further messages after an answer;
    both end where the next answer begins. ``closing`` is the special token behind every answer, ""
    if there is none; ``picture`` is how the checkpoints' own templates spell a picture's place.
    """

    opening: Callable[[Sequence[Message]], list[Piece]]
    turns: Callable[[Sequence[Message]], list[Piece]]
    closing: str = ""
    picture: str = "<image>"


def _llava_hf(messages: Sequence[Message]) -> list[Piece]:
    """Transformers' template: ``USER: <image>\\nWhat? ASSISTANT: A cat. USER: Why? ASSISTANT:``"""
    pieces: list[Piece] = []
    for message in messages:
        if message.role != "system":
            pieces.append(f"{message.role.upper()}: ")
        pieces += _pictures_first(message)
        pieces += [f"{text} " for text in message.texts]
    return [*pieces, "ASSISTANT:"]


# The system sentence of the original repository's `llava_v1` conversation.
_LLAVA_V1_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def _llava_v1(messages: Sequence[Message]) -> list[Piece]:
    """The original repository's conversation: a system sentence, and </s> behind every answer."""
    given = [text for message in messages if message.role == "system" for text in message.texts]
    system = " ".join(given) if given else _LLAVA_V1_SYSTEM
    turns = [message for message in messages if message.role != "system"]
    return [f"{system} ", *_llava_v1_turns(turns)]


def _llava_v1_turns(messages: Sequence[Message]) -> list[Piece]:
    pieces: list[Piece] = []
    for message in messages:
        words = " ".join(message.texts)
        if message.role == "assistant":
            pieces += [f"ASSISTANT: {words}", Special("</s>")]
        elif message.role == "user":
            pieces += ["USER: ", *_pictures_first(message), f"{words} "]
        else:
            raise OptionError(
                "a system message must stand at the start of the conversation",
                hint="start a new conversation to change it",
            )
    return [*pieces, "ASSISTANT:"]


def _pictures_first(message: Message) -> Iterator[Piece]:
    """Both templates put a message's pictures in front of its texts, each with a new line."""
    for place in message.places:
        yield place
        yield "\n"


def _mistral(messages: Sequence[Message]) -> list[Piece]:
    """LLaVA-1.6 over Mistral: ``[INST] <image>\\nWhat? [/INST] A cat. </s>[INST] Why? [/INST]``"""
    pieces: list[Piece] = []
    for message in messages:
        words = "".join(message.texts)
        if message.role == "user":
            pieces += ["[INST] ", *_pictures_first(message), f"{words} [/INST]"]
        elif message.role == "assistant":
            pieces += [f" {words} ", Special("</s>")]
        else:
            raise OptionError(
                "this model's prompt style has no system message",
                hint="write it at the start of the first user message",
            )
    return pieces


def _llama3(messages: Sequence[Message]) -> list[Piece]:
    """Llama 3's: ``<|start_header_id|>user<|end_header_id|>\\n\\n<image>\\nWhat?<|eot_id|>``..."""
    pieces: list[Piece] = []
    for message in messages:
        pieces += [*_llama3_header(message.role), *_pictures_first(message), *message.texts]
        pieces.append(Special("<|eot_id|>"))
    return [*pieces, *_llama3_header("assistant")]


def _llama3_header(role: str) -> tuple[Piece, ...]:
    return (Special("<|start_header_id|>"), role, Special("<|end_header_id|>"), "\n\n")


# What stands in Llama 3.1's template where nobody names the day: a prompt is the same on every day.
_TODAY = "26 Jul 2024"


def _mllama(messages: Sequence[Message]) -> list[Piece]:
    """Llama-3.2-Vision's: a system message is written only where the conversation has no picture,
    and then always.
    """
    system = [message for message in messages[:1] if message.role == "system"]
    spoken = messages[len(system) :]
    given = "".join(text for message in system for text in message.texts).strip()
    if not any(message.places for message in spoken):
        dates = f"Cutting Knowledge Date: December 2023\nToday Date: {_TODAY}\n\n"
        head = [*_llama3_header("system"), f"{dates}{given}", Special("<|eot_id|>")]
        return [*head, *_mllama_turns(spoken)]
    if given:
        raise OptionError(
            "this model's prompt style has no system message beside a picture",
            hint="write it at the start of the user's message",
        )
    return _mllama_turns(spoken)


def _mllama_turns(messages: Sequence[Message]) -> list[Piece]:
    """Texts and pictures in their order, nothing between them."""
    pieces: list[Piece] = []
    for message in messages:
        if message.role == "system":
            raise OptionError(
                "a system message must stand at the start of the conversation",
                hint="start a new conversation to change it",
            )
        pieces += [*_llama3_header(message.role), *message.content, Special("<|eot_id|>")]
    return [*pieces, *_llama3_header("assistant")]


def _mllama_base(messages: Sequence[Message]) -> list[Piece]:
    """The base model, which goes on from a text: ``<|image|>`` and the words, nothing around."""
    return [piece for message in messages for piece in message.content]


def _chatml(default: str, gap: str) -> Style:
    """ChatML, with the system text ``default`` where none is given and ``gap`` between messages."""

    def turns(messages: Sequence[Message]) -> list[Piece]:
        pieces: list[Piece] = []
        for message in messages:
            pieces += [gap, Special("<|im_start|>"), f"{message.role}\n"]
            pieces += [*_pictures_first(message), *message.texts, Special("<|im_end|>")]
        return [*pieces, gap, Special("<|im_start|>"), "assistant\n"]

    def opening(messages: Sequence[Message]) -> list[Piece]:
        if messages[0].role != "system":
            messages = [Message("system", (default,)), *messages]
        return turns(messages)[1:]  # no gap in front of the first

    return Style(opening, turns, closing="<|im_end|>")


def _onevision(messages: Sequence[Message]) -> list[Piece]:
    """LLaVA-OneVision's first template: ``<|im_start|>user <image>\\nWhat?<|im_end|>``, no new line
    between messages, and before an earlier answer a space more than where it was made.
    """
    pieces: list[Piece] = []
    for message in messages:
        pieces += [Special("<|im_start|>"), f"{message.role} ", *message.places]
        pieces += [*(f"\n{text}" for text in message.texts), Special("<|im_end|>")]
    return [*pieces, Special("<|im_start|>"), "assistant\n"]


def _qwen_patches(default: str) -> Style:
    """Qwen2-VL's and Qwen3-VL's ChatML: texts and pictures in their order, nothing between them,
    and the system text ``default``, if there is any, where none is given.
    """

    def turns(messages: Sequence[Message]) -> list[Piece]:
        pieces: list[Piece] = []
        for message in messages:
            pieces += ["\n", Special("<|im_start|>"), f"{message.role}\n"]
            pieces += [*message.content, Special("<|im_end|>")]
        return [*pieces, "\n", Special("<|im_start|>"), "assistant\n"]

    def opening(messages: Sequence[Message]) -> list[Piece]:
        if default and messages[0].role != "system":
            messages = [Message("system", (default,)), *messages]
        return turns(messages)[1:]  # no new line in front of the first

    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    return Style(opening, turns, closing="<|im_end|>", picture=mark)


_NEWLINE = Alone("\n")
_GROUNDING = re.compile(r"(</?(?:ref|box|quad)>)")


def _qwen_chat(messages: Sequence[Message]) -> list[Piece]:
    """Qwen-VL-Chat's ChatML: role, new line and content are encoded apart."""
    if messages[0].role != "system":
        messages = [Message("system", ("You are a helpful assistant.",)), *messages]
    return _qwen_turns(messages)[1:]  # no new line in front of the first


def _qwen_turns(messages: Sequence[Message]) -> list[Piece]:
    pieces: list[Piece] = []
    for message in messages:
        pieces += [_NEWLINE, Special("<|im_start|>"), message.role, _NEWLINE]
        pieces += [*_qwen_content(message, "Picture {}: ", "\n"), Special("<|im_end|>")]
    return [*pieces, _NEWLINE, Special("<|im_start|>"), "assistant", _NEWLINE]


def _qwen_base(messages: Sequence[Message]) -> list[Piece]:
    """Qwen-VL, which goes on from a text: ``<img>...</img>`` and the words, nothing around them."""
    return [piece for message in messages for piece in _qwen_content(message, "", "")]


def _qwen_content(message: Message, before: str, after: str) -> Iterator[Piece]:
    """A message's entries in their order; pictures are numbered through the conversation.

    Regions of a picture (``<ref>``, ``<box>``, ``<quad>`` and their ends) are special tokens in
    texts too: that is how they are asked about, and how earlier answers name them. No other is.
    """
    for entry in message.content:
        if isinstance(entry, ImagePlace):
            yield from (before.format(entry.number), Special("<img>"), entry)
            yield from (Special("</img>"), after)
            continue
        for number, text in enumerate(_GROUNDING.split(entry)):
            yield Special(text) if number % 2 else text


STYLES = {
    "llava-hf": Style(_llava_hf, _llava_hf),
    "llava-v1": Style(_llava_v1, _llava_v1_turns, closing="</s>"),
    "mistral": Style(_mistral, _mistral, closing="</s>"),
    "llama3": Style(_llama3, _llama3, closing="<|eot_id|>"),
    "mllama": Style(_mllama, _mllama_turns, closing="<|eot_id|>", picture="<|image|>"),
    "mllama-base": Style(_mllama_base, _mllama_base, picture="<|image|>"),
    "yi": _chatml("Answer the questions.", gap=""),
    "chatml": _chatml("You are a helpful assistant.", gap="\n"),
    "onevision": Style(_onevision, _onevision, closing="<|im_end|>"),
    "qwen2-vl": _qwen_patches("You are a helpful assistant."),
    "qwen3-vl": _qwen_patches(""),
    "qwen-vl": Style(_qwen_base, _qwen_base),
    "qwen-vl-chat": Style(_qwen_chat, _qwen_turns, closing="<|im_end|>"),
}


# The name of the style that a checkpoint's own chat template makes (``own_template``).
OWN = "template"


def find_style(name: str | Style) -> Style:
    """Return a style by its name, or one that is made already; an unknown name is an
    ``OptionError`` that lists the known.
    """
    if isinstance(name, Style):
        return name
    try:
        return STYLES[name]
    except KeyError:
        known = f"known styles: {', '.join(STYLES)}, {OWN}"
        raise OptionError(f"unknown prompt style {name!r}", hint=known) from None
