"""What pyproject.toml asks for, a requirement a line: ``python .ci/asked.py build run test train``.

``--lowest`` asks for exactly the lowest version of each that is allowed.
"""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def asked(*groups: str, lowest: bool = False) -> list[str]:
    """The requirements of ``build``, ``run`` (what the engine needs) and of extras by name."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = tables["project"]
    known = {
        "build": tables["build-system"]["requires"],
        "run": project["dependencies"],
        **project["optional-dependencies"],
    }
    found = dict.fromkeys(name for group in groups for name in known[group])
    return [name.replace(">=", "==") if lowest else name for name in found]


if __name__ == "__main__":
    groups = [word for word in sys.argv[1:] if word != "--lowest"]
    print("\n".join(asked(*groups, lowest="--lowest" in sys.argv)))
