"""Renders one chat template, as a process of its own that can do little else.

``chat_template`` starts it and nothing imports it. It reads {"template", "values"} as JSON from
stdin and writes {"text"} or {"error"} to stdout.
"""

import json
import re
import sys
from datetime import date
from typing import Any, NoReturn

MOST_TEXT = 100_000  # characters of a rendered prompt
MEMORY = 1 << 29
SECONDS = 1  # of computing


def give_up_rights() -> None:
    """From here on nothing is written or started, and memory and time are short."""
    try:
        import resource
    except ImportError:  # not on Windows, where only the parent's patience limits it
        return
    limits = {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_CPU: SECONDS,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, most in limits.items():
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):  # a system that lacks one still has the others
            continue


def render(template: str, values: dict[str, Any]) -> str:
    """The text that transformers' ``apply_chat_template`` gives."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: object) -> NoReturn:
        raise TemplateError(str(message))

    # {% generation %} marks what the model has said, for training: here it is just a block.
    tag = re.compile(r"(\{%[-+]?\s*)(end)?generation(?=\s*[-+]?%\})")
    template = tag.sub(lambda found: found[1] + ("endif" if found[2] else "if true"), template)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = raise_exception
    # The same prompt on every day: that which Llama 3's template names where nobody else does.
    environment.globals["strftime_now"] = date(2024, 7, 26).strftime
    give_up_rights()
    return environment.from_string(template).render(**values)


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    try:
        answer = {"text": render(request["template"], request["values"])[:MOST_TEXT]}
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        answer = {"error": f"{type(error).__name__}: {reason}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
