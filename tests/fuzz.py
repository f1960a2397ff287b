"""A seeded fuzzer for everything the engine reads from strangers.

Each target takes bytes and either accepts them or raises one of our errors, in one line, within
seconds and without much memory; everything else is a finding. What is found is kept in
tests/corpus/<target>/ and tried first from then on. By hand:

    python -m tests.fuzz --minutes 60 [--seed 7] [--target png]
"""

import argparse
import io
import itertools
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from bench.qwen_checkpoint import QwenShape, toy_tokens, write_qwen, write_tiktoken
from bench.toy_tokenizer import sentencepiece_model as model_bytes
from bench.toy_tokenizer import toy_pieces, toy_tokenizer_json, write_toy_config
from engine.app.batch_file import BatchRun
from engine.app.job import Job
from engine.checkpoint.tensors import Checkpoint
from engine.engine import Engine
from engine.errors import EngineError, OptionError
from engine.loading.families import recognise
from engine.options import make_options
from engine.pictures.image import open_image
from engine.policies.specs import parse
from engine.prompts.tokenizer import StreamDecoder, Tokenizer
from engine.serving.refusal import RefusalError
from engine.serving.request import Limits
from engine.serving.request import parse as parse_request
from tests.checkpoints import Shape, write_llava

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 5.0  # longest computing time for one input; ten times that by the clock
MEMORY = 300 << 20  # most bytes by which one input may raise the process's peak

Read = Callable[[bytes], None]
Mutate = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """One reader: where its inputs start from, how they are changed, and how they are read.

    `read` raises AssertionError if what was accepted is not what an independent reader says.
    """

    seeds: list[bytes]
    read: Read
    mutate: Mutate


@dataclass
class Report:
    """What a run did: inputs by outcome, and the findings as (target, why, input)."""

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    findings: list[tuple[str, str, bytes]] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return self.accepted + self.refused + len(self.findings)


class Hang(BaseException):
    """An input took longer than SECONDS; no `except Exception` swallows it."""


# -- trying one input -----------------------------------------------------------------------------


def attempt(name: str, target: Target, content: bytes, report: Report) -> None:
    """Reads one input and books the outcome."""
    began, peak = time.process_time(), _peak()
    problem = ""
    try:
        with _deadline():
            target.read(content)
        report.accepted += 1
    except EngineError as error:
        problem = _wrong_text(error)
        report.refused += not problem
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a compiled library is no Exception
        problem = f"{type(error).__name__}: {error}"
    seconds = time.process_time() - began
    report.slowest = max(report.slowest, seconds)
    if not problem and _peak() - peak > MEMORY:
        problem = f"took {(_peak() - peak) >> 20} MB"
    if problem:
        report.findings.append((name, problem[:300], content))


def _wrong_text(error: EngineError) -> str:
    """What is wrong with an error's own words, "" if nothing is."""
    text = str(error)
    if not text or "\n" in text or "object at 0x" in text or len(text) > 2000:
        return f"{type(error).__name__} says {text[:200]!r}"
    return "" if error.hint and "\n" not in error.hint else f"{text[:200]!r} has no one-line hint"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _deadline() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang(f"more than {SECONDS} s")

    clocks = ((signal.ITIMER_PROF, signal.SIGPROF, 1), (signal.ITIMER_REAL, signal.SIGALRM, 10))
    before = [signal.signal(number, ring) for _, number, _ in clocks]
    for timer, _, factor in clocks:  # the processor may be shared: its own time counts
        signal.setitimer(timer, factor * SECONDS)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(clocks, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


# -- mutators -------------------------------------------------------------------------------------


def mutate_bytes(draw: random.Random, content: bytes) -> bytes:
    """Changes, cuts, doubles, inserts or swaps a few bytes, mostly near the start."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 5)):
        near = min(len(data), 400) if draw.random() < 0.7 else len(data)
        at, count = draw.randrange(near + 1), draw.choice([1, 1, 2, 4, 8, 32])
        kind = draw.randrange(6)
        if kind == 0 and at < len(data):
            data[at] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
        elif kind == 1:
            del data[at : at + count]
        elif kind == 2:
            data[at:at] = data[at : at + count]
        elif kind == 3:
            data[at:at] = draw.randbytes(count)
        elif kind == 4 and draw.random() < 0.3:
            del data[at:]
        else:  # a number of four bytes, as lengths and sizes are
            value = draw.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, draw.getrandbits(32)])
            data[at : at + 4] = struct.pack(draw.choice(["<I", ">I"]), value)
    return bytes(data)


def mutate_png(draw: random.Random, content: bytes) -> bytes:
    """Changes some chunks' data; their checksums fit again, so that the decoder reads on."""
    if draw.random() < 0.3:
        return mutate_bytes(draw, content)
    made, at = content[:8], 8
    while at < len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        kind, data = content[at + 4 : at + 8], content[at + 8 : at + 8 + size]
        if draw.random() < 0.4:
            data = mutate_bytes(draw, data)
        made += struct.pack(">I", len(data)) + kind + data
        made += struct.pack(">I", zlib.crc32(kind + data))
        at += 12 + size
    return made


HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.0, 0.5, -1.5),
    *(1e308, float("inf"), float("nan"), "", "0", "x", "\0", "\ud800", "\n", "</s>", "<image>"),
    *("a" * 5000, "../x", "/etc/passwd", "\u202e", [], {}, [[]], [None], [0], [2**64], ["x"]),
    *([1, 2, 3], {"": 0}, {"a": None}, {"type": "x"}),
)


