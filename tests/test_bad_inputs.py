"""What a user can get wrong, tried as a user does: exit code, one error line, one hint, no traces.

The table is that of the design's bad inputs: pictures (exit 3), weights (4), prompts and options
(2 and 5). What each reader does in detail is tested beside it; here the whole program answers.
"""

import errno
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from engine.cli import main
from engine.engine import Engine
from engine.errors import CapacityError, CheckpointError
from tests.checkpoints import Shape, edit_json, hub_config, write_json, write_llava

SMALL = Shape(layers=2, vision_layers=2, context=400)
HTML = b"<!DOCTYPE html><html><body>Not found</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint; tests that damage it work on a copy."""
    return write_llava(tmp_path_factory.mktemp("good") / "model", SMALL)


@pytest.fixture(autouse=True)
def _one_processor() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Asked:
    """One run of the command line in this process."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        lines = [line for line in err.splitlines() if line]
        self.errors = [line for line in lines if line.startswith("error: ")]
        self.hints = [line for line in lines if line.startswith("hint: ")]
        self.others = [line for line in lines if line not in self.errors + self.hints]


Ask = Callable[..., Asked]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    def run(*arguments: str | Path) -> Asked:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Asked(code, out, err)

    return run


def refused(asked: Asked, code: int, *words: str) -> None:
    """One error line with all words in it, one hint, nothing else, nothing on stdout."""
    assert asked.code == code, asked.err
    assert len(asked.errors) == 1, asked.err
    assert len(asked.hints) == 1, asked.err
    assert not asked.others, asked.err
    assert not asked.out
    assert "Traceback" not in asked.err
    assert "object at 0x" not in asked.err
    for word in words:
        assert word in asked.err, asked.err


def png(width: int, height: int, mode: str = "RGB", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (width, height)).save(stream, "PNG", **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes whose header announces a huge picture."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(9)))


def flipped(content: bytes) -> bytes:
    at = content.index(b"IDAT") + 6
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


# -- 1 to 23: pictures ----------------------------------------------------------------------------

GOOD = png(24, 18)
PICTURES: dict[str, tuple[bytes, str]] = {
    "3 empty": (b"", "empty (0 bytes)"),
    "3 five bytes": (b"\x89PNG\r", "too short"),
    "4 text": (b"just words, no picture at all", "is text"),
    "4 web page": (HTML, "a web page"),
    "4 LFS pointer": (POINTER, "Git LFS pointer"),
    "6 truncated PNG": (GOOD[:-20], "truncated"),
    "7 flipped bit": (flipped(GOOD), "damaged"),
    "8 bomb 144 MP": (bomb(12_000, 12_000), "144,000,000 pixels"),
    "8 bomb 65,500": (bomb(65_500, 65_500), "4,290,250,000 pixels; at most 89,478,485"),
    "16 PDF": (b"%PDF-1.7\n" + bytes(200), "a PDF document"),
    "16 HEIC": (b"\0\0\0\x18ftypheic" + bytes(200), "a HEIC picture"),
    "16 AVIF": (b"\0\0\0\x18ftypavif" + bytes(200), "an AVIF picture"),
    "16 SVG": (b"<svg xmlns='x'></svg>" + b" " * 50, "an SVG drawing"),
    "16 PSD": (b"8BPS\0\x01" + bytes(200), "a Photoshop file"),
    "16 FITS": (b"SIMPLE  =                    T" + bytes(200), "a FITS file"),
    "18 huge text": (
        GOOD[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(70 << 20))) + GOOD[33:],
        "damaged or unsupported PNG",
    ),
}


@pytest.mark.parametrize("row", PICTURES)
def test_bad_picture(row: str, ask: Ask, tmp_path: Path) -> None:
    content, words = PICTURES[row]
    path = tmp_path / "car.jpg"
    path.write_bytes(content)
    refused(ask("--image", path, "--prompt", "What?", "--model", "nowhere"), 3, str(path), words)


def test_missing_picture_folder_and_pipe(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "car.jpg").write_bytes(GOOD)
    asked = ask("--image", tmp_path / "cat.jpg", "--prompt", "What?")
    refused(asked, 3, "cat.jpg does not exist", f"did you mean {tmp_path}/car.jpg?")
    refused(ask("--image", tmp_path, "--prompt", "What?"), 3, "is a folder")
    os.mkfifo(tmp_path / "pipe.png")
    refused(ask("--image", tmp_path / "pipe.png", "--prompt", "What?"), 3, "not a regular file")
    refused(ask("--image", "/dev/zero", "--prompt", "What?"), 3, "not a regular file")


def test_names_are_printed_escaped_on_one_line(ask: Ask, tmp_path: Path) -> None:
    name = tmp_path / "a\nb\x1b[31m\u202e.jpg"
    asked = ask("--image", name, "--prompt", "What?")
    refused(asked, 3, "a\\nb\\x1b[31m\\u202e.jpg does not exist")
    name.write_bytes(HTML)
    refused(ask("--image", name, "--prompt", "What?"), 3, "is a web page")


@pytest.mark.parametrize("content", [b"", b"x" * 30])
def test_standard_input_without_a_picture(
    content: bytes, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    refused(ask("--image", "-", "--prompt", "What?"), 3, str(len(content)))


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/a.png", "https://10.0.0.1/a.png", "file:///etc/passwd"]
)
def test_addresses_are_refused_without_a_request(
    url: str, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket", no_network)
    refused(ask("--image", url, "--prompt", "What?"), 3, url)


def test_malformed_data_is_cut(ask: Ask) -> None:
    asked = ask("--image", "data:image/png;base64,%%%" + "A" * 5000, "--prompt", "What?")
    refused(asked, 3)
    assert "A" * 60 not in asked.err
    assert "A" * 60 not in asked.errors[0]


ACCEPTED = {
    "5 wrong extension": png(24, 18),
    "9 one pixel": png(1, 1),
    "9 thin": png(1, 300),
    "9 flat": png(300, 1),
    "9 20,000 x 1": png(20_000, 1),
    "10 transparent": png(9, 9, "RGBA"),
    "11 16-bit": png(9, 9, "I;16"),
    "13 grey": png(9, 9, "L"),
    "13 one bit": png(9, 9, "1"),
}


@pytest.mark.parametrize("row", ACCEPTED)
def test_odd_picture_is_answered(row: str, ask: Ask, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "caf\u00e9 \U0001f600.jpg"  # 19: any name works
    path.write_bytes(ACCEPTED[row])
    asked = ask("--image", path, "-p", "What?", "-m", model, "-n", "2", "--cache", "full")
    assert asked.code == 0, asked.err
    assert not asked.errors
    noted = row.startswith(("10", "11"))
    assert ("note: " in asked.err) == noted


def test_many_pictures_fit_or_are_refused_with_the_numbers(
    ask: Ask, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(GOOD)
    rest = ["--prompt", "What?", "--model", model, "-n", "2"]
    assert ask("--image", path, "--image", path, *rest).code == 0
    asked = ask(*["--image", path] * 25, *rest)
    refused(asked, 5, "400 image", "context of 400")


# The peak is VmHWM: what getrusage says begins with the parent's size at the fork.
FAST = """
import sys, time
began = time.process_time()
from engine.cli import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(code, time.process_time() - began, int(peak.split()[1]) / 1e3)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--image", "nowhere.png", "--prompt", "What?"], 3),
        (["--image", "{bomb}", "--prompt", "What?"], 3),
        (["--promt", "What?"], 2),
        (["--prompt", "What?", "--temperature", "-1"], 2),
    ],
    ids=str,
)
def test_typos_fail_before_torch_is_imported(flags: list[str], code: int, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(12_000, 12_000))
    command = [sys.executable, "-c", FAST, *(flag.format(bomb=path) for flag in flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found, seconds, megabytes = map(float, done.stdout.split())
    assert found == code
    assert seconds < 0.5
    assert megabytes < 100
    assert done.stderr.count("error: ") == done.stderr.count("hint: ") == 1


# -- 24 to 36: weights ----------------------------------------------------------------------------


def copy_of(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "model"))


def header(**entry: Any) -> bytes:
    text = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(text)) + text


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


WEIGHTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty (0 bytes)"),
    "few bytes": (b"\x10\0\0", "truncated"),
    "LFS pointer": (POINTER, "Git LFS pointer"),
    "web page": (HTML, "a web page"),
    "header cut": (header(**entry())[:30], "truncated: it has 30 of at least"),
    "data cut": (header(**entry()) + bytes(7), "is truncated"),
    "trailing byte": (header(**entry()) + bytes(9), "has trailing bytes"),
    "2^63 length": (struct.pack("<Q", 2**63) + bytes(100), "not a safetensors file"),
    "200 MB length": (struct.pack("<Q", 200_000_000) + b"{}", "not a safetensors file"),
    "zeros": (bytes(4096), "a download never filled"),
    "hole": (header(**entry(offsets=(8, 16))) + bytes(16), "leaves a hole"),
    "mismatch": (header(**entry(shape=(3,))) + bytes(8), "needs 12 bytes"),
    "overflow": (header(**entry(shape=(2**62, 2**62))) + bytes(8), "for its shape"),
    "30 unknown dtype": (header(**entry("Q4")) + bytes(8), "dtype 'Q4'"),
    "30 fp8": (header(**entry("F8_E4M3", (8,))) + bytes(8), "dtype 'F8_E4M3'"),
}


