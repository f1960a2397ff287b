"""A layer that attends several pools in one call: a sequence spread over them answers as one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.cache.listed import Listed, ListedAttention
from engine.cache.pool import Pool
from engine.models.decoder import Decoder
from engine.ops import native
from engine.ops.rotary import Tables, rotated
from tests.cache_run import embeddings, seeded_decoder

ROOM = 32  # slots of each pool, only some of which are listed


class SpreadView:
    """One layer: token number t goes into pool t % pools, and every pool is attended."""

    def __init__(self, decoder: Decoder, pools: int, offsets: list[int]) -> None:
        config = decoder.config
        self.lists = []
        for offset in offsets[:pools]:
            pool = Pool(config.kv_heads, config.head_dim, torch.float32, torch.device("cpu"))
            pool.take(ROOM)
            slots = (torch.arange(ROOM, dtype=torch.int32) * 5 + offset) % ROOM
            self.lists.append(Listed(pool, slots.view(1, 1, -1), torch.zeros(1, 1).int()))
        first, *others = self.lists
        self.attention = ListedAttention([first, *others])
        self.scores = torch.empty(1, config.heads, ROOM * pools), torch.empty(1, config.heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tables: Tables) -> Tensor:
        stored = sum(int(each.count) for each in self.lists)
        to = self.lists[stored % len(self.lists)]
        slot = to.slots[0, 0, int(to.count)]
        to.pool.k[slot], to.pool.v[slot] = rotated(k, tables)[0], v[0]
        to.count.add_(1)
        out = self.attention(rotated(q, tables), self.scores).clone()
        weights = (self.scores[0] - self.scores[1][..., None]).exp()
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, q.shape[1]))
        assert int((weights > 0).sum()) == (stored + 1) * q.shape[1]
        return out


class SpreadStep:
    """Tokens of one sequence, one a step."""

    def __init__(self, decoder: Decoder, pools: int) -> None:
        self.views = [SpreadView(decoder, pools, [3, 8, 0]) for _ in decoder.layers]
        self.rotary = decoder.rotation.begin(1)[None]
        self.positions = torch.zeros(1, dtype=torch.int64)

    def view(self, layer: int) -> SpreadView:
        return self.views[layer]

    def chunks(self, tokens: int) -> list[slice]:
        return [slice(None)]

    def narrow(self, layer: int) -> None:
        return None


@torch.inference_mode()
def answer(decoder: Decoder, pools: int, tokens: int = 24) -> Tensor:
    """Logits of every token of a sequence whose keys and values lie in so many pools."""
    step, said = SpreadStep(decoder, pools), []
    for token in embeddings(tokens, seed=5):
        said.append(decoder.logits(decoder(token[None].clone(), step)))
        step.positions += 1
    return torch.cat(said)


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("pools", [2, 3])
def test_a_sequence_over_several_pools_answers_as_over_one(
    pools: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "native" and native.backend().name == "torch":
        pytest.skip("the native module is not built")
    if kernels == "torch":
        monkeypatch.setattr(native, "usable", lambda q, pool: False)
    decoder = seeded_decoder(seed=2)
    torch.testing.assert_close(answer(decoder, pools), answer(decoder, 1), rtol=0, atol=1e-5)