def mutate_json(draw: random.Random, content: bytes) -> bytes:
    """Replaces, drops, copies or moves values anywhere in a JSON text; sometimes its bytes."""
    if draw.random() < 0.15:
        return mutate_bytes(draw, content)
    if draw.random() < 0.02:
        return draw.choice([b"[", b'{"a":', b"[[],"]) * draw.choice([900, 5000, 200_000])
    value = json.loads(content)
    for _ in range(draw.randint(1, 3)):
        value = _changed(draw, value)
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def _changed(draw: random.Random, root: Any) -> Any:
    """One change at a random place below `root`, each level as likely as the next."""
    parent, key, node = None, None, root
    while isinstance(node, dict | list) and node and (parent is None or draw.random() < 0.75):
        parent = node
        key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        node = node[key]
    if parent is None:
        return deepcopy(draw.choice(HOSTILE))
    kind = draw.randrange(5)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[draw.choice(["", "x", "\ud800", f"{key}_", "a" * 300])] = parent.pop(key)
    elif kind == 2 and type(node) is int:
        parent[key] = draw.choice([node + 1, node - 1, -node, node * 2, node * 1000, str(node)])
    elif kind == 3 and isinstance(parent, list):
        parent.insert(draw.randrange(len(parent) + 1), deepcopy(node))
    else:
        parent[key] = deepcopy(draw.choice(HOSTILE))
    return root


