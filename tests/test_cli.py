"""The console script: it hands each command on, and says what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sb3_agpo import __version__, cli


def test_installed_script() -> None:
    """The script that pip installed, in a process of its own."""
    script = Path(sys.executable).parent / "sb3-agpo"
    if not script.exists():
        pytest.fail("the script is not installed: pip install -e .")
    result = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"sb3-agpo {__version__}\n")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(f"  {name} " in output for name in cli.COMMANDS)
    assert set(cli.COMMANDS) >= {"demo", "train", "enjoy", "gradients", "benchmark"}


@pytest.mark.parametrize(("arguments", "message"), [([], "give a command"), (["fly"], "there is no command 'fly'")])
def test_no_such_command(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_has_its_own_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Arguments reach the command's own parser."""
    if command in ("train", "enjoy"):
        pytest.importorskip("rl_zoo3")
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    own = {"demo": "--minutes", "train": "--eval-freq", "enjoy": "--no-render", "gradients": "--moments",
           "benchmark": "learning", "card": "--normalization"}  # fmt: skip
    assert exit_.value.code == 0 and own[command] in capsys.readouterr().out


def test_exit_codes_are_handed_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gradients", "Nope-v0"]) == 2
    assert cli.main(["benchmark", "learning", "--seeds", "x"]) == 2
    assert "is no seed" in capsys.readouterr().err


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a command's module cannot be imported."""
    monkeypatch.setitem(sys.modules, "sb3_agpo.benchmark.report", None)
    assert cli.main(["benchmark", "report"]) == 2
    assert "needs the extra 'plot': pip install" in capsys.readouterr().err


def test_training_is_with_agpo() -> None:
    """Without ``--algo``; with another one the zoo's own is used."""
    pytest.importorskip("rl_zoo3")
    small = ["--env", "InvertedPendulum-v5", "-n", "60", "--eval-freq", "-1", "-f", "logs", "--device", "cpu", "-params"]
    assert cli.main(["train", *small, "learning_starts:20", "batch_size:8"]) == 0
    assert (Path("logs") / "agpo" / "InvertedPendulum-v5_1" / "InvertedPendulum-v5.zip").exists()
    assert cli.main(["train", "--algo", "a2c", *small, "n_steps:5"]) == 0
    assert (Path("logs") / "a2c" / "InvertedPendulum-v5_1" / "InvertedPendulum-v5.zip").exists()
