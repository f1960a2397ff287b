"""The errors a user can meet: each says what is wrong, what to do, and which exit code it means.

The command line prints ``error: <message>`` and ``hint: <hint>`` and leaves with ``exit_code``; the
library raises the same classes. This module imports nothing, so that a mistyped path fails fast.
"""


class EngineError(Exception):
    """Base of every known error: a message that names the thing, and one hint.

    Where no hint is given, the class's usual one takes its place: there is always one.

    >>> str(ImageError("car.jpg does not exist", hint="did you mean cat.jpg?"))
    'car.jpg does not exist'
    """

    exit_code = 1
    usual_hint = "--debug shows the whole traceback"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint or self.usual_hint


class OptionError(EngineError):
    """A flag, option or prompt is out of range or unknown."""

    exit_code = 2
    usual_hint = "--help lists all flags with examples"


class ImageError(EngineError):
    """A picture cannot be opened or used."""

    exit_code = 3
    usual_hint = "give another picture, or convert this one to PNG or JPEG first"


class CheckpointError(EngineError):
    """Weights, configuration or tokenizer are missing, damaged or unsupported."""

    exit_code = 4
    usual_hint = "download the file again, or use another version of the model"


class CapacityError(EngineError):
    """The request does not fit: out of memory, or longer than the model's context."""

    exit_code = 5
    usual_hint = "ask for less: fewer or smaller pictures, a shorter prompt or answer"


class ContextError(CapacityError):
    """Prompt and answer are longer than the model's context.

    Attributes:
        left: how many tokens the prompt leaves for an answer; none or less than none of a prompt
            that does not fit itself.
    """

    def __init__(self, message: str, hint: str, left: int) -> None:
        super().__init__(message, hint)
        self.left = left
