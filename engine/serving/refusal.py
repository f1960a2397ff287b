"""What a client is told that does not get an answer: a status and one clear line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CapacityError, ContextError, EngineError


class RefusalError(Exception):
    """An error in the shape that clients of OpenAI's API know.

    Attributes:
        status: of the response.
        message: what is wrong, with the numbers: clients show nothing else.
        param: the field that is wrong; None if none is.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The response's JSON.

        >>> RefusalError(400, "n is 0", "n").body["error"]["type"]
        'invalid_request_error'
        """
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def wrong(param: str, message: str, code: str | None = None) -> RefusalError:
    """The refusal of a field's value."""
    return RefusalError(400, f"{param}: {message}", param, code)


def refusal_of(error: BaseException) -> RefusalError:
    """What an engine's error is to a client; of one that nobody foresaw the class alone is told."""
    if isinstance(error, RefusalError):
        return error
    if isinstance(error, ContextError):
        return RefusalError(400, _told(error), "messages", "context_length_exceeded")
    if isinstance(error, CapacityError):
        out = str(error).startswith("out of memory")
        status, code = (503, "out_of_memory") if out else (400, "request_too_large")
        return RefusalError(status, _told(error), None, code, {"retry-after": "5"} if out else None)
    if isinstance(error, EngineError) and error.exit_code in (2, 3):
        return RefusalError(400, _told(error), "messages", "invalid_value")
    return RefusalError(500, f"the engine failed: {type(error).__name__}", None, "internal_error")


def _told(error: EngineError) -> str:
    return f"{error} ({error.hint})" if error.hint else str(error)
