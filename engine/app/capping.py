"""The length of an answer where more is asked for than the context leaves: cut, with a note.

The library refuses it; on the command line the length is often a wish for "as much as there is".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..errors import ContextError
from ..options import OptionValues

if TYPE_CHECKING:
    from ..result import Result

Note = Callable[[str], None]


def capped(
    ask: Callable[..., Iterator[str | Result]], options: OptionValues, note: Note
) -> Iterator[str | Result]:
    """What ``ask(**options)`` says, with a shorter limit where the context is too short for it.

    Raises ContextError if the prompt leaves no token at all.
    """
    try:
        yield from ask(**options)
    except ContextError as error:  # comes before any text
        yield from ask(**shortened(options, error, note))


def shortened(options: OptionValues, error: ContextError, note: Note) -> OptionValues:
    """Options that fit what ``error`` says is left; raises it again if that is nothing."""
    if error.left < 1:
        raise error
    note(f"the answer has at most {error.left:,} tokens: the context leaves no more room")
    return {**options, "max_new_tokens": error.left}
