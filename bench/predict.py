"""Predicted times on an H200: bytes moved, floors, and a handful of constants. Nothing is measured.

A decode step reads every weight of the decoder once and, per row, the keys and values it attends:

    step = weights / stream + layers * attention + nodes * gap          (graphs)
    attention = fixed + rows * kv / stream

where ``stream`` is the share of the read peak that long reads get. Without graphs the host sets the
pace once its launches take longer than the device. A-VL/full does not depend on the peak, only on
how many tokens are cached: (W + u * KV) / (W + KV) with u = (2 * C + S) / 3 for K = 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

US, MS, GB = 1e-6, 1e-3, 1e9

# -- constants, each with where it comes from -----------------------------------------------------
READ_PEAK = 4.3e12  # bytes/s: 90 % of the H200's 4.8 TB/s, as pure reads reach on Hopper chips
STREAM = 0.90  # of it, in kernels that stream weights or keys (graphs of 8B models on H100: 0.88)
MATRIX_PEAK, MATRIX_SHARE = 788e12, 0.65  # FLOP/s of a bf16 product, and what a prefill gets of it
MEMORY, MEMORY_USED = 139 * 2**30, 0.92  # bytes of the card, and the share that is filled
ATTENTION_FIXED = 5 * US  # one launch with its merge, however few rows
SDPA_FIXED = 14 * US  # published decode kernels at batch 1 on H100: 14-20 us + bytes / bandwidth
GAP = 1.2 * US  # between two nodes of a graph: 1 to 1.5 us
LAUNCH = 8 * US  # of host time for one operation without graphs
HOST_STEP = 500 * US  # of host work per step beside the layers
NODES, FUSED_NODES = 22, 10  # kernels of a layer: torch's, and with the small ones fused
SMALL_FIXED = 3 * US  # of any small kernel
RANK_WAVE, RANK_FIT = 10 * US, 132 * 2  # blocks that fit at once, one per layer and row
AGE_WAVE, AGE_FIT = 3 * US, 132 * 8  # one per layer, row and kv head, over a few text tokens
PEER_HOST = 390 * US  # host time of transformers for a layer: 12.5 ms for 32 layers (8 to 17)
PEER_STREAM = 0.80  # of the read peak, over weights and three passes over the whole cache

# -- what A-VL keeps: its default policy ----------------------------------------------------------
SECONDARY, CORE, EVERY, TEXT, TEXT_FLOOR = 0.45, 0.30, 3, 0.70, 20


# -- policies that keep everything, pictures in few bits ------------------------------------------
PACKED = {  # of a picture's 16-bit bytes, scales included, at heads of 128
    "sift:format=k8v8,skip=0": 130 / 256,
    "sift:format=k4v4,skip=0": 80 / 256,
}


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; weights and cache are in 16 bits."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        return self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Parameters of one layer's linear maps."""
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim * self.hidden
        return attention + 3 * self.hidden * self.mlp

    @property
    def weight_bytes(self) -> int:
        """What a step reads: all linear maps and the language head; the embedding is a look-up."""
        return 2 * (self.layers * self.layer_weights + self.vocab * self.hidden)

    @property
    def all_bytes(self) -> int:
        """What the decoder takes in memory."""
        return self.weight_bytes + 2 * self.vocab * self.hidden

    @property
    def layer_kv(self) -> int:
        """Bytes of one token's key and value in one layer: 16 KiB for LLaVA-1.5-7B."""
        return 2 * self.kv_heads * self.head_dim * 2


SEVEN = Shape("7B", 4096, 32, 32, 32, 11008, 32000)
THIRTEEN = Shape("13B", 5120, 40, 40, 40, 13824, 32000)
TOY = Shape("toy", 64, 2, 4, 4, 128, 96)


