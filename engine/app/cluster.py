"""A Ray cluster: joining one that is there, or one of this machine, and what each engine gets."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from ..errors import OptionError
from ..naming import display_name

LOCAL = "local"


@contextmanager
def connected(address: str, part: str) -> Iterator[None]:
    """A cluster that is there, or, "local", one of this machine for as long as it is needed.

    ``part`` of Ray is imported: "data" or "serve".
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what it says is said by us
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray

        importlib.import_module(f"ray.{part}")
    except ImportError:
        raise OptionError(
            "--ray needs the package ray", hint=f'install it: pip install "ray[{part}]"'
        ) from None
    own = {"include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0][:100]
        raise OptionError(
            f"--ray {display_name(address)}: {reason}", hint="give a cluster's address, or local"
        ) from None
    logging.getLogger(f"ray.{part}").setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(sys.stderr):  # Ray prints of processes that die
            yield
    finally:
        ray.shutdown()


def shares(flags: argparse.Namespace, engines: int | None) -> tuple[int, dict[str, Any]]:
    """How many engines there are, ``engines`` if that is said, and what each has of the cluster: a
    GPU, or so many cores.
    """
    import ray

    there = ray.cluster_resources()
    cores, gpus = int(there.get("CPU", 1)), int(there.get("GPU", 0))
    if gpus and flags.device != "cpu":
        count = engines or gpus
        return count, {"num_gpus": min(1, gpus / count)}
    threads = flags.threads or max(1, cores // (engines or 1))
    return engines or max(1, cores // threads), {"num_cpus": threads}
