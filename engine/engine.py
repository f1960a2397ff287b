"""The engine: a loaded model that answers prompts about pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from engine.cache.policy import Policy
from engine.cache.prefill import Uncached
from engine.cache.specs import parse
from engine.errors import OptionError
from engine.generation import Options, Session, Turn, generate
from engine.image import open_image
from engine.loading import Loaded, load
from engine.preprocess import Pixels
from engine.prompt import Prompt, build_prompt, parse_messages, raw_prompt
from engine.result import Result, Timings
from engine.sampling import Sampling

Picture = str | PathLike[str] | bytes | Image.Image
Messages = str | Sequence[Mapping[str, Any]]

DEFAULT_CACHE = "avl"


class Engine:
    """A model, its tokenizer and its cache policy.

    >>> engine = Engine.load()                                              # doctest: +SKIP
    >>> engine.generate("What colour is the car?", images=["car.jpg"]).text  # doctest: +SKIP
    'Red.'
    """

    def __init__(self, loaded: Loaded, cache: str | Policy = DEFAULT_CACHE) -> None:
        self.model, self.tokenizer = loaded.family.model, loaded.tokenizer
        self.policy = parse(cache)
        self.name, self.load_seconds = loaded.folder.name, loaded.seconds
        self._family = loaded.family

    @classmethod
    def load(
        cls,
        name: str | PathLike[str] | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        cache: str | Policy = DEFAULT_CACHE,
        style: str | None = None,
        revision: str | None = None,
        offline: bool = False,
    ) -> Engine:
        """Load a model.

        Args:
            name: a folder or a hub name; None is the embedded tiny model.
            device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
            dtype: "auto", "float32", "bfloat16", "float16" (or "fp32", "bf16", "fp16"). "auto" is
                the checkpoint's own on CUDA; on CPU float32 below 2 GB of weights, else bfloat16.
            cache: a policy or its spec. "full" is the exact model; the default "avl" approximates
            it.
            style: prompt style and picture geometry, "llava-hf" or "llava-v1"; None: the one the
                checkpoint's layout implies.
            revision: branch, tag or commit of a hub model.
            offline: never download.

        Raises:
            CheckpointError: weights, configuration or tokenizer are missing, damaged, unsupported.
            OptionError: an unknown device, dtype, policy or style.
        """
        policy = parse(cache)
        return cls(load(name, device, dtype, style, revision, offline), policy)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.decoder.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and cache."""
        return self.model.decoder.norm.weight.dtype

    def generate(
        self,
        prompt: Messages,
        images: Sequence[Picture] = (),
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        raw: bool = False,
    ) -> Result:
        """Answer a prompt; the arguments are those of ``stream``."""
        *_, result = self.stream(
            prompt,
            images,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            raw=raw,
        )
        assert isinstance(result, Result)
        return result

    def stream(
        self,
        prompt: Messages,
        images: Sequence[Picture] = (),
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        raw: bool = False,
    ) -> Iterator[str | Result]:
        """Answer a prompt piece by piece: yields texts, and last the Result of ``generate``.

        Args:
            prompt: the text of one user turn, its pictures first; or messages {role, content},
                where content is a text or a list of {type: "text", text} and {type: "image"}.
            images: paths, bytes or Pillow images, in the order of their places.
            max_new_tokens: the answer's length limit.
            temperature, top_k, top_p, seed: see ``Sampling``; temperature 0 is greedy.
            stop: texts before which the answer ends.
            ignore_eos: go on at the end token.
            raw: take ``prompt`` verbatim: special tokens spelled in it are special, ``<image>``
                stands where a picture goes, and no template is applied.

        Raises:
            OptionError, ImageError, CapacityError: before any text is yielded.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        options = Options(max_new_tokens, sampling, tuple(stop), ignore_eos)
        timings = Timings(load=self.load_seconds)
        turn = self._turn(prompt, images, raw, timings)
        session = Session(self.model, self.policy)
        return generate(session, turn, self.tokenizer, options, self._family.end_tokens, timings)

    @torch.inference_mode()
    def logits(
        self,
        prompt: Messages,
        images: Sequence[Picture] = (),
        continuation: str | Sequence[int] | None = None,
        *,
        raw: bool = False,
    ) -> Tensor:
        """Scores of the next token after every token, for parity, scoring and log-probabilities.

        Without ``continuation``: ``[prompt tokens, vocab]`` fp32, pictures expanded, exact whatever
        the policy. With one (text or ids): ``[continuation tokens, vocab]``; row i is what the
        model says before it is given token i, teacher-forced through decode under the engine's
        policy.
        """
        turn = self._turn(prompt, images, raw, Timings())
        if continuation is None:
            tokens = torch.tensor(turn.token_ids, device=self.device)
            hidden = self.model.embed(tokens, turn.spans, turn.features)
            step = Uncached(len(tokens), self.device)
            return self.model.decoder.logits(self.model.decoder(hidden, step))
        ids = self._continuation(continuation)
        session = Session(self.model, self.policy)
        rows = [session.prefill(turn, max(1, len(ids)))]
        rows += [session.decode(token) for token in ids[:-1]]
        return torch.stack(rows)[: len(ids)]

    def _continuation(self, given: str | Sequence[int]) -> list[int]:
        """The ids of a continuation, each one of the vocabulary."""
        ids = self.tokenizer.encode(given) if isinstance(given, str) else list(given)
        vocab = self.model.decoder.config.vocab
        for number, token in enumerate(ids):
            if type(token) is not int or not 0 <= token < vocab:
                raise OptionError(
                    f"token {number} of the continuation is {token!r}",
                    hint=f"use ids from 0 to {vocab - 1}",
                )
        return ids

    def _turn(
        self, prompt: Messages, images: Sequence[Picture], raw: bool, timings: Timings
    ) -> Turn:
        """Open and encode the pictures, and build the prompt around them."""
        if isinstance(images, str | bytes | PathLike | Image.Image):
            images = [images]
        began = perf_counter()
        prepare = self._family.processor.prepare
        pictures = [prepare(open_image(image).pixels) for image in images]
        built = self._prompt(prompt, [self.model.image_tokens(p) for p in pictures], raw)
        features = self._encode(pictures)
        timings.picture = perf_counter() - began
        spans = [(s.start, s.end) for s in built.segments if s.kind == "image"]
        return Turn(built.token_ids, spans, features)

    def _prompt(self, prompt: Messages, counts: list[int], raw: bool) -> Prompt:
        """The prompt's ids, with ``counts`` tokens for each picture."""
        config = self.model.config
        if raw:
            return raw_prompt(str(prompt), self.tokenizer, config.image_token, counts)
        messages = parse_messages(prompt, len(counts))
        return build_prompt(
            messages, self._family.style, self.tokenizer, config.image_token, counts
        )

    @torch.inference_mode()
    def _encode(self, pictures: Sequence[Pixels]) -> list[Tensor]:
        """Features ``[image tokens, hidden]`` of every picture."""
        return self.model.encode(pictures) if pictures else []