@dataclass(frozen=True)
class Prompt:
    """Tokens of a sequence: fixed ones, one picture, text that may be evicted, and new ones."""

    before: int
    image: int
    after: int
    new: int

    @property
    def read(self) -> int:
        """Tokens of the prompt."""
        return self.before + self.image + self.after

    @property
    def length(self) -> int:
        """Tokens at the end."""
        return self.read + self.new


@dataclass(frozen=True)
class Way:
    """One contestant: whose code decodes, under which policy, and how.

    ``selection`` is where A-VL chooses: "branch" (beside the end of the step), "layers" (beside the
    model, layer by layer), "sync" (after the step). ``cache`` is transformers' kind of cache.
    """

    side: str = "ours"
    policy: str = "full"
    batch: int = 1
    graphs: bool = False
    selection: str = "branch"
    fused: bool = False
    cache: str = "dynamic"

    @property
    def label(self) -> str:
        """What tables call it."""
        if self.side != "ours":
            return f"transformers, {self.cache} cache"
        parts = [self.policy, "graphs" if self.graphs else "eager"]
        parts += [self.selection] if self.policy == "avl" else []
        parts += ["fused"] if self.fused else []
        return ", ".join(parts)


# -- tokens ---------------------------------------------------------------------------------------


def kept_text(policy: str, text: int) -> int:
    """Text tokens after the picture that stay when ``text`` have been seen."""
    if policy == "full" or policy in PACKED:
        return text
    return min(text, max(TEXT_FLOOR, round(TEXT * text)))


def attended(policy: str, prompt: Prompt, generated: float) -> list[float]:
    """Tokens of a row that each step of one K-cycle reads: in 16 bits, or of as many bytes."""
    text = kept_text(policy, round(prompt.after + generated))
    whole = 1.0 if policy == "full" else PACKED.get(policy)
    tiers = [whole] * EVERY if whole else [CORE] * (EVERY - 1) + [SECONDARY]
    return [prompt.before + int(tier * prompt.image) + text for tier in tiers]


def stored(policy: str, prompt: Prompt) -> int:
    """Slots of a row in each layer's plain pool once all new tokens are there."""
    if policy == "full":
        return prompt.length
    if policy in PACKED:
        return prompt.length - prompt.image
    image, free = int(SECONDARY * prompt.image), 1  # a token is written before one is evicted
    return prompt.before + image + kept_text(policy, prompt.after + prompt.new) + free


def held(policy: str, prompt: Prompt) -> float:
    """The same with what lies in few bits, as slots of as many bytes."""
    return stored(policy, prompt) + PACKED.get(policy, 0) * prompt.image


# -- kernels --------------------------------------------------------------------------------------


def attention(read: float) -> float:
    """Seconds of our attention over ``read`` bytes of keys and values."""
    return ATTENTION_FIXED + read / (STREAM * READ_PEAK)


def sifted(read: float) -> float:
    """Seconds where values are chosen: keys, the choice and values have launches of their own."""
    return attention(read) + SMALL_FIXED + ATTENTION_FIXED


def sdpa(read: float) -> float:
    """Seconds of torch's attention for one query over all rows."""
    return SDPA_FIXED + read / READ_PEAK


def slice_then_multiply(read: float) -> float:
    """Rows are gathered (read and written) and then attended: three passes, three launches."""
    return SDPA_FIXED + 2 * ATTENTION_FIXED + 3 * read / READ_PEAK


def rank(problems: int, read: float) -> float:
    """Seconds to rank in that many layers x rows, reading ``read`` bytes of logits."""
    waves = math.ceil(problems / RANK_FIT)
    return SMALL_FIXED + max(waves * RANK_WAVE, read / (STREAM * READ_PEAK))


def age(blocks: int) -> float:
    """Seconds to age text in that many layers x rows x kv heads."""
    return SMALL_FIXED + math.ceil(blocks / AGE_FIT) * AGE_WAVE


def stream(moved: float) -> float:
    """Seconds of a small kernel that moves that many bytes once."""
    return SMALL_FIXED + moved / (STREAM * READ_PEAK)


