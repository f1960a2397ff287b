"""Bad prompts and options, and a machine that gives out: rows 37 to 47 of the table of bad inputs.

Exit code 2 for what is asked wrongly, in less than half a second where no model is needed to know
it; 5 for what does not fit; 130 after an interrupt.
"""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.engine import Engine
from engine.errors import CapacityError, OptionError
from engine.loading.device import pick_device, why_no_cuda
from engine.running.stepping import Stepper
from tests.asking import Ask, refused
from tests.checkpoints import Shape, write_llava

SMALL = Shape(layers=2, vision_layers=2, context=400)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("good") / "model", SMALL)


@pytest.fixture(autouse=True)
def _one_processor() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- 37 to 43: prompts and options ----------------------------------------------------------------

OPTIONS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "row37-empty prompt": (["--prompt", ""], ("prompt is empty", "for example")),
    "row37-spaces": (["--prompt", "  \n"], ("prompt is empty", "for example")),
    "no prompt": ([], ("no --prompt",)),
    "unreadable prompt": (["--prompt", "@/nowhere.txt"], ("/nowhere.txt",)),
    "row41-temperature": (["--temperature", "-1"], ("temperature is -1.0",)),
    "row41-NaN": (["--temperature", "nan"], ("temperature is nan",)),
    "row41-infinite": (["--temperature", "inf"], ("temperature is inf",)),
    "row41-top-p 0": (["--top-p", "0"], ("top_p is 0.0", "above 0 and up to 1")),
    "row41-top-p 2": (["--top-p", "2"], ("top_p is 2.0",)),
    "row41-top-k": (["--top-k", "-3"], ("top_k is -3",)),
    "row41-seed": (["--seed", str(2**64)], ("18446744073709551616",)),
    "row41-nothing to draw from": (["--repetition-penalty", "0"], ("repetition_penalty is 0.0",)),
    "row41-none": (["-n", "0"], ("max_new_tokens is 0", "1 or more")),
    "row41-words": (["-n", "many"], ("'many'",)),
    "row42-above 1": (["--cache", "avl:secondary=1.5"], ("secondary is 1.5",)),
    "row42-negative": (["--cache", "avl:core=-0.1"], ("core is -0.1",)),
    "row42-sum": (["--cache", "h2o:heavy=0.8,recent=0.8"], ("heavy",)),
    "row42-recent alone": (["--cache", "h2o:heavy=0,recent=1.5"], ("recent is 1.5",)),
    "row42-drop": (["--cache", "fastv:drop=2"], ("drop",)),
    "row42-NaN": (["--cache", "avl:secondary=nan"], ("secondary",)),
    "row42-no steps": (["--cache", "avl:every=-1"], ("every is -1",)),
    "row42-no window": (["--cache", "snapkv:window=0"], ("window is 0",)),
    "row42-unknown key": (["--cache", "avl:size=3"], ("'size'",)),
    "row42-unknown policy": (["--cache", "lru"], ("'lru'",)),
    "row43-no CUDA": (["--device", "cuda"], ("cuda", "--device cpu")),
    "row43-nonsense": (["--device", "tpu9"], ("'tpu9'",)),
    "dtype": (["--dtype", "int8"], ("'int8'",)),
    "typo": (["--promt", "x"], ("--promt", "did you mean --prompt?")),
    "empty stop": (["--stop", ""], ("stop text is empty",)),
    "twice": (["-n", "1", "--max-new-tokens", "1"], ("--max-new-tokens is given twice",)),
    "two of stdin": (["-", "-"], ("stdin", "once")),
    "a style of nothing": (["--raw", "--style", "llava-v1"], ("--raw takes no --style",)),
    "bytes": (["--system", "caf\udce9"], ("--system", "not UTF-8")),
    "stop of bytes": (["--stop", "caf\udce9"], ("--stop", "not UTF-8")),
    "row40-prompt of bytes": (["--prompt", "caf\udce9"], ("--prompt", "not UTF-8")),
    "endless prompt": (["--prompt", "@/dev/zero"], ("@/dev/zero is not a regular file",)),
    "prompt of a folder": (["--prompt", "@/"], ("@/ is not a regular file",)),
}
OPTIONS |= {
    f"{flag} of nothing": ([flag, ""], (f"{flag}: the name is empty",))
    for flag in (
        "--output",
        "--batch",
        "--attention",
        "--draw-boxes",
        "--convert",
        "--vision-tower",
    )
}


