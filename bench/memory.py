"""Bytes of the KV cache: the paper's memory table, formats, features, a prefill's peak, a step.

    python -m bench.memory             # all of it, written to bench/results/memory-*.json and .md
    python -m bench.memory --table     # tables alone: no numbers are computed, only shapes

The table runs the cache's own prefill over pools on the meta device: what it counts are the
extents that would be allocated. MB are 10^6 bytes, as in the paper.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import common
from engine.cache.crossing import CrossPools, CrossStored, Sight
from engine.cache.decode import Decoding
from engine.cache.looking import Looking
from engine.cache.pool import Pool
from engine.cache.prefill import Prefill
from engine.cache.report import CacheReport, report
from engine.cache.row import Row, Stored
from engine.loading.preparing import prepare
from engine.models.decoder import Decoder, DecoderConfig
from engine.policies.avl import Avl
from engine.policies.layout import Kept, Layout
from engine.policies.policy import Policy
from engine.policies.received import Received
from engine.policies.specs import parse

MB = 1e6
Part = tuple[dict[str, Any], list[dict[str, Any]], list[str]]  # settings, rows, notes


# -- the paper's table ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A model's cache geometry, and the tokens of the paper's average sequence."""

    model: str
    layers: int
    heads: int
    system: int
    image: int
    text: int  # instruction and output together
    head_dim: int = 128


V15_7B = Shape("LLaVA-1.5-7B", 32, 32, 35, 576, 35)
V15_13B = Shape("LLaVA-1.5-13B", 40, 40, 35, 576, 35)
V16_7B = Shape("LLaVA-1.6-7B", 32, 32, 35, 2135, 78)
V16_13B = Shape("LLaVA-1.6-13B", 40, 40, 35, 2135, 78)

S40 = "avl:secondary=0.40,core=none,prefill=1,text=1"
S45 = "avl:secondary=0.45,core=0.30,every=3,prefill=0.9"

# Model, policy, the paper's MB (table 3).
PAPER: list[tuple[Shape, str, int]] = [
    (V15_7B, "full", 339),
    (V15_7B, S40, 156),
    (V15_7B, f"{S45},text=0.5", 163),
    (V15_13B, "full", 529),
    (V15_13B, S40, 243),
    (V15_13B, f"{S45},text=1", 265),
    (V15_13B, f"{S45},text=0.6", 254),
    (V16_7B, "full", 1179),
    (V16_7B, S40, 507),
    (V16_7B, f"{S45},text=1", 554),
    (V16_7B, f"{S45},text=0.7", 531),
    (V16_13B, "full", 1841),
    (V16_13B, S40, 792),
    (V16_13B, f"{S45},text=1", 865),
    (V16_13B, f"{S45},text=0.7", 828),
]


# Stored % and Used % of the same table, by image tokens and kind of row; 7B and 13B agree.
PUBLISHED: dict[tuple[int, str], tuple[int, int]] = {
    (576, "full"): (100, 100),
    (576, "S40"): (46, 46),
    (576, "C30"): (50, 40),
    (576, "T"): (48, 38),
    (2135, "full"): (100, 100),
    (2135, "S40"): (43, 43),
    (2135, "C30"): (47, 36),
    (2135, "T"): (45, 35),
}


class ShapeOnly(Prefill):
    """A prefill without a model: random scores choose, and storage exists as shapes alone."""

    def lay_out(self, layer: int, shape: Shape, generator: torch.Generator) -> None:
        """Choose and store one layer, through the same policy and storage code as ever."""
        layout = self._turn
        q, k = torch.randn(2, layout.columns, shape.heads, 1, generator=generator)
        received = Received(q, k)
        kept = self.policy.retain(layer, layout, received)
        self._onward = self.policy.narrow(layer, layout, received)
        rows = torch.empty(
            layout.columns, shape.heads, shape.head_dim, dtype=torch.float16, device="meta"
        )
        self.row.layers.append(self._store(layer, rows, rows, layout, kept))
        self.narrow(layer)


