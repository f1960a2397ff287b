"""Progress bars on stderr, for work that lasts: a video's frames, a long prompt."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

_PATIENCE = 2.0  # seconds before a bar is shown


class Bars:
    """Shows what ``progress.tell`` says, on a terminal only, one bar for each kind of work."""

    def __init__(self, quiet: bool) -> None:
        self._hidden = quiet or None  # None: shown on a terminal only
        self._shown: dict[str, tqdm[object]] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` are done."""
        bar = self._shown.pop(what, None) or self._begun(what, total)
        bar.update(done - bar.n)
        if done < total:
            self._shown[what] = bar
        else:
            bar.close()

    def _begun(self, what: str, total: int) -> tqdm[object]:
        from tqdm import tqdm

        return tqdm(
            total=total,
            desc=what,
            delay=_PATIENCE,
            leave=False,
            disable=self._hidden,
            file=sys.stderr,
        )
