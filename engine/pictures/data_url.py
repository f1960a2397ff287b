"""Pictures' names that are no paths, and pictures inside ``data:`` URLs (RFC 2397)."""

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from ..errors import ImageError
from ..naming import shorten

MAX_BYTES = 20_000_000


def is_data(source: str) -> bool:
    """Whether a picture's name is a ``data:`` URL."""
    return source[:5].lower() == "data:"


def is_url(source: str) -> bool:
    """Whether a picture's name is an address with ``://`` behind a scheme.

    >>> is_url("ftp://host/car.jpg"), is_url("c:/car.jpg")
    (True, False)
    """
    return bool(re.match(r"[a-z][a-z0-9+.-]*://", source, re.I))


def decode_data(url: str) -> bytes:
    """The bytes of a ``data:[type][;base64],...`` URL; raises ImageError, quoting 40 characters.

    >>> decode_data("data:text/plain;base64,aGk=")
    b'hi'
    """
    head, comma, body = url[5:].partition(",")
    if not comma:
        raise ImageError(
            f"{shorten(url)} is not a data: URL: it has no comma",
            hint="write data:image/png;base64,... with the picture's bytes",
        )
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise ImageError(
            f"{shorten(url)} holds more than {MAX_BYTES:,} bytes", hint="give the picture as a file"
        )
    data = unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise ImageError(
            f"{shorten(url)} is not valid base64: {error}", hint="encode the picture again"
        ) from None