def shape_report(shape: Shape, spec: str) -> CacheReport:
    """What the cache counts for the paper's average sequence under ``spec``."""
    policy, meta = parse(spec), torch.device("meta")
    pools = [Pool(shape.heads, shape.head_dim, torch.float16, meta) for _ in range(shape.layers)]
    end = shape.system + shape.image
    layout = Layout.of_tokens(end + shape.text, [(shape.system, end)], torch.device("cpu"))
    step = ShapeOnly(pools, policy, layout, 0)
    generator = torch.Generator().manual_seed(0)
    for layer in range(shape.layers):
        step.lay_out(layer, shape, generator)
    return report(step.row, pools)


def table() -> list[dict[str, Any]]:
    """The rows of the paper's table 3 with our bytes beside them."""
    rows = []
    for shape, spec, paper in PAPER:
        counted = shape_report(shape, spec)
        used = counted.bytes_used / MB
        stored_published, used_published = PUBLISHED[shape.image, policy_kind(spec)]
        rows.append(
            {
                "model": shape.model,
                "policy": spec,
                "paper_mb": paper,
                "used_mb": round(used, 1),
                "difference_%": round(100 * (used / paper - 1), 1),
                "allocated_mb": round(counted.bytes_allocated / MB, 1),
                "paper stored %": stored_published,
                "stored %": round(100 * counted.stored_share, 1),
                "paper used %": used_published,
                "used %, short answers": round(100 * used_share(shape, counted, 0.2), 1),
                "used %": round(100 * used_share(shape, counted, 1 / 3), 1),
            }
        )
    return rows


# Full-size models with one picture: 24 by 24 patches, and the most that LLaVA-1.6 makes of one.
WITH_ONE_PICTURE = [
    Shape(f"{name}, {image:,} image tokens", layers, heads, 35, image, 35)
    for name, layers, heads in (("7B", 32, 32), ("13B", 40, 40))
    for image in (576, 2880)
]
# An A4 page at 300 dpi, of models whose query heads share keys: layers, KV heads, image tokens.
WITH_ONE_PICTURE += [
    Shape(f"{name}, {image:,} image tokens", layers, heads, 35, image, 35)
    for name, layers, heads, image in (
        ("Qwen3-VL-2B", 28, 8, 8580),
        ("Qwen3-VL-4B and 8B", 36, 8, 8580),
        ("Qwen2.5-VL-3B", 36, 2, 11125),
        ("Qwen2.5-VL-7B", 28, 4, 11125),
    )
]
IN_FORMATS = (
    "full",
    "avl:secondary=0.9,core=0.6,prefill=1,text=1",
    "avl:secondary=0.45,core=0.3,prefill=1,text=1",
    "sift:format=k8v8",
    "sift:format=k4v4",
    "sift:format=k4v2",
    "avl:secondary=0.3,core=none,prefill=1,text=1,format=k8v4,minor=k4v2",
    "avl:secondary=0.45,core=0.3,prefill=1,text=1,format=k4v4",
    "zipvl:share=0.5",
    "zipvl:share=0.5,format=plain,minor=freed",
)


def formats_table() -> list[dict[str, Any]]:
    """Bytes by format: the picture's share beside 16 bits, and a token's in all layers."""
    rows = []
    for shape in WITH_ONE_PICTURE:
        for spec in IN_FORMATS:
            counted = shape_report(shape, spec)
            rows.append(
                {
                    "model": shape.model,
                    "policy": spec,
                    "used MB": round(counted.bytes_used / MB, 1),
                    "allocated MB": round(counted.bytes_allocated / MB, 1),
                    "full MB": round(counted.bytes_full / MB, 1),
                    "picture stored %": round(100 * counted.image_stored_share, 1),
                    "MB by format": ", ".join(
                        f"{name} {held / MB:.1f}" for name, held in counted.formats.items() if held
                    ),
                }
            )
    return rows


# -- features beside the sequence -----------------------------------------------------------------


