"""The examples, each run as a user runs it: in a process and a folder of its own, at a small size."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


class Example(NamedTuple):
    """How to run an example, and what to find afterwards."""

    arguments: str
    printed: str  # regular expression
    files: tuple[str, ...] = ()  # patterns
    needs: tuple[str, ...] = ()  # optional modules


# Updates begin after 1000 steps: those with more really learn
RUNS = {
    "quick_start.py": Example("--steps 1060", r"return \d+ \+/- \d+ over 5", ("agpo_hopper.zip",)),
    "before_sac.py": Example("--steps 150", "Eval num_timesteps=150", ("model.zip",)),
    "after_agpo.py": Example("--steps 150", "Eval num_timesteps=150", ("model.zip",)),
    "many_environments.py": Example(
        "--steps 1104 --n-envs 4", r"1104 environment steps, \d{4,} simulated", ("agpo_cheetah.zip", "vec_normalize.pkl")
    ),
    "custom_mujoco_env.py": Example("--steps 60", "derivatives: env_step, StandingHopper is a custom MujocoEnv"),
    "torch_environment.py": Example("--steps 300", r"exact \(Crane offers its own derivatives\)"),
    "own_gate.py": Example("--steps 1300", r"gate_mean +\| 0\.\d+|gate_mean +\| \d\.\d+e-", ("agpo_own_gate.zip",)),
    "weights_and_biases.py": Example("--steps 300", r"run \w{8}:", ("wandb/offline-run-*/*.wandb",), ("wandb",)),
    "zoo.py": Example("--steps 200", "Mean reward:", ("logs/agpo/InvertedPendulum-v5_1/best_model.zip",), ("rl_zoo3",)),
    "resume_after_kill.py": Example("--steps 600", r"killed, exit code -9\ngoing on at step \d+\n(.*\n)*done: 600 steps"),
    "compare_modes.py": Example(
        "--steps 100 --seeds 1 --env InvertedPendulum-v5", r"analytic: return \d+", ("modes.png",), ("matplotlib",)
    ),
    "gate_video.py": Example("--steps 60 --frames 6 --env Hopper-v5", "weight of the simulator 0", ("gate.gif",)),
    "distributed_sweep.py": Example(
        "--steps 200 --seeds 0", "report.md", ("sweep.csv", "sweep/report.md"), ("ray", "matplotlib")
    ),
}


def test_every_example_is_run() -> None:
    assert set(RUNS) == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_example(name: str, tmp_path: Path) -> None:
    example = RUNS[name]
    for module in example.needs:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    command = [sys.executable, EXAMPLES / name, *example.arguments.split()]
    environment = {"MUJOCO_GL": "egl", "WANDB_SILENT": "true", **os.environ}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if result.returncode and "video" in name and re.search("OpenGL|EGL|GLError", result.stderr):
        pytest.skip("this machine cannot render")
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(example.printed, result.stdout), result.stdout[-3000:]
    for pattern in example.files:
        assert list(tmp_path.glob(pattern)), f"{pattern} is missing in {sorted(tmp_path.rglob('*'))}"


def test_from_sac_to_agpo_is_one_word() -> None:
    """The two scripts differ in the algorithm's name, where it is imported and where it is used, and in what they say."""
    before, after = ((EXAMPLES / name).read_text().partition("import argparse") for name in ("before_sac.py", "after_agpo.py"))
    as_agpo = before[2].replace("from stable_baselines3 import SAC\n", "").replace("SAC(", "AGPO(")
    assert as_agpo.split() == after[2].replace("from sb3_agpo import AGPO\n", "").split()


@pytest.mark.slow
def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs, and the figures are there."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("STEPS", "1200")
    notebook = nbformat.read(EXAMPLES / "first_look.ipynb", as_version=4)
    named = {"kernel_name": "python3", "resources": {"metadata": {"path": str(tmp_path)}}}
    nbclient.NotebookClient(notebook, timeout=1200, startup_timeout=600, **named).execute()
    assert (tmp_path / "learning_curve.png").exists() and (tmp_path / "gradients.png").exists()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ()))
    assert "1200 environment steps" in printed


def test_notebook_is_shown_with_its_results() -> None:
    """The notebook in the repository was run from top to bottom, without an error."""
    nbformat = pytest.importorskip("nbformat")
    cells = [cell for cell in nbformat.read(EXAMPLES / "first_look.ipynb", as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 2
    assert not [output for output in outputs if output.output_type == "error"]
