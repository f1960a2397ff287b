"""A conversation over one cache: each turn is processed on top of what earlier turns left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from threading import Lock
from typing import Unpack

from ..cache.row import Row
from ..errors import OptionError
from ..options import OptionValues, make_options
from ..pictures.encoded import Picture
from ..prompts.messages import Messages
from ..result import Result, Timings
from .asked import Asked
from .generation import result_of
from .scheduler import Job, Said
from .videos import VideoSource


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
        self._scheduler, self._row = engine.scheduler(), Row()
        self.token_ids: list[int] = []
        self._sizes: Sequence[tuple[int, int]] = ()
        self._busy = Lock()

    def send(
        self,
        text: Messages,
        images: Sequence[Picture] | None = (),
        *,
        videos: Sequence[VideoSource] | None = (),
        **options: Unpack[OptionValues],
    ) -> Result:
        """Answer one user turn; the arguments are those of ``Engine.stream``."""
        *_, result = self.stream(text, images, videos=videos, **options)
        assert isinstance(result, Result)
        return result

    def stream(
        self,
        text: Messages,
        images: Sequence[Picture] | None = (),
        *,
        videos: Sequence[VideoSource] | None = (),
        **options: Unpack[OptionValues],
    ) -> Iterator[str | Result]:
        """Answer one user turn piece by piece, the Result last.

        The first turn may be messages, so that a system message can stand in front.

        Leaving the iteration early keeps the conversation usable: what was said stays in it.

        Raises OptionError while another answer of this conversation is under way.
        """
        if not self._busy.acquire(blocking=False):
            raise OptionError(
                "this chat is busy with another answer", hint="take turns, or use a chat for each"
            )
        try:
            yield from self._stream(*self._engine.with_videos(text, images, videos), options)
        finally:
            self._busy.release()

    def _stream(
        self, text: Messages, images: Sequence[Picture] | None, options: OptionValues
    ) -> Iterator[str | Result]:
        chosen, timings = make_options(**options), Timings(load=self._engine.load_seconds)
        # The last tokens of an answer are not in the cache yet: they come before the new turn.
        pending = self.token_ids[self._row.seen :]
        after = pending if self.token_ids else None
        turn = self._engine.turn(text, images, timings, after=after, earlier=self._sizes)
        asked = [*self.token_ids, *turn.token_ids[len(pending) :]]
        answer, policy = self._engine.answer(chosen, asked), self._engine.policy
        job = Job(turn, answer, policy, chosen.max_new_tokens, timings, self._row, keeps=True)
        try:
            with closing(self._scheduler.events(job)) as events:
                for event in events:
                    yield event.text if isinstance(event, Said) else result_of(event)
        finally:
            if job.row is not None:  # otherwise the turn was refused, and nothing changed
                self._row, self._sizes = job.row, turn.sizes
                self.token_ids = asked + answer.token_ids
