"""Started in odd ways: streams that are closed or in another encoding, no home, foreign modules."""

import os
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine.app.cli import main
from engine.app.starting import interrupts_kept
from engine.engine import Engine
from engine.errors import OptionError
from engine.ops import native
from tests.asking import Ask, refused

ROOT = Path(__file__).parents[1]
PRODUCT = [sys.executable, "main.py"]
WRONG = ["-p", "x", "nothing.png"]  # refused before torch is imported: quick
ERROR = b"error: nothing.png does not exist\nhint: check the path; "


def start(
    command: list[str],
    closed: tuple[int, ...] = (),
    given: bytes | None = None,
    **changes: str | None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command with some of the streams 0 to 2 closed, a stdin and another environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **changes}

    def close() -> None:
        for number in closed:
            os.close(number)

    return subprocess.run(
        command,
        cwd=ROOT,
        env={name: value for name, value in environment.items() if value is not None},
        input=given,
        capture_output=True,
        timeout=120,
        preexec_fn=close,
        check=False,
    )


@pytest.mark.parametrize("command", [PRODUCT, [sys.executable, "-m", "engine"]])
def test_it_may_be_started_as_a_file_or_a_module(command: list[str]) -> None:
    done = start([*command, "--help"])
    assert done.returncode == 0
    name = b"python -m engine" if "-m" in command else b"python main.py"
    assert done.stdout.startswith(b"usage: " + name + b" [PICTURE ...] [PROMPT] [flags]\n")
    assert done.stdout.count(name) > 5


