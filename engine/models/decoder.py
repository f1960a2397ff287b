"""The language decoder that Llama, Vicuna, Mistral, Qwen2 and Qwen3 share.

Pre-norm layers of RMSNorm, rotary attention with grouped key/value heads, and a SwiGLU MLP. Tensors
carry no batch dimension: ``hidden`` is ``[tokens, hidden]``, where the tokens are either one
sequence being prefilled or one token of each row being decoded. The decoder never sees a cache
policy; it hands queries, keys and values to ``view.attend``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from ..checkpoint.config import ConfigReader
from ..ops.fused import silu_mul
from ..ops.ranks import ALONE, Ranks
from ..ops.rotary import Tables, turned
from .layers import Embedding, RMSNorm
from .llama3_rope import Llama3Rope
from .matrix import Linear, Matrix

MLP_ROWS = 2048  # tokens that pass an MLP at once: what is wide there stays bounded


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder.

    ``layers`` counts those that attend to the sequence itself, which the cache has a part of each
    for. ``context`` is the largest position + 1 the model was trained for, or its sliding window
    where that is smaller: windows are not implemented, and up to there nothing slides.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float
    norm_eps: float
    qkv_bias: bool
    tied_head: bool
    context: int
    windowed: bool = False
    rope: Llama3Rope | None = None
    qk_norm: bool = False  # queries and keys are normed head by head (Qwen3)

    @property
    def limit(self) -> str:
        """What ``context`` is, in words."""
        return f"{'sliding window' if self.windowed else 'context'} of {self.context:,}"

    @property
    def kv_bytes_per_token(self) -> int:
        """Elements of K and V that one token takes in all layers, to be multiplied by the dtype's
        size.

        LLaVA-1.5-7B: 2 * 32 layers * 32 heads * 128 = 262,144 (0.524 MB per token in fp16).
        """
        return 2 * self.layers * self.kv_heads * self.head_dim

    @classmethod
    def parse(cls, config: ConfigReader) -> DecoderConfig:
        """Read a published text configuration; absent keys take transformers' defaults.

        LLaVA-1.5-7B's text_config holds no sizes at all: LlamaConfig's defaults are the 7B shape.
        Raises CheckpointError naming the key that is wrong.
        """
        family = config.text("model_type", "llama", ("llava", "llava_llama", *_DEFAULTS))
        defaults = _DEFAULTS.get(family, _DEFAULTS["llama"])
        config.text("hidden_act", "silu", ("silu",))
        hidden = config.integer("hidden_size", 4096)
        heads = config.integer("num_attention_heads", 32)
        kv_heads = config.integer("num_key_value_heads", defaults["kv_heads"] or heads)
        if hidden % heads and config.values.get("head_dim") is None:
            raise config.fail("hidden_size", f"is {hidden}, which {heads} heads do not divide")
        if heads % kv_heads:
            raise config.fail("num_key_value_heads", f"is {kv_heads}; it must divide {heads} heads")
        context = config.integer("max_position_embeddings", defaults["context"])
        window = _sliding_window(config, family) or context
        return cls(
            vocab=config.integer("vocab_size", defaults["vocab"]),
            hidden=hidden,
            layers=config.integer("num_hidden_layers", 32, high=1000),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=config.integer("head_dim", hidden // heads),
            mlp=config.integer("intermediate_size", defaults["mlp"]),
            rope_theta=_rope_theta(config),
            norm_eps=config.number("rms_norm_eps", 1e-6),
            qkv_bias=config.flag("attention_bias", family == "qwen2"),
            tied_head=config.flag("tie_word_embeddings", False),
            context=min(context, window),
            windowed=window < context,
            rope=_llama3_rope(config),
            qk_norm=family == "qwen3",
        )


# What transformers' LlamaConfig, MistralConfig, Qwen2Config and Qwen3Config say where a published
# file is silent (kv_heads None: as many as heads).
_DEFAULTS: dict[str, dict[str, int | None]] = {
    "llama": {"kv_heads": None, "mlp": 11008, "vocab": 32000, "context": 2048},
    "mistral": {"kv_heads": 8, "mlp": 14336, "vocab": 32000, "context": 131072},
    "qwen2": {"kv_heads": 32, "mlp": 22016, "vocab": 151936, "context": 32768},
    "qwen3": {"kv_heads": 32, "mlp": 22016, "vocab": 151936, "context": 32768},
}


def _sliding_window(config: ConfigReader, family: str) -> int | None:
    """How many tokens the model attends to, itself included; None: all of them."""
    default = 4096 if family == "mistral" else None
    used = config.flag("use_sliding_window", not family.startswith("qwen"))
    if not used or config.values.get("sliding_window", default) is None:
        return None
    return config.integer("sliding_window", default)


def _rope_theta(config: ConfigReader) -> float:
    """The rotary base: rope_theta in files before transformers 5, rope_parameters since."""
    rope = config.section("rope_parameters")
    return config.number("rope_theta", rope.number("rope_theta", 10000.0))


def _llama3_rope(config: ConfigReader) -> Llama3Rope | None:
    """The scaling of rotary frequencies: none, or Llama 3's."""
    for section in (config.section("rope_parameters"), config.section("rope_scaling")):
        kind = section.values.get("rope_type", section.values.get("type", "default"))
        if kind == "llama3":
            return Llama3Rope.parse(section)
        if kind != "default":
            problem = f"is {kind!r:.40}; 'default' and 'llama3' are supported"
            raise section.unsupported("rope_type", problem)
    return None