def mutate_safetensors(draw: random.Random, content: bytes) -> bytes:
    """Changes the header, as JSON or as bytes; the length in front then fits nine times of ten."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    header = draw.choice([mutate_json, mutate_bytes])(draw, header)
    if draw.random() < 0.1:
        data = mutate_bytes(draw, data)
    length = len(header) if draw.random() < 0.9 else draw.choice([0, 1, len(header) + 1, 2**63])
    return struct.pack("<Q", length) + header + data


def mutate_lines(draw: random.Random, content: bytes) -> bytes:
    """Changes one line of several, as JSON where it is some."""
    lines = content.split(b"\n")
    at = draw.randrange(len(lines))
    try:
        json.loads(lines[at])
        lines[at] = mutate_json(draw, lines[at])
    except ValueError:
        lines[at] = mutate_bytes(draw, lines[at])
    return b"\n".join(lines)


# -- targets --------------------------------------------------------------------------------------


def make_targets(folder: Path) -> dict[str, Target]:
    """All targets by name; what they need lies in `folder`."""
    targets = {kind.lower(): _picture(kind) for kind in PICTURES}
    makers = {
        "safetensors": _safetensors,
        "index": _index,
        "tokenizer-json": _tokenizer_json,
        "tokenizer-config": _tokenizer_config,
        "tokenizer-model": _tokenizer_model,
        "tiktoken": _tiktoken,
        "batch": _batch,
        "cache-spec": _cache_spec,
        "request": _request,
    }
    for name, maker in makers.items():
        (folder / name).mkdir()
        targets[name] = maker(folder / name)
    return targets | _configs(folder)


def _request(folder: Path) -> Target:
    """The body of a chat completion."""
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    content = [*parts, {"type": "text", "text": "What?"}]
    plain: dict[str, Any] = {"model": "it", "messages": [{"role": "user", "content": "Hi"}]}
    rich = plain | {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": content},
        ],
        "max_tokens": 5,
        "temperature": 0.5,
        "stop": ["x"],
        "n": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 3,
        "cache": "avl:core=none",
    }

    def read(content: bytes) -> None:
        try:
            asking = parse_request(json.loads(content), "it", Limits())
        except (ValueError, RecursionError):
            raise OptionError("the body is no JSON") from None
        except RefusalError as refusal:
            json.dumps(refusal.body)
            raise OptionError(refusal.message) from None
        make_options(**{"max_new_tokens": 1, **asking.options})
        assert sum(map(len, asking.pictures)) < 1000

    return Target([json.dumps(plain).encode(), json.dumps(rich).encode()], read, mutate_json)


PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _picture(kind: str) -> Target:
    image = Image.linear_gradient("L").resize((24, 18)).convert("RGB")
    seeds = [_encoded(image, kind)]
    if kind not in ("JPEG", "BMP"):
        seeds.append(_encoded(image, kind, save_all=True, append_images=[image.rotate(90)] * 2))
        seeds.append(_encoded(image.convert("RGBA"), kind))
    if kind in ("PNG", "TIFF"):
        seeds.append(_encoded(Image.new("I;16", (9, 7), 300), kind))
    if kind in ("JPEG", "TIFF"):
        seeds.append(_encoded(image.convert("CMYK"), kind))
    exif = Image.Exif()
    exif[0x0112] = 6
    if kind in ("JPEG", "PNG", "WEBP"):
        seeds.append(_encoded(image, kind, exif=exif))

    def read(content: bytes) -> None:
        assert open_image(content, max_pixels=1_000_000).pixels.mode == "RGB"

    return Target(seeds, read, mutate_png if kind == "PNG" else mutate_bytes)


def _safetensors(folder: Path) -> Target:
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b.weight": torch.arange(4, dtype=torch.int64),
        "c": torch.zeros(0, 3, dtype=torch.bfloat16),
    }

    def read(content: bytes) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(content)
        with Checkpoint.open(folder) as checkpoint:
            try:
                expected = load_file(path)
            except SafetensorError as error:
                raise AssertionError(f"accepted what the library refuses: {error}") from None
            assert checkpoint.tensors.keys() == expected.keys()
            for name, tensor in expected.items():
                read = checkpoint.read(name)
                torch.testing.assert_close(read, tensor, rtol=0, atol=0, equal_nan=True)

    return Target([save(tensors), save({"a": torch.ones(2)}, {"k": "v"})], read, mutate_safetensors)


def _index(folder: Path) -> Target:
    for name in "ab":
        content = save({name: torch.ones(2, 2)})
        (folder / f"model-0000{'ab'.index(name) + 1}-of-00002.safetensors").write_bytes(content)
    shards = {name: f"model-0000{at}-of-00002.safetensors" for at, name in enumerate("ab", 1)}
    index = {"metadata": {"total_size": 32}, "weight_map": shards}

    def read(content: bytes) -> None:
        (folder / "model.safetensors.index.json").write_bytes(content)
        with Checkpoint.open(folder) as checkpoint:
            assert set(checkpoint.tensors) <= {"a", "b"}

    return Target([json.dumps(index).encode()], read, mutate_json)


TEXTS = ("Hello world", "", "é你好 </s><image> \x00 \U0001f600\ud800", "a" * 50)


def _use(tokenizer: Tokenizer) -> None:
    """Encodes and decodes a little: damage may show only there."""
    for text in TEXTS:
        ids = tokenizer.encode(text) + tokenizer.encode_with_specials(text)
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push(token) for token in ids] + [stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids), "streaming differs from decoding"


def _tokenizer_json(folder: Path) -> Target:
    write_toy_config(folder)

    def read(content: bytes) -> None:
        (folder / "tokenizer.json").write_bytes(content)
        _use(Tokenizer.from_folder(folder))

    return Target([json.dumps(toy_tokenizer_json()).encode()], read, mutate_json)


def _tokenizer_config(folder: Path) -> Target:
    write_toy_config(folder)
    (folder / "tokenizer.json").write_text(json.dumps(toy_tokenizer_json()))
    path = folder / "tokenizer_config.json"
    seed = path.read_bytes()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        _use(Tokenizer.from_folder(folder))

    return Target([seed], read, mutate_json)


def _tokenizer_model(folder: Path) -> Target:
    def read(content: bytes) -> None:
        (folder / "tokenizer.model").write_bytes(content)
        _use(Tokenizer.from_folder(folder))

    return Target([model_bytes(toy_pieces())], read, mutate_bytes)


def _tiktoken(folder: Path) -> Target:
    path = folder / "qwen.tiktoken"
    write_tiktoken(path, toy_tokens())
    seed = path.read_bytes()

    def read(content: bytes) -> None:
        (folder / "tokenizer.json").unlink(missing_ok=True)
        path.write_bytes(content)
        _use(Tokenizer.from_folder(folder))

    return Target([seed], read, mutate_lines)


def _batch(folder: Path) -> Target:
    model = write_llava(folder / "model", Shape(layers=1, vision_layers=2, context=160))
    engine = Engine.load(model, device="cpu")
    picture = folder / "a.png"
    Image.linear_gradient("L").resize((30, 20)).save(picture)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    lines = [
        {"prompt": "What?", "images": [str(picture)], "max_new_tokens": 3},
        {"prompt": messages, "images": [str(picture)], "max_new_tokens": 2, "stop": ["e"]},
        {"prompt": "A <image>", "images": [str(picture)], "raw": True, "max_new_tokens": 2},
        {"prompt": "Hi", "temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3, "stop": "x"}
        | {"max_new_tokens": 2, "ignore_eos": True},
    ]
    requests, answers = folder / "requests.jsonl", folder / "answers.jsonl"

    def read(content: bytes) -> None:
        answers.unlink(missing_ok=True)
        requests.write_bytes(content)
        run = BatchRun(engine, Job.read(requests), 2)
        for _ in run.into(answers):
            pass
        text = requests.read_text("utf-8-sig", "replace")
        given = [line for line in text.split("\n") if line.strip()]
        found = [json.loads(line) for line in answers.read_text("utf-8").split("\n") if line]
        assert [line["index"] for line in found] == list(range(len(given)))
        assert all(("error" in line) != ("text" in line) for line in found)
        assert all(line.get("error", "x") and line.get("hint", "x") for line in found)
        if run.failures:
            raise run.failures[0].error

    return Target([json.dumps(line).encode() for line in lines], read, mutate_lines)


def _cache_spec(folder: Path) -> Target:
    specs = ["full", "avl:secondary=0.45,core=0.30,every=3", "h2o:heavy=0.125", "fastv:layer=2"]

    def read(content: bytes) -> None:
        policy = parse(content.decode("utf-8", "surrogateescape"))
        assert parse(policy.spec).spec == policy.spec

    return Target([spec.encode() for spec in specs], read, mutate_bytes)


def _configs(folder: Path) -> dict[str, Target]:
    """The JSON files that describe a model, of each family; weights are not read."""
    made = {
        "llava": write_llava(folder / "llava", Shape()),
        "original": write_llava(folder / "original", Shape(), "original"),
        "qwen": write_qwen(folder / "qwen", QwenShape()),
    }
    targets = {}
    for family, model in made.items():
        for name in ("config", "preprocessor_config", "generation_config"):
            path = model / f"{name}.json"
            if path.exists():
                targets[f"{family}-{name.replace('_', '-')}"] = _config(path)
    return targets


def _config(path: Path) -> Target:
    seed = path.read_bytes()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        try:
            recognise(path.parent)
        finally:
            path.write_bytes(seed)

    return Target([seed], read, mutate_json)


# -- runs -----------------------------------------------------------------------------------------


def replay(name: str, target: Target, report: Report) -> None:
    """Tries the seeds, and what was found earlier."""
    for seed in target.seeds:
        attempt(name, target, seed, report)
        assert not report.findings, f"{name}: a seed is refused: {report.findings[-1][1]}"
    for path in sorted((CORPUS / name).glob("*")):
        attempt(name, target, path.read_bytes(), report)


def fuzz(name: str, target: Target, inputs: int, seed: int, report: Report) -> None:
    """Tries `inputs` mutations; the same seed gives the same ones."""
    draw = random.Random(f"{name} {seed}")
    for _ in range(inputs):
        attempt(name, target, target.mutate(draw, draw.choice(target.seeds)), report)


def keep_findings(report: Report) -> list[str]:
    """Writes what was found into the corpus; returns one line for each."""
    lines = []
    for name, problem, content in report.findings:
        path = CORPUS / name / f"{hash_of(content)}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        lines.append(f"{name}: {problem} -> {path}")
    return lines


def hash_of(content: bytes) -> str:
    """A short name for an input."""
    import hashlib

    return hashlib.sha256(content).hexdigest()[:12]


def main() -> int:
    """Goes round the targets until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--target", default="", help="only targets whose name begins so")
    parser.add_argument("--once", type=int, default=0, help="only one round of so many inputs")
    options = parser.parse_args()
    end, seed, failed = time.monotonic() + 60 * options.minutes, options.seed - 1, 0
    reports: dict[str, Report] = {}
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background both would lose the counts
        signal.signal(number, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory() as folder:
            targets = make_targets(Path(folder))
            chosen = [name for name in targets if name.startswith(options.target)]
            for name in itertools.cycle(chosen):
                seed += name == chosen[0]
                if time.monotonic() > end or (options.once and seed > options.seed):
                    break
                report = reports.setdefault(name, Report())
                fuzz(name, targets[name], options.once or 100, seed, report)
                for line in keep_findings(report):
                    print(line, flush=True)
                failed += len(report.findings)
                report.findings.clear()
    except KeyboardInterrupt:
        print("interrupted")
    for name, report in reports.items():
        counts = f"{report.accepted:,} accepted, {report.refused:,} refused"
        print(f"{name}: {counts}, slowest {report.slowest:.2f} s", flush=True)
    tried = sum(report.accepted + report.refused for report in reports.values()) + failed
    print(f"{tried:,} inputs, {failed} findings, seeds {options.seed} to {seed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
