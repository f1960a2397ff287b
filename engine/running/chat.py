"""A conversation over one cache: each turn is processed on top of what earlier turns left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Unpack

from ..options import OptionValues, make_options
from ..pictures.encoded import Picture
from ..prompts.messages import Messages
from ..result import Result, Timings
from .asked import Asked
from .generation import generate
from .session import Session


class Chat:
    """Several turns with one model; made by ``Engine.chat``. ``token_ids`` are those of all turns.

    Under a policy that evicts, the next turn sees what was kept: the core is chosen again from the
    turn's last prompt token, positions go on, and tokens that were freed do not come back. A new
    picture makes all earlier text fixed.

    >>> chat = engine.chat()                                             # doctest: +SKIP
    >>> chat.send("What colour is the car?", images=["car.jpg"]).text     # doctest: +SKIP
    'Red.'
    >>> chat.send("And what stands left of it?").text                     # doctest: +SKIP
    'A tree.'
    """

    def __init__(self, engine: Asked) -> None:
        self._engine = engine
        self._session = Session(engine.model, engine.policy, stepping=engine.stepping)
        self.token_ids: list[int] = []
        self._sizes: Sequence[tuple[int, int]] = ()

    def send(
        self, text: Messages, images: Sequence[Picture] | None = (), **options: Unpack[OptionValues]
    ) -> Result:
        """Answer one user turn; the arguments are those of ``Engine.stream``."""
        *_, result = self.stream(text, images, **options)
        assert isinstance(result, Result)
        return result

    def stream(
        self, text: Messages, images: Sequence[Picture] | None = (), **options: Unpack[OptionValues]
    ) -> Iterator[str | Result]:
        """Answer one user turn piece by piece, the Result last.

        The first turn may be messages, so that a system message can stand in front.

        Leaving the iteration early keeps the conversation usable: what was said stays in it.
        """
        chosen, timings = make_options(**options), Timings(load=self._engine.load_seconds)
        # The last tokens of an answer are not in the cache yet: they come before the new turn.
        pending = self.token_ids[self._session.seen :]
        after = pending if self.token_ids else None
        turn = self._engine.turn(text, images, timings, after=after, earlier=self._sizes)
        asked, seen = [*self.token_ids, *turn.token_ids[len(pending) :]], self._session.seen
        answer = self._engine.answer(chosen, asked)
        try:
            yield from generate(self._session, turn, answer, chosen.max_new_tokens, timings)
        finally:
            if self._session.seen > seen:  # otherwise the turn was refused, and nothing changed
                self.token_ids, self._sizes = asked + answer.token_ids, turn.sizes