@pytest.mark.parametrize("row", WEIGHTS)
def test_bad_weights(row: str, ask: Ask, model: Path, tmp_path: Path) -> None:
    content, words = WEIGHTS[row]
    folder = copy_of(model, tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    refused(ask("--prompt", "Hi", "--model", folder), 4, "model.safetensors", words)


def without(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        held = load_file(path)
        change(held)
        path.unlink()
        save_file(held, path)

    return spoil


def index(**shards: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        write_json(folder / "model.safetensors.index.json", {"weight_map": shards})

    return spoil


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = hub_config(SMALL)
        content["text_config"] |= changes
        write_json(folder / "config.json", content)

    return spoil


HEAD = "language_model.lm_head.weight"
SHARD = "model-00001-of-00002.safetensors"
TYPO = "model-00002-of-00002.safetensors"
FOLDERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "26 shard missing": (index(a=SHARD, b=TYPO), ("lacks 1 of 2 shards", TYPO)),
    "27 index walks out": (index(a="../x.safetensors"), ("../x.safetensors", "plain file name")),
    "27 absolute path": (index(a="/etc/passwd"), ("/etc/passwd", "plain file name")),
    "28 tensor missing": (tensors(lambda t: t.pop(HEAD)), ("1 missing", "head")),
    "28 unexpected": (tensors(lambda t: t.update(x=torch.ones(1))), ("1 unexpected", "'x'")),
    "28 wrong shape": (
        tensors(lambda t: t.update({HEAD: torch.ones(3, 4)})),
        ("1 mis-shaped", "[3, 4]"),
    ),
    "30 int8": (
        tensors(lambda t: t.update({HEAD: t[HEAD].to(torch.int8)})),
        ("int8", "quantised"),
    ),
    "31 pickles only": (pickled, ("pytorch_model.bin", "--convert")),
    "32 invalid JSON": (replaced("config.json", b"{"), ("config.json", "invalid JSON")),
    "32 duplicate key": (replaced("config.json", b'{"a": 1, "a": 2}'), ("duplicate key 'a'",)),
    "32 string": (config(hidden_size="64"), ("hidden_size", "'64'")),
    "32 no heads": (config(num_attention_heads=0), ("num_attention_heads", "is 0")),
    "32 negative": (config(num_hidden_layers=-2), ("num_hidden_layers", "-2")),
    "32 indivisible": (config(hidden_size=66), ("hidden_size", "66")),
    "32 unknown decoder": (config(model_type="gpt2"), ("model_type", "'gpt2'")),
    "32 no config": (without("config.json"), ("config.json",)),
    "33 no tokenizer": (without("tokenizer.json"), ("no tokenizer",)),
    "33 damaged tokenizer": (replaced("tokenizer.json", b"[" * 9999), ("tokenizer.json",)),
    "33 other tokenizer": (replaced("tokenizer.json", b"{}"), ("tokenizer.json",)),
    "36 NaN": (tensors(lambda t: t[HEAD].fill_(float("nan"))), ("not finite", "--check")),
}


@pytest.mark.parametrize("row", FOLDERS)
def test_bad_folder(row: str, ask: Ask, model: Path, tmp_path: Path) -> None:
    spoil, words = FOLDERS[row]
    folder = copy_of(model, tmp_path)
    spoil(folder)
    before = sorted(os.listdir(folder))
    refused(ask("--prompt", "Hi", "--model", folder), 4, *words)
    assert sorted(os.listdir(folder)) == before


def test_tokenizer_without_the_image_token(ask: Ask, model: Path, tmp_path: Path) -> None:
    folder = copy_of(model, tmp_path)
    edit_json(folder / "config.json", image_token_index=10**6)
    refused(ask("--prompt", "Hi", "--model", folder), 4, "image_token_index", "1000000")


def test_folder_missing_or_empty(ask: Ask, tmp_path: Path) -> None:
    asked = ask("--prompt", "Hi", "--model", tmp_path / "nowhere", "--offline")
    refused(asked, 4, str(tmp_path / "nowhere"), "does not exist", "GB")
    refused(ask("--prompt", "Hi", "--model", tmp_path), 4, str(tmp_path))
    path = tmp_path / "a.safetensors"
    path.touch()
    refused(ask("--prompt", "Hi", "--model", path), 4, "is a file, a model is a folder")


def test_tied_head_may_be_absent_but_not_different(ask: Ask, model: Path, tmp_path: Path) -> None:
    folder = copy_of(model, tmp_path)
    config(tie_word_embeddings=True)(folder)
    refused(ask("--prompt", "Hi", "--model", folder), 4, "lm_head", "config ties them")
    tensors(lambda t: t.pop(HEAD))(folder)
    assert ask("--prompt", "Hi", "--model", folder, "-n", "1").code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="the super-user may read everything")
def test_unreadable_weights(ask: Ask, model: Path, tmp_path: Path) -> None:
    folder = copy_of(model, tmp_path)
    (folder / "model.safetensors").chmod(0)
    refused(ask("--prompt", "Hi", "--model", folder), 4, "Permission denied")


# -- 37 to 43: prompts and options ----------------------------------------------------------------

OPTIONS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "37 empty prompt": (["--prompt", ""], ("prompt is empty", "for example")),
    "37 spaces": (["--prompt", "  \n"], ("prompt is empty", "for example")),
    "no prompt": ([], ("no --prompt",)),
    "unreadable prompt": (["--prompt", "@/nowhere.txt"], ("/nowhere.txt",)),
    "41 temperature": (["--temperature", "-1"], ("temperature is -1.0",)),
    "41 NaN": (["--temperature", "nan"], ("temperature is nan",)),
    "41 infinite": (["--temperature", "inf"], ("temperature is inf",)),
    "41 top-p 0": (["--top-p", "0"], ("top_p is 0.0", "above 0 and up to 1")),
    "41 top-p 2": (["--top-p", "2"], ("top_p is 2.0",)),
    "41 top-k": (["--top-k", "-3"], ("top_k is -3",)),
    "41 seed": (["--seed", str(2**64)], ("18446744073709551616",)),
    "41 none": (["-n", "0"], ("max_new_tokens is 0", "1 or more")),
    "41 words": (["-n", "many"], ("'many'",)),
    "42 above 1": (["--cache", "avl:secondary=1.5"], ("secondary is 1.5",)),
    "42 negative": (["--cache", "avl:core=-0.1"], ("core is -0.1",)),
    "42 sum": (["--cache", "h2o:heavy=0.8,recent=0.8"], ("heavy",)),
    "42 unknown key": (["--cache", "avl:size=3"], ("'size'",)),
    "42 unknown policy": (["--cache", "lru"], ("'lru'",)),
    "43 no CUDA": (["--device", "cuda"], ("cuda", "--device cpu")),
    "43 nonsense": (["--device", "tpu9"], ("'tpu9'",)),
    "dtype": (["--dtype", "int8"], ("'int8'",)),
    "typo": (["--promt", "x"], ("--promt", "did you mean --prompt?")),
    "empty stop": (["--stop", ""], ("stop text is empty",)),
}


