"""The tokenizer, by the name that programs beside the engine import it by."""

from .prompts.tokenizer import StreamDecoder as StreamDecoder
from .prompts.tokenizer import Tokenizer as Tokenizer
