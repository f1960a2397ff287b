"""Prompts against the published ids, transformers' template and literal expected strings."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bench.toy_tokenizer import write_toy_sentencepiece
from engine.errors import OptionError
from engine.prompts.prompt import (
    Prompt,
    Segment,
    build_prompt,
    continue_prompt,
    parse_messages,
    raw_prompt,
)
from engine.prompts.tokenizer import Tokenizer

CANONICAL = (
    "1 3148 1001 29901 29871 32000 29871 13 "
    "5618 338 4318 297 445 1967 29973 319 1799 9047 13566 29901"
)
V1_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
SPELLINGS = ["<s>", "</s>", "<image>", "<pad>", "<unk>", "<|im_end|>", "<img>"]
Conversation = list[dict[str, Any]]


def user(text: str, images: int = 0) -> dict[str, Any]:
    return {"role": "user", "content": [*_images(images), {"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _images(count: int) -> list[dict[str, Any]]:
    return [{"type": "image"} for _ in range(count)]


def build(tokenizer: Tokenizer, conversation: Any, counts: list[int], style: str) -> Prompt:
    image_id = tokenizer.token_id("<image>")
    assert image_id is not None
    messages = parse_messages(conversation, len(counts))
    return build_prompt(messages, style, tokenizer, image_id, counts)


# --- rendering -----------------------------------------------------------------------------------

TURNS = [user("What are these?", images=1), assistant("Cats."), user("Sure?")]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("style", "conversation", "images", "expected"),
    [
        ("llava-hf", "Hi", 0, "USER: Hi ASSISTANT:"),
        ("llava-hf", "Hi", 2, "USER: <image>\n<image>\nHi ASSISTANT:"),
        (
            "llava-hf",
            TURNS,
            1,
            "USER: <image>\nWhat are these? ASSISTANT: Cats. USER: Sure? ASSISTANT:",
        ),
        ("llava-hf", [SYSTEM, user("Hi")], 0, "Be brief. USER: Hi ASSISTANT:"),
        ("llava-v1", "Hi", 1, f"{V1_SYSTEM} USER: <image>\nHi ASSISTANT:"),
        (
            "llava-v1",
            TURNS,
            1,
            f"{V1_SYSTEM} USER: <image>\nWhat are these? ASSISTANT: Cats.</s>"
            "USER: Sure? ASSISTANT:",
        ),
        ("llava-v1", [SYSTEM, user("Hi")], 0, "Be brief. USER: Hi ASSISTANT:"),
    ],
)
def test_rendered_text(
    toy: Tokenizer, style: str, conversation: Any, images: int, expected: str
) -> None:
    prompt = build(toy, conversation, [2] * images, style)
    assert prompt.text == expected
    assert prompt.image_count == images
    assert prompt.token_ids.count(1) == 1  # exactly one BOS
    assert prompt.token_ids[0] == 1
    assert prompt.token_ids.count(2) == expected.count("</s>")


def test_pictures_come_before_texts_wherever_they_stand(toy: Tokenizer) -> None:
    content = [{"type": "text", "text": "a"}, *_images(1), {"type": "text", "text": "b"}]
    prompt = build(toy, [{"role": "user", "content": content}], [1], "llava-hf")
    assert prompt.text == "USER: <image>\na b ASSISTANT:"


def test_segments_cover_the_prompt_and_name_each_picture(toy: Tokenizer) -> None:
    image_id = toy.token_id("<image>")
    first, second = len(toy.encode("USER: ")), len(toy.encode("\n"))
    prompt = build(toy, "Hi", [3, 2], "llava-hf")
    after = 1 + first + 3 + second + 2
    assert prompt.segments == (
        Segment("text", 0, 1 + first),
        Segment("image", 1 + first, 4 + first, 0),
        Segment("text", 4 + first, 4 + first + second),
        Segment("image", after - 2, after, 1),
        Segment("text", after, len(prompt.token_ids)),
    )
    for segment in prompt.segments:
        ids = set(prompt.token_ids[segment.start : segment.end])
        assert (ids == {image_id}) == (segment.kind == "image")


# --- the published ids ---------------------------------------------------------------------------


def test_canonical_prompt_has_the_published_ids(llava: Tokenizer) -> None:
    expected = list(map(int, CANONICAL.split()))
    prompt = build(llava, "What is shown in this image?", [1], "llava-hf")
    assert prompt.token_ids == expected
    assert raw_prompt(prompt.text, llava, 32000, [1]) == prompt
    many = build(llava, "What is shown in this image?", [576], "llava-hf")
    assert many.token_ids == expected[:5] + [32000] * 576 + expected[6:]


def random_conversation(rng: random.Random) -> Conversation:
    words = ["What", " is", "\nthis", "?", " 你好", "é", "  ", "USER:", "1.", " ASSISTANT:", "👍"]
    turns: Conversation = []
    if rng.random() < 0.3:
        turns.append({"role": "system", "content": [{"type": "text", "text": "Be brief."}]})
    for _ in range(rng.randint(1, 4)):
        texts = ["x" + "".join(rng.choices(words, k=rng.randint(1, 8))) for _ in range(2)]
        parts = [{"type": "text", "text": text} for text in texts[: rng.randint(1, 2)]]
        parts += _images(rng.choice([0, 0, 1, 2]))
        rng.shuffle(parts)
        turns += [{"role": "user", "content": parts}, assistant("".join(rng.choices(words, k=5)))]
    return turns[:-1]


def count_images(conversation: Conversation) -> int:
    return sum(part["type"] == "image" for turn in conversation for part in turn["content"])


def test_random_conversations_agree_with_transformers(llava: Tokenizer, llava_folder: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(llava_folder)
    template = json.loads((llava_folder / "chat_template.json").read_text())["chat_template"]
    rng = random.Random(7)
    for _ in range(60):
        conversation = random_conversation(rng)
        counts = [rng.randint(1, 5) for _ in range(count_images(conversation))]
        rendered = reference.apply_chat_template(
            conversation, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        prompt = build(llava, conversation, counts, "llava-hf")
        assert prompt.text == rendered
        # The processor repeats the image token in the text, then encodes all of it.
        repeats = iter(counts)
        parts = rendered.split("<image>")
        expanded = parts[0] + "".join("<image>" * next(repeats) + part for part in parts[1:])
        assert prompt.token_ids == reference(expanded)["input_ids"]
        assert raw_prompt(rendered, llava, 32000, counts).token_ids == prompt.token_ids


def test_processor_of_transformers_gives_the_same_ids(llava: Tokenizer, llava_folder: Path) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(llava_folder)
    conversation = [user("Which is larger?", images=2), assistant("The first."), user("Sure?")]
    prompt = build(llava, conversation, [576, 576], "llava-hf")
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    assert processor(text=prompt.text, images=pictures)["input_ids"] == [prompt.token_ids]


def original_ids(reference: Any, rendered: str) -> list[int]:
    """Encode as the original repository does: parts around <image>, BOS of later parts dropped."""
    chunks = [reference(chunk)["input_ids"] for chunk in rendered.split("<image>")]
    ids = list(chunks[0])
    for chunk in chunks[1:]:
        ids += [32000, *chunk[1:]]
    return ids


def test_original_style_agrees_with_the_original_encoding(
    llava: Tokenizer, llava_folder: Path
) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(llava_folder)
    for conversation in (TURNS, [*TURNS, assistant("Yes, two."), user("Where?")]):
        prompt = build(llava, conversation, [1], "llava-v1")
        assert prompt.token_ids == original_ids(reference, prompt.text)


# --- text stays text -----------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["llava-hf", "llava-v1"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_typed_specials_stay_text(toy: Tokenizer, style: str, spelling: str) -> None:
    evil = [user(f"{spelling}a{spelling}", images=1), assistant(f"b{spelling}"), user(spelling * 2)]
    good = [user("a", images=1), assistant("b"), user("c")]
    prompt, plain = build(toy, evil, [4], style), build(toy, good, [4], style)
    assert [id_ for id_ in prompt.token_ids if is_special(toy, id_)] == [
        id_ for id_ in plain.token_ids if is_special(toy, id_)
    ]
    assert [segment.kind for segment in prompt.segments] == ["text", "image", "text"]
    words = [id_ for id_ in prompt.token_ids if not is_special(toy, id_)]
    assert toy.decode(words).count(spelling) == 5


def is_special(tokenizer: Tokenizer, id_: int) -> bool:
    return id_ < 3 or id_ >= tokenizer.vocab_size - 2


texts = st.text(st.sampled_from(" aUSER:\n<image>/s你"), min_size=1, max_size=20).map("q{}".format)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    turns: Conversation = []
    for _ in range(draw(st.integers(1, 3))):
        turns += [user(draw(texts), images=draw(st.integers(0, 2))), assistant(draw(texts))]
    return turns[:-1]


@settings(max_examples=60, deadline=None)
@given(conversations(), st.sampled_from(["llava-hf", "llava-v1"]), st.integers(1, 9))
def test_structure_of_any_conversation(
    toy: Tokenizer, conversation: Conversation, style: str, size: int
) -> None:
    images = count_images(conversation)
    counts = [size + number for number in range(images)]
    prompt = build(toy, conversation, counts, style)
    pictures = [segment for segment in prompt.segments if segment.kind == "image"]
    assert [segment.image for segment in pictures] == list(range(images))
    assert [segment.end - segment.start for segment in pictures] == counts
    edges = [0, *(segment.end for segment in prompt.segments)]
    assert [segment.start for segment in prompt.segments] == edges[:-1]
    assert edges[-1] == len(prompt.token_ids)
    assert prompt.token_ids.count(toy.token_id("<image>")) == sum(counts)
    assert prompt.token_ids.count(1) == 1


# --- later turns ---------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["llava-hf", "llava-v1"])
@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("images", [0, 2])
def test_continuation_is_the_rest_of_the_whole_conversation(
    llava: Tokenizer, style: str, ended: bool, images: int
) -> None:
    start, answer = [user("What are these?", images=1)], "Two cats on a sofa."
    later = [user("Are you sure? 你", images=images)]
    first = build(llava, start, [5], style)
    counts = [3, 4][:images]
    whole = build(llava, [*start, assistant(answer), *later], [5, *counts], style)
    answer_ids = llava.encode(answer)
    if style == "llava-v1" and ended:
        answer_ids.append(2)
    messages = parse_messages(later, images)
    rest = continue_prompt(messages, style, llava, 32000, counts, ended=ended)
    assert first.token_ids + answer_ids + rest.token_ids == whole.token_ids
    assert [segment.image for segment in rest.segments if segment.kind == "image"] == list(
        range(images)
    )


def test_original_style_takes_no_system_message_later(toy: Tokenizer) -> None:
    messages = parse_messages([SYSTEM, user("Hi")])
    with pytest.raises(OptionError, match="start of the conversation"):
        continue_prompt(messages, "llava-v1", toy, 5, [], ended=True)


# --- raw prompts ---------------------------------------------------------------------------------


def test_raw_prompt_is_verbatim(toy: Tokenizer) -> None:
    image_id = toy.token_id("<image>")
    prompt = raw_prompt("What<image>\n<image></s>", toy, image_id, [2, 1])
    body = [image_id, image_id, *toy.encode("\n"), image_id, 2]
    assert prompt.token_ids == [1, *toy.encode("What"), *body]
    assert [segment.image for segment in prompt.segments] == [-1, 0, -1, 1, -1]
    assert prompt.text == "What<image>\n<image></s>"


def test_a_raw_prompt_that_begins_with_bos_gets_no_second_one(toy: Tokenizer) -> None:
    image_id = toy.token_id("<image>")
    for text in ("<s>USER: <image>\nHi", "USER: <image>\nHi"):
        ids = raw_prompt(text, toy, image_id, [1]).token_ids
        assert ids == [1, *toy.encode("USER: "), image_id, *toy.encode("\nHi")]
    assert raw_prompt("<s><image>", toy, 7, [1]).token_ids == [1, 7]
    assert raw_prompt("<s><s>x", toy, 7, []).token_ids == [1, 1, *toy.encode("x")]  # as written


def test_marks_stand_around_every_picture(tmp_path: Path) -> None:
    """run_llava.py of the original repository, where mm_use_im_start_end is true."""
    write_toy_sentencepiece(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path, ("<im_start>", "<im_end>"))
    start, end = (tokenizer.token_id(token) for token in ("<im_start>", "<im_end>"))
    messages, marks = parse_messages("Hi <im_end>", 2), ("<im_start>", "<im_end>")
    prompt = build_prompt(messages, "llava-v1", tokenizer, 9999, [2, 1], image_marks=marks)
    place = "<im_start><image><im_end>\n"
    assert prompt.text == f"{V1_SYSTEM} USER: {place}{place}Hi <im_end> ASSISTANT:"
    first = prompt.token_ids.index(9999)
    assert prompt.token_ids[first - 1 : first + 3] == [start, 9999, 9999, end]
    assert prompt.token_ids.count(start) == prompt.token_ids.count(end) == 2
    later = continue_prompt(
        messages, "llava-v1", tokenizer, 9999, [2, 1], ended=True, image_marks=marks
    )
    assert later.text == f"USER: {place}{place}Hi <im_end> ASSISTANT:"


def test_raw_prompt_may_start_with_a_picture(toy: Tokenizer) -> None:
    prompt = raw_prompt("<image><image>", toy, 7, [1, 2])
    assert prompt.token_ids == [1, 7, 7, 7]
    assert prompt.segments == (
        Segment("text", 0, 1),
        Segment("image", 1, 2, 0),
        Segment("image", 2, 4, 1),
    )


# --- what is refused -----------------------------------------------------------------------------

PICTURE = {"type": "image"}


@pytest.mark.parametrize(
    ("prompt", "images", "words"),
    [
        ("", 0, "empty"),
        (" \n\t ", 1, "empty"),
        ([], 0, "neither text nor a list"),
        (None, 0, "neither text nor a list"),
        (3, 0, "neither text nor a list"),
        ({"role": "user", "content": "Hi"}, 0, "neither text nor a list"),
        (["Hi"], 0, "message 1 is not an object"),
        ([{"role": "user"}], 0, "message 1 is not an object"),
        ([user("a"), {"role": "robot", "content": "b"}], 0, "message 2 has the unknown role"),
        ([{"role": ["user"], "content": "b"}], 0, "unknown role"),
        ([{"role": "user", "content": 3}], 0, "neither text nor a list of entries"),
        ([{"role": "user", "content": None}], 0, "neither text nor a list of entries"),
        ([{"role": "user", "content": b"Hi"}], 0, "neither text nor a list of entries"),
        ([{"role": "user", "content": [{"type": "audio"}]}], 0, "unknown kind"),
        ([{"role": "user", "content": [{"type": "video"}]}], 0, "names its video inside"),
        ([{"role": "user", "content": [{"type": "text"}]}], 0, "unknown kind"),
        ([{"role": "user", "content": ["Hi"]}], 0, "unknown kind"),
        ([{"role": "user", "content": [{"type": "image", "path": "a"}]}], 0, "inside the message"),
        ([{"role": "system", "content": [PICTURE]}, user("Hi")], 1, "system.* holds a picture"),
        ([user("Hi"), assistant("yes"), user("  ")], 0, "message 3 .* is empty"),
        ([{"role": "user", "content": [PICTURE]}], 1, "no text from the user"),
        ([assistant("Hi")], 0, "no text from the user"),
        ([user("Hi", images=2)], 3, "places for 2 pictures, but 3 are given"),
        ([user("Hi")], 1, "places for 0 pictures, but 1 are given"),
    ],
)
def test_bad_prompts_are_refused(prompt: Any, images: int, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse_messages(prompt, images)


def test_other_refusals(toy: Tokenizer) -> None:
    messages = parse_messages("Hi", 1)
    with pytest.raises(OptionError, match="places for 1 pictures, but 2 are given"):
        build_prompt(messages, "llava-hf", toy, 5, [1, 1])
    with pytest.raises(OptionError, match="places for 1 pictures, but 0 are given"):
        raw_prompt("a<image>", toy, 5, [])
    with pytest.raises(OptionError, match="unknown prompt style 'x'") as caught:
        build_prompt(messages, "x", toy, 5, [1])
    assert "llava-hf" in caught.value.hint


def test_hard_characters_are_encoded(toy: Tokenizer) -> None:
    prompt = build(toy, "a\0b \ud800 \u202e", [], "llava-hf")
    assert toy.decode(prompt.token_ids) == "USER: a\0b \ufffd \u202e ASSISTANT:"
