"""Prompts by a checkpoint's own chat template: what it writes, and what it can never do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from bench.byte_level import byte_level
from engine.engine import Engine
from engine.errors import CheckpointError, OptionError
from engine.loading.families import Wishes, recognise
from engine.prompts import own_template
from engine.prompts.chat_template import ChatTemplate, TemplateError
from engine.prompts.messages import parse_messages
from engine.prompts.own_template import own_style
from engine.prompts.prompt import build_prompt, continue_prompt
from engine.prompts.templates import Style
from engine.prompts.tokenizer import Tokenizer
from tests.asking import Ask
from tests.checkpoints import Shape, edit_json
from tests.noise import noise
from tests.qwen_patches_checkpoint import KINDS, write_qwen_patches

# As Phi-3-V, Gemma and the tokenizer of a Llama 3 have them; the last takes texts for contents.
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% for c in m.content %}{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "<start_of_turn>{{ role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<image>{% else %}{{ c.text | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEXTS = (
    "{% for m in messages %}{{ '### ' + m.role + ': ' + (m['content'] | trim) + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}### assistant:{% endif %}"
)
# One that drops what a system message says.
USERS = PHI.replace("messages %}", "messages if m.role != 'system' %}", 1)
TEMPLATES = {"phi": PHI, "gemma": GEMMA, "texts": TEXTS}
SPECIALS = ("<image>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>")
GEMMAS = ("<bos>", "<start_of_turn>", "<end_of_turn>")


def library(*, swallow: bool = False) -> Library:
    specials = [
        AddedToken(token, normalized=False, rstrip=swallow and "|" in token)
        for token in (*SPECIALS, *GEMMAS)
    ]
    return byte_level("user assistant model What is in the picture?\n\n", 300, specials)


def tokenizer(*, swallow: bool = False) -> Tokenizer:
    named = {"eos_token": "<|endoftext|>", "bos_token": "<bos>"}
    return Tokenizer(json.loads(library(swallow=swallow).to_str()), named)


def style(name: str, *, swallow: bool = False) -> Style:
    template = ChatTemplate("chat_template.jinja", TEMPLATES.get(name, name))
    return own_style(template, tokenizer(swallow=swallow), "<image>")


def turn(role: str, *content: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return {"role": role, "content": parts}


PICTURE = {"type": "image"}
CONVERSATIONS = {
    "one": [turn("user", PICTURE, "What is it?")],
    "none": [turn("user", "  Who are you?\n")],
    "two": [turn("user", PICTURE, PICTURE, " Compare. ")],
    "later": [
        turn("user", PICTURE, "What?"),
        turn("assistant", "A cat."),
        turn("user", "Sure? "),
        turn("assistant", " Yes."),
        turn("user", "Why?"),
    ],
}


@pytest.mark.parametrize("swallow", [False, True])
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_are_those_of_the_whole_rendering(template: str, name: str, swallow: bool) -> None:
    """Rendered by transformers and encoded in one go, special tokens included."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages: Any = CONVERSATIONS[name]
    if template == "texts":
        plain = [[c.get("text", "<image>\n") for c in m["content"]] for m in messages]
        # Trimming is of what stands around all of a message's texts.
        messages = [{**m, "content": "".join(p)} for m, p in zip(messages, plain, strict=True)]
    (wanted,), _ = render_jinja_template(
        [messages], chat_template=TEMPLATES[template], add_generation_prompt=True,
        bos_token="<bos>", eos_token="<|endoftext|>",
    )  # fmt: skip
    parsed = parse_messages(CONVERSATIONS[name], wanted.count("<image>"))
    mine = tokenizer(swallow=swallow)
    counts = [1] * wanted.count("<image>")
    made = style(template, swallow=swallow)
    prompt = build_prompt(parsed, made, mine, mine.token_id("<image>") or 0, counts)
    assert prompt.token_ids == library(swallow=swallow).encode(wanted).ids
    assert prompt.image_count == len(counts)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_goes_on_as_the_whole_is_written(template: str) -> None:
    made, mine = style(template), tokenizer()
    start, answer, later = CONVERSATIONS["later"][:1], "A cat.", CONVERSATIONS["later"][2:3]
    begun = build_prompt(parse_messages(start, 1), made, mine, 256, [3])
    behind = continue_prompt(parse_messages(later, 0), made, mine, 256, [], ended=False)
    whole = [*start, turn("assistant", answer), *later]
    all_at_once = build_prompt(parse_messages(whole, 1), made, mine, 256, [3])
    joined = begun.text + answer + behind.text
    if template == "texts":  # here an answer begins without the space that histories have
        joined = begun.text + f" {answer}" + behind.text
    assert joined == all_at_once.text


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("typed", [*SPECIALS, *GEMMAS, "\ue0000\ue001", "\u2003", "{{ 7 * 7 }}"])
def test_what_users_type_stays_text(template: str, typed: str) -> None:
    made, mine = style(template), tokenizer()
    prompts = [
        build_prompt(parse_messages(f"a{text}b"), made, mine, 256, []) for text in (typed, "Hi")
    ]
    assert f"a{typed}b" in prompts[0].text
    special = [[t for t in p.token_ids if mine.piece(t) is None] for p in prompts]
    assert special[0] == special[1]
    assert [segment.kind for prompt in prompts for segment in prompt.segments] == ["text"] * 2