@dataclass(frozen=True)
class CrossShape:
    """A Llama-3.2-Vision: its text and cross layers, of 8 KV heads of 128 each.

    ``kept`` is the share of features that Trimmed Llama's .25 keeps of it, as published.
    """

    model: str
    layers: int
    cross_layers: int
    hidden: int
    kept: float


LLAMAS = (
    CrossShape("Llama-3.2-Vision-11B", 32, 8, 4096, 0.615),
    CrossShape("Llama-3.2-Vision-90B", 80, 20, 8192, 0.742),
)
WHOLE_PICTURE, WORDS = 4 * 1601, (128, 1024, 4096)  # features of four tiles; tokens of text


class KeepsShare(Policy):
    """Keeps the first of a picture's features, as many as are published."""

    name = "share"
    share = 1.0

    def features(self, received: Tensor) -> Tensor:
        """See ``Policy.features``."""
        return torch.arange(int(self.share * received.shape[1]), device=received.device)


def stored_picture(shape: CrossShape, kept: float) -> CrossStored:
    """A whole picture in the pools of all cross layers, through the cache's own first pass."""
    meta, policy = torch.device("meta"), KeepsShare()
    policy.share = kept
    pools = CrossPools([Pool(8, 128, torch.bfloat16, meta) for _ in range(shape.cross_layers)])
    features = torch.empty(WHOLE_PICTURE, shape.hidden, dtype=torch.bfloat16, device=meta)
    looking = Looking([Sight(0, features, WHOLE_PICTURE)], pools, policy=policy)
    positions = torch.arange(2)
    q = torch.empty(2, 32, 128, dtype=torch.bfloat16, device=meta)
    for layer in range(shape.cross_layers):
        view = looking.view(layer, positions)
        assert view is not None, "there is a picture"
        view.attend(q, lambda given: (given.new_empty(len(given), 8, 128),) * 2)
    (stored,) = looking.keep()
    return stored


def cross_table() -> list[dict[str, Any]]:
    """Bytes of pictures and of text, whole and trimmed, by rows that are decoded together."""
    rows = []
    for shape in LLAMAS:
        whole, trimmed = (stored_picture(shape, kept).nbytes for kept in (1.0, shape.kept))
        text = [shape_report(Shape("", shape.layers, 8, 0, 0, words), "full") for words in WORDS]
        for batch in (1, 2, 4, 8, 16, 32):
            held = {"picture GB": whole, "trimmed GB": trimmed}
            for words, each in zip(WORDS, text, strict=True):
                held[f"text of {words:,} GB"] = each.bytes_used
            rounded = {key: round(batch * size / 1e9, 3) for key, size in held.items()}
            kept = {"trimmed to %": round(100 * shape.kept, 1)}
            rows.append({"model": shape.model, "rows": batch} | kept | rounded)
    return rows


def policy_kind(spec: str) -> str:
    """Which of the paper's rows a policy is."""
    policy = parse(spec)
    if not isinstance(policy, Avl):
        return "full"
    return "S40" if policy.core is None else "T" if policy.text < 1 else "C30"


def used_share(shape: Shape, counted: CacheReport, full_steps: float) -> float:
    """Tokens attended / tokens seen when ``full_steps`` of the steps attend all stored ones."""
    core, stored = counted.core.mean, counted.stored.mean
    attended = shape.system + core + full_steps * (stored - core) + counted.text.mean
    return attended / (shape.system + shape.image + shape.text)


# -- the peak of a prefill ------------------------------------------------------------------------


def live_bytes(kv_heads: int, head_dim: int) -> int:
    """Bytes of all live tensors shaped like keys or values, each place in memory once.

    Views count with their own size: the decoder's projections may share a tensor with the queries.
    """
    places: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) is Tensor and thing.shape[1:] == (kv_heads, head_dim):
            place = thing.data_ptr()
            places[place] = max(places.get(place, 0), thing.numel() * thing.element_size())
    return sum(places.values())


