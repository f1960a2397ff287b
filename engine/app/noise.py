"""What goes to stderr beside errors: load line, notes and figures."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..options import WEIGHTS

if TYPE_CHECKING:
    from ..cache.report import CacheReport
    from ..engine import Engine
    from ..pictures.image import LoadedImage
    from ..prompts.prompt import Prompt
    from ..result import Result


class Noise:
    """What goes to stderr beside errors: only on a terminal, or where it is asked for."""

    def __init__(self, options: argparse.Namespace, pictures: Iterable[LoadedImage]) -> None:
        self.options = options
        self.wanted = not options.quiet and (sys.stderr.isatty() or options.verbose)
        self.weights: dict[str, int] = {}  # bytes by format
        self.processes = 1  # that share the model
        for picture in pictures:
            for note in picture.notes:
                self.note(note)

    def note(self, text: str) -> None:
        """One line on stderr, unless --quiet."""
        if not self.options.quiet:
            print(f"note: {text}", file=sys.stderr)

    def loaded(self, engine: Engine) -> None:
        """The load line, and that the default cache is an approximation."""
        for flag in ("graphs", "sync_selection"):
            if getattr(self.options, flag) and engine.device.type == "cpu":
                self.note(f"--{flag.replace('_', '-')} changes nothing on a CPU")
        drawn = self.options.temperature or engine.published.get("temperature")
        if not (drawn or self.options.batch):  # whose lines may have their own
            for flag, default in {"top_k": 0, "top_p": 1, "seed": 0}.items():
                if getattr(self.options, flag) not in (None, default):
                    self.note(f"--{flag.replace('_', '-')} changes nothing without --temperature")
        if more := _more_bits(engine):
            self.note(more)
        self.weights = engine.weights
        self.processes = engine.model.decoder.ranks.size
        if not self.wanted:
            return
        from ..ops.native import backend

        dtype = str(engine.dtype).removeprefix("torch.")
        few = [name for name in self.weights if name in WEIGHTS]
        kinds = " and ".join([*few, dtype])
        print(
            f"{engine.name} loaded in {engine.load_seconds:.1f} s: {kinds} on {engine.device}, "
            f"{backend().name} kernels, cache {engine.policy.spec}",
            file=sys.stderr,
        )
        if self.options.model is None:
            print(
                "the embedded tiny model knows drawings and printed text; "
                "--model FOLDER runs a real one",
                file=sys.stderr,
            )
        if self.options.cache is None:
            print(
                "the default cache approximates the model; --cache full is exact", file=sys.stderr
            )

    def prompt(self, prompt: Prompt) -> None:
        """The rendered prompt and its ids, a picture's as how many times its id."""
        ids: list[str] = []
        for segment in prompt.segments:
            span = prompt.token_ids[segment.start : segment.end]
            ids += map(str, span) if segment.kind == "text" else [f"{span[0]}*{len(span)}"]
        print(f"prompt: {prompt.text!r}\nids: {' '.join(ids)}", file=sys.stderr)

    def finished(self, result: Result) -> None:
        """The summary line, or all figures with --stats."""
        if self.options.quiet or not (self.wanted or self.options.stats):
            return
        if self.options.stats:
            self.figures(result)
        else:
            self.summary(result)

    def summary(self, result: Result) -> None:
        """Tokens per tier, speed and bytes, in one line."""
        times, cache = result.timings, result.cache
        print(
            f"{_tiers(cache)} | "
            f"first token {times.ttft * 1e3:.0f} ms, {times.tokens_per_second:.1f} tokens/s | "
            f"cache {cache.bytes_used / 1e6:.2f} MB of {cache.bytes_full / 1e6:.2f} MB full",
            file=sys.stderr,
        )

    def figures(self, result: Result) -> None:
        """Everything that is known about an answer, in two lines."""
        from ..ops.native import cpu_isa

        self.summary(result)
        times, cache = result.timings, result.cache
        weights = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in self.weights.items())
        print(
            f"{result.prompt_tokens} prompt tokens, {len(result.token_ids)} generated, "
            f"ended by {result.finish_reason} | load {times.load:.2f} s, "
            f"picture {times.picture * 1e3:.0f} ms, prefill {times.prefill * 1e3:.0f} ms, "
            f"{times.per_token * 1e3:.1f} ms per token | stored {cache.stored_share:.1%}, "
            f"used {cache.used_share:.1%}, text {cache.text.mean:.0f} kept, "
            f"{cache.bytes_allocated / 1e6:.2f} MB allocated{_pictures(cache)} | "
            f"weights {weights} | "
            f"CPU kernels: {cpu_isa() or 'none'}{self._shared()}",
            file=sys.stderr,
        )

    def _shared(self) -> str:
        """That the figures are of one process among several."""
        n = self.processes
        return f" | one of {n} processes, whose sums make steps eager" if n > 1 else ""


def _more_bits(engine: Engine) -> str:
    """Which layers keep keys in more bits than the cache policy asks for; empty: none."""
    asked = [int(bits) for bits in re.findall(r"=k(\d+)v", engine.policy.spec)]
    least = engine.model.decoder.key_bits() if asked else []
    layers = [str(layer) for layer, bits in enumerate(least) if bits > min(asked)]
    if not layers:
        return ""
    return f"keys of layers {', '.join(layers)} have 8 or 16 bits: their biases are large"


def _tiers(cache: CacheReport) -> str:
    """Image tokens by tier, or the features that stand in their place."""
    if cache.features:
        all_ = f" of {cache.features_whole:,}" if cache.features < cache.features_whole else ""
        return f"{cache.features:,}{all_} features of pictures in every cross layer"
    return (
        f"{cache.image_tokens} image tokens: {cache.core.mean:.0f} core, "
        f"{cache.stored.mean:.0f} stored, {cache.minor.mean:.0f} freed"
    )


def _pictures(cache: CacheReport) -> str:
    """What pictures take by format, and what of it a step reads; empty without a picture."""
    if not (cache.image_tokens or cache.features):
        return ""
    held = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in cache.formats.items() if size)
    what = "features of pictures" if cache.features else "pictures"
    said = f" | {what} {held}: {cache.image_stored_share:.1%} of full"
    said += f", {cache.image_read_share:.1%} read a step"
    if cache.values_read < 1:
        said += f" ({cache.values_read:.1%} of values, {cache.left_out:.1%} of attention left out)"
    return said
