"""What the command line can be asked to do, and which flags each of these takes.

A flag that a mode does not take is refused by name: none is ignored in silence.
"""

from __future__ import annotations

from collections.abc import Set

from ..errors import OptionError

_ALWAYS = {"quiet", "debug"}
_FOLDER = {"model", "revision", "offline", "vision_tower"}
_RUN = {
    "dtype",
    "weights",
    "device",
    "threads",
    "cache",
    "sync_selection",
    "graphs",
    "as_published",
}
_LOADED = _FOLDER | _RUN | {"style", "max_image_tokens"}
SHOWN = ("frames", "fps", "start", "end")  # how a video is shown
_LATER = {"batch", "chat"}  # where videos may be named later
_ASKED = {"image", "video", "prompt", "allow_url", "max_pixels", "system", "max_new_tokens", "stop"}
_DRAWN = {"temperature", "top_k", "top_p", "seed", "repetition_penalty"}
_ANSWER = _ALWAYS | _LOADED | _ASKED | {*SHOWN} | _DRAWN

# The flag that asks for a mode, the first that is given decides; "" is one answer.
MODES: dict[str, Set[str]] = {
    "check": _ALWAYS | _FOLDER | {"json"},
    "convert": _ALWAYS | _FOLDER | {"weights"},
    "batch": _ANSWER | {"output", "rows", "raw", "logprobs", "ray", "workers"},
    "chat": _ANSWER | {"stats"},
    "compare": _ANSWER | {"raw", "json", "logprobs", "verbose"},
    "": _ANSWER
    | {"raw", "json", "logprobs", "verbose", "stats", "no_stream", "attention", "draw_boxes"},
}

# Flags that say nothing without another one, and flags that say the contrary of another one.
_NEEDS = {"logprobs": "json", "workers": "ray"}
_EXCLUDES = {"verbose": "quiet", "stats": "quiet", "system": "raw", "style": "raw"}
_EXCLUDES |= {"attention": "video"}


def find_mode(given: Set[str], words: Set[str] = frozenset()) -> str:
    """The mode that the flags ask for, by their names as attributes.

    ``words`` are those of ``given`` that stand there without a flag.

    Raises OptionError for what the mode does not take.
    """
    mode = next((name for name in MODES if name in given), "")
    for name in sorted(given - MODES[mode] - {mode}):
        if not mode:
            needed = " or ".join(_flag(other) for other, takes in MODES.items() if name in takes)
            raise OptionError(f"{_flag(name)} is of {needed}", hint=f"add {needed}")
        what = (
            {"image": "picture", "video": "video", "prompt": "question"}[name]
            if name in words
            else _flag(name)
        )
        raise OptionError(f"{_flag(mode)} takes no {what}", hint="leave one out")
    for name, other in _NEEDS.items():
        if name in given and other in MODES[mode] and other not in given:
            raise OptionError(f"{_flag(name)} needs {_flag(other)}", hint=f"add {_flag(other)}")
    for name in sorted(given & {*SHOWN}):
        if mode not in _LATER and "video" not in given:
            raise OptionError(f"{_flag(name)} needs --video", hint="add --video FILE")
    for name, other in _EXCLUDES.items():
        if {name, other} <= given:
            raise OptionError(f"{_flag(other)} takes no {_flag(name)}", hint="leave one out")
    return mode


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
