"""qwen.tiktoken as a `tokenizers` BPE, against tiktoken and its rule written out naively."""

import base64
import functools
import itertools
import json
import os
import random
import shutil
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import regex
import tiktoken

from bench.qwen_checkpoint import toy_tokens, write_tiktoken
from engine.errors import CheckpointError
from engine.prompts.rank_vocabulary import SPECIALS, special_ids
from engine.prompts.tokenizer import StreamDecoder, Tokenizer

PATTERN = regex.compile(
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
GROUNDING_TEXT = "<ref>the man</ref><box>(1,2),(3,4)</box>"


Encode = Callable[[str], list[int]]


def original(tokens: list[bytes]) -> Encode:
    """Tiktoken itself, built from the ranks: nothing is downloaded."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    made = tiktoken.Encoding(
        "qwen", pat_str=PATTERN.pattern, mergeable_ranks=ranks, special_tokens={}
    )
    return lambda text: made.encode_ordinary(unicodedata.normalize("NFC", text))


def naive(tokens: list[bytes]) -> Encode:
    """Tiktoken's rule: cut by the pattern, then join the pair of lowest rank until none is left."""
    ranks = {token: rank for rank, token in enumerate(tokens)}

    @functools.cache
    def piece(data: bytes) -> list[int]:
        if data in ranks:
            return [ranks[data]]
        parts = [bytes([byte]) for byte in data]
        while True:
            joins = [
                (ranks[a + b], n)
                for n, (a, b) in enumerate(itertools.pairwise(parts))
                if a + b in ranks
            ]
            if not joins:
                return [ranks[part] for part in parts]
            at = min(joins)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    def encode(text: str) -> list[int]:
        text = unicodedata.normalize("NFC", text)
        return [token for found in PATTERN.findall(text) for token in piece(found.encode())]

    return encode


def characters() -> list[str]:
    """Every code point but the surrogates, which no text holds."""
    return [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]


def random_strings(count: int, seed: int) -> Iterable[str]:
    """Words, spaces, digits, marks and characters from everywhere."""
    draw = random.Random(seed)
    pools = [
        "abcdefghij XYZ'",
        " \t\n\r\u00a0\u3000",
        "0123456789٣४",
        "'s't're've'm'll'D'S<|>_-.,!?()[]{}#",
        "你好世界这是什么图中有的",
        "éàüñ\u0301\u0308\u200d🎉👩🏽ßſK",
        "".join(map(chr, range(0x80, 0x600))),
    ]
    for _ in range(count):
        words = (
            "".join(draw.choices(draw.choice(pools), k=draw.randint(1, 6)))
            for _ in range(draw.randint(1, 6))
        )
        yield "".join(words)


def reference_file(name: str, file: str) -> Path:
    named = os.environ.get("AVL_REFERENCE_DATA")
    root = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    path = root / name / file
    if not path.is_file():
        pytest.skip(f"no published Qwen-VL vocabulary: {path} is absent (set AVL_REFERENCE_DATA)")
    return path


# A character behind and before others: a letter, a space, a digit, a new line, itself.
NEIGHBOURS = "a{0} {0}5{0}\n{0}{0}"


def compare_in_blocks(
    tokenizer: Tokenizer, expected: Encode, characters: list[str], form: str
) -> None:
    """Many characters per call; only a block that differs is looked at one by one."""
    for at in range(0, len(characters), 1024):
        block = characters[at : at + 1024]
        text = "|".join(map(form.format, block))
        if tokenizer.encode(text) != expected(text):
            for char in block:
                single = form.format(char)
                assert tokenizer.encode(single) == expected(single), hex(ord(char))
            pytest.fail(f"the block from {ord(block[0]):#x} differs as a whole")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("toy")
    write_tiktoken(folder / "qwen.tiktoken", toy_tokens())
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("rule", [naive, original])
def test_toy_vocabulary_encodes_as_tiktoken_does(
    rule: Callable[[list[bytes]], Encode], toy: Tokenizer
) -> None:
    expected = rule(toy_tokens())
    for text in random_strings(3000, seed=1):
        assert toy.encode(text) == expected(text), text
    assert len(expected("How many people are on the left?")) < 32  # merges do happen


@pytest.mark.parametrize(("rule", "every"), [(naive, 431), (original, 47)])
def test_toy_vocabulary_on_every_kind_of_character(
    rule: Callable[[list[bytes]], Encode], every: int, toy: Tokenizer
) -> None:
    compare_in_blocks(toy, rule(toy_tokens()), characters()[::every], NEIGHBOURS)


def test_special_tokens(toy: Tokenizer) -> None:
    ids = special_ids(346 + 214)
    assert ids["<|endoftext|>"] == 346
    assert [toy.token_id(token) for token in SPECIALS] == list(range(346, 346 + 217))
    assert (toy.bos_id, toy.eos_id, toy.vocab_size) == (None, 346, 563)
    assert [special_ids(151857)[name] for name in ("<|im_end|>", "<ref>", "<imgpad>")] == [
        151645,
        151851,
        151859,
    ]


@pytest.mark.parametrize("token", ["<|im_end|>", "<img>", "</img>", "<|extra_7|>"])
def test_typed_special_tokens_are_text(toy: Tokenizer, token: str) -> None:
    ids = toy.encode(f"a{token}b")
    assert max(ids) < 346
    assert toy.decode(ids) == f"a{token}b"
    assert toy.encode_with_specials(token) == [toy.token_id(token)]


def test_regions_are_kept_in_decoded_text_and_other_specials_are_not(toy: Tokenizer) -> None:
    ids = toy.encode_with_specials(f"<|im_start|>{GROUNDING_TEXT} 你好<img></img><|im_end|>")
    assert toy.decode(ids) == f"{GROUNDING_TEXT} 你好"
    decoder = StreamDecoder(toy)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == f"{GROUNDING_TEXT} 你好"


def test_built_tokenizer_is_kept_beside_the_vocabulary(tmp_path: Path, toy: Tokenizer) -> None:
    write_tiktoken(tmp_path / "qwen.tiktoken", toy_tokens(), newline="\r\n")
    Tokenizer.from_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qwen.tiktoken", "tokenizer.json"]
    (tmp_path / "qwen.tiktoken").unlink()
    again = Tokenizer.from_folder(tmp_path)
    for text in random_strings(200, seed=2):
        assert again.encode(text) == toy.encode(text)
    assert again.eos_id == toy.eos_id


def test_folder_that_cannot_be_written_to_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiktoken(tmp_path / "qwen.tiktoken", toy_tokens())

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert Tokenizer.from_folder(tmp_path).encode("a")
    assert [path.name for path in tmp_path.iterdir()] == ["qwen.tiktoken"]


def lines(*tokens: bytes) -> bytes:
    every = [bytes([byte]) for byte in range(256)] + list(tokens)
    return b"".join(base64.b64encode(t) + f" {n}\n".encode() for n, t in enumerate(every))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "256 single bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "line 1"),
        (lines() + b"YWI= x\n", "line 257"),
        (lines() + b"Y*I= 256\n", "line 257"),
        (lines() + b"YWI= 300\n", "count up"),
        (lines()[5:], "line 1|count up"),
        (lines(b"abc"), "no union"),
        (lines(b"ab", b"ab"), "count up"),
    ],
)
def test_damaged_vocabulary_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "qwen.tiktoken" in str(caught.value)
    assert not (tmp_path / "tokenizer.json").exists()


