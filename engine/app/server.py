"""The application of a server that flags ask for, wherever it runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine import Engine
    from ..serving.app import Server


def server_of(flags: argparse.Namespace, engine: Engine, keys: tuple[str, ...]) -> Server:
    """The application that the flags ask for; its worker is not started yet."""
    from ..serving.app import Server
    from ..serving.request import Limits
    from ..serving.settings import Settings
    from ..serving.worker import Worker

    budget = None if flags.cache_gb is None else int(flags.cache_gb * 1e9)
    shared = int(flags.shared_gb * 1e9)
    worker = Worker(engine, flags.rows, budget, flags.queue, flags.slices, shared)
    settings = Settings(
        flags.name or engine.name,
        keys,
        flags.max_body,
        flags.max_pixels,
        flags.deadline,
        frozenset(host.lower() for host in flags.allow_url),
        tuple(flags.cors),
        Limits(tokens=flags.max_tokens),
    )
    return Server(worker, settings)
