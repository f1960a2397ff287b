"""A checkpoint's own chat template: rendering it, and what it renders unlike a prompt style.

A template is a stranger's program. Nothing else runs one, and here it runs in a sandbox inside a
process with little time and memory (``prompts.template_process``).
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.folder_files import read_file, read_json
from ..errors import CheckpointError
from .messages import parse_messages
from .prompt import IMAGE_MARK, build_prompt
from .templates import Style, find_style
from .tokenizer import Tokenizer

MOST_CHARACTERS = 100_000  # of a template: the longest published ones have a tenth
PATIENCE = 10.0  # seconds for the process, its start included

_QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
_ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A car."}]}
_LATER = {"role": "user", "content": [{"type": "text", "text": "Sure?"}]}
CONVERSATIONS = {"a question": [_QUESTION], "a later turn": [_QUESTION, _ANSWER, _LATER]}


class TemplateError(Exception):
    """A template could not be rendered; the text says why."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the file that holds it; ``plain`` ones take texts for contents, no lists."""

    file: str
    text: str
    plain: bool = False


def find_template(folder: Path, with_tokenizers: bool) -> ChatTemplate | None:
    """The template of a checkpoint, None if it has none; its tokenizer's only if asked for."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return ChatTemplate(path.name, read_file(path).decode("utf-8", "replace"))
    files = [("chat_template.json", False), ("tokenizer_config.json", True)]
    for name, plain in files[: 1 + with_tokenizers]:
        path = folder / name
        found = read_json(path) if path.exists() else {}
        if text := _default(found.get("chat_template")):
            return ChatTemplate(name, text, plain)
        if path.exists() and not plain:
            raise CheckpointError(f"{path} holds no template")
    return None


def _default(template: object) -> str | None:
    """Of several named templates the one called "default"."""
    if isinstance(template, list):
        named = (item for item in template if isinstance(item, dict))
        template = next((t.get("template") for t in named if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def difference(template: ChatTemplate, tokenizer: Tokenizer, style: str) -> str:
    """What the template renders that our style does not, in one line; "" where they agree.

    Raises TemplateError.
    """
    mark = find_style(style).picture
    for what, messages in CONVERSATIONS.items():
        ours = build_prompt(parse_messages(messages, 1), style, tokenizer, 0, [1]).text
        theirs = rendered(template, messages, tokenizer).replace(mark, IMAGE_MARK)
        if theirs != ours:
            first = next(n for n in itertools.count() if theirs[n : n + 1] != ours[n : n + 1])
            start, end = max(0, first - 20), first + 60
            return (
                f"{template.file} renders {what} as ...{theirs[start:end]!r}, "
                f"style {style} as ...{ours[start:end]!r}"
            )
    return ""


def question(style: str | Style, tokenizer: Tokenizer) -> str:
    """A question about one picture, as a style writes it."""
    messages = parse_messages(CONVERSATIONS["a question"], 1)
    return build_prompt(messages, style, tokenizer, 0, [1]).text


def rendered(
    template: ChatTemplate, messages: Sequence[dict[str, Any]], tokenizer: Tokenizer
) -> str:
    """A conversation as the template renders it, without the BOS that the tokenizer adds."""
    added = (tokenizer.bos_id is not None and tokenizer.spelling(tokenizer.bos_id)) or ""
    eos = (tokenizer.eos_id is not None and tokenizer.spelling(tokenizer.eos_id)) or ""
    tokens = {"bos_token": "", **tokenizer.named, "eos_token": eos}
    values = tokens | ({"bos_token": added} if added else {}) | {"add_generation_prompt": True}
    shown = [_plain(message) for message in messages] if template.plain else messages
    return _run(template.text, values | {"messages": shown}).removeprefix(added)


def _plain(message: dict[str, Any]) -> dict[str, str]:
    entries = (entry.get("text", "<image>\n") for entry in message["content"])
    return {"role": message["role"], "content": "".join(entries)}


def _run(template: str, values: dict[str, Any]) -> str:
    if importlib.util.find_spec("jinja2") is None:
        raise TemplateError("jinja2 is not installed")
    if len(template) > MOST_CHARACTERS:
        raise TemplateError(f"it has {len(template):,} characters")
    script = Path(__file__).with_name("template_process.py")
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(script)],
            input=json.dumps({"template": template, "values": values}),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=PATIENCE,
        )
        answer = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        raise TemplateError("it takes too long or too much memory") from None
    if "text" not in answer:
        raise TemplateError(str(answer.get("error")))
    return str(answer["text"])
