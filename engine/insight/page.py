"""The attention page: one HTML file that shows what was looked at and kept, token by token.

Everything is inside the file: opened from a disk or a mail, it asks the network for nothing.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from os import PathLike
from typing import TYPE_CHECKING, Any, Unpack

import torch
from PIL import Image
from torch import Tensor

from ..errors import OptionError
from ..files import PAGE_SIGNATURE, check_target, write_whole
from ..options import OptionValues
from ..pictures.encoded import EncodedImage, Picture, listed
from ..pictures.image import open_image
from ..pictures.preprocess import Pixels
from ..prompts.tokenizer import StreamDecoder
from ..result import Result
from .compare import first_difference
from .panels import Panel, bytes_of, panels_of
from .recorder import Recorder, find_sinks

if TYPE_CHECKING:
    from ..engine import Engine
    from ..prompts.messages import Messages

# Bytes, before compression, of the strongest patches of every layer and of one layer's heads.
LAYER_BYTES, HEAD_BYTES = 800_000, 200_000


def stream_with_page(
    engine: Engine,
    path: str | PathLike[str],
    prompt: Messages,
    images: Sequence[Picture] | None,
    *,
    raw: bool = False,
    head_layer: int | None = None,
    **options: Unpack[OptionValues],
) -> Iterator[str | Result]:
    """``Engine.stream``, which also writes the page of the answer to ``path``.

    Unless the engine's cache is ``full``, the exact model answers as well, to be compared.
    ``head_layer`` is the layer whose heads are shown one by one (default: the middle one). Of a
    model whose cross layers look at pictures, these are the layers, and features the image tokens.
    Raises OptionError without a picture or for a layer that is not there.
    """
    across = engine.model.cross_layers
    layers = across or engine.model.decoder.config.layers
    recorder = Recorder(layers // 2 if head_layer is None else head_layer, across=across > 0)
    if not 0 <= recorder.head_layer < layers:
        raise OptionError(f"layer {head_layer} is not in the model", hint=f"use 0 to {layers - 1}")
    check_target("the attention page", path, ours=PAGE_SIGNATURE)
    panels = _panels(engine, images)
    for piece in engine.stream(prompt, images, raw=raw, observer=recorder, **options):
        if isinstance(piece, str):
            yield piece
        else:
            result = piece
    exact = None
    if engine.policy.spec != "full":
        exact = engine.with_cache("full").generate(prompt, images, raw=raw, **options)
    shown = prompt if isinstance(prompt, str) else engine.render(prompt, images, raw=raw).text
    data = page_data(engine, shown, panels, recorder, result, exact)
    write_whole(path, render(data).encode("utf-8", "backslashreplace"), PAGE_SIGNATURE)
    yield result


def page_data(
    engine: Engine,
    prompt: str,
    panels: Sequence[Sequence[Panel]],
    recorder: Recorder,
    result: Result,
    exact: Result | None,
) -> dict[str, Any]:
    """What the page shows, as values for JSON; ``panels`` are those of every picture."""
    means = mean_over_layers(recorder)
    moments = recorder.passes
    panels = panels[len(panels) - len(recorder.image_spans) :]  # cross layers see the last alone
    return {
        "model": engine.name,
        "cache": engine.policy.spec,
        "prompt": prompt,
        "steps": _labels(token_pieces(engine, result.token_ids), len(moments)),
        "exact": None if exact is None else token_pieces(engine, exact.token_ids),
        "differs": None if exact is None else first_difference(result.token_ids, exact.token_ids),
        "positions": [p for start, end in recorder.image_spans for p in range(start, end)],
        "panels": panel_values(panels),
        "layers": len(moments[0]),
        "across": recorder.across,
        "headLayer": recorder.head_layer,
        "sinks": find_sinks(means),
        "text": [_mean([moment.text.shape[1] for moment in row]) for row in moments],
        "bytes": _bytes(recorder, result),
        "blob": pack(recorder, means),
    }


def render(data: dict[str, Any]) -> str:
    """The page around ``data``. No text of the model can end the script that holds it."""
    page, style, script = (
        files(__package__).joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "page.js")
    )
    # In JSON these three stand in strings only; escaped there, no markup can be spelled.
    text = json.dumps(data, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    page = page.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    return page.replace("/*DATA*/", text)


def token_pieces(engine: Engine, token_ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; joined they are the text."""
    decoder = StreamDecoder(engine.tokenizer)
    pieces = [decoder.push(token) for token in token_ids]
    if pieces:
        pieces[-1] += decoder.flush()
    return pieces


def mean_over_layers(recorder: Recorder) -> Tensor:
    """Attention on the image tokens ``[passes, image tokens]`` fp32, mean over layers and heads."""
    return _image_attention(recorder).mean(1)


