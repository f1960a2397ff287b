"""LLaVA over Llama 3: asked in the prompt of its own template, and ended by its own token."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.engine import Engine
from engine.loading.families import Wishes, recognise
from engine.options import make_options
from engine.prompts.prompt import build_prompt, continue_prompt, parse_messages
from engine.running.generation import Answer
from tests.llama3_checkpoint import write_llama3
from tests.noise import noise

QUESTION: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
]
TURNS = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    *QUESTION,
    {"role": "assistant", "content": [{"type": "text", "text": "A car."}]},
    {"role": "user", "content": [{"type": "text", "text": "Which <|eot_id|> colour?"}]},
]


@pytest.fixture(scope="module", params=[False, True], ids=["llava", "llava_next"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return write_llama3(tmp_path_factory.mktemp("llama3") / "m", patch, request.param)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.load(folder, device="cpu", cache="full")


@pytest.mark.parametrize("messages", [QUESTION, TURNS], ids=len)
def test_the_prompt_is_the_templates(
    messages: list[dict[str, Any]], folder: Path, engine: Engine
) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    wanted = processor.apply_chat_template(messages, add_generation_prompt=True)
    got = engine.render(messages, [noise(56, 56)])
    assert "<|begin_of_text|>" + got.text == wanted
    typed = "<|eot_id|> colour" in wanted
    if not typed:  # in a user's text a special token's spelling is text here
        made = processor(text=wanted, images=noise(56, 56), add_special_tokens=False)
        assert got.token_ids == made["input_ids"][0]
    eot = engine.tokenizer.token_id("<|eot_id|>")
    assert got.token_ids.count(eot) == wanted.count("<|eot_id|>") - typed


def test_a_later_turn_goes_on_as_the_whole_conversation(engine: Engine) -> None:
    image = engine.tokenizer.token_id("<image>")
    assert image is not None
    first = build_prompt(parse_messages(TURNS[:2], 1), "llama3", engine.tokenizer, image, [4])
    whole = build_prompt(parse_messages(TURNS, 1), "llama3", engine.tokenizer, image, [4])
    later = parse_messages(TURNS[3:])
    rest = continue_prompt(later, "llama3", engine.tokenizer, image, [], ended=False)
    answer = engine.tokenizer.encode("A car.")
    assert first.token_ids + answer + rest.token_ids == whole.token_ids


def test_the_closing_token_ends_an_answer_though_no_file_says_so(engine: Engine) -> None:
    for name in ("<|eot_id|>", "<|end_of_text|>"):
        answer = engine.answer(make_options(), [])
        token = engine.tokenizer.token_id(name)
        assert token is not None
        answer.take(token)
        assert (answer.finish, answer.token_ids) == ("stop", [])


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_stop_may_name_any_special_token(ignore_eos: bool, engine: Engine) -> None:
    options = make_options(stop=["<|start_header_id|>", "<|eot_id|>"], ignore_eos=ignore_eos)
    for name in options.stop:
        answer = Answer(engine.tokenizer, options, frozenset())
        answer.take(engine.tokenizer.encode("W")[0])
        token = engine.tokenizer.token_id(name)
        assert token is not None
        answer.take(token)
        assert (answer.finish, answer.text) == ("stop", "W")
    spelled = Answer(engine.tokenizer, options, frozenset())
    for token in engine.tokenizer.encode("is<|eot_id|>"):
        spelled.take(token)
    assert (spelled.finish, spelled.text) == ("stop", "is")


def test_without_a_template_the_tokenizer_tells(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert recognise(tmp_path).style == "llama3"
    assert recognise(tmp_path, Wishes("llava-hf")).style == "llava-hf"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "USER: ASSISTANT:"}')
    assert recognise(tmp_path).style in ("llava-hf", "llava-v1")


def test_an_answer_is_the_models(engine: Engine) -> None:
    """The ids of the prompt reach the model as they are: greedy tokens follow the exact logits."""
    prompt = engine.render("What is this?", [noise(56, 56)]).text
    scores = engine.logits(prompt, [noise(56, 56)], raw=True)
    result = engine.generate("What is this?", [noise(56, 56)], max_new_tokens=1, ignore_eos=True)
    assert result.token_ids == [int(torch.argmax(scores[-1]))]
