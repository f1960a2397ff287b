"""--check compares prompts with the checkpoint's own template, whatever that template tries."""

import importlib.util
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.prompts.chat_template import (
    CONVERSATIONS,
    ChatTemplate,
    TemplateError,
    difference,
    find_template,
    rendered,
)
from engine.prompts.tokenizer import Tokenizer
from tests.asking import Ask
from tests.checkpoints import CHAT_TEMPLATE, Shape, edit_json, write_original_with_tower
from tests.llama3_checkpoint import TEMPLATE, llama3_tokenizer, write_llama3
from tests.next_checkpoints import TEMPLATES, write_next

TEXTS = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_rendering_is_transformers(toy: Tokenizer) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    spaced = """
    {%- for m in messages %}
        {% generation %}
        {{- m.role + ' ' + bos_token }}
        {%- endgeneration %}

        {% if loop.index > 1 %}{% continue %}{% endif %}
    {% endfor %}
    """
    for text in (*TEMPLATES.values(), CHAT_TEMPLATE, TEMPLATE, spaced, TEXTS):
        for messages in CONVERSATIONS.values():
            (wanted,), _ = render_jinja_template(
                [messages], chat_template=text, add_generation_prompt=True,
                bos_token="<s>", eos_token="</s>",
            )  # fmt: skip
            got = rendered(ChatTemplate("x", text), messages, toy)
            assert got == wanted.removeprefix("<s>")


@pytest.mark.parametrize(
    ("style", "text", "says"),
    [
        ("llava-hf", CHAT_TEMPLATE, ""),
        ("mistral", TEMPLATES["mistral"], ""),
        ("llama3", TEMPLATE, ""),
        ("llava-hf", TEMPLATE, "renders a question as ...'<|start_header_id|>"),
        ("llava-hf", CHAT_TEMPLATE.replace("ASSISTANT:", "BOT:"), "renders a question"),
        ("llava-v1", CHAT_TEMPLATE, "renders a question as ...'USER: <image>"),
        ("mistral", TEMPLATES["mistral"].replace("</s>", "<\\s>"), "renders a later turn"),
    ],
)
def test_what_differs_is_said(style: str, text: str, says: str, toy: Tokenizer) -> None:
    tokenizer = toy
    if style == "llama3":
        named = {"bos_token": "<|begin_of_text|>"}
        tokenizer = Tokenizer(json.loads(llama3_tokenizer().to_str()), named)
    found = difference(ChatTemplate("chat_template.jinja", text), tokenizer, style)
    assert (says in found) if says else (found == "")
    assert "\n" not in found
    assert len(found) < 500


@pytest.mark.parametrize("tiled", [False, True])
def test_a_checkpoint_over_llama_3_is_asked_as_its_template_says(
    tiled: bool, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama3(tmp_path / "m", monkeypatch, tiled)
    assert (
        "template: ok - chat_template.jinja renders what style llama3 does"
        in ask("--check", "--model", folder, "-q").out
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<|eot_id|>", "<|end|>"))
    asked = ask("--check", "--model", folder, "-q")
    assert asked.code == 0
    assert "template: WARNING - chat_template.jinja renders a question" in asked.out
    assert "--raw" in asked.out


def test_where_templates_are_found(tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    hub = Path(shutil.copytree(checkpoint(Shape()), tmp_path / "hub"))
    assert find_template(hub, True) == ChatTemplate("chat_template.jinja", CHAT_TEMPLATE)
    (hub / "chat_template.jinja").unlink()
    assert find_template(hub, True) is None
    edit_json(hub / "tokenizer_config.json", chat_template=TEXTS)
    assert find_template(hub, True) == ChatTemplate("tokenizer_config.json", TEXTS, plain=True)
    assert find_template(hub, False) is None
    several = [{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}]
    edit_json(hub / "tokenizer_config.json", chat_template=several)
    assert find_template(hub, True) == ChatTemplate("tokenizer_config.json", "y", plain=True)
    (hub / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    assert find_template(hub, True) == ChatTemplate("chat_template.json", CHAT_TEMPLATE)


def test_a_base_models_template_says_nothing_of_the_original_layout(
    ask: Ask, tmp_path: Path
) -> None:
    for folder in (
        write_original_with_tower(tmp_path / "o", Shape()),
        write_next(tmp_path / "n", "mistral", "original"),
    ):
        edit_json(folder / "tokenizer_config.json", chat_template=TEXTS)
        assert "template: ok - there is none" in ask("--check", "--model", folder, "-q").out


HOSTILE = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{% set x = namespace(s='aaaaaaaa') %}{% for a in range(60) %}"
    "{% set x.s = x.s + x.s %}{% endfor %}",
    "power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "repeated": "{{ 'a' * 10 ** 12 }}",
    "deep": "{{ " + "(" * 4000 + "1" + ")" * 4000 + " }}",
    "broken": "{% for %}",
    "undefined": "{{ a.b.c }}",
    "raises": "{{ raise_exception('not today\n\x1b[31m') }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch hacked') }}",
    "frames": "{{ raise_exception.__globals__.os.system('touch hacked') }}",
    "include": "{% include '/etc/passwd' %}",
    "long": "x" * 200_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_survived(
    name: str, toy: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        rendered(ChatTemplate("x", HOSTILE[name]), CONVERSATIONS["a question"], toy)
    assert time.monotonic() - began < 12
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [HOSTILE["power"], HOSTILE["raises"]])
def test_check_survives_it_too(
    text: str, ask: Ask, tmp_path: Path, checkpoint: Callable[..., Path]
) -> None:
    folder = Path(shutil.copytree(checkpoint(Shape()), tmp_path / "m"))
    (folder / "chat_template.jinja").write_text(text + "ASSISTANT:")  # as llava-hf has it
    asked = ask("--check", "--model", folder, "-q")
    assert (asked.code, asked.err) == (0, "")
    assert "template: WARNING - not compared with llava-hf: " in asked.out
    assert "\x1b" not in asked.out


def test_without_jinja2_check_says_so(
    ask: Ask, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec

    def lacking(name: str, *arguments: Any) -> Any:
        return None if name == "jinja2" else found(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", lacking)
    asked = ask("--check", "--model", checkpoint(Shape()), "-q")
    assert asked.code == 0
    assert "not compared with llava-hf: jinja2 is not installed" in asked.out