def pack(recorder: Recorder, means: Tensor) -> dict[str, Any]:
    """The large arrays: names with their offsets, and all bytes, deflated, in base64.

    Attention is stored as ``round(255 * sqrt(a / highest))`` of its row, which keeps small values
    apart. Of every layer (and head) only the strongest patches are stored once the answer is long:
    all of them would take 4.7 MB for 256 tokens, 32 layers and 576 patches.
    """
    arrays: dict[str, bytes] = {}
    arrays["mean"], arrays["meanHigh"] = _levels(means)
    strongest = {
        "layer": (_image_attention(recorder), LAYER_BYTES),
        "head": (torch.stack(recorder.heads), HEAD_BYTES),
    }
    counts = {}
    for name, (attention, budget) in strongest.items():
        passes, rows, tokens = attention.shape
        count = max(1, min(tokens, budget // (3 * passes * rows)))
        top = attention.topk(count).indices.sort().values
        arrays[name], arrays[name + "High"] = _levels(attention.gather(2, top))
        gaps = top.diff(dim=2, prepend=top.new_zeros(passes, rows, 1))
        arrays[name + "Gap"] = bytes_of(gaps.to(torch.int16))
        counts[name] = [passes, rows, count]
    arrays["tiers"] = _changes(recorder, "tiers")
    arrays["bits"] = _changes(recorder, "bits")
    offsets, at = {}, 0
    for name, content in arrays.items():
        offsets[name] = [at, len(content)]
        at += len(content)
    deflated = zlib.compress(b"".join(arrays.values()), 9)
    return {
        "shapes": counts,
        "arrays": offsets,
        "bytes": base64.b64encode(deflated).decode("ascii"),
    }


def _image_attention(recorder: Recorder) -> Tensor:
    """``[passes, layers, image tokens]`` fp32."""
    return torch.stack(
        [
            torch.stack([recorder.image_attention(n, layer) for layer in range(len(moments))])
            for n, moments in enumerate(recorder.passes)
        ]
    ).float()


def _levels(attention: Tensor) -> tuple[bytes, bytes]:
    """Levels (uint8) relative to each last-axis row's highest value, and those values (fp32)."""
    high = attention.amax(-1, keepdim=True)
    levels = (attention / high.clamp_min(1e-30)).sqrt().mul(255).round()
    return bytes_of(levels.to(torch.uint8)), bytes_of(high.float())


def _changes(recorder: Recorder, name: str) -> bytes:
    """Tiers, or bits, ``[passes, layers, image tokens]``, each pass as its change from the last.

    They change only where a policy ranks anew, so that nearly all bytes are 0 and deflate well.
    """
    values = torch.stack(
        [torch.stack([getattr(moment, name) for moment in row]) for row in recorder.passes]
    )
    changes = values.clone()
    changes[1:] = values[1:] ^ values[:-1]
    return bytes_of(changes)


def _bytes(recorder: Recorder, result: Result) -> dict[str, list[int]]:
    """Bytes of the tokens (or features) stored after each pass, and those of the full cache."""
    last, cache = recorder.passes[-1], result.cache
    kept = [sum(moment.bytes for moment in row) for row in recorder.passes]
    if recorder.across:
        return {"kept": kept, "full": [round(kept[0] / cache.image_stored_share)] * len(kept)}
    token = cache.bytes_full // (len(last) * (last[0].query + 1))
    full = [token * len(row) * (row[0].query + 1) for row in recorder.passes]
    return {"kept": kept, "full": full}


def _labels(pieces: list[str], passes: int) -> list[str | None]:
    """The text each pass chose; None is the end of the answer."""
    return [*pieces, *[None] * passes][:passes]


def _mean(counts: Sequence[int]) -> float:
    return round(sum(counts) / len(counts), 1)


def _panels(engine: Engine, images: Sequence[Picture] | None) -> list[list[Panel]]:
    """The grids of every picture."""
    images = listed(images)
    if not images:
        raise OptionError("the attention page needs a picture", hint="add --image FILE")
    opened = []
    for image in images:
        if isinstance(image, EncodedImage | Pixels):
            raise OptionError(
                "the attention page needs the pictures themselves",
                hint="give them unencoded, and no videos",
            )
        opened.append(open_image(image).pixels)
    prepared = engine.processor.prepare_all(opened)
    return [panels_of(engine.model, engine.processor, pixels) for pixels in prepared]


def panel_values(panels: Sequence[Sequence[Panel]]) -> list[dict[str, Any]]:
    """Panels for JSON; tokens are now counted through all pictures."""
    values, first = [], 0
    for number, group in enumerate(panels):
        for panel in group:
            prefix = f"picture {number + 1}: " if len(panels) > 1 else ""
            values.append(
                {
                    "title": prefix + panel.title,
                    "picture": _data_uri(panel.picture),
                    "rows": panel.rows,
                    "columns": panel.columns,
                    "placed": panel.placed,
                    "tokens": [first + token for token in panel.tokens],
                    "newlines": [first + token for token in panel.newlines],
                    "beside": panel.beside,
                    "seams": {"rows": panel.row_seams, "columns": panel.column_seams},
                }
            )
        first += sum(len(panel.tokens) + len(panel.newlines) for panel in group)
    return values


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