def test_the_installed_command_is_called_avl(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/local/bin/avl"])
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: avl [PICTURE")
    assert "main.py" not in said


@pytest.mark.parametrize("closed", [(0,), (2,), (0, 2), (0, 1, 2), (1,)])
def test_errors_never_go_to_stdout(closed: tuple[int, ...]) -> None:
    done = start([*PRODUCT, *WRONG], closed)
    assert done.returncode == (1 if 1 in closed else 3)
    assert done.stdout == b""
    if closed == (0,):
        assert done.stderr.startswith(ERROR)
    elif closed == (1,):
        assert done.stderr.startswith(b"error: Bad file descriptor: stdout\nhint: ")


def test_a_file_never_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """What is printed to a number, as libraries do, would be written into the user's file."""
    program = (
        "import os; from engine.app.terminal import prepare; prepare(); "
        f"file = open({str(tmp_path / 'a')!r}, 'w'); print(file.fileno())"
    )
    assert int(start([sys.executable, "-c", program], (0, 2)).stdout) > 2


def test_a_closed_stdin_is_an_empty_one() -> None:
    done = start([*PRODUCT, "-p", "-"], (0,))
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: the prompt is empty\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict", "utf-8"])
def test_every_encoding_is_written(encoding: str) -> None:
    say = "from engine.app import cli; from engine.app.terminal import say, say_json\n"
    say += "def run(_):\n say('\\u6f22\\n'); say_json({'a': '\\u6f22'})\n"
    say += " raise cli.OptionError('\\u6f22')\n"
    say += "cli._run = run; raise SystemExit(cli.main([]))"
    done = start([sys.executable, "-c", say], PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.returncode == 2
    text, line = done.stdout.decode(encoding.partition(":")[0]).splitlines()
    if encoding == "utf-8":
        assert (text, line) == ("漢", '{"a": "漢"}')
    else:
        assert (text, line) == (r"\u6f22", r'{"a": "\u6f22"}')  # the second is JSON still
    assert done.stderr.decode(encoding.partition(":")[0]).splitlines()[0] == f"error: {text}"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_what_could_not_be_said_is_an_error(flag: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*PRODUCT, flag], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: No space left on device: stdout\nhint: make room")


def test_warnings_decide_nothing() -> None:
    program = (
        "import warnings; from engine.app import cli\n"
        "cli._run = lambda _: warnings.warn('of a library') or 0; raise SystemExit(cli.main([]))"
    )
    done = start([sys.executable, "-c", program], PYTHONWARNINGS="error")
    assert done.returncode == 0
    assert b"UserWarning: of a library" in done.stderr


def test_a_user_without_a_home_is_answered() -> None:
    """As in a container that is started under a number that no file knows."""
    without: dict[str, Any] = dict.fromkeys(("HOME", "USER", "LOGNAME", "LANG", "XDG_STATE_HOME"))
    command = [*PRODUCT, "-p", "What?", "-n", "1", "--device", "cpu"]
    chat = [*PRODUCT, *WRONG, "--chat", "--model", "~/nothing"]
    if os.getuid() == 0 and (setpriv := next(filter(os.path.exists, ["/usr/bin/setpriv"]), None)):
        other = [setpriv, "--reuid", "54321", "--regid", "54321", "--clear-groups"]
        if start([*other, sys.executable, "-c", "import engine.cli"]).returncode == 0:
            command, chat = [*other, *command], [*other, *chat]
    done = start(command, **without)
    assert (done.returncode, done.stderr) == (0, b"")
    assert start(chat, **without).returncode == 3


def test_a_foreign_native_module_is_left_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    found = native.load.__wrapped__
    monkeypatch.setitem(sys.modules, "engine._native", ModuleType("engine._native"))
    module, reason = found()
    assert module is None
    assert "another module: it has no AttentionPlan" in reason

    def broken(*_: object) -> None:
        raise AttributeError("of its own making")

    monkeypatch.setattr("importlib.import_module", broken)
    assert found() == (None, "_native cannot be imported (of its own making)")


NUMBERS = ["-n", "--temperature", "--top-k", "--top-p", "--seed", "--repetition-penalty"]
NUMBERS += ["--max-pixels", "--rows", "--threads"]


@pytest.mark.parametrize("flag", NUMBERS)
@pytest.mark.parametrize("value", ["9" * 5000, "-" + "9" * 30, "1e400", "-inf", "nan", "0x10", ""])
def test_numbers_beyond_all_types_are_refused(
    flag: str, value: str, ask: Ask, tmp_path: Path
) -> None:
    job = tmp_path / "jobs.jsonl"
    job.write_text('{"prompt": "x"}\n')
    rows = flag == "--rows"
    asked = ask(
        *(["--batch", job] if rows else ["-p", "x"]), "--model", tmp_path, f"{flag}={value}"
    )
    refused(asked, 2)
    assert len(asked.err) < 300
    assert asked.seconds < 1


def test_threads_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", given.append)
    monkeypatch.setattr("engine.engine.load", lambda *_: (_ for _ in ()).throw(OptionError("no")))
    most = os.cpu_count() or 1
    for threads, words in {
        0: "threads is 0",
        most + 1: f"threads is {most + 1}",
        most: "no",
    }.items():
        with pytest.raises(OptionError, match=words):
            Engine.load(threads=threads)
    assert given == [most]


def test_an_answer_starts_without_what_it_does_not_need() -> None:
    """torch's compiler takes a second to import, the hub's client half of one."""
    code = (
        "import sys; from engine import Engine; e = Engine.load(); "
        "e.generate('Hi', max_new_tokens=3, ignore_eos=True); "
        "print([m for m in ('torch._dynamo', 'huggingface_hub', 'transformers', 'sympy') "
        "if m in sys.modules])"
    )
    done = start([sys.executable, "-c", code])
    assert done.stdout.strip() == b"[]", done.stdout + done.stderr


LONG = "x" * 300
DEEP = "/" + "y/" * 3000 + "y"
LOCAL = ["--offline", "-p", "Hi"]
CAR = ["examples/car.jpg", "Hi"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", LONG, "-p", "Hi"], 4, "cannot be read: File name too long"),
        (["--model", DEEP, "-p", "Hi"], 4, "cannot be read: File name too long"),
        (["--model", f"a/{'x' * 100}", *LOCAL], 4, "does not exist"),
        (["--model", "a/b", "--revision", LONG, *LOCAL], 4, "is no revision"),
        ([*CAR, "--attention", f"{DEEP}.html"], 2, "no folder /y/"),
        ([*CAR, "--draw-boxes", f"{DEEP}.png"], 2, "no folder /y/"),
        (["--batch", "pyproject.toml", "--output", DEEP], 2, "no folder /y/"),
        (["--model", "weights/tiny", "--convert", LONG], 2, "cannot be written: File name too"),
        (["--image", "", "-p", "Hi"], 2, "the name of --image is empty"),
        (["-"], 2, "-p - reads the question there"),
    ],
)
def test_names_that_none_can_have(
    arguments: list[str], code: int, words: str, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    asked = ask(*arguments)
    refused(asked, code, words)
    assert len(asked.err) < 600


def test_no_message_fills_more_than_a_screen(ask: Ask) -> None:
    asked = ask("--style", "x" * 5000, "-p", "Hi")
    refused(asked, 2, "invalid choice", "choose from")
    assert len(asked.err) < 2200


def test_an_interrupt_waits_until_all_is_imported() -> None:
    done = []

    def imported() -> None:
        with interrupts_kept():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("all")

    with pytest.raises(KeyboardInterrupt):
        imported()
    assert done == ["all"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


INTERRUPTED = """
import importlib.abc, os, signal, sys

class Interrupts(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch._C":  # in the middle of torch
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
from engine.__main__ import start
sys.exit(start())
"""


@pytest.mark.parametrize("arguments", [["-p", "Hi"], ["--check"]])
def test_an_interrupt_while_torch_is_imported_is_one(arguments: list[str]) -> None:
    done = start([sys.executable, "-c", INTERRUPTED, *arguments])
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@pytest.mark.parametrize(("limit", "most"), [("RLIMIT_AS", 400 << 20), ("RLIMIT_DATA", 60 << 20)])
def test_too_little_memory_for_torch_is_said(limit: str, most: int) -> None:
    command = [*PRODUCT, "-p", "Hi", "-n", "1"]
    limited = partial(resource.setrlimit, getattr(resource, limit), (most, most))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, preexec_fn=limited, check=False)
    assert done.returncode == 5
    assert done.stderr.startswith(b"error: out of memory: torch does not fit")


@pytest.mark.parametrize("more", [[], [str(ROOT / CAR[0]), "--attention", "a.html"], ["--check"]])
def test_a_working_directory_that_was_removed_is_said(more: list[str], tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    asked = [] if "--check" in more else ["-p", "Hi", "-n", "1"]
    command = [sys.executable, str(ROOT / "main.py"), *asked, *more]
    done = subprocess.run(
        command, cwd=gone, capture_output=True, preexec_fn=gone.rmdir, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: the working directory was removed\nhint: ")


def test_the_checkout_is_found_without_the_scripts_folder_on_the_path() -> None:
    assert start([*PRODUCT, "--version"], PYTHONSAFEPATH="1").returncode == 0


def test_words_are_utf_8_whatever_the_locale_is() -> None:
    changes = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = start([*PRODUCT, "-p", "Où?", "--system", "É", "-n", "1"], **changes)
    assert (done.returncode, done.stderr) == (0, b"")
    done = start([*PRODUCT, "--chat", "-q", "-n", "1"], given="Où?\n".encode(), **changes)
    assert (done.returncode, done.stderr) == (0, b"")
