"""The tokenizer of `weights/cross`: tiny's pieces under their numbers, behind them Llama 3's
special tokens, and no space put in front of a text.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import Tokenizer

from training.tokenizer import SPACE, added_token, build

ROWS = 1088  # of the head; <|image|> is the first id behind them
NAMED = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)
IMAGE = "<|image|>"


def build_cross() -> dict[str, Any]:
    """The whole tokenizer.json as a dictionary; deterministic."""
    made = build()
    pieces = len(made["model"]["vocab"])
    names = list(NAMED)
    names += [f"<|reserved_special_token_{i}|>" for i in range(ROWS - pieces - len(names))]
    bos = {"SpecialToken": {"id": NAMED[0], "type_id": 0}}
    single = [bos, {"Sequence": {"id": "A", "type_id": 0}}]
    return made | {
        "added_tokens": [added_token(name, pieces + i) for i, name in enumerate([*names, IMAGE])],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {NAMED[0]: {"id": NAMED[0], "ids": [pieces], "tokens": [NAMED[0]]}},
        },
        "decoder": {"type": "Sequence", "decoders": made["decoder"]["decoders"][:-1]},
    }


@cache
def _fresh() -> str:
    return json.dumps(build_cross(), ensure_ascii=False)


def load_cross() -> Tokenizer:
    """The tokenizer."""
    return Tokenizer.from_str(_fresh())


def special(name: str) -> int:
    """The id of a special token."""
    found: int = load_cross().token_to_id(name)
    return found
