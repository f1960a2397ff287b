"""A small tokenizer with the structure of Llama's published one, for tests without its files.

Same pipeline as the real tokenizer.json: ▁ for spaces, BPE with byte fallback, BOS by a template,
special added tokens <image> and <pad> behind the vocabulary. `write_toy_tokenizer` writes the
tokenizer.json layout, `write_toy_sentencepiece` the tokenizer.model layout of the same vocabulary.
"""

import json
import struct
from pathlib import Path
from typing import Any

_WORDS = (
    "▁USER ▁ASSISTANT ▁What ▁What's ▁is ▁in ▁the ▁this ▁image ▁picture ▁car ▁red ▁colour ▁cat ▁a "
    "▁▁ ▁A ▁of ▁human ▁assistant ▁answers ▁question ▁they ▁here ▁Hello ▁world ing tion é 你好"
)
_LETTERS = "▁" + "".join(map(chr, range(33, 127))) + "\u00e9\u00fc\u4f60\u597d"


def toy_pieces() -> list[tuple[str, float, int]]:
    """Return (text, score, SentencePiece type) of every piece, in the order of their ids."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    joined = [word[:end] for word in _WORDS.split() for end in range(2, len(word) + 1)]
    for text in [*dict.fromkeys(joined), *_LETTERS]:
        pieces.append((text, -float(len(pieces) - 259), 1))
    return pieces


def toy_tokenizer_json() -> dict[str, Any]:
    """Return the content of the toy's tokenizer.json."""
    vocab = {text: index for index, (text, _, _) in enumerate(toy_pieces())}
    merges = [
        [text[:cut], text[cut:]]
        for text, _, kind in toy_pieces()
        if kind == 1
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    specials = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    ids = [0, 1, 2, len(vocab), len(vocab) + 1]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(*entry) for entry in zip(ids, specials, strict=True)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def write_toy_tokenizer(folder: Path) -> int:
    """Write tokenizer.json and tokenizer_config.json; return the number of token ids."""
    content = toy_tokenizer_json()
    _write(folder / "tokenizer.json", content)
    write_toy_config(folder)
    return len(content["model"]["vocab"]) + 2


def write_toy_config(folder: Path) -> None:
    """Write tokenizer_config.json as the published checkpoints have it."""
    content = toy_tokenizer_json()
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in content["added_tokens"]
        },
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 4096,
        "tokenizer_class": "LlamaTokenizer",
    }
    _write(folder / "tokenizer_config.json", config)


def write_toy_sentencepiece(folder: Path) -> None:
    """Write the same vocabulary as tokenizer.model."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(toy_pieces()))


def sentencepiece_model(pieces: list[tuple[str, float, int]], model_type: int = 2) -> bytes:
    """Encode pieces as the protocol buffer of a SentencePiece model (type 2 is BPE)."""
    body = b"".join(_message(1, _piece(*piece)) for piece in pieces)
    trainer = _number(3, model_type)
    normalizer = _message(1, b"identity") + _number(3, 1) + _number(4, 0)
    return body + _message(2, trainer) + _message(3, normalizer)


def _piece(text: str, score: float, kind: int) -> bytes:
    return (
        _message(1, text.encode())
        + _varint(2 << 3 | 5)
        + struct.pack("<f", score)
        + _number(3, kind)
    )


def _message(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    head, rest = value & 127, value >> 7
    return bytes([head | 128]) + _varint(rest) if rest else bytes([head])


def _added(index: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, **flags, "special": True}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
