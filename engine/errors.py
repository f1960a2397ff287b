"""The errors a user can meet: each says what is wrong, what to do, and which exit code it means.

The command line prints ``error: <message>`` and ``hint: <hint>`` and leaves with ``exit_code``; the
library raises the same classes. This module imports nothing, so that a mistyped path fails fast.
"""


class EngineError(Exception):
    """Base of every known error: a message that names the thing, and one hint.

    >>> str(ImageError("car.jpg does not exist", hint="did you mean cat.jpg?"))
    'car.jpg does not exist'
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class OptionError(EngineError):
    """A flag, option or prompt is out of range or unknown."""

    exit_code = 2


class ImageError(EngineError):
    """A picture cannot be opened or used."""

    exit_code = 3


class CheckpointError(EngineError):
    """Weights, configuration or tokenizer are missing, damaged or unsupported."""

    exit_code = 4


class CapacityError(EngineError):
    """The request does not fit: out of memory, or longer than the model's context."""

    exit_code = 5
