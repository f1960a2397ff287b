"""Read a vocabulary in tiktoken's format (qwen.tiktoken) into what a tokenizer.json holds.

Each line is a token's bytes in base64 and its rank, which is also its id. Tiktoken joins the
neighbours whose union has the lowest rank; ``tokenizers`` follows a ranked list of merges. The
merge of a token is the last pair left when its bytes are joined by tokens of lower rank alone, so
one turns into the other exactly: Qwen's 151,643 tokens are 256 bytes and 151,387 merges.
"""

import base64
import binascii
import itertools
import json
import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

# Qwen's special tokens, numbered on from the vocabulary in this order.
SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{number}|>" for number in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
)
# What an answer may say: regions of a picture. These stay in the text when ids are decoded.
GROUNDING = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")

# How Qwen cuts text before any merge; digits stand alone.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def special_ids(image_start: int) -> dict[str, int]:
    """Ids of all special tokens, from the one of ``<img>``: 151857 in the published models."""
    first = image_start - SPECIALS.index("<img>")
    return {token: first + number for number, token in enumerate(SPECIALS)}


def byte_alphabet() -> list[str]:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the others from U+0100 on.

    >>> byte_alphabet()[ord("a")], byte_alphabet()[ord(" ")]
    ('a', 'Ġ')
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable}
    spelled |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [spelled[byte] for byte in range(256)]


def read_tiktoken(path: Path) -> dict[str, Any]:
    """Read qwen.tiktoken into the dictionary that a tokenizer.json of the same model would hold.

    Raises ``CheckpointError`` naming the file and the line that is wrong.
    """
    ranks = _read_ranks(path)
    alphabet = byte_alphabet()
    spelled = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            pieces = split_below(token, rank, ranks)
            if len(pieces) != 2:
                raise CheckpointError(
                    f"{path}: token {rank} is no union of two tokens of lower rank",
                    hint="download the file again",
                )
            merges.append([spelled[piece] for piece in pieces])
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    return _as_tokenizer_json(vocabulary, merges)


def split_below(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """Join a token's bytes, lowest rank first and leftmost on ties, by tokens below ``rank``.

    >>> split_below(b"abc", 3, {b"a": 0, b"b": 1, b"c": 2, b"abc": 3, b"bc": 4})
    [b'a', b'b', b'c']
    """
    pieces = [token[at : at + 1] for at in range(len(token))]
    while len(pieces) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(pieces)]
        lowest = min(pairs)
        if lowest >= rank:
            break
        at = pairs.index(lowest)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def keep(description: dict[str, Any], path: Path) -> None:
    """Write tokenizer.json beside the vocabulary, so that it is built once only.

    A folder that cannot be written to is left as it is; a file is never seen half written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise CheckpointError(
                f"{path}: line {number} is not a token in base64 and its rank",
                hint="download the file again",
            ) from None
    if list(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{path}: ranks do not count up from 0", hint="download it again")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} single bytes have no token", hint="download the file again"
        )
    return ranks


def _as_tokenizer_json(vocabulary: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added: list[dict[str, Any]] = [
        {"id": number, "content": token, **flags, "special": token not in GROUNDING}
        for number, token in enumerate(SPECIALS, len(vocabulary))
    ]
    byte_level: dict[str, Any] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "use_regex": False,
    }
    byte_level |= {"trim_offsets": False}
    split: dict[str, Any] = {"type": "Split", "pattern": {"Regex": _PATTERN}}
    split |= {"behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
