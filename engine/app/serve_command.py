"""``avl serve``: the flags of a server, and the server itself until it is told to end."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..options import as_number
from ..policies.specs import parse
from .flags import Parser, add_cache, add_model, program
from .inputs import engine_of
from .server import server_of
from .starting import need_folder

if TYPE_CHECKING:
    from ..serving.app import Server

DESCRIPTION = """Answers requests over HTTP, as OpenAI's chat completions have them: POST
/v1/chat/completions, GET /v1/models, /health, /metrics, and a page to ask on at /. docs/serving.md
has fields, limits and promises."""
ENDING = (signal.SIGINT, signal.SIGTERM)
# What strangers send is logged nowhere, and heads of requests end.
LISTENING: dict[str, Any] = {
    "log_level": "critical",
    "access_log": False,
    "server_header": False,
    "timeout_keep_alive": 30,
    "timeout_graceful_shutdown": 60,
    "http": "h11",
    "h11_max_incomplete_event_size": 64 * 1024,
}


def serve(arguments: Sequence[str]) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code."""
    flags = parse_flags(arguments)
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(
            f"serve needs {' and '.join(missing)}", hint='pip install "avl-engine[serve]"'
        )
    need_folder()
    if flags.cache is not None:
        parse(flags.cache)
    keys = _keys(flags)
    if flags.host not in ("127.0.0.1", "localhost", "::1") and not keys:
        raise OptionError(
            f"--host {flags.host} lets others ask", hint="add --api-key-file, or serve on 127.0.0.1"
        )
    if flags.ray is not None:
        from .replicas import serve_replicas

        return serve_replicas(flags, keys)
    return _run(server_of(flags, engine_of(flags), keys), flags)


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags; raises OptionError for what is wrong."""
    parser = Parser(
        prog=f"{program()} serve",
        usage=f"{program()} serve [flags]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    add("--port", type=int, default=8000, help="port (8000); 0 takes a free one")
    add("--ray", metavar="ADDRESS", help="servers on a Ray cluster; local: on this machine")
    add("--replicas", type=int, metavar="N", help="servers there (default: one a GPU)")
    add("--name", metavar="NAME", help="what requests call the model (default: its folder's name)")
    add("--api-key-file", metavar="FILE", help="keys that requests must bring, one a line")
    add("--rows", type=int, default=8, metavar="N", help="answers in the making at once (8)")
    add("--queue", type=int, default=64, metavar="N", help="requests that may wait (64)")
    add("--slices", type=int, default=4, metavar="N", help="layers of a prompt between steps (4)")
    add(
        "--cache-gb",
        type=float,
        metavar="GB",
        help="keys and values, claimed at once (default: as used)",
    )
    add(
        "--shared-gb",
        type=float,
        default=1.0,
        metavar="GB",
        help="pictures that are kept for further questions (1); 0: none",
    )
    add(
        "--deadline",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds a request may take (600)",
    )
    add("--max-body", type=int, default=32_000_000, metavar="BYTES", help="of a request (32000000)")
    add("--max-pixels", type=int, default=40_000_000, metavar="N", help="of a picture (40000000)")
    add("--max-tokens", type=int, default=4096, metavar="N", help="of an answer (4096)")
    add(
        "--allow-url",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch https:// pictures from HOST; repeatable",
    )
    add(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of ORIGIN ask; repeatable",
    )
    add_model(parser)
    add_cache(parser)
    add = parser.add_argument_group("information").add_argument
    add("--quiet", "-q", action="store_true", help="nothing on stderr but errors")
    add("--debug", action="store_true", help="show the traceback of an error")
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    for name, low, high in (
        *(("port", 0, 65535), ("rows", 1, 4096), ("queue", 0, 1_000_000), ("slices", 1, 100_000)),
        *(("max_body", 1000, 2**31), ("max_pixels", 1, 2**31), ("max_tokens", 1, 2**20)),
    ):
        value = as_number(f"--{name.replace('_', '-')}", getattr(flags, name), int)
        if not low <= value <= high:
            raise OptionError(f"--{name.replace('_', '-')} is {value}", hint=f"use {low} to {high}")
    if flags.replicas is not None and (flags.replicas < 1 or flags.ray is None):
        raise OptionError(f"--replicas is {flags.replicas}", hint="use 1 or more, with --ray")
    if flags.ray is not None and not flags.port:
        raise OptionError("--port is 0", hint="with --ray, give the port to listen on")
    if not flags.deadline > 0:
        raise OptionError(f"--deadline is {flags.deadline}", hint="use seconds above 0")
    if not 0 <= flags.shared_gb < 1e6:
        raise OptionError(f"--shared-gb is {flags.shared_gb}", hint="use gigabytes, or 0")
    if flags.cache_gb is not None and not 0 < flags.cache_gb < 1e6:
        raise OptionError(f"--cache-gb is {flags.cache_gb}", hint="use gigabytes above 0")
    return flags


def _keys(flags: argparse.Namespace) -> tuple[str, ...]:
    if flags.api_key_file is None:
        return ()
    lines = Path(flags.api_key_file).read_text(encoding="utf-8").splitlines()
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise OptionError(f"{flags.api_key_file} holds no key", hint="write one a line")
    return keys


def _run(server: Server, flags: argparse.Namespace) -> int:
    server.worker.start()
    try:
        return listen(server, flags.host, flags.port, quiet=flags.quiet)
    finally:
        server.worker.stop()


def listen(server: Server, host: str, port: int, *, quiet: bool = False) -> int:
    """Take connections until a signal; what runs then may end, and nothing new begins."""
    import uvicorn

    class Listening(uvicorn.Server):
        """Says where it listens, and drains when it is told to end."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Uvicorn's own sends the signal again at the end: being told to end is no failure."""
            before = {each: signal.signal(each, self.handle_exit) for each in ENDING}
            try:
                yield
            finally:
                for each, handler in before.items():
                    signal.signal(each, handler)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            server.draining = True
            super().handle_exit(sig, frame)

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started and not quiet:
                where = self.servers[0].sockets[0].getsockname()
                print(
                    f"serving {server.settings.model} on http://{where[0]}:{where[1]}",
                    file=sys.stderr,
                )

    listening = Listening(uvicorn.Config(server.app, host, port, **LISTENING))
    listening.run()
    if not listening.started:
        raise OptionError(f"--port {port} on {host} cannot be listened on", hint="use another one")
    return 0
