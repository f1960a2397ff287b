"""Byte-pair tokenizer in the structure of the published LLaVA-1.5 tokenizer.json.

Every word of the questions, keys and sentences becomes one token. Digits and upper-case letters
never merge with each other, so printed values are read one character per token.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from training.fields import NAMES
from training.scene_questions import ask
from training.scenes import SceneStyle, place

SPACE = "▁"
SPECIALS = ("<unk>", "<s>", "</s>")
ROLES = ("USER:", "ASSISTANT:")
# Sentences of questions that a model may meet; unknown words fall apart into letters.
EXTRA = """Read all the text. Read the text. What does the page say? Which field says it? What is
the sum of these? Which is larger, smaller, higher, lower, more, less? What stands left of right of
above below next to between behind in front near the first second third last line? Describe the
picture image photo scene page document receipt form table sign in detail. What do you see? How much
is it? Please answer with a word or number. Who where when why which many how can not does it has
have there their this that these those and or with without on of for from by you your I we they he
she big small large tiny dark light colours colors objects shapes cars things text words letters
numbers Yes No Nothing None It This The There They Hello Thank hello thanks true false same
different biggest smallest wheel wheels window windows door roof sky ground background road street
tree sun what is are was were a an the to be as at into up down out inside outside truck bus person
people dog cat empty full show shows shown write written printed total price sum cheapest most
expensive payment paid pay cost costs key value label says said say"""


def _words() -> Counter[str]:
    """Words of all templates with their frequency; `▁` marks a preceding space."""
    rng = random.Random(0)
    texts = [EXTRA.replace("\n", " ")] * 3
    for _ in range(300):
        for q in ask(place(rng, SceneStyle()), rng):
            texts += [q.text, " " + q.answer]
    for name in [n for names in NAMES.values() for n in names]:
        texts += [f"What is the {name}?", name.capitalize(), " " + name.capitalize()] * 5
    found: Counter[str] = Counter()
    for text in texts:
        found.update(re.findall(r" ?[A-Z]?[a-z]+", text))
    return Counter({w.replace(" ", SPACE): n for w, n in found.items()})


def _allowed(left: str, right: str, whole: str) -> bool:
    """A capital joins only a finished lower-case rest; a space joins no lone capital."""
    if left[-1].isupper():
        return whole.endswith(left + right) and len(right) > 1
    return not (left == SPACE and right[0].isupper() and len(right) == 1)


def _learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until every word is one token."""
    split = {w: list(w) for w in sorted(words)}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for w, parts in split.items():
            for a, b in pairwise(parts):
                if _allowed(a, b, w):
                    pairs[a, b] += words[w]
        if not pairs:
            return merges
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        for parts in split.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [parts[i] + parts[i + 1]]
                i += 1


def _role_merges() -> list[tuple[str, str]]:
    """`▁USER:` and `▁ASSISTANT:` as one token, joined from the right so that names stay apart."""
    out = []
    for role in ROLES:
        tail = role[-1]
        for letter in reversed(SPACE + role[:-1]):
            out.append((letter, tail))
            tail = letter + tail
    return out


def added_token(token: str, index: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": token, **flags, "special": True}


def _pipeline() -> dict[str, Any]:
    """Everything around the BPE model, as in the published file."""
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first = [bos, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [
        {"SpecialToken": {"id": "<s>", "type_id": 1}},
        {"Sequence": {"id": "B", "type_id": 1}},
    ]
    to_space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first,
            "pair": first + second,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                to_space,
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    }


def build() -> dict[str, Any]:
    """The whole tokenizer.json as a dictionary; deterministic."""
    merges = _learn_merges(_words()) + _role_merges()
    pieces = list(SPECIALS) + [f"<0x{b:02X}>" for b in range(256)]
    merged = [a + b for a, b in merges]
    letters = [SPACE, *(chr(c) for c in range(33, 127))]
    pieces += list(dict.fromkeys(merged + letters))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    added = [added_token(t, i) for i, t in enumerate(SPECIALS)]
    added += [added_token("<image>", len(vocab)), added_token("<pad>", len(vocab) + 1)]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [list(m) for m in dict.fromkeys(merges)],
    }
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return {**head, **_pipeline(), "model": model}


def load(path: Path | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder's tokenizer.json, or a freshly trained one."""
    return Tokenizer.from_str(path.read_text(encoding="utf-8") if path else _fresh())


@cache
def _fresh() -> str:
    return json.dumps(build(), ensure_ascii=False)


def vocabulary_rows(tokenizer: Tokenizer) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple of 64."""
    return (tokenizer.get_vocab_size() + 63) // 64 * 64
