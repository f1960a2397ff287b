"""New tokens for a sequence, and their prefill into pools."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.crossing import CrossPools, Sight
from ..cache.looking import Looking
from ..cache.observe import Observer
from ..cache.pool import Pool
from ..cache.prefill import Prefill, most_packed, most_slots
from ..cache.row import Row
from ..errors import ContextError
from ..models.decoder import DecoderConfig, Slices, finished
from ..models.vision_language import VisionLanguageModel
from ..policies.layout import Layout
from ..policies.policy import Policy
from ..progress import tell


@dataclass(frozen=True)
class Turn:
    """New tokens for a sequence.

    Attributes:
        token_ids: their ids.
        spans: where pictures lie among them; empty ones, behind a picture's token, where its
            features take no places.
        features: ``[image tokens, hidden]`` of each picture.
        sizes: (width, height) of the conversation's pictures, earlier turns' first.
        times: of each of its own pictures those of ``Pixels``.
    """

    token_ids: Sequence[int]
    spans: list[tuple[int, int]]
    features: Sequence[Tensor]
    sizes: Sequence[tuple[int, int]] = ()
    times: Sequence[tuple[int, ...]] = ()

    @property
    def image_tokens(self) -> int:
        """Image tokens among the ids."""
        return sum(end - start for start, end in self.spans)

    def sights(self, model: VisionLanguageModel) -> list[Sight]:
        """What the model's cross layers see of it, if it has any."""
        return model.sights(self.spans, self.features, self.own_sizes)

    def rotary(self, model: VisionLanguageModel, past: Row | None = None) -> Tensor:
        """The rotary state of a sequence that it begins or, behind ``past``, goes on with."""
        before, earlier = (past.rotary, past.seen) if past and past.layers else (None, 0)
        spans = [(earlier + start, earlier + end) for start, end in self.spans]
        grids, begin = model.grids(self.own_sizes, self.times), model.decoder.rotation.begin
        return begin(len(self.token_ids), before, spans if grids else (), grids)

    @property
    def own_sizes(self) -> list[tuple[int, int]]:
        """Of its own pictures, without those of earlier turns."""
        return list(self.sizes[len(self.sizes) - len(self.features) :])

    def slots(self, policy: Policy, new_tokens: int, past: Row) -> tuple[int, dict[str, int]]:
        """Slots of cache that a layer needs at most for it, and ``new_tokens``, behind ``past``:
        plain ones, and those of formats.
        """
        device = past.layers[0].layout.positions.device if past.layers else torch.device("cpu")
        layout = Layout.of_tokens(len(self.token_ids), self.spans, device)
        return most_slots(policy, layout, new_tokens, past), most_packed(policy, layout, past)


def make_pools(model: VisionLanguageModel, budget: int | None = None) -> list[Pool]:
    """Empty pools for the layers of ``model``'s decoder, which claim ``budget`` bytes together at
    once; None: they grow as they are used.
    """
    config, weight = model.decoder.config, model.decoder.norm.weight
    given = config.kv_heads, config.head_dim, weight.dtype, weight.device
    limit = None
    if budget is not None:
        limit = budget // (config.kv_bytes_per_token * weight.element_size())
    return [Pool(*given, limit, bits) for bits in model.decoder.key_bits()]


def make_cross_pools(
    model: VisionLanguageModel, budget: int | None = None, rows: int = 1
) -> CrossPools | None:
    """Empty pools for the layers of ``model`` that look at features, if it has any.

    Of a ``budget`` in bytes they claim what a whole picture takes for each of the ``rows`` that are
    decoded together, but half of it at most; None: they grow as they are used.
    """
    if not model.cross_layers:
        return None
    config, weight = model.decoder.config, model.decoder.norm.weight
    given = config.kv_heads, config.head_dim, weight.dtype, weight.device
    pools, limit = [Pool(*given) for _ in range(model.cross_layers)], None
    if budget is not None:
        whole = rows * model.most_features
        limit = min(whole, budget // (2 * sum(pool.slot_bytes for pool in pools)))
    return CrossPools([Pool(*given, limit) for _ in pools])


Read = tuple[Row, Tensor]


def prefill(
    model: VisionLanguageModel,
    pools: Sequence[Pool],
    policy: Policy,
    turn: Turn,
    new_tokens: int,
    past: Row | None = None,
    observer: Observer | None = None,
    cross: CrossPools | None = None,
) -> Read:
    """Process a turn on top of ``past``, all at once; see ``reading``."""
    return finished(reading(model, pools, policy, turn, new_tokens, past, observer, cross))


@torch.inference_mode()
def reading(
    model: VisionLanguageModel,
    pools: Sequence[Pool],
    policy: Policy,
    turn: Turn,
    new_tokens: int,
    past: Row | None = None,
    observer: Observer | None = None,
    cross: CrossPools | None = None,
) -> Slices[Read]:
    """Process a turn on top of ``past``, slice by slice; comes to the sequence and the next token's
    logits ``[vocab]``. Closed before its end, it leaves everything as it was. ``cross`` is where
    features go that cross layers look at.

    Raises ContextError if the turn and ``new_tokens`` more do not fit the model's context.
    """
    decoder = model.decoder
    seen = past.seen if past else 0
    check_context(len(turn.token_ids), turn.image_tokens, decoder.config, seen, new_tokens)
    device = decoder.norm.weight.device
    layout = Layout.of_tokens(len(turn.token_ids), turn.spans, device)
    ids = torch.tensor(turn.token_ids, device=device)
    rotary = turn.rotary(model, past)
    pictures, watched = past.pictures if past else (), observer is not None
    looking = Looking(turn.sights(model), cross, pictures, policy, watched=watched)
    given = policy, layout, new_tokens, past, observer, rotary, looking
    with Prefill(pools, *given, decoder.ranks) as step:
        embedded = model.embed(ids, turn.spans, turn.features)
        pieces = len(decoder.layers) * len(step.chunks(len(ids)))
        hidden = yield from _counted(decoder.slices(embedded, step), pieces)
        logits = decoder.logits(hidden[-1])
    return step.row, logits


def _counted(slices: Slices[Tensor], pieces: int) -> Slices[Tensor]:
    """The same slices; how many of so many ``pieces`` are done is told."""
    for done in itertools.count():
        try:
            next(slices)
        except StopIteration as end:
            result: Tensor = end.value
            return result
        tell("prompt read", done + 1, pieces)
        yield
    raise AssertionError("slices have an end")


def check_context(
    tokens: int, image_tokens: int, config: DecoderConfig, seen: int = 0, new_tokens: int = 1
) -> None:
    """Raise ContextError where so many ``tokens``, some of them of pictures, do not fit behind
    those ``seen``, and ``new_tokens`` behind them.
    """
    prompt = seen + tokens
    if prompt + new_tokens > config.context:
        shorter = "ask for a shorter answer (max_new_tokens, -n)"
        raise ContextError(
            f"prompt {prompt:,} tokens ({image_tokens:,} image) + {new_tokens:,} requested "
            f"exceed the model's {config.limit}",
            hint=f"begin a new conversation (/clear), or {shorter}"
            if seen
            else f"shorten the prompt, give fewer pictures or frames, or {shorter}",
            left=config.context - prompt,
        )