class View(Protocol):
    """What a layer sees of the cache in one step."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tables: Tables) -> Tensor:
        """Rotate q ``[tokens, heads, head_dim]`` and k, store k and v ``[tokens, kv_heads,
        head_dim]``, and attend; returns the shape of q. A view may do without k and v.
        """


# A cross layer's keys and values ``[features, kv_heads, head_dim]`` of a picture's features
# ``[features, hidden]``.
Project: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]


class CrossView(Protocol):
    """What a cross layer sees of the cache in one step: features of pictures."""

    def attend(self, q: Tensor, project: Project) -> tuple[Tensor, Tensor]:
        """Attend with q ``[tokens, heads, head_dim]`` as it is, each token over the features of the
        pictures that it sees. ``project`` is called where a picture is new to the cache.

        Returns the shape of q, and fp32 ``[tokens]``, 1 for tokens that see a picture and 0 for
        others.
        """


class Step(Protocol):
    """One forward pass as the cache sees it: a prefill of one sequence or a decode step of rows.

    Attributes:
        positions: ``[tokens]`` int64 numbers of the tokens within their sequences.
        rotary: ``[1 or rows, words]`` int64, each sequence's rotary state: what its rotation has
            made of its turns (see ``Rotation.begin``). The cache carries it and reads nothing of
            it: what a token is rotated by is the model's affair.
    """

    positions: Tensor
    rotary: Tensor

    def view(self, layer: int) -> View:
        """The view that layer number ``layer``, of those that attend to the sequence, has."""

    def cross(self, layer: int) -> CrossView | None:
        """The view that cross layer number ``layer`` has; None where no token sees a picture."""

    def chunks(self, tokens: int) -> list[slice]:
        """The ranges in which ``tokens`` pass a layer, in order."""

    def narrow(self, layer: int) -> Tensor | None:
        """Indices of the tokens that go on after ``layer``, or None where all do."""


class Grid(NamedTuple):
    """Where the tokens of a picture lie, or of a video: ``times`` are those of its slices, which
    follow one another, since the first.
    """

    rows: int
    columns: int
    times: tuple[int, ...] = (0,)


class Rotation:
    """Rotary position embedding, the 'rotate half' form (Su et al. 2021).

    Angles are computed in fp32 and cast to the model's dtype, as transformers does. The sign of the
    rotated half is folded into the sine, so that a rotation is ``x * cos + swap(x) * sin``.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float,
        device: torch.device | str,
        scaling: Llama3Rope | None = None,
    ) -> None:
        exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
        self.frequencies = theta**-exponent
        if scaling is not None:
            self.frequencies = scaling.slowed(self.frequencies)

    def begin(
        self,
        tokens: int,
        past: Tensor | None = None,
        spans: Sequence[tuple[int, int]] = (),
        grids: Sequence[Grid] = (),
    ) -> Tensor:
        """The rotary state ``[words]`` int64 of a sequence that a turn of ``tokens`` begins, or
        goes on with, behind the state ``past``. ``spans`` are the numbers of its pictures' tokens,
        ``grids`` are those of ``VisionLanguageModel.grids``, of a model that tells places apart.
        """
        nothing = torch.empty(0, dtype=torch.int64, device=self.frequencies.device)
        return nothing if past is None else past

    def tables(self, positions: Tensor, rotary: Tensor, dtype: torch.dtype) -> Tables:
        """Cosine and signed sine at a step's positions, for a model in ``dtype``; see ``Step``."""
        return turned(positions[:, None].float() * self.frequencies, dtype)


