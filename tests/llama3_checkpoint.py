"""Small LLaVAs over Llama 3: a byte-level tokenizer, its special tokens, its template."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bench.byte_level import llama3
from tests import checkpoints as plain
from tests.checkpoints import Shape
from tests.next_checkpoints import write_next

SPECIALS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<image>", "<pad>"),
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% for c in m.content if c.type == 'image' %}<image>\n{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def llama3_tokenizer() -> Tokenizer:
    """A trained byte-level BPE with Llama 3's special tokens; it puts BOS in front."""
    return llama3("user assistant What is this picture?", 300, SPECIALS)


def write_llama3(folder: Path, patch: pytest.MonkeyPatch, tiled: bool = False) -> Path:
    """Write a LLaVA-1.5, or ``tiled`` a 1.6; generation_config.json names one end of two."""
    tokenizer = llama3_tokenizer()
    patch.setattr(plain, "IMAGE_TOKEN", tokenizer.token_to_id("<image>"))
    patch.setattr(plain, "HUB_VOCAB", tokenizer.get_vocab_size() + 5)
    if tiled:
        write_next(folder, "vicuna")
    else:
        plain.write_llava(folder, Shape())
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    named = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[1], "pad_token": SPECIALS[-1]}
    named["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    ends = {"eos_token_id": tokenizer.token_to_id("<|end_of_text|>")}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder
