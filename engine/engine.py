"""The engine: a loaded model that answers prompts about pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from copy import copy
from os import PathLike
from time import perf_counter
from typing import Any, Unpack

import torch
from torch import Tensor

from .cache.looking import Looking
from .cache.observe import Observer
from .cache.prefill import Uncached
from .checkpoint.fingerprint import fingerprint
from .errors import CheckpointError, OptionError
from .loading.capacity import memory_for
from .loading.families import Wishes
from .loading.loading import Loaded, load
from .loading.processors import choose_threads
from .loading.published import published_sampling
from .loading.quantising import held
from .naming import told
from .ops.ranks import ALONE, Ranks
from .options import (
    Options,
    OptionValues,
    as_number,
    check_kinds,
    check_threads,
    is_iterable,
    make_options,
)
from .pictures.encoded import EncodedImage, Picture, PictureEncoder, listed
from .pictures.image import open_image
from .pictures.preprocess import ImageProcessor, Pixels
from .policies.policy import Policy
from .policies.specs import DEFAULT_CACHE, parse
from .prompts.messages import Messages
from .prompts.prompt import Prompt, build_prompt, continue_prompt, parse_messages, raw_prompt
from .result import Result, Timings
from .running.batch import Failure, Request, generate_batch
from .running.chat import Chat
from .running.generation import Answer, Forced, result_of
from .running.scheduler import Job, Said, Scheduler
from .running.stepping import Stepping
from .running.turn import Turn, check_context
from .running.videos import VideoSource, with_videos

MOST = 1 << 50  # of rows, bytes or slices: beyond all use


class Engine:
    """A model, its tokenizer and its cache policy.

    >>> engine = Engine.load()                                              # doctest: +SKIP
    >>> engine.generate("What colour is the car?", images=["car.jpg"]).text  # doctest: +SKIP
    'Red.'
    """

    def __init__(
        self,
        loaded: Loaded,
        cache: str | Policy = DEFAULT_CACHE,
        stepping: Stepping | None = None,
    ) -> None:
        self.model, self.tokenizer = loaded.family.model, loaded.tokenizer
        self.policy, self.stepping = parse(cache), stepping or Stepping()
        self._check_policy(self.policy)
        self.name, self.load_seconds = loaded.folder.name, loaded.seconds
        self._folder = loaded.folder
        self._family = loaded.family
        self._encoder = PictureEncoder(self.model)
        self.published: dict[str, float] = {}  # of ``options.Sampling``, where nobody says more
        self.max_image_tokens: int | None = None  # of a picture's tokens, if somebody has set one

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
        vision_tower: str | PathLike[str] | None = None,
        max_image_tokens: int | None = None,
        selection: str = "branch",
        graphs: bool = False,
        threads: int | None = None,
        weights: str = "auto",
        parallel: bool = False,
        as_published: bool = False,
    ) -> Engine:
        """Load a model.

        Args:
            name: a folder or a hub name; None is the embedded tiny model.
            device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ..., or "mps" (an
                Apple GPU by plain torch, in fp16 or fp32; untested).
            dtype: "auto", "float32", "bfloat16", "float16" (or "fp32", "bf16", "fp16"). "auto" is
                the checkpoint's own on CUDA; on CPU float32 below 2 GB of weights, else bfloat16.
            cache: a policy or its spec. "full" is the exact model; the default, "sift", keeps
                pictures in 4 bits; "avl" has the paper's settings and frees half of a picture.
            style: how a prompt is written, one of ``prompts.prompt.STYLES``; None: as the
                checkpoint was trained. What becomes of a picture is the checkpoint's alone.
            revision: branch, tag or commit of a hub model.
            offline: never download.
            vision_tower: folder or hub name of the vision tower of a checkpoint that leaves it out,
                in place of the one that its config.json names (``mm_vision_tower``).
            max_image_tokens: of a picture, for models that take pictures of any size (Qwen2-VL and
                its successors); None: as many as the checkpoint allows, which may be 16,384.
            selection: where cached tokens are ranked and evicted on a GPU: "branch" (beside the end
                of the step), "layers" (each layer's beside the next layers) or "sync" (in order).
                The tokens are the same; on a CPU it is always in order.
            graphs: replay decode steps from captured CUDA graphs; on a CPU the same code runs
                without a capture. The tokens are the same.
            threads: that torch and the kernels use, for the whole process; None: one for each
                physical core that the process may use, at most what OMP_NUM_THREADS says.

            weights: "q8" or "q4" rounds the decoder's layers to 8 or 4 bits as they are read, so
                that the model never exists in more; "q8+head" and "q4+head" the language head too.
                The rest, and what is computed, stays in ``dtype``.
            parallel: share the model between the processes of torch.distributed's group, which the
                caller has made: each holds its part of the heads, and all must ask the same
                (docs/scale.md).
            as_published: draw answers as generation_config.json has it, where a request does not
                say; otherwise such answers are greedy.

        Raises:
            CheckpointError: weights, configuration or tokenizer are missing, damaged, unsupported.
            OptionError: an unknown device, dtype, policy, style or selection, too many threads, a
                limit of image tokens where their number is fixed, heads that processes cannot
                share.
        """
        check_kinds(str, device=device, dtype=dtype, selection=selection, weights=weights)
        check_kinds(str | None, style=style, revision=revision)
        check_kinds(str | PathLike | None, name=name, vision_tower=vision_tower)
        check_kinds(bool, offline=offline, graphs=graphs, parallel=parallel)
        check_kinds(bool, as_published=as_published)
        check_threads(threads)
        choose_threads(threads)
        policy, stepping = parse(cache), Stepping(selection, graphs)
        tower = None if vision_tower is None else str(vision_tower)
        wishes = Wishes(style, tower, offline, max_image_tokens)
        ranks = Ranks.of_group() if parallel else ALONE
        loaded = load(name, device, dtype, revision, weights, wishes, ranks)
        engine = cls(loaded, policy, stepping)
        engine.max_image_tokens = max_image_tokens
        if as_published:
            engine.published = published_sampling(loaded.folder)
        return engine

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.decoder.norm.weight.device

    @property
    def processor(self) -> ImageProcessor:
        """Turns pictures into the pixels that the model takes."""
        return self._family.processor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and cache."""
        return self.model.decoder.norm.weight.dtype

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of the weights by format, such as ``{"q4": 4000000, "bf16": 900000}``."""
        return held(self.model)

    @property
    def names_regions(self) -> bool:
        """Whether answers may name regions of the picture; see ``Result.boxes``."""
        return self._family.boxes is not None

    def fingerprint(self) -> str:
        """Tells apart engines that may answer differently under the same cache policy."""
        dtype = str(self.dtype).removeprefix("torch.")
        tower = self._family.tower
        folders = [self._folder, *([tower[0]] if tower else [])]
        weights = [f"{name} {size}" for name, size in self.weights.items()]
        drawn = [f"{name}={value:g}" for name, value in sorted(self.published.items())]
        limits = [f"limit={self.max_image_tokens}"] if self.max_image_tokens is not None else []
        named = map(fingerprint, folders)
        return " ".join([*named, dtype, *weights, self._family.style, *drawn, *limits])

    def generate(
        self,
        prompt: Messages,
        images: Sequence[Picture] | None = (),
        *,
        videos: Sequence[VideoSource] | None = (),
        raw: bool = False,
        **options: Unpack[OptionValues],
    ) -> Result:
        """Answer a prompt; the arguments are those of ``stream``."""
        *_, result = self.stream(prompt, images, videos=videos, raw=raw, **options)
        assert isinstance(result, Result)
        return result

    def stream(
        self,
        prompt: Messages,
        images: Sequence[Picture] | None = (),
        *,
        videos: Sequence[VideoSource] | None = (),
        raw: bool = False,
        observer: Observer | None = None,
        **options: Unpack[OptionValues],
    ) -> Iterator[str | Result]:
        """Answer a prompt piece by piece: yields texts, and last the Result of ``generate``.

        Args:
            prompt: the text of one user turn, its pictures first; or messages {role, content},
                where content is a text or a list of {type: "text", text}, {type: "image"} and
                {type: "video"}.
            images: pictures in the order of their places, each a path, a ``data:`` URL, the bytes
                of a file, a file opened in binary mode, a Pillow image, an array or tensor of uint8
                (``[height, width, 3]``), an ``EncodedImage``, or pixels that are prepared already;
                None is no picture.
            videos: videos in the order of their places, behind the pictures of a text: each a path
                of a file or of a folder of frames, the bytes of a file, a list of pictures, or a
                ``Video``, which says which frames are shown. A model that has not learned videos
                sees the frames as so many pictures.
            raw: take ``prompt`` verbatim: special tokens spelled in it are special, ``<image>``
                stands where a picture goes, and no template is applied.
            observer: is told of every layer of every pass, such as an ``insight.trace.Trace``;
                without one no weights are computed for it.
            options: max_new_tokens, temperature, top_k, top_p, seed, stop, ignore_eos; see
                ``options.make_options``.

        Raises:
            OptionError, ImageError, CapacityError: before any text is yielded.
        """
        chosen = make_options(**options)
        prompt, images = self.with_videos(prompt, images, videos, raw=raw)
        return self._answered(self.job(prompt, images, chosen, raw=raw, observer=observer))

    def with_videos(
        self,
        prompt: Messages,
        images: Sequence[Picture] | None,
        videos: Sequence[VideoSource] | None,
        *,
        raw: bool = False,
    ) -> tuple[Messages, Sequence[Picture]]:
        """The prompt with pictures only, and those: what of the videos is shown is decoded and
        prepared, frame by frame; see ``stream``.
        """
        return with_videos(prompt, images, videos, self.processor.prepare_frames, raw=raw)

    def _answered(self, job: Job) -> Iterator[str | Result]:
        with closing(self.scheduler().events(job)) as events:
            for event in events:
                yield event.text if isinstance(event, Said) else result_of(event)

    def job(
        self,
        prompt: Messages,
        images: Sequence[Picture] | None,
        options: Options,
        *,
        raw: bool = False,
        observer: Observer | None = None,
    ) -> Job:
        """The job of one prompt by itself: its pictures are encoded, nothing is read yet."""
        timings = Timings(load=self.load_seconds)
        turn = self.turn(prompt, images, timings, raw=raw)
        answer = self.answer(options, turn.token_ids)
        if observer is not None and self.model.decoder.ranks.size > 1:
            raise OptionError(
                "an observer sees all heads, and each process has its own",
                hint="load the model without parallel",
            )
        if observer is not None and not callable(getattr(observer, "observe", None)):
            raise OptionError(
                f"observer is {told(observer)}", hint="use one that can observe, such as a Trace"
            )
        return Job(turn, answer, self.policy, options.max_new_tokens, timings, observer=observer)

    def scheduler(
        self, rows: int = 1, budget: int | None = None, slices: int | None = None
    ) -> Scheduler:
        """What answers jobs, ``rows`` of them together, in pools of its own; see ``Scheduler``.

        Raises OptionError for counts below 1 or beyond use, CapacityError for a budget that the
        machine does not have.
        """
        for name, value in {"rows": rows, "budget": budget, "slices": slices}.items():
            if (value is not None or name == "rows") and not 1 <= as_number(
                name, value, int
            ) < MOST:
                raise OptionError(f"{name} is {value}", hint=f"use 1 to {MOST - 1}")
        return Scheduler(self.model, self.stepping, rows, budget, slices)

    def chat(self) -> Chat:
        """A conversation whose turns share one cache; see ``Chat``."""
        return Chat(self)

    def encode(self, image: Picture, salt: str = "", *, beside: bool = False) -> EncodedImage:
        """Encode a picture once, to be given in place of it as often as needed.

        The engine also remembers the latest pictures by itself, those of each ``salt`` apart.
        ``beside`` is whether others stand in the same prompt: LLaVA-OneVision then takes fewer
        tokens of each.
        """
        picture = self._open(image, beside=beside)
        return EncodedImage(self._encoder.encode([picture], salt)[0], picture.size, picture.times)

    def forget_pictures(self) -> None:
        """Drop the features of pictures seen before, to free them or to time their encoding."""
        self._encoder = PictureEncoder(self.model)

    def generate_batch(
        self, requests: Iterable[Request | Mapping[str, Any]], rows: int = 8
    ) -> Iterator[Result | Failure]:
        """Answer many requests, ``rows`` at a time; yields each result as soon as it is done.

        A request holds the arguments of ``generate``: {prompt, images, max_new_tokens, ...}. One
        that cannot be answered comes back as a ``Failure`` while the others go on; ``index`` says
        which request a result belongs to.
        """
        return generate_batch(self, requests, rows)

    def with_cache(self, cache: str | Policy) -> Engine:
        """The same model in memory under another cache policy."""
        other = copy(self)
        other.policy = parse(cache)
        other._check_policy(other.policy)
        return other

    def _check_policy(self, policy: Policy) -> None:
        policy.check_depth(self.model.decoder.config.layers, self.model.cross_layers)

    def answer(self, options: Options, prompt_ids: Sequence[int]) -> Answer:
        """An empty answer under this model's tokenizer and end tokens."""
        family = self._family
        return Answer(
            self.tokenizer,
            options.filled(self.published),
            family.end_tokens,
            prompt_ids,
            strip=family.strip,
            boxes=family.boxes,
        )

    @torch.inference_mode()
    def logits(
        self,
        prompt: Messages,
        images: Sequence[Picture] | None = (),
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
        turn = self.turn(prompt, images, Timings(), raw=raw)
        if continuation is None:
            tokens = torch.tensor(turn.token_ids, device=self.device)
            hidden = self.model.embed(tokens, turn.spans, turn.features)
            looking = Looking(turn.sights(self.model))
            step = Uncached(len(tokens), turn.rotary(self.model), looking)
            return self.model.decoder.logits(self.model.decoder(hidden, step))
        ids = self._continuation(continuation)
        forced, scheduler = Forced(ids), self.scheduler()
        job = scheduler.submit(Job(turn, forced, self.policy, max(1, len(ids)), Timings()))
        while not scheduler.idle:
            scheduler.step()
        if job.failed:
            raise job.failed
        return torch.stack(forced.scores)[: len(ids)]

    def _continuation(self, given: str | Sequence[int]) -> list[int]:
        """The ids of a continuation, each one of the vocabulary."""
        if isinstance(given, str):
            return self.tokenizer.encode(given)
        if not is_iterable(given):
            raise OptionError(f"continuation is {told(given)}", hint="use a text, or token ids")
        ids, vocab = [], self.model.decoder.config.vocab
        for number, token in enumerate(given):
            ids.append(as_number(f"token {number} of the continuation", token, int))
            if not 0 <= ids[-1] < vocab:
                raise OptionError(
                    f"token {number} of the continuation is {ids[-1]}",
                    hint=f"use ids from 0 to {vocab - 1}",
                )
        return ids

    def turn(
        self,
        prompt: Messages,
        images: Sequence[Picture] | None,
        timings: Timings,
        *,
        raw: bool = False,
        after: Sequence[int] | None = None,
        earlier: Sequence[tuple[int, int]] = (),
    ) -> Turn:
        """Open and encode the pictures, and build the prompt around them.

        ``after`` are the ids that an earlier answer left undecoded: the turn then goes on behind
        them. ``earlier`` are the sizes of the pictures of earlier turns.
        """
        began = perf_counter()
        number = None if after is None else len(earlier)
        pictures, built = self._prepare(prompt, images, raw, number)
        self._check_ids(built)
        places = [segment for segment in built.segments if segment.kind == "image"]
        of_pictures = sum(place.end - place.start for place in places)
        if after is None:  # a conversation's length is known to who goes on with it
            check_context(len(built.token_ids), of_pictures, self.model.decoder.config)
        used = [pictures[place.image] for place in places]
        pixels = [p.tiles.nbytes for p in used if isinstance(p, Pixels)]
        with memory_for("encoding the pictures", sum(pixels), self.device):
            features = self._encoder.encode(used)
        timings.picture = perf_counter() - began
        before, aside = list(after or ()), bool(self.model.cross_layers)
        starts = [place.end if aside else place.start for place in places]
        both = zip(starts, places, strict=True)
        spans = [(start + len(before), place.end + len(before)) for start, place in both]
        sizes = [*earlier, *(picture.size for picture in used)]
        times = [picture.times for picture in used]
        return Turn([*before, *built.token_ids], spans, features, sizes, times)

    def _check_ids(self, prompt: Prompt) -> None:
        """Refuse tokens of a vocabulary that the weights were never extended to."""
        vocab = self.model.decoder.config.vocab
        texts = (s for s in prompt.segments if s.kind == "text")
        highest = max((max(prompt.token_ids[s.start : s.end]) for s in texts), default=0)
        if highest >= vocab:
            raise CheckpointError(
                f"the tokenizer has a token {highest} ({self.tokenizer.spelling(highest)!r:.40}), "
                f"the weights of {self.name} have {vocab} tokens",
                hint="tokenizer and weights may be of different checkpoints",
            )

    def render(
        self, prompt: Messages, images: Sequence[Picture] | None = (), *, raw: bool = False
    ) -> Prompt:
        """The prompt as the model gets it: its rendered text, ids and segments; nothing is run."""
        return self._prepare(prompt, images, raw, None)[1]

    def _prepare(
        self, prompt: Messages, images: Sequence[Picture] | None, raw: bool, earlier: int | None
    ) -> tuple[list[Pixels | EncodedImage], Prompt]:
        """Open the pictures, and build the prompt around them.

        ``earlier`` is how many pictures the conversation holds that it continues, None at its
        start.
        """
        given = listed(images)
        stills = [each for each in given if not (isinstance(each, Pixels) and each.video)]
        beside = len(stills) + (earlier or 0) > 1
        pictures = [self._open(image, beside=beside) for image in given]
        counts = list(map(self._tokens_of, pictures))
        return pictures, self._prompt(prompt, counts, raw, earlier)

    def _tokens_of(self, picture: Pixels | EncodedImage) -> int:
        """Tokens that a picture takes in the sequence."""
        if isinstance(picture, Pixels):
            return self.model.image_tokens(picture)
        return 1 if self.model.cross_layers else len(picture.features)

    def _open(self, image: Picture, *, beside: bool) -> Pixels | EncodedImage:
        if isinstance(image, EncodedImage | Pixels):
            return image
        pixels, processor = open_image(image).pixels, self._family.processor
        return processor.prepare_beside(pixels) if beside else processor.prepare(pixels)

    def _prompt(
        self, prompt: Messages, counts: list[int], raw: bool, earlier: int | None
    ) -> Prompt:
        """The prompt's ids, with ``counts`` tokens for each picture."""
        image_token = self.model.image_token
        check_kinds(bool, raw=raw)
        if raw and not isinstance(prompt, str):
            raise OptionError("raw is of a prompt that is a text", hint="leave raw out")
        if raw:
            return raw_prompt(str(prompt), self.tokenizer, image_token, counts)
        messages = parse_messages(prompt, len(counts))
        style, marks = self._family.prompts, self._family.image_marks
        if earlier is not None:
            return continue_prompt(
                messages,
                style,
                self.tokenizer,
                image_token,
                counts,
                ended=False,
                earlier=earlier,
                image_marks=marks,
            )
        window = self._family.window
        return build_prompt(messages, style, self.tokenizer, image_token, counts, window, marks)