class Layer(Protocol):
    """One of a decoder's layers, whatever it attends to."""

    def view(self, step: Step) -> View | CrossView | None:
        """Its view of a step; None where it has nothing to do."""

    def __call__(
        self, hidden: Tensor, delta: Tensor | None, tables: Tables, view: View | CrossView
    ) -> tuple[Tensor, Tensor]:
        """One layer over the stream ``hidden + delta``, ``[tokens, hidden]`` each.

        Returns the stream in the same two summands: the next norm adds them in passing.
        """

    def narrow(self, step: Step) -> Tensor | None:
        """Indices of the tokens that go on after it, or None where all do."""


class DecoderLayer(nn.Module):
    """Attention and MLP, each on the normed stream and added back to it."""

    def __init__(self, config: DecoderConfig, number: int, ranks: Ranks = ALONE) -> None:
        """``number``: among the layers that attend to the sequence. Of one that several ``ranks``
        share, ``config`` counts this one's heads and features.
        """
        super().__init__()
        self.config, self.number, self.ranks = config, number, ranks
        hidden, bias = config.hidden, config.qkv_bias
        q_size, kv_size = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.attn_norm = RMSNorm(hidden, config.norm_eps)
        self.q_proj = Linear(hidden, q_size, bias=bias)
        self.k_proj = Linear(hidden, kv_size, bias=bias)
        self.v_proj = Linear(hidden, kv_size, bias=bias)
        self.o_proj = Linear(q_size, hidden, bias=False)
        self.mlp_norm = RMSNorm(hidden, config.norm_eps)
        self.gate_proj = Linear(hidden, config.mlp, bias=False)
        self.up_proj = Linear(hidden, config.mlp, bias=False)
        self.down_proj = Linear(config.mlp, hidden, bias=False)
        if config.qk_norm:  # which wants them apart
            self.q_norm, self.k_norm = (RMSNorm(config.head_dim, config.norm_eps) for _ in "qk")
        else:
            self.qkv = Matrix(self.q_proj, self.k_proj, self.v_proj)
        self.gate_up = Matrix(self.gate_proj, self.up_proj)

    def view(self, step: Step) -> View:
        """See ``Layer``."""
        return step.view(self.number)

    def narrow(self, step: Step) -> Tensor | None:
        """See ``Layer``."""
        return step.narrow(self.number)

    def forward(
        self, hidden: Tensor, delta: Tensor | None, tables: Tables, view: View
    ) -> tuple[Tensor, Tensor]:
        """See ``Layer``."""
        hidden, normed = self.attn_norm.after(hidden, delta)
        hidden, normed = self.mlp_norm.after(hidden, self.attention(normed, tables, view))
        if len(normed) <= MLP_ROWS:
            return hidden, self.mlp(normed)
        return hidden, torch.cat([self.mlp(part) for part in normed.split(MLP_ROWS)])

    def mlp(self, normed: Tensor) -> Tensor:
        """``[tokens, hidden]`` to the same."""
        gate, up = self.gate_up.product(normed)
        return self.ranks.sum(self.down_proj(silu_mul(gate, up)))

    def attention(self, normed: Tensor, tables: Tables, view: View) -> Tensor:
        """Project, rotate q and k to their positions, attend through the cache, project back."""
        shape = (len(normed), -1, self.config.head_dim)
        q, k, v = (each.view(shape) for each in self._qkv(normed))
        return self.ranks.sum(self.o_proj(view.attend(q, k, v, tables).flatten(1)))

    def _qkv(self, normed: Tensor) -> Sequence[Tensor]:
        if not self.config.qk_norm:
            return self.qkv.product(normed)
        heads = (-1, self.config.head_dim)
        q, k = self.q_proj(normed).view(heads), self.k_proj(normed).view(heads)
        return self.q_norm(q), self.k_norm(k), self.v_proj(normed)


