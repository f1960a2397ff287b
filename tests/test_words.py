"""Words without a flag, and what the modes take: nothing is guessed wrongly or left unsaid."""

from pathlib import Path

import pytest

from engine.app.flags import build_parser, parse_flags
from engine.app.modes import MODES, SHOWN
from engine.app.words import is_picture
from engine.errors import OptionError
from tests.asking import Ask, refused


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with some files in it."""
    for name in ("car.jpg", "two words.png", "README", "b.png"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "pictures", "prompt"),
    [
        (["car.jpg", "What is it?"], ["car.jpg"], "What is it?"),
        (["What is it?", "car.jpg"], ["car.jpg"], "What is it?"),
        (["car.jpg", "--stats", "What?"], ["car.jpg"], "What?"),
        (["--image", "car.jpg", "b.png", "Which?"], ["car.jpg", "b.png"], "Which?"),
        (
            [
                "--image",
                "car.jpg",
                "b.png",
                "--stats",
                "--image",
                "x.jpg",
                "two words.png",
                "-p",
                "a",
            ],
            ["car.jpg", "b.png", "x.jpg", "two words.png"],
            "a",
        ),
        (["two words.png", "README", "What?"], ["two words.png", "README"], "What?"),
        (["~/car.jpg", "What?"], ["~/car.jpg"], "What?"),
        (["nowhere.JPG", "What?"], ["nowhere.JPG"], "What?"),
        (["photos/car", "What?"], ["photos/car"], "What?"),
        (["my car.jpeg", "What?"], ["my car.jpeg"], "What?"),
        (["data:image/png;base64,aGk=", "What?"], ["data:image/png;base64,aGk="], "What?"),
        (["HTTPS://a.b/c", "What?"], ["HTTPS://a.b/c"], "What?"),
        (["-", "What?"], ["-"], "What?"),
        (["Is it red and/or blue?"], [], "Is it red and/or blue?"),
        (["@q.txt", "car.jpg"], ["car.jpg"], "@q.txt"),
        (["- What is it?"], [], "- What is it?"),
        (["What?", "--", "-car.jpg"], ["-car.jpg"], "What?"),
        (["--", "car.jpg", "--what"], ["car.jpg"], "--what"),
        (["car.jpg", "check"], ["car.jpg"], "check"),
        (["What"], [], "What"),
        ([], [], None),
    ],
)
def test_words_are_pictures_or_the_prompt(
    words: list[str], pictures: list[str], prompt: str | None, here: Path
) -> None:
    flags, mode = parse_flags(words)
    assert (flags.image, flags.prompt, mode) == (pictures, prompt, "")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["cra.jpg", "What?"], 3, "cra.jpg does not exist"),
        (["--image", "car.jpg", "bb.png", "What?"], 3, "is empty"),
        (["What", "is", "it?"], 2, "more than one prompt: 'What' and 'is'"),
        (["-p", "What?", "Where?"], 2, "more than one prompt: 'What?' and 'Where?'"),
        (["serve", "car.jpg"], 2, "unrecognized arguments: car.jpg"),
        (["--quiet", "serve"], 2, "'serve' comes before its flags"),
        (["batch", "jobs.jsonl"], 2, "--batch jobs.jsonl cannot be read"),
        (["--quiet", "batch"], 2, "'batch' comes before its flags"),
        (["--imgae=a.jpg", "What?"], 2, "did you mean --image?"),
        (["--temp", "1", "What?"], 2, "did you mean --temperature?"),
        (["-x.jpg", "What?"], 2, "comes behind --"),
        (["chat"], 2, "did you mean --chat?"),
        (["check", "car.jpg"], 2, "did you mean --check?"),
        (["yes/no?"], 2, "yes/no? was taken as a picture, -p 'yes/no?' asks it"),
        (["what is in a.jpg"], 2, "taken as a picture, -p 'what is in a.jpg' asks it"),
        (["yes/no?", "car.jpg", "What?"], 3, "yes/no? was taken as a picture, -p 'yes/no?'"),
        (["dangling.png", "What?"], 3, "it is a link to nowhere, which is not there"),
        (["-p", "@alice is who?"], 2, "begins with @ may come from stdin"),
        (["--seed", "9" * 5000, "-p", "x"], 2, "has 5,000 characters"),
        (["-p", "x", "--repetition-penalty", "0"], 2, "a number above 0"),
        (["-p", "x", "--model", "."], 4, "is no model folder: it has no config.json"),
    ],
)
def test_what_is_no_question_is_refused(
    words: list[str], code: int, said: str, here: Path, ask: Ask
) -> None:
    (here / "dangling.png").symlink_to("nowhere")
    asked = ask(*words)
    refused(asked, code, said)
    assert asked.seconds < 0.5 or "--model" in words


def test_what_was_called_a_picture_is_not_explained(here: Path, ask: Ask) -> None:
    asked = ask("--image", "yes/no?", "-p", "What?")
    refused(asked, 3, "yes/no? does not exist")
    assert "taken as" not in asked.err


def test_a_long_prompt_is_no_path() -> None:
    assert not is_picture("word " * 100_000)


# -- modes ----------------------------------------------------------------------------------------

VALUES = {"--dtype": "fp32", "--device": "cpu", "--style": "llava-v1", "--weights": "q4"}


def arguments_of(flag: str) -> list[str]:
    """A flag with a value where it needs one."""
    actions = {each: action for action in build_parser()._actions for each in action.option_strings}
    return [flag] if actions[flag].nargs == 0 else [flag, VALUES.get(flag, "1")]


def flags_of_the_parser() -> list[str]:
    names = [action.option_strings[0] for action in build_parser()._actions]
    return [name for name in names if name not in ("-h", "--version")]


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_takes_a_flag_or_refuses_it_by_name(mode: str) -> None:
    """The whole table, through the parser: given alone beside its mode."""
    asking = arguments_of(f"--{mode}") if mode else []
    other_modes = {f"--{name}" for name in MODES if name != mode}
    for flag in flags_of_the_parser():
        name = flag.lstrip("-").replace("-", "_")
        if name == mode or (not mode and flag in other_modes):
            continue
        extra = ["--json"] if flag == "--logprobs" and "json" in MODES[mode] else []
        extra += ["--ray", "local"] if flag == "--workers" and mode == "batch" else []
        extra += ["--video", "1"] if name in SHOWN else []
        if name in MODES[mode]:
            assert parse_flags([*asking, *arguments_of(flag), *extra])[1] == mode
            continue
        first = next((each for each in MODES if each in (mode, name)), "")
        with pytest.raises(OptionError) as caught:
            parse_flags([*asking, *arguments_of(flag)])
        assert flag in f"{caught.value} {caught.value.hint}", (first, flag)


def test_every_flag_is_of_some_mode() -> None:
    known = set().union(*MODES.values(), MODES)
    assert {flag.lstrip("-").replace("-", "_") for flag in flags_of_the_parser()} == known - {""}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["-p", "x", "--logprobs"], "--logprobs needs --json"),
        (["-p", "x", "-q", "--stats"], "--quiet takes no --stats"),
        (["-p", "x", "-q", "-v"], "--quiet takes no --verbose"),
        (["-p", "x", "--raw", "--system", "x"], "--raw takes no --system"),
        (["-p", "x", "--output", "a"], "--output is of --batch"),
        (["-p", "x", "--rows", "8"], "--rows is of --batch"),  # its own default, but given
        (["--chat", "-n", "256", "--json"], "--chat takes no --json"),
        (["--check", "--convert", "x"], "--check takes no --convert"),
        (["--check", "What?"], "--check takes no question"),
        (["--convert", "x", "car.jpg"], "--convert takes no picture"),
        (["--check", "--image", "car.jpg"], "--check takes no --image"),
        (["--batch", "x", "--chat"], "--batch takes no --chat"),
        (["--compare", "--attention", "a.html"], "--compare takes no --attention"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(given: list[str], words: str, ask: Ask) -> None:
    refused(ask(*given), 2, words)


def test_the_version_is_told_with_any_other_flag(ask: Ask) -> None:
    asked = ask("--version", "--check", "--batch", "x", "-p", "What?")
    assert (asked.code, asked.err) == (0, "")
    assert asked.out.startswith("avl-engine ")