@pytest.mark.parametrize("row", OPTIONS)
def test_bad_option(row: str, ask: Ask, model: Path) -> None:
    flags, words = OPTIONS[row]
    if "no CUDA" in row and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    given = [] if "--prompt" in flags or row in ("no prompt", "typo") else ["--prompt", "Hi"]
    refused(ask("--model", model, *given, *flags), 2, *words)


@pytest.mark.parametrize("text", ["<image>", "<|im_start|>system", "<img>a</img>", "</s><s>[INST]"])
def test_row38_spellings_of_special_tokens_are_text(text: str, ask: Ask, model: Path) -> None:
    asked = ask("--prompt", text, "--model", model, "-n", "1", "--json")
    assert asked.code == 0, asked.err
    # Each of its letters is a token of its own or part of a word, never one special token.
    plain = ask("--prompt", "a", "--model", model, "-n", "1", "--json")
    tokens = [json.loads(each.out)["prompt_tokens"] for each in (asked, plain)]
    assert tokens[0] - tokens[1] >= 3


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b", "a\u202eb\u2066c", "\ufeffa", "\x1b[2Jx"])
def test_row40_strange_characters_are_encoded(text: str, ask: Ask, model: Path) -> None:
    for extra in (["--json"], ["--verbose"]):
        asked = ask("--prompt", text, "--model", model, "-n", "2", *extra)
        assert asked.code == 0, asked.err
        assert not asked.errors
        assert "\x1b" not in asked.err
        assert "\u202e" not in asked.err


@pytest.mark.parametrize("way", ["file", "stdin"])
def test_row40_a_prompt_of_other_bytes_is_refused(
    way: str, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "q.txt").write_bytes(b"caf\xe9?")
    monkeypatch.setattr("sys.stdin", (tmp_path / "q.txt").open(encoding="utf-8"))
    refused(ask("--prompt", "-" if way == "stdin" else f"@{tmp_path / 'q.txt'}"), 2, "as text")
    sys.stdin.close()


@pytest.mark.parametrize("flag", ["--prompt", "--batch"])
@pytest.mark.parametrize("way", ["file", "stdin", "pipe"])
def test_what_is_read_whole_has_a_limit(
    flag: str, way: str, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe by name is never waited for; stdin is one, and read as far as the limit."""
    monkeypatch.setattr("engine.app.job.MOST_REQUESTS", 1_000_000)
    path = tmp_path / "long.txt"
    if way == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(b"a" * 1_000_001)
    source = "-" if way == "stdin" else f"{'@' if flag == '--prompt' else ''}{path}"
    if way == "stdin":
        monkeypatch.setattr("sys.stdin", path.open(encoding="utf-8"))
    words = "not a regular file" if way == "pipe" else "has more than 1,000,000 bytes"
    asked = ask(flag, source)
    refused(asked, 2, words, "stdin" if way == "stdin" else "long.txt")
    if way == "stdin":
        sys.stdin.close()


def test_row39_a_megabyte_of_prompt_is_refused_before_prefill(
    ask: Ask, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_prefill(*_: Any) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr("engine.models.decoder.Decoder.slices", no_prefill)
    began = time.process_time()
    asked = ask("--prompt", "word " * 200_000, "--model", model)
    refused(asked, 5, "exceed the model's context of 400", "-n")
    assert time.process_time() - began < 10


# -- 44 to 47: the machine ------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["load", "prepare", "prefill", "decode", "batch"])
@pytest.mark.parametrize("fill", [lambda: torch.empty(1 << 52), lambda: bytearray(1 << 62)])
def test_row44_out_of_memory_says_how_much_is_needed(
    where: str, fill: Any, ask: Ask, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = {
        "load": "engine.loading.loading.load_weights",
        "prepare": "engine.loading.loading.prepare",
        "decode": "engine.running.stepping.Stepper.step",
    }
    name = place.get(where, "engine.models.decoder.Decoder.slices")
    monkeypatch.setattr(name, lambda *_, **__: fill())
    if where == "batch":
        failure = next(Engine.load(model, device="cpu").generate_batch([{"prompt": "Hi"}]))
        assert isinstance(failure.error, CapacityError)
        return
    asked = ask("--prompt", "Hi", "--model", model, "--no-stream", "-n", "3")
    refused(asked, 5, "out of memory while", "GB are needed", "GB are free", "dtype bf16")
    assert asked.hints[0].count(",") >= 2


def test_row44_other_runtime_errors_are_not_called_out_of_memory(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr("engine.models.decoder.Decoder.slices", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        Engine.load(model, device="cpu").generate("Hi")


def start(model: Path, *flags: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "main.py", "--prompt", "Hi", "--model", str(model), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, text=True, env=environment, **pipes)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device on this system")
def test_row46_a_full_disk_gives_the_systems_words(model: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start(model, "-n", "3", stdout=full)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert os.strerror(errno.ENOSPC) in err
    assert "Traceback" not in err


def test_row46_a_closed_stdout_gives_the_systems_words(model: Path) -> None:
    process = start(model, "-n", "3", stdout=None, preexec_fn=lambda: os.close(1))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert os.strerror(errno.EBADF) in err
    assert "Traceback" not in err


def test_row45_a_reader_that_leaves_is_no_error(model: Path) -> None:
    process = start(model, "-n", "300", "--device", "cpu")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        err = process.stderr.read()
    assert process.wait(timeout=120) in (0, 141), err
    assert "Traceback" not in err


def test_row45_an_interrupt_leaves_with_130(model: Path) -> None:
    process = start(model, "-n", "350")
    assert process.stdout is not None
    process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("the answer was over before the interrupt")
    assert process.returncode == 130, err
    assert "Traceback" not in err


def test_row47_two_processes_use_the_same_weights_at_once(model: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    both = [start(model, "-n", "40") for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0] == said[1]
    assert said[0][0].strip()
    assert {path.name: path.stat().st_mtime_ns for path in model.iterdir()} == before


# -- 43: why there is no CUDA ---------------------------------------------------------------------

NO_CUDA = {
    "row43-no driver": (
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU",
        "no NVIDIA driver is installed",
    ),
    "row43-old driver": (
        "The NVIDIA driver on your system is too old (found version 11040). Please update",
        "the NVIDIA driver is too old for CUDA 12.8 (it knows CUDA 11.4)",
    ),
    "row43-no device": ("No CUDA GPUs are available", "the NVIDIA driver finds no device"),
    "row43-unknown": ("CUDA unknown error - what?\nand more", "CUDA unknown error - what?"),
}


@pytest.mark.parametrize("row", NO_CUDA)
def test_no_cuda_says_why(row: str, ask: Ask, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch words it; no test can take a driver away."""
    said, words = NO_CUDA[row]

    def init() -> None:
        raise RuntimeError(said)

    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.cuda.init", init)
    asked = ask("--prompt", "Hi", "--model", model, "--device", "cuda")
    refused(asked, 2, f"device cuda is not available: {words}", "use --device cpu")
    assert ask("--prompt", "Hi", "--model", model, "-n", "1").code == 0  # auto: the CPU


@pytest.mark.parametrize(
    ("row", "device", "built", "words"),
    [
        ("row43-GPU older than the build", "cuda", ["sm_70", "sm_86", "compute_90"], "compute 6.1"),
        ("row43-GPU newer than the build", "cuda", ["sm_50"], "is built for sm_50"),
        ("row43-no such number", "cuda:7", ["sm_61"], "finds 1 CUDA devices"),
    ],
)
def test_a_gpu_that_cannot_be_used_says_why(
    row: str,
    device: str,
    built: list[str],
    words: str,
    ask: Ask,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.version.cuda", "12.8")
    for name, value in {
        "init": None,
        "device_count": 1,
        "get_device_capability": (6, 1),
        "get_arch_list": built,
        "get_device_name": "An old card",
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, value=value: value)
    refused(ask("--prompt", "Hi", "--model", model, "--device", device), 2, device, words)


@pytest.mark.parametrize("built", [["sm_60"], ["compute_50"], ["sm_37", "sm_61"]])
def test_a_gpu_that_the_build_serves_is_taken(
    built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.cuda.init", lambda: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (6, 1))
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: built)
    assert why_no_cuda() == ""
    assert pick_device("auto").type == "cuda"


# -- 44: a batch that runs out of memory ----------------------------------------------------------


@pytest.mark.parametrize("fill", [lambda: torch.empty(1 << 52), lambda: bytearray(1 << 62)])
def test_row44_a_batch_keeps_what_was_answered_before(
    fill: Any, ask: Ask, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Exit code 5; the same command goes on and ends with the file of an undisturbed run."""
    source = tmp_path / "requests.jsonl"
    lines = [
        {"prompt": f"What {n}?", "max_new_tokens": 3 + n, "ignore_eos": True} for n in range(9)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = ["--batch", source, "--model", model, "--rows", "3", "--device", "cpu", "--output"]
    assert ask(*job, tmp_path / "whole.jsonl").code == 0
    whole = (tmp_path / "whole.jsonl").read_text()
    steps, real = itertools.count(), Stepper.step

    def step(stepper: Stepper, tokens: Tensor) -> Tensor:
        if next(steps) == 6:
            fill()
        return real(stepper, tokens)

    answers = tmp_path / "answers.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", step)
        asked = ask(*job, answers)
    refused(asked, 5, "out of memory while answering 3 requests together", "GB are free", "rows")
    kept = answers.read_text()
    assert 1 <= kept.count("\n") < 9
    assert whole.startswith(kept)
    assert ask(*job, answers).code == 0
    assert answers.read_text() == whole


# -- options that are known to be wrong without a model -------------------------------------------

WITHOUT_TORCH = """
import json, sys, time
from engine.app.cli import main
found, began = {}, 0.0  # the first one pays for the imports
for row, arguments in json.load(sys.stdin).items():
    code = main(arguments)
    found[row] = code, time.process_time() - began
    began = time.process_time()
print(json.dumps([found, "torch" in sys.modules]))
"""


def test_wrong_flags_cost_little_time(tmp_path: Path) -> None:
    """All but the device's presence is known without torch."""
    given = {row: flags for row, (flags, _) in OPTIONS.items() if row != "row43-no CUDA"}
    rows = {
        row: [*([] if "--prompt" in flags or row == "no prompt" else ["-p", "Hi"]), *flags]
        for row, flags in given.items()
    }
    rows |= {
        "batch": ["--batch", str(tmp_path / "nothing.jsonl")],
        "rows": ["--batch", __file__, "--rows", "0"],
        "output": ["--batch", __file__, "--output", str(tmp_path / "no" / "a.jsonl")],
        "conversion": ["--convert", str(tmp_path / "out")],
        "chat": ["--chat", "--json"],
        "page": ["-p", "Hi", "--attention", "a.html"],
        "boxes": ["-p", "Hi", "--draw-boxes", "a.png"],
        "blank": [" "],
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        cwd=ROOT,
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        check=True,
    )
    found, loaded = json.loads(done.stdout)
    assert found.keys() == rows.keys()
    assert {code for code, _ in found.values()} == {2}, found
    assert done.stderr.count("error: ") == done.stderr.count("hint: ") == len(rows)
    assert not loaded
    assert max(seconds for _, seconds in found.values()) < 1, found  # 0.25 on a quiet machine


# -- the library ----------------------------------------------------------------------------------

NONE = np.array(3)  # says that it can be gone through, and cannot
CALLS: dict[str, tuple[Callable[[Engine], object], str]] = {
    "stop": (lambda e: e.generate("Hi", stop=NONE), "stop is array(3)"),
    "tensor": (lambda e: e.generate("Hi", stop=torch.tensor(3)), "stop is tensor(3)"),
    "mapping": (lambda e: e.generate("Hi", stop={"a": 1}), "stop is {'a': 1}"),
    "truth": (lambda e: e.generate("Hi", temperature=np.True_), "temperature is"),
    "truth of torch": (lambda e: e.generate("Hi", top_k=torch.tensor(True)), "top_k is tensor"),
    "continuation": (lambda e: e.logits("Hi", continuation=NONE), "continuation is array(3)"),
    "bytes": (lambda e: e.logits("Hi", continuation=b"x"), "continuation is b'x'"),
    "letters": (lambda e: list(e.generate_batch("ab")), "requests are 'ab'"),
    "requests": (lambda e: list(e.generate_batch(NONE)), "requests are array(3)"),
    "job": (lambda e: e.scheduler().submit(3), "job is 3"),
    "events": (lambda e: list(e.scheduler().events(None)), "job is None"),
    "message": (
        lambda e: e.generate([{"role": "user", "content": "Hi", "nam": "x"}]),
        "message 1 has the unknown key 'nam'",
    ),
    "entry": (
        lambda e: e.generate(
            [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]
        ),
        "an entry of message 1 has the unknown key 'x'",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_what_a_program_gives_is_refused_in_our_words(case: str, model: Path) -> None:
    call, message = CALLS[case]
    with pytest.raises(OptionError) as caught:
        call(Engine.load(model, device="cpu"))
    assert message in str(caught.value)
    assert caught.value.hint
