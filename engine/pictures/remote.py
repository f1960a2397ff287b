"""Pictures that are no files: over https, where the user allows it.

A URL may come from a stranger, and the machine may reach what strangers must not. So only https is
spoken, to addresses of the public internet, and the address that was checked is the one that is
connected to: a name that resolves differently a moment later changes nothing. Every redirect is
checked like the first address. Proxies of the environment are not used.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Container, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from queue import Empty, SimpleQueue
from threading import Thread, Timer
from time import monotonic
from urllib.parse import SplitResult, urljoin, urlsplit

from ..errors import ImageError
from ..naming import display_name, shorten
from .data_url import MAX_BYTES, is_data, is_url
from .image import LoadedImage, open_image

_NETWORK = "check the address and the network, or download the picture and give its path"
SECONDS = 10.0  # for a whole picture, redirects included
REDIRECTS = 3

_NAT64 = IPv6Network("64:ff9b::/96")  # an IPv4 address in IPv6 clothes


def open_picture(source: str, max_pixels: int, allow_url: bool) -> LoadedImage:
    """Open a picture as the command line names it: a path, a ``data:`` URL or an https URL.

    Raises ImageError; for a URL unless ``allow_url``.
    """
    if source[:8].lower().startswith(("http://", "https://")):
        return open_image(_allowed(source, allow_url), max_pixels, shorten(source))
    return open_image(source, max_pixels)


def is_address(source: str) -> bool:
    """Whether a picture's name is no path: a ``data:`` URL or one with ``://`` behind a scheme."""
    return is_data(source) or is_url(source)


def _allowed(url: str, allow_url: bool) -> bytes:
    if not allow_url:
        raise ImageError(
            f"{shorten(url)} is a URL, which is not fetched by default",
            hint="add --allow-url, or download the picture and give its path",
        )
    return fetch(url)


def fetch(url: str, hosts: Container[str] | None = None) -> bytes:
    """Download at most 20 MB over https within 10 s and 3 redirects, from public addresses only,
    and from ``hosts`` alone, at the port of https (None: from any, at any).

    Raises ImageError saying which of these was not kept.
    """
    deadline = monotonic() + SECONDS
    for _ in range(REDIRECTS + 1):
        _check_host(url, hosts)
        answer = _ask(url, deadline)
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise ImageError(f"{shorten(url)}: more than {REDIRECTS} redirects", hint="give the last URL")


def _ask(url: str, deadline: float) -> bytes | str:
    """One request: the body, or where it redirects to."""
    split = _check_url(url)
    host, port = split.hostname or "", split.port or 443
    try:
        address = _public_address(url, host, port, deadline)
        connection = _connect(host, port, address, _left(deadline))
        with closing(connection), _hung_up_at(deadline, connection.sock):
            path = (split.path or "/") + (f"?{split.query}" if split.query else "")
            connection.request("GET", path, headers={"User-Agent": "avl-engine"})
            return _body(url, connection.getresponse())
    except TimeoutError:
        raise ImageError(
            f"{shorten(url)} did not arrive within {SECONDS:.0f} s",
            hint="download the picture and give its path",
        ) from None
    except (OSError, HTTPException, ValueError) as error:
        reason = display_name(str(error) or type(error).__name__)[:120]
        raise ImageError(f"{shorten(url)} cannot be fetched: {reason}", hint=_NETWORK) from None


@contextmanager
def _hung_up_at(deadline: float, sock: socket.socket) -> Iterator[None]:
    """Shut the connection at ``deadline``; a server may trickle bytes, which no timeout notices."""
    timer = Timer(_left(deadline), socket.socket.shutdown, (sock, socket.SHUT_RDWR))
    timer.daemon = True
    timer.start()
    try:
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        yield
    except Exception:
        _left(deadline)  # whatever the reading noticed, the reason is the time
        raise
    finally:
        timer.cancel()
    _left(deadline)


def _check_host(url: str, hosts: Container[str] | None) -> None:
    if hosts is None:
        return
    split = _check_url(url)
    if split.hostname not in hosts or split.port not in (None, 443):
        raise ImageError(
            f"{shorten(url)} lies on a host that pictures are not taken from",
            hint="send the picture itself as a data: URL",
        )


def _check_url(url: str) -> SplitResult:
    try:
        split = urlsplit(url)
        known = split.scheme == "https" and split.hostname and (split.port or 443)
    except ValueError:
        known = False
    if not known or not url.isascii() or any(char <= " " for char in url):
        raise ImageError(
            f"{shorten(url)} is not an https URL", hint="only https:// pictures are fetched"
        )
    if split.username is not None:
        raise ImageError(
            f"{shorten(url)} holds a user name, which is not sent",
            hint="leave out what stands before the @",
        )
    return split


def _public_address(url: str, host: str, port: int, deadline: float) -> str:
    """The address to connect to; all that the name resolves to must be public."""
    addresses = _resolve(host, port, deadline)
    if not addresses:
        raise ImageError(f"{shorten(url)}: no host {shorten(host)} is known", hint=_NETWORK)
    for address in addresses:
        if not is_public(address):
            raise ImageError(
                f"{shorten(url)} leads to {display_name(address)}, which is not a public address",
                hint="download the picture and give its path",
            )
    return addresses[0]


def _resolve(host: str, port: int, deadline: float) -> list[str]:
    """The addresses of a name, [] if there are none; TimeoutError at ``deadline``.

    The system's resolver knows no limit of time: it is asked in a thread, which nobody waits for.
    """
    answer: SimpleQueue[list[str]] = SimpleQueue()

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            found = []
        answer.put([str(entry[4][0]) for entry in found])

    Thread(target=look_up, daemon=True).start()
    try:
        return answer.get(timeout=_left(deadline))
    except Empty:
        raise TimeoutError from None


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet, IPv4 inside IPv6 looked into.

    >>> is_public("169.254.169.254"), is_public("::ffff:10.0.0.1"), is_public("8.8.8.8")
    (False, False, True)
    """
    try:
        parsed: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    inner: IPv4Address | None = None
    if isinstance(parsed, IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo or (None, None))[1]
        if parsed in _NAT64:
            inner = IPv4Address(int(parsed) & 0xFFFFFFFF)
    if inner is not None:
        return is_public(str(inner))
    return parsed.is_global and not parsed.is_multicast


def _connect(host: str, port: int, address: str, seconds: float) -> HTTPConnection:
    """A connection to ``address``; the handshake follows, and asks for ``host``'s certificate."""
    connection = HTTPSConnection(host, port, timeout=seconds)
    raw = socket.create_connection((address, port), timeout=seconds)
    connection.sock = ssl.create_default_context().wrap_socket(
        raw, server_hostname=host, do_handshake_on_connect=False
    )
    return connection


def _body(url: str, response: HTTPResponse) -> bytes | str:
    place = response.getheader("Location")
    if response.status in (301, 302, 303, 307, 308) and place:
        return place
    if response.status != 200:
        raise ImageError(f"{shorten(url)}: the server answers {response.status}", hint=_NETWORK)
    body = response.read(MAX_BYTES + 1)
    if len(body) > MAX_BYTES:
        raise ImageError(
            f"{shorten(url)} is larger than {MAX_BYTES // 10**6} MB",
            hint="download the picture, make it smaller and give its path",
        )
    if response.length:  # what the server announced and did not send
        raise ImageError(
            f"{shorten(url)}: the connection broke, {response.length:,} bytes missing",
            hint=_NETWORK,
        )
    return body


def _left(deadline: float) -> float:
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError
    return left
