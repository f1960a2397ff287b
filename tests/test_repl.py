"""--chat: questions and commands, over a pipe and on a pseudo-terminal; Ctrl-C in both places."""

import argparse
import io
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.app.cli import main
from engine.app.lines import completions, read_lines
from engine.app.noise import Noise
from engine.app.repl import Repl
from engine.engine import Engine
from engine.errors import ContextError, EngineError, OptionError
from engine.pictures.image import open_image
from tests.checkpoints import Shape
from tests.noise import noise

SHAPE = Shape(kv_heads=2)
OPTIONS = {"max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture
def engine(engine_of: Callable[..., Engine]) -> Engine:
    return engine_of(SHAPE)


def make_repl(engine: Engine, system: str | None = None) -> Repl:
    options = argparse.Namespace(quiet=False, verbose=False, stats=False)
    return Repl(engine, open_image, dict(OPTIONS), Noise(options, []), system)  # type: ignore[arg-type]


@pytest.fixture
def repl(engine: Engine) -> Repl:
    return make_repl(engine)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    noise(70, 50).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_turns_are_those_of_a_conversation(
    engine: Engine, repl: Repl, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = engine.chat()
    expected = [
        chat.send("Hello", **OPTIONS).text,
        chat.send("What?", [noise(70, 50)], **OPTIONS).text,
        chat.send("Sure?", **OPTIONS).text,
    ]
    assert repl.run(iter(["Hello", f"/image {picture}", "What?", "", "Sure?", "/exit", "x"])) == 0
    said = capsys.readouterr()
    assert said.out == "".join(f"{text}\n" for text in expected)
    assert "70 x 50 pixels" in said.err


def test_clear_begins_again(engine: Engine, repl: Repl, capsys: pytest.CaptureFixture[str]) -> None:
    repl.run(iter(["Hello", "/clear", "Hello"]))
    assert capsys.readouterr().out == f"{engine.generate('Hello', **OPTIONS).text}\n" * 2


def test_cache_changes_the_policy_for_a_new_conversation(
    engine: Engine, repl: Repl, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repl.run(iter(["Hello", "/cache h2o", f"/image {picture}", "What?", "/cache"]))
    other = engine.with_cache("h2o").generate("What?", [noise(70, 50)], **OPTIONS)
    said = capsys.readouterr()
    assert said.out.endswith(f"\n{other.text}\n")
    assert said.err.count(f"cache {other.cache.policy}") == 2


def test_a_system_text_stands_before_the_first_question_only(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    make_repl(engine, "Be brief.").run(iter(["Hello", "world"]))
    chat = engine.chat()
    system = {"role": "system", "content": "Be brief."}
    first = chat.send([system, {"role": "user", "content": "Hello"}], **OPTIONS)
    second = chat.send("world", **OPTIONS)
    assert capsys.readouterr().out == f"{first.text}\n{second.text}\n"


def test_stats_save_and_help(
    repl: Repl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "chat.txt"
    with pytest.raises(OptionError, match="no figures yet"):
        repl.take("/stats")
    repl.take("Hello")
    answer = capsys.readouterr().out.rstrip("\n")
    for command in ("/stats", "/help", f"/save {target}"):
        repl.take(command)
    said = capsys.readouterr()
    assert said.out == ""
    assert "tokens/s" in said.err
    assert "/cache SPEC" in said.err
    assert target.read_text() == f"> Hello\n\n{answer}\n\n"
    with pytest.raises(OptionError, match="File exists"):
        repl.take(f"/save {target}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/imag a.png", "unknown command /imag"),
        ("/image nothing.png", r"nothing\.png does not exist"),
        ("/cache nonsense", "nonsense"),
        ("/save", "needs a file name"),
        ("/image", "needs a file name"),
        ("/image -", r"stdin \(-\) holds the conversation"),
        ("/clear now", "/clear stands alone"),
        ("/quit now", "/quit stands alone"),
    ],
)
def test_mistakes_leave_the_conversation_usable(
    repl: Repl, line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EngineError, match=words):
        repl.take(line)
    repl.take("Hello")
    assert capsys.readouterr().out.strip()


def test_a_refused_picture_is_put_away(
    engine: Engine, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be refused again with every question; the conversation goes on without it."""
    repl, count = make_repl(engine), engine.model.decoder.config.context // SHAPE.image_tokens + 1
    repl.show([open_image(picture)] * count)
    assert repl.run(iter(["What?", "Hello", f"/image {picture}", "What?"])) == 5
    chat = engine.chat()
    expected = [chat.send("Hello", **OPTIONS).text]
    expected.append(chat.send("What?", [noise(70, 50)], **OPTIONS).text)
    said = capsys.readouterr()
    assert said.out == "".join(f"{text}\n" for text in expected)
    assert said.err.count("error: ") == 1
    assert f"({count} pictures are put away" in said.err


def test_an_answer_longer_than_the_context_is_cut_with_a_note(
    engine_of: Callable[..., Engine], capsys: pytest.CaptureFixture[str]
) -> None:
    engine = engine_of(Shape(kv_heads=2, context=160))
    repl = make_repl(engine)
    repl._options["max_new_tokens"] = 10**30
    repl.take("Hello")
    said = capsys.readouterr()
    room = engine.model.decoder.config.context - len(engine.render("Hello").token_ids)
    assert f"note: the answer has at most {room:,} tokens" in said.err
    expected = engine.generate("Hello", max_new_tokens=room, ignore_eos=True)
    assert said.out == expected.text + "\n"
    with pytest.raises(ContextError):  # nothing is left for an answer, or for the prompt itself
        repl.take("word " * 2000)


@pytest.mark.parametrize("command", ["/image {}", "/image {} {}", "/save {}"])
@pytest.mark.parametrize("spell", ["plain", "quoted", "double", "escaped", "url", "home"])
def test_paths_may_be_typed_as_terminals_drop_them(
    command: str,
    spell: str,
    repl: Repl,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "it's my car.png"
    if "/save" not in command:
        noise(70, 50).save(path)
    spelled = {
        "plain": str(path),
        "quoted": shlex.quote(str(path)),
        "double": f'"{path}"',
        "escaped": str(path).replace(" ", r"\ ").replace("'", r"\'"),
        "url": path.as_uri(),
        "home": r"~/it\'s\ my\ car.png",
    }[spell]
    if spell == "plain" and command.count("{}") == 2:
        return  # spaces without quotes: nobody could say where one path ends
    repl.take(command.format(spelled, spelled))
    assert path.exists()
    if "/image" in command:
        assert capsys.readouterr().err.count("70 x 50 pixels") == command.count("{}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{folder}/my car.png", "70 x 50 pixels"),
        ("'{folder}/my car.png' ", "70 x 50 pixels"),
        (r"{folder}/my\ car.png", "70 x 50 pixels"),
        ("file://{folder}/my%20car.png", "70 x 50 pixels"),
        ("~/my\\ car.png", "70 x 50 pixels"),
        ("a.png", "70 x 50 pixels"),
        ("a.png b.png", "70 x 50 pixels"),
        ("{folder}/plain", "70 x 50 pixels"),
        ("c.png", "c.png does not exist"),
        ("'{folder}/no car.png'", "no car.png does not exist"),
        ("plain", ""),
        ("What is in a.png", ""),
        ("What is it in c.png?", ""),
    ],
)
def test_a_picture_alone_on_a_line_is_shown(
    line: str,
    words: str,
    repl: Repl,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a terminal spells what is dropped on it; all else is a question."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("my car.png", "a.png", "b.png", "plain"):
        noise(70, 50).save(tmp_path / name, "PNG")
    code = repl.run(iter([line.replace("{folder}", str(tmp_path))]))
    said = capsys.readouterr()
    assert words in said.err
    assert bool(said.out) == (not words)
    assert code == (3 if "exist" in words else 0)


def test_of_several_pictures_the_good_ones_are_shown(
    engine: Engine, repl: Repl, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert repl.run(iter([f"/image no.png {picture} nor.png", "What?"])) == 3
    said = capsys.readouterr()
    chat = engine.chat().send("What?", [noise(70, 50)], **OPTIONS)  # type: ignore[arg-type]
    assert said.out == f"{chat.text}\n"
    assert "no.png does not exist" in said.err
    assert "nor.png does not exist" in said.err


def test_the_tabulator_completes_commands_and_paths(tmp_path: Path) -> None:
    (tmp_path / "my car.png").touch()
    (tmp_path / "mine").mkdir()
    commands = ["/image", "/clear", "/cache", "/save"]
    assert completions("/c", commands) == ["/clear", "/cache"]
    assert completions(f"/image {tmp_path}/m", commands) == [
        f"/image {tmp_path}/mine/",
        f"/image {tmp_path}/my car.png",
    ]
    for line in ("", "What", f"/cache {tmp_path}/m", f"/image {tmp_path}/[m"):
        assert completions(line, commands) == []


def test_a_path_is_a_question_and_no_command(
    repl: Repl, capsys: pytest.CaptureFixture[str]
) -> None:
    repl.take("/etc/hosts is what?")
    assert capsys.readouterr().out


def interrupt_at(engine: Engine, monkeypatch: pytest.MonkeyPatch, presses: int) -> None:
    """Send SIGINT to this process after the second piece of every answer."""
    from engine.running.chat import Chat

    real = Chat.stream

    def stream(self: Chat, *args: object, **options: object) -> Iterator[object]:
        for number, piece in enumerate(real(self, *args, **options)):  # type: ignore[arg-type]
            if number == 1:
                for _ in range(presses):
                    os.kill(os.getpid(), signal.SIGINT)
            yield piece

    monkeypatch.setattr(Chat, "stream", stream)


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repl = make_repl(engine)
    repl._options["max_new_tokens"] = 60
    with monkeypatch.context() as patch:
        interrupt_at(engine, patch, presses=1)
        repl.take("Hello")
    stopped = capsys.readouterr()
    whole = engine.generate("Hello", max_new_tokens=60, ignore_eos=True).text
    assert stopped.out.endswith("\n")
    assert stopped.out.rstrip("\n")
    assert whole.startswith(stopped.out[:-1])
    assert len(stopped.out) < len(whole)
    assert "(stopped)" in stopped.err
    repl.take("world")
    assert capsys.readouterr().out.strip()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_leaves(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(engine, monkeypatch, presses=2)
    with pytest.raises(KeyboardInterrupt):
        make_repl(engine).take("Hello")


def test_a_block_is_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'one\n"""\ntwo\n\n three\n"""\nfour\n"""\nfive'
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert list(read_lines()) == ["one", "two\n\n three", "four", "five"]


def test_a_pipe_of_other_bytes_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.TextIOWrapper(io.BytesIO(b"one\n\xff\xfe\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", pipe)
    with pytest.raises(OptionError, match="stdin is not text"):
        list(read_lines())


def test_a_line_of_a_pipe_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 1_000_001))
    with pytest.raises(OptionError, match="more than 1,000,000 characters") as refused:
        list(read_lines())
    assert refused.value.hint == "give less at once"


def test_piped_lines_end_to_end(
    engine: Engine,
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--model", str(checkpoint(SHAPE)), "--chat", "--cache", "full", "-n", "3"]
    arguments += ["--device", "cpu", "-p", "Hello"]
    chat = engine.chat()
    expected = [chat.send(text, max_new_tokens=3).text for text in ("Hello", "What?")]
    monkeypatch.setattr("sys.stdin", io.StringIO("/nonsense\nWhat?\n"))
    assert main(arguments) == 2  # that of the first error, for scripts
    said = capsys.readouterr()
    assert said.out == "".join(f"{text}\n" for text in expected)
    assert "error: unknown command /nonsense" in said.err


@pytest.mark.parametrize(
    "extra", [["--json"], ["--raw"], ["--compare"], ["--image", "-"], ["-p", "-"]]
)
def test_what_does_not_go_with_chat_is_refused(
    extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--chat", *extra]) == 2
    assert "--chat" in capsys.readouterr().err


TYPED = """
import sys
from engine.app.lines import read_lines
for line in read_lines(["/image", "/save"]):
    print("GOT", repr(line), flush=True)
"""


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, home: Path) -> None:
        self.fd, inner = pty.openpty()
        environment = {**os.environ, "XDG_STATE_HOME": str(home), "TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", TYPED],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=environment,
            cwd=Path(__file__).parents[1],
            start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )
        os.close(inner)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, text: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.fd], [], [], 0.2)[0]:
                self.seen += os.read(self.fd, 4096).decode()
        self.seen = self.seen.split(text, 1)[1]

    def close(self) -> int:
        code = self.process.wait(20)
        os.close(self.fd)
        return code


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal(tmp_path)
    yield made
    made.process.kill()
    made.process.wait()


def test_a_terminal_edits_pastes_and_remembers(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("> ")
    terminal.type("helo\x1b[Dl\r")  # left, and the missing letter
    terminal.wait_for("GOT 'hello'")
    terminal.wait_for("> ")
    terminal.type("\x1b[200~first\nsecond\nthird\x1b[201~\r")
    terminal.wait_for(r"GOT 'first\nsecond\nthird'")
    terminal.wait_for("> ")
    terminal.type("dropped")
    terminal.wait_for("dropped")
    time.sleep(0.3)  # Python looks for signals only where readline waits for a key
    terminal.type("\x03")
    terminal.wait_for("again or /exit leaves")
    terminal.wait_for("> ")
    terminal.type("\x1b[A\x1b[A\r")  # up twice: the line before the paste
    terminal.wait_for("GOT 'hello'")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.close() == 0
    history = tmp_path / "avl-engine" / "history"
    assert "hello" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_a_terminal_completes_with_the_tabulator(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "some picture.png").touch()
    terminal.wait_for("> ")
    terminal.type(f"/im\t {tmp_path}/some\t\r")
    terminal.wait_for(f"GOT '/image {tmp_path}/some picture.png'")


def test_line_ends_of_other_systems_are_no_part_of_a_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('Hi\r\n"""\r\none\r\ntwo\r\n"""\r\n', newline=""))
    assert list(read_lines()) == ["Hi", "one\ntwo"]


def test_a_mistyped_picture_beside_another_is_named(repl: Repl, picture: Path) -> None:
    with pytest.raises(EngineError, match=r"nope\.jpg does not exist"):
        repl.take(f"{picture} nope.jpg")
    assert repl._pictures[0].name == str(picture)


def test_a_full_conversation_is_told_to_begin_anew(engine: Engine) -> None:
    chat, context = engine.chat(), engine.model.decoder.config.context
    list(chat.stream("Hello", max_new_tokens=4))
    with pytest.raises(ContextError) as caught:
        list(chat.stream("a b " * context, max_new_tokens=1))
    assert "/clear" in caught.value.hint
