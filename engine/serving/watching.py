"""What a client may watch while it is answered: where the tokens of its pictures lie in the cache,
step by step, and which of them are looked at.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..cache.observe import CORE, Observed
from ..engine import Engine
from ..insight.page import panel_values
from ..insight.panels import Panel, bytes_of, panels_of
from ..insight.recorder import image_heads


class Watching:
    """An observer that means over the layers of a pass; the latest pass is there to be taken.

    A value has a byte for each image token, in base64: ``stored``, what share of the bits of a
    plain token it is kept in; ``core``, in what share of the layers it is core; ``attention``, the
    root of what the last query gave it, beside the most that any of them got. Where cross layers
    look at pictures, layers are these, and image tokens their features.
    """

    def __init__(self, engine: Engine, pictures: Sequence[Image.Image]) -> None:
        model, processor = engine.model, engine.processor
        panels = [panels_of(model, processor, each) for each in processor.prepare_all(pictures)]
        self._panels: list[list[Panel]] | None = panels
        self._across = model.cross_layers > 0
        self._layers = model.cross_layers or model.decoder.config.layers
        self._bits = 16 * model.decoder.norm.weight.element_size()  # of a key and a value
        self._sum, self._seen = torch.zeros(3, 0), 0
        self._latest: dict[str, Any] | None = None

    def observe(self, seen: Observed) -> None:
        """See ``Observer.observe``."""
        if seen.across != self._across:
            return
        self._seen = len(seen.image_spans)
        stored = seen.bits.float() / self._bits
        attention = image_heads(seen).mean(0)
        mine = torch.stack([stored, (seen.tiers == CORE).float(), attention]).cpu()
        self._sum = self._sum + mine if seen.layer else mine
        if seen.layer == self._layers - 1:
            stored, core, attention = self._sum / self._layers
            looked = (attention / attention.amax().clamp_min(1e-30)).sqrt()
            values = {"stored": stored, "core": core, "attention": looked}
            self._latest = {"step": seen.step} | {key: _bytes(v) for key, v in values.items()}

    def take(self) -> dict[str, Any] | None:
        """The latest pass, if it has not been taken; before the first one the pictures' panels."""
        latest, self._latest = self._latest, None
        if latest is None:
            return None
        panels, self._panels = self._panels, None
        if panels is None:
            return latest
        # Of several pictures cross layers see the last ones alone.
        return {"panels": panel_values(panels[len(panels) - self._seen :])} | latest


def _bytes(shares: Tensor) -> str:
    """Shares of 1 as bytes in base64.

    >>> _bytes(torch.tensor([0.0, 0.5, 1.0]))
    'AID/'
    """
    levels = shares.clamp(0, 1).mul(255).round().to(torch.uint8)
    return base64.b64encode(bytes_of(levels)).decode("ascii")
