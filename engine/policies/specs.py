"""Cache policies by name: ``avl:secondary=0.45,core=0.30`` to a policy object."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from ..errors import OptionError
from ..naming import told
from .avl import Avl
from .composed import Composed
from .fastv import FastV
from .full import Full
from .h2o import H2o
from .policy import Policy
from .random import Random
from .sift import Sift
from .snapkv import SnapKv
from .streaming import Streaming
from .trimmed import Trimmed
from .zipvl import ZipVl

# Nothing is forgotten, a third of a picture's bytes are stored and a sixth read in a step, within a
# point of the full cache (python -m bench.quality --group formats; docs/quality.md says why).
DEFAULT_CACHE = "sift"

# A new policy is one file in this folder and one row here.
POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (Full, Avl, Sift, ZipVl, H2o, FastV, Streaming, SnapKv, Trimmed, Random)
}


def parse(spec: str | Policy) -> Policy:
    """The policy that ``spec`` names, or several joined by ``+``; a policy object passes through.

    Raises OptionError that lists the known names or keys.

    >>> parse("avl:core=none,text=1").spec
    'avl:secondary=0.45,core=none,every=3,prefill=0.9,layer=2,text=1.0,heavy=0.7,floor=20'
    """
    if isinstance(spec, Policy):
        return spec
    if not isinstance(spec, str):
        raise OptionError(f"cache is {told(spec)}", hint='use a spec such as "full", or a policy')
    joined = tuple(map(_parse_one, spec.split("+")))
    return joined[0] if len(joined) == 1 else Composed(joined)


def _parse_one(spec: str) -> Policy:
    name, _, rest = spec.partition(":")
    if name not in POLICIES:
        raise OptionError(
            f"unknown cache policy {name!r}", hint=_suggest(name, list(POLICIES), "policies")
        )
    policy = POLICIES[name]
    defaults = {field.name: field.default for field in fields(policy)}  # type: ignore[arg-type]
    absent = {field.name for field in fields(policy) if "None" in str(field.type)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, text = pair.partition("=")
        if key in defaults and not equals:
            raise OptionError(
                f"cache policy {name}: {key} has no value",
                hint=f"for example {name}:{key}={defaults[key]}",
            )
        if key not in defaults:
            raise OptionError(
                f"cache policy {name}: unknown key {key!r}",
                hint=_suggest(key, list(defaults), "keys"),
            )
        if key in values:
            raise OptionError(f"cache policy {name}: {key} is given twice", hint="give it once")
        none = text == "none" and key in absent
        values[key] = None if none else _value(name, key, text, defaults[key])
    return policy(**values)


def _value(name: str, key: str, text: str, default: Any) -> Any:
    """``text`` as the type of ``default``."""
    if isinstance(default, str):
        return text
    try:
        return int(text) if isinstance(default, int) else float(text)
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise OptionError(
            f"cache policy {name}: {key}={text!r} is not {kind}",
            hint=f"for example {key}={default}",
        ) from None


def _suggest(word: str, known: list[str], kind: str) -> str:
    if close := difflib.get_close_matches(word, known, n=1):
        others = ", ".join(name for name in known if name != close[0])
        return f"did you mean {close[0]!r}? Other {kind}: {others}"
    return f"known {kind}: {', '.join(known)}" if known else f"it has no {kind}"
