"""Text to token ids and back, around the ``tokenizers`` library.

What a user types goes through an encoder that knows no special tokens, so that "</s>" or "<image>"
in it stays text; templates place them by id. Added tokens that are not special ("[SEG]", "<loc_7>")
are words of an extended vocabulary: they have their ids in a user's text and are shown in answers.
A second encoder, for raw prompts, knows them all.
Streaming releases text as soon as later tokens can no longer change it, and no sooner.
"""

import codecs
import functools
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import CheckpointError
from ..refusals import hint_for
from .piece_vocabulary import read_model
from .rank_vocabulary import byte_alphabet, keep, read_tiktoken

# Tokens that give a prompt its structure: special whatever the files say of them, and where they
# say nothing. Some published vocabularies list ChatML's as ordinary words.
STRUCTURE = frozenset(
    (
        *("<s>", "</s>", "<unk>", "<pad>", "<image>", "<im_patch>", "<im_start>", "<im_end>"),
        *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|startoftext|>"),
        *("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|image|>"),
        *("<|start_header_id|>", "<|end_header_id|>", "<img>", "</img>", "<imgpad>"),
    )
)


class Tokenizer:
    """A checkpoint's tokenizer.

    ``bos_id`` is the token that belongs in front of a prompt (None: the model has none), ``eos_id``
    the end-of-text token of its tokenizer, ``vocab_size`` the highest id plus one. ``named`` are
    the tokens that the files name by role, such as {"pad_token": "<pad>"}.
    """

    def __init__(self, description: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Build from what tokenizer.json and tokenizer_config.json hold; see ``from_folder``."""
        added = _marked(description.get("added_tokens") or (), config)
        self._description = {**description, "added_tokens": added}
        self._added: dict[str, int] = {token["content"]: token["id"] for token in added}
        self._special_ids = {token["id"] for token in added if token.get("special")}
        vocabulary = description["model"]["vocab"]
        _check_ids(vocabulary, added)
        _check_flags(added)
        _check_strips(description.get("decoder"))
        self._plain = _build(_without_spellings(self._description, added))
        self._plain.encode_special_tokens = True  # as text, that is
        names = {key: _token_name(config, key) for key in config if key.endswith("_token")}
        self.named = {key: name for key, name in names.items() if name is not None}
        self.vocab_size = max([*vocabulary.values(), *self._added.values()]) + 1
        ends = (_token_name(config, "eos_token"), "<|endoftext|>", "</s>")
        self.eos_id = next(filter(None, (self.token_id(token) for token in ends if token)), None)
        self.bos_id = self._find_bos(config)
        self._byte_level = '"ByteLevel"' in json.dumps(description.get("decoder"))

    @classmethod
    def from_folder(cls, folder: Path, more: Sequence[str] = ()) -> "Tokenizer":
        """Read tokenizer.json, tokenizer.model or qwen.tiktoken, with the files beside it.

        Tokens named only in tokenizer_config.json or added_tokens.json are added, and the special
        ones of ``more`` that no file names are numbered on behind them. Raises ``CheckpointError``
        naming the file that is missing or damaged.
        """
        config = _read_json(folder / "special_tokens_map.json", optional=True)
        config |= _read_json(folder / "tokenizer_config.json", optional=True)
        path = folder / "tokenizer.json"
        if path.exists():
            description = _read_json(path)
        elif (path := folder / "tokenizer.model").exists():
            description = read_model(path)
        elif (path := folder / "qwen.tiktoken").exists():
            description = read_tiktoken(path)
            keep(description, folder / "tokenizer.json")
        else:
            raise CheckpointError(
                f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model "
                "nor qwen.tiktoken",
                hint="download one of these files into the folder",
            )
        named = _read_json(folder / "added_tokens.json", optional=True)
        try:
            _add_named_tokens(description, config, named, more)
            if path.name == "tokenizer.model":
                _match_as_typed(description)
            return cls(description, config)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}", hint=error.hint) from None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises plain Exception, or panics
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{path} is not a usable tokenizer: {reason}", hint="download the file again"
            ) from None

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text: no token in it is special, and no BOS is added.

        Words of an extended vocabulary have their own ids, as the tokenizer's flags for them say.
        """
        return list(self._plain.encode(_valid_unicode(text), add_special_tokens=False).ids)

    def encode_with_specials(self, text: str, bos: bool = True) -> list[int]:
        """Return the ids of text whose special tokens are meant, with BOS as the tokenizer adds it.

        A text that begins with BOS, as rendered templates do, gets no second one; ``bos`` False
        leaves out what the tokenizer adds around a text.
        """
        ids = list(self._knowing.encode(_valid_unicode(text), add_special_tokens=False).ids)
        if not bos or self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special tokens and ids without a token are left out."""
        plain = [token for token in ids if token not in self._special_ids]
        return str(self._plain.decode(plain, skip_special_tokens=False))

    def token_id(self, token: str) -> int | None:
        """Return the id of a token as it is spelled in the vocabulary, or None."""
        found: int | None = self._plain.token_to_id(token)
        return self._added.get(token, found)

    def spelling(self, token_id: int) -> str | None:
        """Return any token as it is spelled in the vocabulary, or None for an unknown id."""
        found: str | None = self._plain.id_to_token(token_id)
        return found

    def special_id(self, token: str) -> int | None:
        """Return the id of a special token by its spelling; None for all other texts."""
        found = self._added.get(token)
        return found if found in self._special_ids else None

    @property
    def special_tokens(self) -> dict[str, tuple[bool, bool]]:
        """Special tokens as they are spelled, and whether each swallows white space before and
        behind it.
        """
        added = [token for token in self._description["added_tokens"] if token.get("special")]
        return {token["content"]: (token["lstrip"], token["rstrip"]) for token in added}

    def piece(self, token_id: int) -> str | None:
        """Return the vocabulary's spelling of a token; None for special or unknown ids."""
        return None if token_id in self._special_ids else self.spelling(token_id)

    @property
    def is_byte_level(self) -> bool:
        """True if every piece stands for raw bytes (GPT-2's alphabet), as in Qwen and Llama 3."""
        return self._byte_level

    @functools.cached_property
    def _knowing(self) -> tokenizers.Tokenizer:
        """The tokenizer that knows special tokens; only raw prompts need it."""
        try:
            return _build(self._description)
        except Exception as error:
            raise CheckpointError(f"the special tokens are not usable: {error!s:.200}") from None

    def _find_bos(self, config: Mapping[str, Any]) -> int | None:
        """Take BOS from what the tokenizer really adds, then from its configuration."""
        if config.get("add_bos_token") is False:
            return None
        added = self._plain.encode("", add_special_tokens=True).ids
        if added:
            return int(added[0])
        bos = _token_name(config, "bos_token")
        return self.token_id(bos) if bos and config.get("add_bos_token") else None


class StreamDecoder:
    """Decodes token by token; the pieces joined are exactly ``tokenizer.decode`` of all the ids.

    Each token is decoded once or twice, whatever came before it.

    >>> decoder = StreamDecoder(tokenizer)                          # doctest: +SKIP
    >>> [decoder.push(token) for token in (15043, 240, 155, 148)]   # doctest: +SKIP
    ['Hello', '', '', '']
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []  # tokens whose text the next one may still change
        self._last: int | None = None  # an earlier token, so that the first space is not cut again
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is now certain (often its own, sometimes "")."""
        piece = self._tokenizer.piece(token_id)
        if piece is None:
            return ""
        if self._tokenizer.is_byte_level:
            return self._bytes.decode(_bytes_of(piece))
        self._held.append(token_id)
        # Bytes in a row are one unit: a single invalid one makes all of them U+FFFD.
        return "" if _is_byte_piece(piece) else self._release()

    def flush(self) -> str:
        """Return the text still held back, once no token follows."""
        return self._bytes.decode(b"", final=True) + self._release()

    def _release(self) -> str:
        held, self._held = self._held, []
        if not held:
            return ""
        if self._last is None:
            text = self._tokenizer.decode(held)
        else:
            before = self._tokenizer.decode([self._last])
            text = self._tokenizer.decode([self._last, *held])[len(before) :]
        self._last = held[-1]
        return text


# --- building ------------------------------------------------------------------------------------


def _build(description: Mapping[str, Any]) -> tokenizers.Tokenizer:
    built = tokenizers.Tokenizer.from_str(json.dumps(description))
    built.no_truncation()
    built.no_padding()
    return built


def _marked(
    added: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """The added tokens, those special that are named as such or give prompts their structure."""
    special = STRUCTURE | _named_special(config)
    return [{**token, "special": True} if token["content"] in special else token for token in added]


def _named_special(config: Mapping[str, Any]) -> set[str]:
    """What tokenizer_config.json names by role (``eos_token``) or among other special tokens."""
    names = [_token_name(config, key) for key in config if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(key) or ()
        values = listed.values() if isinstance(listed, Mapping) else listed
        if isinstance(values, Iterable) and not isinstance(values, str):
            names += [_token_name({key: value}, key) for value in values]
    return set(filter(None, names))


def _without_spellings(
    description: Mapping[str, Any], added: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Drop any merge that would spell a special token from ordinary text."""
    model = dict(description["model"])
    spellings = {token["content"] for token in added if token.get("special")}
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if _union(pair) not in spellings]
    return {**description, "model": model}


def _union(pair: str | Sequence[str]) -> str:
    return pair.replace(" ", "") if isinstance(pair, str) else "".join(pair)


def _add_named_tokens(
    description: dict[str, Any],
    config: Mapping[str, Any],
    named: Mapping[str, Any],
    more: Sequence[str],
) -> None:
    """Register tokens that only the files beside the tokenizer name, and then those of ``more``.

    Without flags, as in added_tokens.json, a token is a word of the vocabulary: transformers' rule.
    """
    tokens = {token["content"]: token for token in description.get("added_tokens") or ()}
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        tokens.setdefault(token["content"], {**_FLAGS, "special": True, **token, "id": int(index)})
    word = {**_FLAGS, "normalized": True, "special": False}
    for content, index in named.items():
        tokens.setdefault(content, {**word, "content": content, "id": index})
    vocabulary = description["model"]["vocab"]
    for content in more:
        if content not in tokens and content not in vocabulary:
            following = 1 + max([*vocabulary.values(), *(token["id"] for token in tokens.values())])
            special = {**_FLAGS, "special": True, "content": content, "id": following}
            tokens[content] = special
    description["added_tokens"] = sorted(tokens.values(), key=lambda token: int(token["id"]))


def _match_as_typed(description: dict[str, Any]) -> None:
    """Find words in the text as it is typed, as SentencePiece's own tokenizers do.

    Normalised, a word gets the space that goes in front of texts and is found behind spaces only.
    """
    words = [{**token, "normalized": False} for token in description["added_tokens"]]
    description["added_tokens"] = words


_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def _check_ids(vocabulary: Mapping[str, int], added: Sequence[Mapping[str, Any]]) -> None:
    """Require the ids that ``tokenizers`` gives: new tokens are numbered on from the vocabulary."""
    fresh = itertools.count(len(vocabulary))
    for token in sorted(added, key=lambda token: int(token["id"])):
        content = token["content"]
        found = vocabulary[content] if content in vocabulary else next(fresh)
        if found != token["id"]:
            raise CheckpointError(
                f"special token {content!r:.40} should be {token['id']} but is {found}",
                hint="the tokenizer's files belong to different checkpoints",
            )


def _check_flags(added: Sequence[Mapping[str, Any]]) -> None:
    """Require complete added tokens now: the encoder that reads them is built on first use."""
    for token in added:
        if type(token["id"]) is not int:
            raise CheckpointError(f"special token {token['content']!r:.40} has no whole number")
        for flag in ("single_word", "lstrip", "rstrip", "normalized", "special"):
            if not isinstance(token.get(flag), bool):
                raise CheckpointError(
                    f"special token {token['content']!r:.40} needs {flag}: true or false",
                    hint="download the file again",
                )


def _check_strips(decoder: object) -> None:
    """Refuse a decoder that cuts more than the one space in front of a text.

    A stream would have to look back through all its tokens to cut the same.
    """
    if not isinstance(decoder, Mapping):
        return
    cut = decoder.get("start"), decoder.get("stop")
    if decoder.get("type") == "Strip" and (cut[0] not in (0, 1) or cut[1] != 0):
        raise CheckpointError(f"the decoder strips {cut[0]!r:.20} and {cut[1]!r:.20} characters")
    for inner in decoder.get("decoders") or ():
        _check_strips(inner)


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", hint_for(error)) from None
    except (ValueError, RecursionError):
        pointer = path.read_bytes()[:24] == b"version https://git-lfs."
        what, hint = "not valid JSON", "download the file again"
        if pointer:
            what, hint = "a Git LFS pointer", "run 'git lfs pull' in its folder"
        raise CheckpointError(f"{path} is {what}", hint=hint) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object", hint="download it again")
    return content


def _token_name(config: Mapping[str, Any], key: str) -> str | None:
    """Return a token of tokenizer_config.json, spelled there as text or as an object."""
    token = config.get(key)
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


# --- characters and bytes ------------------------------------------------------------------------


def _valid_unicode(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates by U+FFFD: UTF-8 has neither."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _is_byte_piece(piece: str) -> bool:
    """Recognise SentencePiece's single bytes, spelled <0x00> to <0xFF>."""
    return piece.startswith("<0x") and piece.endswith(">") and len(piece.encode()) == 6


_BYTE_OF = {char: byte for byte, char in enumerate(byte_alphabet())}


def _bytes_of(piece: str) -> bytes:
    """Return the bytes of a byte-level piece; an added token outside that alphabet is UTF-8."""
    try:
        return bytes(_BYTE_OF[char] for char in piece)
    except KeyError:
        return piece.encode("utf-8")
