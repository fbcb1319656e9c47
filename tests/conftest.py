"""Set-up that every test shares."""

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, and inherited by processes that tests start: tests run side by side, one thread each.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
# Services of libraries may take long to start where much else runs, and Ray's memory monitor would kill workers
# where others use the memory: neither is what a test is about
os.environ.setdefault("WANDB__SERVICE_WAIT", "600")
os.environ.setdefault("WANDB_INIT_TIMEOUT", "600")
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "600")
os.environ.setdefault("RAY_gcs_server_request_timeout_seconds", "600")
os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)

# The same examples in every run, so that a failure can be told from a change; HYPOTHESIS_PROFILE=default draws new ones.
# How long it takes to draw them says more about the machine than about the test
too_slow = hypothesis.HealthCheck.too_slow
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[too_slow])
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: a file stays on one worker, and the longest must not be what the others wait for."""
    n_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -n_slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def _session_working_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what fixtures of a wider scope than one test write to the working directory out of the repository."""
    previous = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(previous)


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in a directory of its own: MuJoCo, for one, writes MUJOCO_LOG.TXT to the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _global_generators() -> None:
    """Begin each test with the same random numbers, whatever ran before it in its process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