Result = TypeVar("Result")
Slices: TypeAlias = Generator[None, None, Result]  # work in pieces, and what it comes to


def finished(slices: Slices[Result]) -> Result:
    """What slices come to, all taken at once."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            result: Result = end.value
            return result


def joined(pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The stream's two summands, put together from those of its chunks."""
    if len(pieces) == 1:
        return pieces[0]
    hidden, delta = zip(*pieces, strict=True)
    return torch.cat(hidden), torch.cat(delta)


class Decoder(nn.Module):
    """Embedding, layers, final norm and language head.

    ``rotation`` is there once ``loading.preparing`` has made it. ``ranks`` are the processes that
    share it; ``config`` then counts this one's heads and features.
    """

    rotation: Rotation
    ranks: Ranks = ALONE

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(DecoderLayer(config, n) for n in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.head = Linear(config.hidden, config.vocab, bias=False)

    def key_bits(self) -> list[int]:
        """Bits that a layer's keys need in the cache at least; 0: whatever a policy says.

        A bias of the keys may be hundreds of times larger in a few channels than in the others
        (Qwen2's first and last layers), and those share their steps: a fifteenth of the range of
        keys in 4 bits, a 127th of the largest in 8. Where such a step would be wider than 1, the
        order of what keys say, more bits are needed.
        """
        layers = [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
        biases = [layer.k_proj.bias for layer in layers]
        largest = [0.0 if bias is None else float(bias.abs().max()) for bias in biases]
        return [0 if bias <= 15 else 8 if bias <= 127 else 16 for bias in self.ranks.most(largest)]

    def make_rotation(self, device: torch.device) -> Rotation:
        """The rotary embedding, whose frequencies are computed in fp32 and not loaded."""
        config = self.config
        return Rotation(config.head_dim, config.rope_theta, device, config.rope)

    def forward(self, hidden: Tensor, step: Step) -> Tensor:
        """Run all layers over embeddings ``[tokens, hidden]``; returns the final normed states.

        A policy may narrow the sequence after a layer; the result then has fewer rows, the last
        token always among them.
        """
        return finished(self.slices(hidden, step))

    def slices(self, hidden: Tensor, step: Step) -> Slices[Tensor]:
        """``forward`` in pieces, each a layer and a range of tokens, layers outermost; what is
        yielded says nothing.
        """
        tables = self.rotation.tables(step.positions, step.rotary, hidden.dtype)
        return (yield from self.through(hidden, tables, step))

    def through(
        self, hidden: Tensor, tables: Tables, step: Step, beside: Sequence[Tensor] = ()
    ) -> Slices[Tensor]:
        """All layers and the final norm; see ``slices``. ``beside[n] [tokens, hidden]`` is added to
        the stream behind layer n.
        """
        delta: Tensor | None = None
        for number, layer in enumerate(cast(Iterable[Layer], self.layers)):
            view, pieces = layer.view(step), []
            if view is None:
                continue
            for chunk in step.chunks(len(hidden)):
                behind = None if delta is None else delta[chunk]
                pieces.append(layer(hidden[chunk], behind, tables.at(chunk), view))
                yield
            hidden, delta = joined(pieces)
            if number < len(beside):
                hidden = hidden + beside[number]
            onward = layer.narrow(step)
            if onward is not None:
                hidden, delta = hidden[onward], delta[onward]
                tables, beside = tables.at(onward), [each[onward] for each in beside]
        return self.norm.after(hidden, delta)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token ``[tokens, vocab]`` in fp32."""
        scores: Tensor = self.head(hidden).float()
        if scores.shape[-1] < self.config.vocab:
            scores = self.ranks.gather(scores, -1)
        return scores