# -- steps ----------------------------------------------------------------------------------------


def step_bytes(shape: Shape, way: Way, prompt: Prompt, generated: float) -> float:
    """Bytes that a step must read, mean over a K-cycle."""
    rows = attended(way.policy, prompt, generated)
    mean = sum(rows) / len(rows)
    return shape.weight_bytes + shape.layers * way.batch * mean * shape.layer_kv


def floor(shape: Shape, way: Way, prompt: Prompt, generated: float) -> float:
    """Seconds of a step that does nothing but read, at the full read peak."""
    return step_bytes(shape, way, prompt, generated) / READ_PEAK


def step(shape: Shape, way: Way, prompt: Prompt, generated: float) -> float:
    """Seconds of a decode step, mean over a K-cycle."""
    if way.side != "ours":
        return _peer_step(shape, way, prompt, generated)
    rows = attended(way.policy, prompt, generated)
    attending = sum(attention(n * way.batch * shape.layer_kv) for n in rows) / len(rows)
    nodes = FUSED_NODES if way.fused else NODES
    device = shape.weight_bytes / (STREAM * READ_PEAK)
    device += shape.layers * (attending + nodes * GAP) + selecting(shape, way, prompt)
    if way.graphs:
        return device
    return max(device, HOST_STEP + shape.layers * nodes * LAUNCH)


def selecting(shape: Shape, way: Way, prompt: Prompt) -> float:
    """Seconds that choosing adds to a step, mean over a K-cycle."""
    if way.policy == "full" or way.policy in PACKED:
        return 0.0
    if way.selection == "layers":  # two events between the streams for each layer
        return shape.layers * 2 * GAP
    problems = shape.layers * way.batch
    ranking = rank(problems, 4 * problems * shape.heads * SECONDARY * prompt.image)
    aging = age(problems * shape.kv_heads)
    work = [aging] * (EVERY - 1) + [aging + ranking]
    # Beside the last layer's MLP and the language head, only what takes longer than they do shows.
    beside = 2 * (3 * shape.mlp + shape.vocab) * shape.hidden / (STREAM * READ_PEAK)
    hidden = beside if way.selection == "branch" else 0.0
    return sum(max(0.0, seconds - hidden) for seconds in work) / EVERY


def _peer_step(shape: Shape, way: Way, prompt: Prompt, generated: float) -> float:
    """transformers: torch.cat reads and writes the whole cache, attention reads it again."""
    kv = shape.layers * way.batch * shape.layer_kv
    if way.cache == "static":  # compiled: no host time, but padded to the greatest length
        return (shape.weight_bytes + kv * prompt.length) / (PEER_STREAM * READ_PEAK)
    read = shape.weight_bytes + 3 * kv * (prompt.read + generated)
    return max(shape.layers * PEER_HOST, read / (PEER_STREAM * READ_PEAK))


# -- prefill and memory ---------------------------------------------------------------------------


def prefill(shape: Shape, tokens: int) -> float:
    """Seconds for one sequence: 2 FLOP per weight and token, and causal attention."""
    attention_flops = 2 * tokens * tokens * shape.heads * shape.head_dim * shape.layers
    flops = 2 * shape.layers * shape.layer_weights * tokens + attention_flops
    return flops / (MATRIX_PEAK * MATRIX_SHARE)


def prefill_peak(shape: Shape, policy: str, prompt: Prompt) -> float:
    """Bytes above the weights: the pools, and one layer at work (its MLP is the widest place)."""
    pools = shape.layers * stored(policy, prompt) * shape.layer_kv
    one_layer = prompt.read * 2 * (3 * shape.mlp + 3 * shape.hidden)
    return pools + one_layer


def largest_batch(shape: Shape, policy: str, prompt: Prompt) -> int:
    """Rows that fit beside the weights."""
    row = shape.layers * stored(policy, prompt) * shape.layer_kv
    return int((MEMORY * MEMORY_USED - shape.all_bytes) / row)
