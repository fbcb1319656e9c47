"""Set-up that every test shares."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, and inherited by processes that tests start: tests run side by side, one thread each.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

# The same examples in every run, so that a failure can be told from a change; HYPOTHESIS_PROFILE=default draws new ones
hypothesis.settings.register_profile("repeatable", derandomize=True)
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
