"""The tokenizer against the published pipeline, SentencePiece's own rule, and transformers."""

import contextlib
import functools
import itertools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.toy_tokenizer import (
    sentencepiece_model,
    toy_pieces,
    toy_tokenizer_json,
    write_toy_config,
    write_toy_sentencepiece,
)
from engine.errors import CheckpointError
from engine.prompts.messages import ImagePlace, Message
from engine.prompts.piece_vocabulary import Piece, merges_of, read_model
from engine.prompts.templates import STYLES, Special
from engine.prompts.tokenizer import STRUCTURE, StreamDecoder, Tokenizer

SPELLINGS = ["<unk>", "<s>", "</s>", "<image>", "<pad>", "<0x0A>"]
TEXTS = [
    "",
    " ",
    "What is in the picture?",
    "  two  spaces ",
    "line\nline\r\n\ttab",
    "naïve café 你好 您 👩‍👩‍👧 e\u0301 ก็ 𓂀",
    "a\0b\x1b[31m\u202eright",
]

# Few distinct ids, so that every neighbourhood occurs: specials, bytes of 你, spaces, words, none.
SOME_IDS = [0, 1, 2, 3 + 0xE4, 3 + 0xBD, 3 + 0xA0, 3 + 0x41, 259, 260, 270, 300, 301, 420, 9999]


def naive_sentencepiece(text: str) -> list[int]:
    """Encode by SentencePiece's definition: merge the best-scored neighbours, leftmost first."""
    pieces = toy_pieces()
    ids = {piece[0]: index for index, piece in enumerate(pieces)}
    mergeable = {piece[0]: piece[1] for piece in pieces if piece[2] == 1}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        unions = [first + second for first, second in itertools.pairwise(symbols)]
        scored = [(-mergeable[union], at) for at, union in enumerate(unions) if union in mergeable]
        if not scored:
            break
        at = min(scored)[1]
        symbols[at : at + 2] = [unions[at]]
    encoded: list[int] = []
    for symbol in symbols:
        encoded += [ids[symbol]] if symbol in ids else [byte + 3 for byte in symbol.encode()]
    return encoded


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from(" USERANTWhatisthepcrégd'你好x?\n𓂀"), max_size=60))
def test_tokenizer_model_encodes_by_sentencepieces_own_rule(text: str) -> None:
    assert _from_model().encode(text) == naive_sentencepiece(text)


@functools.cache
def _from_model() -> Tokenizer:
    with tempfile.TemporaryDirectory() as name:
        write_toy_sentencepiece(Path(name))
        return Tokenizer.from_folder(Path(name))


def test_merges_follow_scores_then_ids() -> None:
    pieces = [
        Piece(text, score, 1)
        for text, score in [("ab", -1.0), ("a", -5.0), ("b", -6.0), ("bb", 0.0), ("abb", -2.0)]
    ]
    expected = [("b", "b"), ("a", "b"), ("ab", "b"), ("a", "bb")]
    assert merges_of(pieces) == expected


def test_tokenizer_model_alone_knows_bos_and_special_tokens(tmp_path: Path) -> None:
    write_toy_sentencepiece(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.token_id("<image>") is None
    assert tokenizer.encode_with_specials("</s>") == [1, 2]


def test_config_adds_the_special_tokens_that_the_model_file_lacks(tmp_path: Path) -> None:
    write_toy_sentencepiece(tmp_path)
    write_toy_config(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.token_id("<image>") == len(toy_pieces())
    assert tokenizer.encode_with_specials("<image>") == [1, len(toy_pieces())]
    assert tokenizer.vocab_size == len(toy_pieces()) + 2


def test_added_tokens_file_is_read(tmp_path: Path) -> None:
    write_toy_sentencepiece(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": len(toy_pieces())}))
    assert Tokenizer.from_folder(tmp_path).token_id("<image>") == len(toy_pieces())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_typed_special_tokens_stay_text(toy: Tokenizer, spelling: str) -> None:
    special = {toy.token_id(name) for name in ("<unk>", "<s>", "</s>", "<image>", "<pad>")}
    for text in (spelling, f"a{spelling}b", f" {spelling * 3}\n", spelling + "<image>"):
        ids = toy.encode(text)
        assert not special & set(ids)
        assert toy.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*SPELLINGS, " ", "<", "s", ">", "/", "x", "你"]), max_size=12))
