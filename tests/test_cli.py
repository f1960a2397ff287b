"""The command line from end to end: streams, exit codes, speed of refusals, interrupts."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.app.cli import main
from engine.app.terminal import printable, say
from engine.engine import Engine
from engine.errors import OptionError
from engine.pictures.image import MAX_PIXELS
from tests.checkpoints import Shape
from tests.noise import noise

SHAPE = Shape(kv_heads=2)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(SHAPE)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    noise(70, 50).save(tmp_path / "car.png")
    return tmp_path / "car.png"


@pytest.fixture
def ask(folder: Path, picture: Path) -> Callable[..., int]:
    """``ask(*flags)``: the command line on a test model and a picture."""

    def run(*flags: str, prompt: str = "What?", image: str = "") -> int:
        arguments = ["--model", str(folder), "--image", image or str(picture), "-p", prompt]
        length = [] if "--max-new-tokens" in flags else ["-n", "6"]
        return main([*arguments, *length, "--device", "cpu", *flags])

    return run


@pytest.fixture
def answer(engine_of: Callable[..., Engine]) -> str:
    """What the exact model says."""
    return engine_of(SHAPE).generate("What?", [noise(70, 50)], max_new_tokens=6).text


# -- the answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--no-stream",), ("--stats",), ("--quiet",)])
def test_stdout_is_the_answer_alone(
    ask: Callable[..., int],
    answer: str,
    flags: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ask("--cache", "full", *flags) == 0
    said = capsys.readouterr()
    assert said.out == f"{answer}\n"
    assert bool(said.err) == (flags == ("--stats",))


def test_json_is_one_object(
    ask: Callable[..., int], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask("--cache", "full", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    values = json.loads(lines[0])
    assert values["text"] == answer
    assert values["image_tokens"] == SHAPE.image_tokens
    assert values["cache"]["policy"] == "full"
    assert values["timings"]["ttft"] > 0


def test_compare_shows_both_answers(
    ask: Callable[..., int], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask("--compare", "--cache", "streaming", "--json") == 0
    both = json.loads(capsys.readouterr().out)
    full, chosen = both["full"], both["chosen"]
    assert full["text"] == answer
    assert chosen["cache"]["bytes_used"] < full["cache"]["bytes_used"]
    place = both["first_difference"]
    ids = full["token_ids"], chosen["token_ids"]
    assert (place is None) == (ids[0] == ids[1])
    if place is not None:
        assert ids[0][:place] == ids[1][:place]
        assert ids[0][place : place + 1] != ids[1][place : place + 1]
    assert ask("--compare", "--cache", "streaming") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"--- full\n{answer}\n[6 tokens | cache ")
    assert said.count("tokens/s]") == 2
    assert ask("--compare", "--cache", "full") == 2


@pytest.mark.parametrize("mode", [[], ["--compare", "--cache", "h2o"]])
def test_a_limit_beyond_the_context_is_cut_with_a_note(
    mode: list[str],
    checkpoint: Callable[..., Path],
    picture: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = ["--model", str(checkpoint(Shape(kv_heads=2, context=160))), "--device", "cpu"]
    asked = [str(picture), "What?", "-n", "9" * 30, "--json", *mode]
    assert main([*model, *asked]) == 0
    said = capsys.readouterr()
    values = json.loads(said.out)
    answers = [values["full"], values["chosen"]] if mode else [values]
    for answer in answers:
        room = 160 - answer["prompt_tokens"]
        assert said.err == f"note: the answer has at most {room} tokens: " + (
            "the context leaves no more room\n"
        )
        assert len(answer["token_ids"]) <= room
    assert main([*model, str(picture), "word " * 200, "-n", "5"]) == 5


def test_compare_finds_the_first_difference() -> None:
    from engine.insight.compare import first_difference

    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], [4]) == 0


def test_a_system_text_reaches_the_model(
    ask: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask("--system", "Be brief.", "--verbose") == 0
    assert "'Be brief. USER: <image>" in capsys.readouterr().err
    assert ask("--system", "Be brief.", "--raw", prompt="<image>x") == 2


def test_prompt_and_picture_may_come_from_stdin_and_files(
    ask: Callable[..., int],
    answer: str,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "q.txt").write_text("What?")
    assert ask("--cache", "full", prompt=f"@{tmp_path / 'q.txt'}") == 0
    stream = io.TextIOWrapper(io.BytesIO(picture.read_bytes()))
    monkeypatch.setattr("sys.stdin", stream)
    assert ask("--cache", "full", image="-") == 0
    assert capsys.readouterr().out == f"{answer}\n" * 2


def test_flags_of_an_answer_reach_the_engine(
    ask: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {
        "--max-new-tokens": 9,
        "--temperature": 1.5,
        "--top-k": 90,
        "--top-p": 0.97,
        "--seed": 11,
        "--repetition-penalty": 1.3,
    }
    asked: dict[str, Any] = {}

    def stream(*_: Any, **options: Any) -> None:
        asked.update(options)
        raise OptionError("enough")

    monkeypatch.setattr(Engine, "stream", stream)
    flags = [part for flag, value in given.items() for part in (flag, str(value))]
    assert ask(*flags, "--stop", "a", "--stop", "b", "--logprobs", "--json") == 2
    expected = {flag[2:].replace("-", "_"): value for flag, value in given.items()}
    assert asked == {**expected, "stop": ["a", "b"], "logprobs": True, "raw": False}


def test_flags_of_the_model_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load(name: str, **options: Any) -> None:
        asked.update(options, name=name)
        raise OptionError("enough")

    monkeypatch.setattr(Engine, "load", load)
    monkeypatch.setattr("engine.app.inputs.find_model", lambda _: None)
    flags = ["--model", "a/b", "--revision", "v1", "--dtype", "bf16", "--device", "cuda:1"]
    flags += ["--offline", "--style", "llava-v1", "--vision-tower", "c/d"]
    flags += ["--threads", "1"]
    assert main([*flags, "-p", "x", "--cache", "h2o"]) == 2
    expected = {"name": "a/b", "revision": "v1", "dtype": "bf16", "device": "cuda:1"}
    expected |= {"offline": True, "style": "llava-v1", "cache": "h2o", "vision_tower": "c/d"}
    expected |= {"threads": 1}
    assert {key: asked[key] for key in expected} == expected


def test_what_changes_nothing_is_said(
    ask: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a temperature nothing is drawn; a default says nothing."""
    assert ask("--seed", "3", "--top-k", "4", "--top-p", "1") == 0
    said = capsys.readouterr().err.splitlines()
    changes = [
        f"note: --{name} changes nothing without --temperature" for name in ("top-k", "seed")
    ]
    assert said == changes
    assert ask("--seed", "3", "--quiet") == ask("--seed", "3", "--temperature", "1") == 0
    assert capsys.readouterr().err == ""


def test_boxes_of_a_model_that_names_none_are_refused_before_the_answer(
    ask: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask("--draw-boxes", str(tmp_path / "a.png")) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "names no regions" in said.err
    assert not (tmp_path / "a.png").exists()


def test_version_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    said = r"avl-engine (\d+\.\d+\.\d+|\(not installed\))\n"
    assert re.fullmatch(said, capsys.readouterr().out)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """And changes nothing else: neither the exit code nor the two lines."""
    arguments = ["-p", "x", "--image", "nothing.png"]
    assert main(arguments) == 3
    lines = capsys.readouterr().err
    assert main([*arguments, "--debug"]) == 3
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert "ImageError: nothing.png does not exist" in said
    assert said.endswith(lines)


def test_an_error_is_no_json(ask: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """stdout stays empty; the error's two lines are on stderr, as without --json."""
    assert ask("--json", image="nothing.png") == 3
    assert ask("--json", "--compare", "--cache", "full") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("error: ") == said.err.count("hint: ") == 2


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError(), 5, "out of memory"),
        (RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"), 5, "out of memory"),
        (KeyError("a\nb"), 1, "unexpected KeyError: "),
    ],
)
def test_what_nobody_expected_is_one_line_too(
    error: Exception,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(_: list[str]) -> int:
        raise error

    monkeypatch.setattr("engine.app.cli._run", broken)
    assert main([]) == code
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {words}")
    assert second.startswith("hint: ")
    assert main(["--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "code", "error", "hint"),
    [
        (["--imag", "x"], 2, "unrecognized arguments: --imag", "did you mean --image?"),
        (["--max-new-token", "3"], 2, "--max-new-token", "did you mean --max-new-tokens?"),
        ([], 2, "no --prompt is given", "add --prompt"),
        (["-p", "x", "--image", "nothing.png"], 3, "nothing.png does not exist", "path"),
        (["-p", "x", "--image", "http://a.b/c.png"], 3, "not fetched by default", "--allow-url"),
        (["-p", "x", "--image", "data:,"], 3, "empty (0 bytes)", "again"),
        (["-p", "x", "--max-pixels", "0", "--image", "a"], 2, "--max-pixels is 0", str(MAX_PIXELS)),
        (["-p", "x", "-n", "0"], 2, "max_new_tokens is 0", "1 or more"),
        (["-p", "x", "--temperature", "nan"], 2, "temperature is nan", "0 (greedy)"),
        (["-p", "x", "--top-p", "0"], 2, "top_p is 0", "above 0"),
        (["-p", "x", "--model", "no/such/folder"], 4, "does not exist", "hub name"),
        (["-p", "x", "--cache", "nonsense"], 2, "nonsense", "full"),
        (["-p", "@nothing.txt"], 2, "cannot be read", ""),
    ],
)
def test_refusals(
    flags: list[str], code: int, error: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == code
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert lines[0].startswith("error: ")
    assert error in lines[0]
    assert len(lines) <= 2
    assert hint in "".join(lines[1:])


@pytest.mark.parametrize(
    "arguments",
    [
        ["-p", "x", "--image", "nothing.png"],
        ["-p", "x", "--imag", "a.png"],
        ["-p", "x", "--temperature", "-1"],
        ["-p", "x", "--image", "https://127.0.0.1/", "--allow-url"],
        ["--chat", "--json"],
        ["-p", "x", "--model", "no/such/folder"],
        ["-p", "x", "--model", "nobody/has-this", "--offline"],
        ["-p", "x", "--threads", "0"],
        ["nothing.png", "What?"],
        ["serve", "--rows", "0"],
        ["--version"],
    ],
)
def test_a_mistake_never_waits_for_torch(arguments: list[str]) -> None:
    """The seconds are torch's import; without it the rest is a fraction of one."""
    program = (
        "import sys, time; began = time.process_time(); from engine.app.cli import main\n"
        f"main({arguments!r}); print('torch' in sys.modules, time.process_time() - began)"
    )
    done = run_python("-c", program)
    loaded, seconds = done.stdout.split()[-2:]
    assert loaded == b"False"
    assert float(seconds) < 1  # of this process's own time; 0.25 on a quiet machine


def test_help_starts_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert said.index("examples:") < said.index("--image PATH")
    assert "exit codes:" in said


# -- interrupts and broken pipes ------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--no-stream",), ("--json",)])
def test_ctrl_c_keeps_what_was_said(
    ask: Callable[..., int],
    answer: str,
    flags: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = Engine.stream

    def stream(self: Engine, *args: Any, **options: Any) -> Iterator[Any]:
        for number, piece in enumerate(real(self, *args, **options)):
            yield piece
            if number == 0:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Engine, "stream", stream)
    assert ask("--cache", "full", *flags) == 130
    said = capsys.readouterr()
    if flags == ("--json",):
        assert said.out == ""
    else:
        assert said.out.endswith("\n")
        assert 1 < len(said.out) <= len(answer)  # a part, and the line's end
        assert answer.startswith(said.out[:-1])
    assert "Traceback" not in said.err


def run_python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        timeout=120,
        check=False,
        **options,
    )


def test_a_reader_that_leaves_is_told_by_the_exit_code_alone() -> None:
    inlet, outlet = os.pipe()
    os.close(inlet)
    done = run_python("main.py", "--version", stdout=outlet)
    speaking = (
        "from engine.app import cli; from engine.app.terminal import say\n"
        "cli._run = lambda _: say('x' * 100000); raise SystemExit(cli.main([]))"
    )
    streamed = run_python("-c", speaking, stdout=outlet)
    os.close(outlet)
    assert (streamed.returncode, streamed.stderr) == (141, b"")
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_the_systems_words() -> None:
    program = (
        "import sys; from engine.app import cli; from engine.app.terminal import say\n"
        "cli._run = lambda _: say('x')\n"
    )
    with open("/dev/full", "wb") as full:
        done = run_python("-c", program + "sys.exit(cli.main([]))", stdout=full)
    assert done.returncode == 1
    error, hint = done.stderr.decode().splitlines()
    assert error == "error: No space left on device: stdout"
    assert hint.startswith("hint: ")


INTERRUPTED = """
import runpy, sys
class Interrupting:
    def find_spec(self, name, *_):
        if name == {name!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupting())
sys.argv = ["main.py", "--version"]
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.parametrize("name", ["engine", "engine.__main__", "engine.app.terminal", "argparse"])
def test_ctrl_c_is_silent_from_the_first_line_on(name: str) -> None:
    """Wherever it comes among the imports, which take most of the first moments."""
    done = run_python("-c", INTERRUPTED.format(name=name))
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_what_stderr_cannot_take_changes_no_exit_code() -> None:
    with open("/dev/full", "wb") as full:
        program = "import sys; from engine.app.cli import main; sys.exit(main(sys.argv[1:]))"
        for arguments, code in ((["--version"], 0), (["-p", "x", "nothing.png"], 3)):
            command = [sys.executable, "-c", program, *arguments]
            assert subprocess.run(command, cwd=ROOT, stderr=full).returncode == code


def test_a_terminal_gets_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "**red**\x1b[31m\x07\x9b\u202e\r\n\t- `ü` 漢"
    assert printable(hostile) == "**red**[31m\n\t- `ü` 漢"  # Markdown stays text
    say(hostile)
    assert capsys.readouterr().out == hostile  # a file keeps what the model said
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    say(hostile)
    assert capsys.readouterr().out == printable(hostile)


@pytest.mark.parametrize("start", [["main.py"], ["-m", "engine"]])
def test_a_python_without_the_packages_is_told_so_in_a_line(start: list[str]) -> None:
    """-S: the same Python, without what is installed beside it."""
    command = [sys.executable, "-S", *start, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    said = done.stderr.splitlines()
    assert len(said) == 2
    assert re.fullmatch(r"error: the package \w+ is not installed for .+", said[0])
    assert ".venv/bin/python" in said[1]
