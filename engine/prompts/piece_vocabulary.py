"""Read a SentencePiece BPE model (tokenizer.model) without the sentencepiece package.

The file is a protocol buffer. Three of its fields matter: the pieces, the trainer's model type and
the normalizer's settings. SentencePiece joins the neighbours whose union has the highest score;
``tokenizers`` follows a ranked list of merges. Listing every way to split every piece, best score
first, turns one into the other exactly: for Llama's file it gives the published 61,249 merges.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError

# Piece types of sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_BPE = 2  # TrainerSpec.model_type

Value = int | bytes


class Piece(NamedTuple):
    """One vocabulary entry: its text (spaces are ▁), its score (higher merges first), its type."""

    text: str
    score: float
    type: int


def read_model(path: Path) -> dict[str, Any]:
    """Read tokenizer.model into the dictionary that a tokenizer.json of the same model holds.

    Raises ``CheckpointError`` naming the file if it is damaged or holds another kind of model.
    """
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [_piece(value) for number, value in fields if number == 1]
        trainer = _last(fields, 2)
        normalizer = _last(fields, 3)
    except (ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a SentencePiece model ({error})", hint="download the file again"
        ) from None
    if not pieces:
        raise CheckpointError(f"{path} holds no pieces", hint="download the file again")
    # The defaults are Llama's settings, for files that leave these out.
    if trainer.get(3, _BPE) != _BPE:
        raise CheckpointError(f"{path} is a Unigram model; only BPE models are supported")
    if normalizer.get(4, 0):
        raise CheckpointError(f"{path} removes extra spaces, which is not supported")
    return _as_tokenizer_json(pieces, space_in_front=bool(normalizer.get(3, 1)))


def merges_of(pieces: list[Piece]) -> list[tuple[str, str]]:
    """List every pair of pieces whose union is a piece, in the order SentencePiece prefers them.

    Best score of the union first; splits of one piece in the order of their two ids.
    """
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    ranked: list[tuple[float, tuple[str, str]]] = []
    for text, score, _ in pieces:
        splits = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        ranked.extend((score, pair) for pair in known)
    ranked.sort(key=lambda entry: -entry[0])  # stable: equal scores keep the order of the pieces
    return [pair for _, pair in ranked]


def _as_tokenizer_json(pieces: list[Piece], space_in_front: bool) -> dict[str, Any]:
    """Write the pipeline that transformers publishes for such models: ▁ for spaces, bytes last."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    unknown = next((piece.text for piece in pieces if piece.type == UNKNOWN), None)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(index, piece) for index, piece in _specials(pieces)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [prepend, replace] if space_in_front else [replace],
        },
        "pre_tokenizer": None,
        "post_processor": _add_bos(pieces),
        "decoder": {
            "type": "Sequence",
            "decoders": [*decoders, strip] if space_in_front else decoders,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.type == BYTE for piece in pieces),
            "ignore_merges": False,
            "vocab": {piece.text: index for index, piece in enumerate(pieces)},
            "merges": merges_of(pieces),
        },
    }


def _add_bos(pieces: list[Piece]) -> dict[str, Any] | None:
    """Put <s> in front of every text, as Llama does, if the model has such a control piece."""
    for index, piece in enumerate(pieces):
        if piece.type == CONTROL and piece.text == "<s>":
            bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
            single = [bos, {"Sequence": {"id": "A", "type_id": 0}}]
            tokens = {"<s>": {"id": "<s>", "ids": [index], "tokens": ["<s>"]}}
            return {
                "type": "TemplateProcessing",
                "single": single,
                "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": tokens,
            }
    return None


def _specials(pieces: list[Piece]) -> Iterator[tuple[int, Piece]]:
    for index, piece in enumerate(pieces):
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED):
            yield index, piece


def _added_token(index: int, piece: Piece) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": piece.text, **flags, "special": piece.type != USER_DEFINED}


def _piece(message: Value) -> Piece:
    fields = dict(_fields(_bytes(message)))
    if 1 not in fields:
        raise ValueError("a piece has no text")
    (score,) = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
    kind = fields.get(3, NORMAL)
    return Piece(_bytes(fields[1]).decode("utf-8"), score, kind if isinstance(kind, int) else -1)


def _last(fields: list[tuple[int, Value]], number: int) -> dict[int, Value]:
    """Return the fields of the last sub-message with this number; {} if there is none."""
    messages = [value for key, value in fields if key == number]
    return dict(_fields(_bytes(messages[-1]))) if messages else {}


def _bytes(value: Value) -> bytes:
    if isinstance(value, int):
        raise ValueError("a field has the wrong type")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Split a protocol buffer message into (field number, integer or raw bytes)."""
    offset = 0
    while offset < len(data):
        key, offset = _varint(data, offset)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, offset = _varint(data, offset)
            yield number, value
            continue
        if wire == 2:
            length, offset = _varint(data, offset)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"unknown wire type {wire}")
        if offset + length > len(data):
            raise ValueError("it ends too early")
        yield number, data[offset : offset + length]
        offset += length


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    """Read a base-128 number, lowest seven bits first; return it and the offset behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if offset >= len(data):
            raise ValueError("it ends too early")
        byte = data[offset]
        offset += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, offset
    raise ValueError("a number is too long")
