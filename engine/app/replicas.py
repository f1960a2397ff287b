"""``avl serve --ray ADDRESS``: servers on a Ray cluster (Ray Serve), each with its own engine.

Ray Serve starts them, replaces those that die, lets those that go end what they answer, and takes
the connections. Requests with the same header ``x-session-id`` go to the same server as long as it
is there and has room, so that it finds the picture and the prompt that it remembers.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from typing import Any

from .cluster import connected, shares
from .inputs import engine_of

BY_SESSION = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


def serve_replicas(flags: argparse.Namespace, keys: tuple[str, ...]) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code."""
    with connected(flags.ray, "serve"):
        from ray import serve

        told = threading.Event()
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda *_: told.set())
        serve.start(http_options={"host": flags.host, "port": flags.port})
        serve.run(_deployment(flags, keys).bind(), name="avl", route_prefix="/")
        if not flags.quiet:
            print(f"serving on http://{flags.host}:{flags.port}", file=sys.stderr)
        told.wait()
        serve.shutdown()
    return 0


def _deployment(flags: argparse.Namespace, keys: tuple[str, ...]) -> Any:
    """What Ray Serve starts: so many servers, which take as many requests as have room in them."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    replicas, each = shares(flags, flags.replicas)

    def application() -> Any:  # a function, which is called where a server runs
        return _application(flags, keys)

    return serve.deployment(
        name="server",
        num_replicas=replicas,
        ray_actor_options=each,
        max_ongoing_requests=flags.rows + flags.queue,
        graceful_shutdown_timeout_s=60,
        request_router_config=RequestRouterConfig(request_router_class=BY_SESSION),
    )(serve.ingress(application)())


def _application(flags: argparse.Namespace, keys: tuple[str, ...]) -> Any:
    """One server's application, made where it runs."""
    from .server import server_of

    server = server_of(flags, engine_of(flags), keys)
    server.worker.start()
    return server.app