class Watched(Prefill):
    """Notes the most bytes of keys and values that were alive after a layer was stored."""

    peak = 0

    def _store(self, layer: int, k: Tensor, v: Tensor, layout: Layout, kept: Kept) -> Stored:
        stored = super()._store(layer, k, v, layout, kept)
        self.peak = max(self.peak, live_bytes(*k.shape[1:]))
        return stored


class NaiveOrder(Watched):
    """The order to compare with: all layers' full keys and values first, compacted at the end."""

    def _keep(self, layer: int, k: Tensor, v: Tensor, layout: Layout, received: Received) -> None:
        """Hold the layer's keys and values whole until the last layer is through."""
        self.waiting = [*getattr(self, "waiting", []), (k, v, layout, received)]
        self._onward = self.policy.narrow(layer, layout, received)
        if layer + 1 < len(self.pools):
            return
        for number, (*numbers, layout_, received_) in enumerate(self.waiting):
            kept = self.policy.retain(number, layout_, received_)
            self.row.layers.append(self._store(number, *numbers, layout_, kept))


def seeded(layers: int = 8, heads: int = 8, kv_heads: int = 4, head_dim: int = 64) -> Decoder:
    """A small decoder with seeded weights; its answers mean nothing, its sizes do."""
    size = heads * head_dim
    config = DecoderConfig(
        vocab=256, hidden=size, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        mlp=2 * size, rope_theta=10000.0, norm_eps=1e-5, qkv_bias=False, tied_head=False,
        context=4096,
    )  # fmt: skip
    decoder = Decoder(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in decoder.named_parameters():
        weight.fill_(1.0) if "norm" in name else weight.normal_(0, 0.05, generator=generator)
    prepare(decoder, torch.device("cpu"))
    return decoder


def new_pools(decoder: Decoder) -> list[Pool]:
    config = decoder.config
    return [
        Pool(config.kv_heads, config.head_dim, torch.float32, torch.device("cpu"))
        for _ in range(config.layers)
    ]


@torch.inference_mode()
def run_prefill(
    decoder: Decoder, policy: Policy, order: type[Prefill], tokens: int, image: int, new: int
) -> tuple[Prefill, list[Pool]]:
    """A prompt of ``tokens`` with a picture of ``image`` tokens after the first 35."""
    pools = new_pools(decoder)
    layout = Layout.of_tokens(tokens, [(35, 35 + image)], torch.device("cpu"))
    step = order(pools, policy, layout, new)
    generator = torch.Generator().manual_seed(1)
    decoder(torch.randn(tokens, decoder.config.hidden, generator=generator), step)
    return step, pools


def peaks(decoder: Decoder, tokens: int = 646, image: int = 576) -> list[dict[str, Any]]:
    """Measured peak of K and V during a prefill, both orders, beside what it should be."""
    rows = []
    token = 2 * decoder.config.kv_heads * decoder.config.head_dim * 4
    for spec in ("full", S40, f"{S45},text=0.7"):
        for order in (Watched, NaiveOrder):
            before = live_bytes(decoder.config.kv_heads, decoder.config.head_dim)
            step, pools = run_prefill(decoder, parse(spec), order, tokens, image, 1)
            assert isinstance(step, Watched)
            counted = report(step.row, pools)
            rows.append(
                {
                    "policy": spec,
                    "order": "layer by layer" if order is Watched else "compact at the end",
                    "peak_mb": round((step.peak - before) / MB, 3),
                    "compacted_mb": round(counted.bytes_allocated / MB, 3),
                    "one_layer_full_mb": round(tokens * token / MB, 3),
                    "all_layers_full_mb": round(decoder.config.layers * tokens * token / MB, 3),
                }
            )
            del step, pools
    return rows


# -- a decode step --------------------------------------------------------------------------------


@torch.inference_mode()
def decode_times(decoder: Decoder, row: Row, pools: list[Pool], policy: Policy, n: int) -> float:
    """Median milliseconds of ``n`` decode steps."""
    decoding = Decoding(pools, [row])
    generator, times = torch.Generator().manual_seed(2), []
    for _ in range(n):
        hidden = torch.randn(1, decoder.config.hidden, generator=generator)
        began = time.perf_counter()
        decoder(hidden, decoding)
        decoding.advance()
        times.append(1000 * (time.perf_counter() - began))
    decoding.settle(0)
    return sorted(times)[n // 2]


def steps(decoder: Decoder, n: int = 48) -> list[dict[str, Any]]:
    """Bytes and time per token of the default policy beside full."""
    rows = []
    for spec in ("full", S40, f"{S45},text=0.7"):
        step, pools = run_prefill(decoder, parse(spec), Prefill, 2248, 2135, n + 1)
        median = decode_times(decoder, step.row, pools, step.policy, n)
        counted = report(step.row, pools)
        rows.append(
            {
                "policy": spec,
                "ms_per_token": round(median, 2),
                "used_mb": round(counted.bytes_used / MB, 2),
                "allocated_mb": round(counted.bytes_allocated / MB, 2),
                "full_mb": round(counted.bytes_full / MB, 2),
                "stored_%": round(100 * counted.stored_share, 1),
                "attended_%": round(100 * counted.used_share, 1),
            }
        )
    return rows


def main() -> None:
    options = read_options()
    measured = {
        "table": table_part,
        "formats": formats_part,
        "cross": cross_part,
        "peak": peak_part,
        "steps": steps_part,
    }
    for part in common.progress(options.parts, "tables"):
        settings, rows, notes = measured[part]()
        name = f"{options.name}-{part}"
        settings = {"seed": 0, **settings}
        path = common.write_report(name, settings, rows, notes, options.out)
        print(path.with_suffix(".md").read_text())


def read_options() -> argparse.Namespace:
    parser = common.make_parser(__doc__, name="memory")
    parser.add_argument("--table", action="store_true", help="what needs shapes alone")
    options = common.read_options(parser, lambda o: [f"{o.name}-{part}" for part in parts(o)])
    options.parts = parts(options)
    return options


def parts(options: argparse.Namespace) -> list[str]:
    """Which tables these options ask for."""
    shapes = ["table", "formats", "cross"]
    return shapes if options.table else [*shapes, "peak", "steps"]


def table_part() -> Part:
    note = (
        "Sequences: 35 + 576 + 35 tokens (1.5), 35 + 2135 + 78 (1.6); fp16, MB = 10^6 bytes. The "
        "two 1.6 rows with T70 lie above the paper by its own rule; nothing is adjusted. Used: "
        "with K = 3 one step in three attends all that is stored; in answers of one to ten "
        "tokens, as the paper's mostly are, about one in five does: its figures agree with that."
    )
    return {"dtype": "float16", "device": "meta"}, table(), [note]


def formats_part() -> Part:
    note = (
        "One picture, 35 tokens before it and 35 behind; fp16, MB = 10^6 bytes, scales included. "
        "Sift reads a part of the values only; what it stores does not depend on that. Under ZipVL "
        "half of all tokens are important here, text as well as picture."
    )
    return {"dtype": "float16", "device": "meta"}, formats_table(), [note]


def cross_part() -> Part:
    note = (
        "One picture of four tiles, 6,404 features, for each row; bf16, GB = 10^9 bytes. Trimmed "
        "Llama at ratio .25 keeps the published share; how many it keeps of a trained model's "
        "pictures only such a model can say."
    )
    return {"dtype": "bfloat16", "device": "meta"}, cross_table(), [note]


def peak_part() -> Part:
    note = "Peak: K and V alive right after a layer was stored, in the cache or out of it."
    return toy_settings() | {"tokens": 646}, peaks(seeded()), [note]


def steps_part() -> Part:
    return toy_settings() | {"tokens": 2248}, steps(seeded()), []


def toy_settings() -> dict[str, Any]:
    """What the small seeded decoder is."""
    settings = {"dtype": "float32", "device": "cpu", "threads": torch.get_num_threads()}
    return settings | {"layers": 8, "heads": 8, "kv_heads": 4, "head_dim": 64}


if __name__ == "__main__":
    main()