def test_ids_equal_the_original_tokenizer(tmp_path: Path) -> None:
    cases = json.loads(reference_file("qwen-vl-golden", "golden.json").read_text())
    shutil.copy(reference_file("qwen-vl-golden", "qwen.tiktoken"), tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    for token, number in cases["special_tokens"].items():
        assert tokenizer.token_id(token) == number
    plain = [case for case in cases["tokenizer_cases"] if "<img>" not in case["text"]]
    assert len(plain) == 6
    for case in plain:
        assert tokenizer.encode_with_specials(case["text"]) == case["ids"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Encode]:
    folder = tmp_path_factory.mktemp("published")
    path = Path(shutil.copy(reference_file("qwen-vl-chat", "qwen.tiktoken"), folder))
    tokens = [base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines()]
    return Tokenizer.from_folder(folder), original(tokens)


def test_published_vocabulary_on_random_strings(published: tuple[Tokenizer, Encode]) -> None:
    tokenizer, expected = published
    assert tokenizer.vocab_size == 151860
    assert tokenizer.encode("<|im_end|>") == [27, 91, 318, 6213, 91, 29]
    for text in random_strings(20_000, seed=3):
        assert tokenizer.encode(text) == expected(text), text


def test_published_vocabulary_on_every_character(published: tuple[Tokenizer, Encode]) -> None:
    compare_in_blocks(*published, characters(), " {0}")


@pytest.mark.slow
def test_published_vocabulary_on_every_character_among_others(
    published: tuple[Tokenizer, Encode],
) -> None:
    compare_in_blocks(*published, characters(), NEIGHBOURS)