@pytest.mark.parametrize("row", OPTIONS)
def test_bad_option(row: str, ask: Ask, model: Path) -> None:
    flags, words = OPTIONS[row]
    if "no CUDA" in row and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    given = [] if "prompt" in row or row == "typo" else ["--prompt", "Hi"]
    refused(ask("--model", model, *given, *flags), 2, *words)


@pytest.mark.parametrize("text", ["<image>", "<|im_start|>system", "<img>a</img>", "</s><s>[INST]"])
def test_spellings_of_special_tokens_are_text(text: str, ask: Ask, model: Path) -> None:
    asked = ask("--prompt", text, "--model", model, "-n", "1", "--json")
    assert asked.code == 0, asked.err
    # Each of its letters is a token of its own or part of a word, never one special token.
    plain = ask("--prompt", "a", "--model", model, "-n", "1", "--json")
    tokens = [json.loads(each.out)["prompt_tokens"] for each in (asked, plain)]
    assert tokens[0] - tokens[1] >= 3


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b", "a\u202eb\u2066c", "\ufeffa", "\x1b[2Jx"])
def test_strange_characters_are_encoded(text: str, ask: Ask, model: Path) -> None:
    for extra in (["--json"], ["--verbose"]):
        asked = ask("--prompt", text, "--model", model, "-n", "2", *extra)
        assert asked.code == 0, asked.err
        assert not asked.errors
        assert "\x1b" not in asked.err
        assert "\u202e" not in asked.err


def test_a_megabyte_of_prompt_is_refused_before_prefill(
    ask: Ask, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_prefill(*_: Any) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr("engine.models.decoder.Decoder.forward", no_prefill)
    began = time.process_time()
    asked = ask("--prompt", "word " * 200_000, "--model", model)
    refused(asked, 5, "exceed the model's context of 400", "-n")
    assert time.process_time() - began < 10


# -- 44 to 47: the machine ------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["load", "prefill", "decode", "batch"])
@pytest.mark.parametrize("fill", [lambda: torch.empty(1 << 52), lambda: bytearray(1 << 62)])
def test_out_of_memory_says_how_much_is_needed(
    where: str, fill: Any, ask: Ask, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = {"load": "engine.loading.load_weights", "decode": "engine.session.Session.decode"}
    name = place.get(where, "engine.models.decoder.Decoder.forward")
    monkeypatch.setattr(name, lambda *_, **__: fill())
    if where == "batch":
        failure = next(Engine.load(model, device="cpu").generate_batch([{"prompt": "Hi"}]))
        assert isinstance(failure.error, CapacityError)
        return
    asked = ask("--prompt", "Hi", "--model", model, "--no-stream", "-n", "3")
    refused(asked, 5, "out of memory while", "GB are needed", "GB are free", "--dtype bf16")
    assert asked.hints[0].count(",") >= 2


def test_other_runtime_errors_are_not_called_out_of_memory(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr("engine.models.decoder.Decoder.forward", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        Engine.load(model, device="cpu").generate("Hi")


def start(model: Path, *flags: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "main.py", "--prompt", "Hi", "--model", str(model), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, text=True, env=environment, **pipes)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device on this system")
def test_full_disk_gives_the_systems_words(model: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start(model, "-n", "3", stdout=full)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert os.strerror(errno.ENOSPC) in err
    assert "Traceback" not in err


def test_closed_stdout_gives_the_systems_words(model: Path) -> None:
    process = start(model, "-n", "3", stdout=None, preexec_fn=lambda: os.close(1))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert os.strerror(errno.EBADF) in err
    assert "Traceback" not in err


def test_reader_that_leaves_is_no_error(model: Path) -> None:
    process = start(model, "-n", "300", "--device", "cpu")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        err = process.stderr.read()
    assert process.wait(timeout=120) in (0, 141), err
    assert "Traceback" not in err


def test_interrupt_leaves_with_130(model: Path) -> None:
    process = start(model, "-n", "350")
    assert process.stdout is not None
    process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("the answer was over before the interrupt")
    assert process.returncode == 130, err
    assert "Traceback" not in err


def test_two_engines_read_the_same_weights(model: Path) -> None:
    one, other = (Engine.load(model, device="cpu") for _ in range(2))
    assert one.generate("Hi", max_new_tokens=5).text == other.generate("Hi", max_new_tokens=5).text


def test_library_raises_the_same_classes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        Engine.load(tmp_path)
    assert caught.value.exit_code == 4
    assert caught.value.hint
