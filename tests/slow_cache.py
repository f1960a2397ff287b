"""A cache fed with random queries, keys and values, and the same as plain lists of tokens."""

from __future__ import annotations

import math

import torch

from engine.cache.decode import Decoding
from engine.cache.pool import Pool
from engine.cache.prefill import Prefill
from engine.policies.layout import Layout
from tests.cache_run import attended

LAYERS, HEADS, KV, DIM = 3, 6, 2, 16
GROUP = HEADS // KV
CPU = torch.device("cpu")


def draw(layer, positions, heads):
    """The same random q, k or v for a position, however it is asked for."""
    rows = []
    for position in positions:
        seed = torch.Generator().manual_seed(1 + position * 100 + layer * 10 + heads)
        rows.append(torch.randn(heads, DIM, generator=seed) * 1.5)
    return torch.stack(rows)


def tokens(layer, positions):
    k = draw(layer, positions, KV)
    return draw(layer, positions, HEADS), k, k.flip(-1)


class Cache:
    """The cache under test, fed with random queries, keys and values."""

    def __init__(self, policy):
        self.pools = [Pool(KV, DIM, torch.float32, CPU) for _ in range(LAYERS)]
        self.policy, self.row, self.decoding = policy, None, None

    def prefill(self, count, spans, new_tokens):
        past = self.settled()
        seen = past.seen if past else 0
        layout = Layout.of_tokens(count, spans, CPU)
        step = Prefill(self.pools, self.policy, layout, new_tokens, past)
        outs, alive = [], list(range(seen, seen + count))
        for layer in range(LAYERS):
            outs.append(
                dict(zip(alive, attended(step.view(layer), *tokens(layer, alive)), strict=True))
            )
            kept = step.narrow(layer)
            alive = alive if kept is None else [alive[i] for i in kept]
        self.row = step.row
        return outs

    def decode(self):
        self.decoding = self.decoding or Decoding(self.pools, [self.row])
        position = int(self.decoding.positions)
        outs = [
            attended(self.decoding.view(layer), *tokens(layer, [position]))[0]
            for layer in range(LAYERS)
        ]
        self.decoding.advance()
        return outs

    def kept(self):
        """Positions by layer and KV head."""
        row = self.settled()
        places = [stored.whole_layout().positions.expand(KV, -1) for stored in row.layers]
        return [[sorted(head) for head in layer.tolist()] for layer in places]

    def settled(self):
        """The row, complete; decoding may go on."""
        row = self.decoding.settle(0) if self.decoding else self.row
        self.row, self.decoding = row, None
        return row


class Slow:
    """A layer that keeps lists of tokens per KV head; subclasses say which ones go."""

    def __init__(self, layer):
        self.layer, self.seen = layer, 0
        self.kept = [[] for _ in range(KV)]
        self.weight = [{} for _ in range(KV)]  # attention received, by position

    def attend(self, position):
        """Attention of one token over what every head keeps; returns weights by head too."""
        q = draw(self.layer, [position], HEADS)[0].double()
        out, rows = [], []
        for head in range(HEADS):
            places = self.kept[head // GROUP]
            k = draw(self.layer, places, KV)[:, head // GROUP].double()
            weights = torch.softmax(k @ q[head] / math.sqrt(DIM), 0)
            out.append(weights @ k.flip(-1))
            rows.append(dict(zip(places, weights.tolist(), strict=True)))
        return torch.stack(out), rows

    def prefill(self, alive, spans):
        """Dense causal attention, then ``shrink``; returns outputs by position."""
        outs, rows = {}, {}
        for position in alive:
            self.seen += 1
            for head in range(KV):
                self.kept[head].append(position)
            outs[position], rows[position] = self.attend(position)
        self.after_prefill(rows, spans)
        return outs

    def decode(self, position):
        self.seen += 1
        for head in range(KV):
            self.kept[head].append(position)
        out, rows = self.attend(position)
        self.after_step(rows)
        return out

    def after_prefill(self, rows, spans):
        pass

    def after_step(self, rows):
        pass

    def let_through(self, alive):
        return alive
