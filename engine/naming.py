"""How untrusted names and addresses appear in messages: printable, and never long."""

LONGEST = 200


def display_name(path: str, longest: int = LONGEST) -> str:
    r"""Escape what a terminal must not receive: control, bidirectional and undecodable characters.

    Of more than ``longest`` characters the middle is left out: a file's name stands at the end.

    >>> display_name("car\n\u202e.jpg")
    'car\\n\\u202e.jpg'
    """
    name = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in path
    )
    half = longest // 2 - 2
    return name if len(name) <= longest else f"{name[:half]}...{name[-half:]}"


def told(value: object) -> str:
    """A value that somebody gave: as it is written, cut; of an object without a spelling its type.

    >>> told("7"), told(object())
    ("'7'", 'object')
    """
    text = repr(value)
    return type(value).__name__ if " at 0x" in text else text[:80]


def shorten(text: str) -> str:
    """At most 40 characters of what a stranger wrote, safe to print."""
    return display_name(text[:40]) + ("..." if len(text) > 40 else "")
