"""
Being connected to a Ray cluster: one that is started here and ended afterwards, or one that runs somewhere.

Ray is imported here alone, after it has been told what it must not do.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from sb3_agpo.benchmark.pool import thread_variables

# Ray 2 reports how it is used to its makers unless told otherwise, and this package sends nothing anywhere by itself
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Workers of a cluster that is started here have the priority of other processes. Ray would give them the lowest but a few,
# which leaves them next to nothing where anything else runs
os.environ.setdefault("RAY_worker_niceness", "0")
try:
    import ray
    from ray.util.queue import Queue
except ImportError as error:
    raise ImportError(f"Ray cannot be imported ({error}); install it with: pip install 'sb3-agpo[ray]'") from error

__all__ = ["Queue", "connected", "ray"]

CONNECT_SECONDS = 10.0


def _join(address: str) -> None:
    """Connect to a running cluster."""
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal():  # Ray would wait for minutes where nobody answers
            socket.create_connection((host.rpartition("/")[2].strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"--address {address}: there is no Ray cluster ({error}); start one with 'ray start --head', or leave it out"
        ) from error


@contextmanager
def connected(address: str | None, processes: int, threads: int) -> Iterator[None]:
    """
    Be connected to a cluster.

    :param address: of a running cluster; None to start one
    :param processes: how many tasks a cluster that is started here does at the same time
    :param threads: cores of each task
    :raises ValueError: if there is no cluster at the address
    """
    if address is None:
        with thread_variables(threads):  # which the workers inherit; those of other clusters have Ray's own limit
            # Named "local", as Ray would otherwise go to the cluster that the variable RAY_ADDRESS names
            ray.init("local", num_cpus=processes * threads, include_dashboard=False, log_to_driver=False)
    else:
        _join(address)
    try:
        yield
    finally:
        ray.shutdown()