@pytest.mark.parametrize(
    ("template", "messages", "pictures", "says"),
    [
        ("gemma", [turn("system", "Be brief."), turn("user", "Hi")], 0, "System role not support"),
        (USERS, [turn("system", "Be brief."), turn("user", "Hi")], 0, "what the system says"),
        (PHI.replace("<image>", "<img>"), CONVERSATIONS["one"], 1, "0 places for 1 pictures"),
    ],
)
def test_what_a_template_leaves_out_is_refused(
    template: str, messages: Any, pictures: int, says: str
) -> None:
    made = style(template)
    parsed = parse_messages(messages, pictures)
    with pytest.raises(OptionError, match=says) as caught:
        build_prompt(parsed, made, tokenizer(), 256, [1] * pictures)
    assert "--style" in caught.value.hint


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}",
        "{% for m in messages | reverse %}{{ m.content[0].text }}{% endfor %}",
        "{% for m in messages %}{{ m.content[0].text * 2 }}{% endfor %}",
        "{% for m in messages %}{{ m.content[0].text | upper | replace('0', '1') }}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% for %}",
    ],
)
def test_what_no_style_can_be_made_of_is_refused_at_once(template: str) -> None:
    with pytest.raises(TemplateError):
        style(template)


def test_a_shape_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, mine = style("phi"), tokenizer()
    seen: list[Any] = []
    plain = own_template.rendered
    monkeypatch.setattr(own_template, "rendered", lambda *a: seen.append(a) or plain(*a))
    texts = [build_prompt(parse_messages(t), made, mine, 256, []).text for t in ("one", "other")]
    assert texts[0].replace("one", "other") == texts[1]
    assert len(seen) == 1


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Callable[..., Path]) -> Path:
    """A LLaVA whose template is none of ours; its tokenizer has no special tokens for it."""
    made = Path(shutil.copytree(checkpoint(Shape()), tmp_path / "m"))
    text = TEXTS.replace("(m['content'] | trim)", "(m['content'] | trim) + '</s>'")
    (made / "chat_template.jinja").write_text(text)
    return made


def test_a_checkpoint_is_asked_as_its_template_says(folder: Path, ask: Ask) -> None:
    assert recognise(folder).style == "template"
    assert recognise(folder, Wishes("llava-v1")).style == "llava-v1"
    engine = Engine.load(folder, device="cpu")
    assert engine.render("What?").text == "### user: What?</s>\n### assistant:"
    chat = engine.chat()
    chat.send("What?", max_new_tokens=3, ignore_eos=True)
    assert chat.send("Sure?", max_new_tokens=3, ignore_eos=True).token_ids
    checked = ask("--check", "--model", folder, "-q")
    assert checked.code == 0
    decides = "template: ok - chat_template.jinja decides the prompt; a prompt is '"
    assert decides + "### user: <image>" in checked.out


def test_a_published_style_stays_what_it_was(checkpoint: Callable[..., Path], ask: Ask) -> None:
    made = checkpoint(Shape())
    assert recognise(made).style == "llava-hf"
    asked = [
        Engine.load(made, device="cpu", style=name).render("What?").token_ids
        for name in ("llava-hf", "template")
    ]
    assert asked[0] == asked[1]
    assert "; a prompt is 'USER: <image>" in ask("--check", "--model", made, "-q").out


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_template_as_it_is_gives_the_same_prompts(kind: str, tmp_path: Path) -> None:
    """Marks around pictures are written once, whoever writes them."""
    folder, image = write_qwen_patches(tmp_path / "m", kind), noise(60, 80)
    turns = [*CONVERSATIONS["later"][:2], turn("user", PICTURE, "Sure?")]
    asked = [
        Engine.load(folder, device="cpu", style=name).render(turns, [image, image]).token_ids
        for name in (None, "template")
    ]
    assert asked[0] == asked[1]


def test_a_template_that_cannot_be_used_is_named(folder: Path, ask: Ask) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no \x1b[31m') }}")
    with pytest.raises(CheckpointError, match=r"jinja is not usable: .*no") as caught:
        Engine.load(folder, device="cpu")
    assert "--style" in caught.value.hint
    assert Engine.load(folder, device="cpu", style="llava-hf").render("What?")
    checked = ask("--check", "--model", folder, "-q")
    assert (checked.code, "\x1b" in checked.out + checked.err) == (4, False)
    (folder / "chat_template.jinja").unlink()
    edit_json(folder / "tokenizer_config.json", "chat_template")
    with pytest.raises(CheckpointError, match="no chat template"):
        Engine.load(folder, device="cpu", style="template")