def test_no_text_at_all_reaches_a_special_id(parts: list[str]) -> None:
    text = "".join(parts)
    ids = _from_model().encode(text)
    assert all(id_ >= 3 for id_ in ids)
    assert _from_model().decode(ids) == text


def test_a_merge_that_spells_a_special_token_is_not_used(tmp_path: Path) -> None:
    content = toy_tokenizer_json()
    content["model"]["vocab"]["</s"] = len(content["model"]["vocab"])
    content["model"]["vocab"]["</"] = len(content["model"]["vocab"])
    content["added_tokens"] = content["added_tokens"][:3]
    content["model"]["merges"] += [["<", "/"], ["</", "s"], ["</s", ">"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert 2 not in tokenizer.encode("x</s>")
    assert content["model"]["vocab"]["</s"] in tokenizer.encode("x</s>")


def test_added_tokens_that_are_not_special_are_words(tmp_path: Path) -> None:
    content = toy_tokenizer_json()
    count = len(content["model"]["vocab"])
    content["added_tokens"].append(content["added_tokens"][3] | {"id": count + 2, "content": "<x>"})
    content["added_tokens"][-1]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_folder(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = library.encode("a <x></s>b").ids
    assert count + 2 in ids
    assert tokenizer.encode_with_specials("a <x></s>b") == ids
    assert tokenizer.decode(ids) == library.decode(ids) == "a <x> b"
    assert tokenizer.token_id("<x>") == count + 2
    assert tokenizer.encode("a <x>") == library.encode("a <x>", add_special_tokens=False).ids
    assert tokenizer.vocab_size == count + 3


# Words of extended vocabularies, under every combination of flags that a tokenizer can give them.
WORDS = ["[SEG]", "<loc_7>", "<loc_77>", "▁new", "two words", "é", "你", "USER", "##"]
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
TYPED = [*WORDS, *SPELLINGS, " ", "  ", "\n", "a", "loc_7>", "What", "?", "x"]


def extended(seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    first = len(toy_pieces()) + 2
    fresh = [word for word in WORDS if word not in {piece[0] for piece in toy_pieces()}]
    return [
        {"id": first + number, "content": word, "special": False}
        | {flag: rng.random() < 0.4 for flag in FLAGS}
        for number, word in enumerate(fresh)
    ]


def write_extended(folder: Path, layout: str, seed: int) -> None:
    write_toy_config(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    words = extended(seed)
    config["added_tokens_decoder"] |= {
        str(token["id"]): {key: token[key] for key in token if key != "id"} for token in words
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if layout == "tokenizer.json":
        content = toy_tokenizer_json()
        content["added_tokens"] += words
        (folder / "tokenizer.json").write_text(json.dumps(content))
    else:
        write_toy_sentencepiece(folder)


@pytest.mark.parametrize("layout", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("seed", range(8))
def test_words_of_an_extended_vocabulary_are_transformers_ids(
    seed: int, layout: str, tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    write_extended(tmp_path, layout, seed)
    tokenizer, words = Tokenizer.from_folder(tmp_path), extended(seed)
    if layout == "tokenizer.model":  # where words are found as they are typed
        words = [token | {"normalized": False} for token in words]
    content = toy_tokenizer_json()
    content["added_tokens"] += words
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    oracle = PreTrainedTokenizerFast(tokenizer_object=library)
    special = {0, 1, 2, len(toy_pieces()), len(toy_pieces()) + 1}
    rng, seen = random.Random(1000 + seed), set()
    for _ in range(150):
        text = "".join(rng.choices(TYPED, k=rng.randint(0, 9)))
        ids = tokenizer.encode(text)
        assert not special & set(ids)
        if not any(spelling in text for spelling in SPELLINGS):
            assert ids == oracle(text, add_special_tokens=False)["input_ids"], text
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)
        seen |= set(ids)
    assert len(seen & {token["id"] for token in words}) >= 4


@pytest.mark.parametrize("layout", ["tokenizer.json", "tokenizer.model"])
def test_answers_show_words_of_an_extended_vocabulary(layout: str, tmp_path: Path) -> None:
    write_extended(tmp_path, layout, seed=3)
    tokenizer, rng = Tokenizer.from_folder(tmp_path), random.Random(7)
    for token in extended(3):
        if "▁" not in token["content"]:
            shown = tokenizer.decode([*tokenizer.encode("A"), token["id"]])
            assert shown == f"A{token['content']}"
    for _ in range(300):
        ids = [rng.choice([*SOME_IDS, *range(455, 475)]) for _ in range(rng.randint(0, 12))]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_tokens_without_flags_are_words_unless_they_give_structure(tmp_path: Path) -> None:
    """added_tokens.json says no more than ids: transformers takes them for words."""
    write_toy_sentencepiece(tmp_path)
    first = len(toy_pieces())
    named = {"[SEG]": first, "<im_start>": first + 1, "[OWN]": first + 2, "[ROLE]": first + 3}
    (tmp_path / "added_tokens.json").write_text(json.dumps(named))
    roles = {"additional_special_tokens": ["[OWN]"], "cls_token": {"content": "[ROLE]"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(roles))
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("x [SEG] [OWN] [ROLE] <im_start>")
    assert {id_ for id_ in ids if id_ >= first} == {first}
    assert tokenizer.decode([first, first + 1, first + 2, first + 3]) == "[SEG]"


def test_structure_stays_special_whatever_a_file_says(tmp_path: Path) -> None:
    """Some published vocabularies list ChatML's tokens as ordinary words."""
    content = toy_tokenizer_json()
    first = len(toy_pieces()) + 2
    named = sorted(STRUCTURE - {token["content"] for token in content["added_tokens"]})
    plain = content["added_tokens"][3] | {"special": False}
    content["added_tokens"] += [
        plain | {"id": first + number, "content": token} for number, token in enumerate(named)
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_folder(tmp_path)
    for token in STRUCTURE:
        id_ = tokenizer.token_id(token)
        assert id_ not in tokenizer.encode(f"a{token} {token}")
        assert tokenizer.special_id(token) == id_
        assert tokenizer.encode_with_specials(token, bos=False) == [id_]


def test_every_token_that_a_style_places_gives_structure() -> None:
    turns = [Message("user", ("Hi", ImagePlace(0))), Message("assistant", ("Yes",))]
    for style in STYLES.values():
        pieces = [*style.opening([*turns, turns[0]]), *style.turns(turns), Special(style.closing)]
        placed = {piece.token for piece in pieces if isinstance(piece, Special)} - {""}
        assert placed <= STRUCTURE


def test_tokens_that_no_file_names_are_numbered_on(tmp_path: Path) -> None:
    write_toy_sentencepiece(tmp_path)
    first = len(toy_pieces())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<im_start>": first}))
    tokenizer = Tokenizer.from_folder(tmp_path, ("<im_patch>", "<im_start>", "<im_end>", "<s>"))
    ids = [tokenizer.token_id(token) for token in ("<im_start>", "<im_patch>", "<im_end>", "<s>")]
    assert ids == [first, first + 1, first + 2, 1]
    assert tokenizer.decode(ids) == ""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(SOME_IDS) | st.integers(0, 500), max_size=20))
def test_decoding_is_the_librarys(toy: Tokenizer, ids: list[int]) -> None:
    assert toy.decode(ids) == _library().decode(ids, skip_special_tokens=True)


@functools.cache
def _library() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(toy_tokenizer_json()))


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_a_round_trip(toy: Tokenizer, text: str) -> None:
    assert toy.decode(toy.encode(text)) == text


def test_lone_surrogates_become_the_replacement_character(toy: Tokenizer) -> None:
    assert toy.decode(toy.encode("a\ud800b\udc00")) == "a\ufffdb\ufffd"
    assert toy.decode(toy.encode("\ud83d\ude00")) == "😀"
    assert toy.encode_with_specials("\udfff")[0] == toy.bos_id


def test_specials_are_special_in_raw_text_and_left_out_of_decoded_text(toy: Tokenizer) -> None:
    image = toy.token_id("<image>")
    ids = toy.encode_with_specials("<image>What</s>")
    assert ids == [1, image, *toy.encode("What"), 2]
    assert toy.encode_with_specials("What", bos=False) == toy.encode("What")
    assert toy.decode([*ids, toy.vocab_size + 7]) == "What"


# --- streaming -----------------------------------------------------------------------------------


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*map(decoder.push, ids), decoder.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_stream_joins_to_the_text(toy: Tokenizer, text: str) -> None:
    pieces = stream(toy, toy.encode(text))
    assert "".join(pieces) == text
    assert all(piece.isprintable() or "\ufffd" not in piece for piece in pieces)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(SOME_IDS) | st.integers(0, 500), max_size=40))
def test_stream_of_any_ids_joins_to_their_decoding(ids: list[int]) -> None:
    tokenizer = _from_model()
    decoder, shown = StreamDecoder(tokenizer), ""
    for position, token in enumerate(ids):
        shown += decoder.push(token)
        so_far = ids[: position + 1]
        assert tokenizer.decode(ids).startswith(shown)
        if not any(3 <= id_ < 259 for id_ in so_far):
            assert shown == tokenizer.decode(so_far)  # without bytes nothing is held back
    assert shown + decoder.flush() == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_stream_never_takes_text_back(text: str) -> None:
    tokenizer = _from_model()
    ids = tokenizer.encode(text)
    decoder, shown = StreamDecoder(tokenizer), ""
    for token in ids:
        shown += decoder.push(token)
        assert tokenizer.decode(ids).startswith(shown)


def byte_level_tokenizer() -> Tokenizer:
    """A tokenizer whose tokens are single bytes in GPT-2's spelling, as Qwen's are longer runs."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": 256, "content": "<|im_end|>", **flags, "special": True}]
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    parts = {"pre_tokenizer": {**byte_level, "trim_offsets": False}}
    decoder = {**byte_level, "trim_offsets": False}
    return Tokenizer({"added_tokens": added, **parts, "decoder": decoder, "model": model}, {})


BYTE_LEVEL = byte_level_tokenizer()


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=40), st.text(max_size=20).map(str.encode)))
def test_byte_level_stream_is_the_decoding_and_splits_no_character(data: bytes) -> None:
    alphabet = {bytes_: char for char, bytes_ in _spelling_of_bytes().items()}
    ids = [BYTE_LEVEL.token_id(alphabet[byte]) for byte in data]
    ids = [id_ for id_ in ids if id_ is not None]
    assert len(ids) == len(data)
    assert BYTE_LEVEL.bos_id is None
    assert BYTE_LEVEL.is_byte_level
    pieces = stream(BYTE_LEVEL, [256, *ids, 256])
    assert "".join(pieces) == BYTE_LEVEL.decode(ids) == data.decode("utf-8", "replace")


@functools.cache
def _spelling_of_bytes() -> dict[str, int]:
    """Find GPT-2's spelling of each byte from the library: encode every byte in a valid text."""
    spelling: dict[str, int] = {}
    pre = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for code in [*range(128), *range(128, 0x800), *range(0x800, 0x10FFFF, 0x800)]:
        if 0xD800 <= code < 0xE000:
            continue
        for char, byte in zip(
            pre.pre_tokenize_str(chr(code))[0][0], chr(code).encode(), strict=True
        ):
            spelling[char] = byte
    missing = sorted(set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) - set(spelling))
    never_in_utf8 = [byte for byte in range(256) if byte not in spelling.values()]
    return spelling | dict(zip(missing, never_in_utf8, strict=True))


def test_streaming_cost_does_not_grow(toy: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    original = Tokenizer.decode

    def counted(self: Tokenizer, ids: list[int]) -> str:
        decoded.append(len(ids))
        return original(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    ids = toy.encode("What is in the picture? 𓂀 " * 50)
    stream(toy, ids)
    assert sum(decoded) <= 3 * len(ids)


# --- files that are missing or wrong -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", b"{", "not valid JSON"),
        ("tokenizer.json", b"\xff\xfe", "not valid JSON"),
        ("tokenizer.json", b"[]", "JSON object"),
        ("tokenizer.json", b"{}", "not a usable tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": 3}}', "not a usable tokenizer"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        ("tokenizer.model", b"", "holds no pieces"),
        ("tokenizer.model", b"\x0a\xff", "not a SentencePiece model"),
        ("tokenizer.model", b"\x0a\x00", "a piece has no text"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "not a SentencePiece"),
        ("tokenizer.model", sentencepiece_model(toy_pieces(), model_type=1), "Unigram"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        Tokenizer.from_folder(tmp_path)
    assert name in str(caught.value)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)


def test_special_token_with_another_id_is_refused(tmp_path: Path) -> None:
    write_toy_sentencepiece(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<image>": 99999}')
    with pytest.raises(CheckpointError, match=r"<image>.* should be 99999"):
        Tokenizer.from_folder(tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2000))
def test_any_bytes_as_tokenizer_model_raise_our_error_only(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int
) -> None:
    folder = tmp_path_factory.mktemp("junk")
    good = sentencepiece_model(toy_pieces()[:40])
    (folder / "tokenizer.model").write_bytes(good[:at] + junk)
    with contextlib.suppress(CheckpointError):
        Tokenizer.from_folder(folder)


# --- the published files -------------------------------------------------------------------------


def _llama_score(text: str, id_: int) -> float:
    """Llama's scores: 0 for control pieces and bytes, lowest for runs of spaces, else -rank."""
    return -1e9 if set(text) == {"▁"} else -float(max(0, id_ - 259))


def test_scores_give_the_published_merges(llava_folder: Path) -> None:
    content = json.loads((llava_folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = content["model"]["vocab"]
    pieces = [Piece(text, _llama_score(text, ids[text]), 1) for text in sorted(ids, key=ids.get)]
    published = [tuple(pair) for pair in content["model"]["merges"]]
    assert len(published) == 61249
    assert merges_of(pieces) == published


def test_model_file_gives_the_published_pipeline(llava_folder: Path, tmp_path: Path) -> None:
    content = json.loads((llava_folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = content["model"]["vocab"]
    kinds = {0: 2, 1: 3, 2: 3} | dict.fromkeys(range(3, 259), 6)
    pieces = [
        (text, _llama_score(text, ids[text]), kinds.get(ids[text], 1))
        for text in sorted(ids, key=ids.get)
    ]
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    built = read_model(tmp_path / "tokenizer.model")
    for key in ("normalizer", "pre_tokenizer", "decoder"):
        assert built[key] == content[key]
    assert built["post_processor"]["single"] == content["post_processor"]["single"]
    built["model"]["merges"] = [list(pair) for pair in built["model"]["merges"]]
    assert built["model"] == content["model"]
    assert built["added_tokens"] == content["added_tokens"][:3]


def test_published_tokenizer_agrees_with_transformers(llava: Tokenizer, llava_folder: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(llava_folder)
    assert (llava.bos_id, llava.eos_id, llava.vocab_size) == (1, 2, 32002)
    assert llava.token_id("<image>") == 32000
    rng = random.Random(3)
    alphabet = [*"abc dé\n.,:USER?!0你好👍\u0301𓂀\t", "  ", "<image>", "</s>", "ASSISTANT"]
    for text in [*TEXTS[1:], *("".join(rng.choices(alphabet, k=20)) for _ in range(100))]:
        ids = reference(text)["input_ids"]
        assert llava.encode_with_specials(text) == ids
        assert llava.decode(ids) == reference.decode(ids, skip_special_tokens=True)
        assert "".join(stream(llava, ids)) == llava.decode(ids)
        plain = text.replace("<image>", "").replace("</s>", "")
        assert llava.encode(plain) == reference(plain, add_special_tokens=False)["input_ids"]
