"""Where the command line starts: ``python -m engine``, ``python main.py`` and ``avl``.

It says in one line what it cannot do without: a Python that is too old, or a package that this
Python does not have. Whatever takes time is imported where an interrupt is waited for.
"""

from __future__ import annotations

import sys


def start() -> int:
    """Run the command line; returns the exit code."""
    try:
        return _start()
    except KeyboardInterrupt:
        return 130


def _start() -> int:
    from .app.terminal import complain, lacking

    if sys.version_info < (3, 11):  # noqa: UP036 - any Python may be told to run this file
        complain("Python 3.11 or later is needed", f"this is {sys.version.split()[0]}")
        return 1
    try:
        from .app.cli import main
    except ModuleNotFoundError as error:
        complain(*lacking(error))
        return 1
    return main()


if __name__ == "__main__":
    sys.exit(start())
