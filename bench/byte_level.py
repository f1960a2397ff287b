"""Small byte-level tokenizers, such as those of Qwen and Llama 3, for models without the files."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers


def byte_level(words: str, vocab: int, specials: Sequence[str | AddedToken]) -> Tokenizer:
    """A BPE of at most ``vocab`` entries, trained on ``words``, its special tokens behind them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([words], trainer)
    each = [s if isinstance(s, AddedToken) else AddedToken(s, normalized=False) for s in specials]
    made.add_special_tokens(each)
    return made


def llama3(words: str, vocab: int, specials: Sequence[str]) -> Tokenizer:
    """The same as Llama 3's is set up: whole words come before merges, and ``specials[0]``, BOS, in
    front of every text.
    """
    made, bos = byte_level(words, vocab, specials), specials[0]
    made.model.ignore_merges = True
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, made.token_to_id(bos))]
    )
    return made
