"""Running the zoo's scripts with AGPO registered, in this process and in those that the scripts start."""

from __future__ import annotations

import importlib
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sb3_agpo.command_line import EXIT_USAGE
from sb3_agpo.zoo.registration import ALGORITHM_NAME, register

PROGRAM = "python -m sb3_agpo.zoo"

#: scripts that are functions: module and name
FUNCTIONS = {
    "train": ("rl_zoo3.train", "train"),
    "optimize": ("rl_zoo3.train", "train"),
    "enjoy": ("rl_zoo3.enjoy", "enjoy"),
    "plot_train": ("rl_zoo3.plots", "plot_train"),
    "plot_from_file": ("rl_zoo3.plots", "plot_from_file"),
    "all_plots": ("rl_zoo3.plots", "all_plots"),
}
#: scripts that are files, run as a whole
MODULES = {
    "record_video": "rl_zoo3.record_video",
    "record_training": "rl_zoo3.record_training",
    "benchmark": "rl_zoo3.benchmark",
}
#: scripts that show what was trained, and the folder that training writes to
SHOWING, TRAINED = ("enjoy", "record_video", "record_training"), "logs"
#: the search with its trials on Ray, which is not the zoo's
RAY_SEARCH = "optimize_on_ray"
USAGE = f"""usage: {PROGRAM} SCRIPT [ARGUMENTS]

Runs a script of RL Baselines3 Zoo with `--algo agpo` among the algorithms:
  {", ".join([*FUNCTIONS, *MODULES])}
`optimize` is `train -optimize`; `{RAY_SEARCH}` is the same with its trials on a Ray cluster.
`{PROGRAM} SCRIPT --help` lists a script's arguments."""


def main(arguments: Sequence[str]) -> int:
    """
    Run a script of the zoo.

    :param arguments: its name and its arguments
    :return: exit status
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else EXIT_USAGE
    script, *rest = arguments
    if script not in (*FUNCTIONS, *MODULES, RAY_SEARCH):
        print(f"{PROGRAM}: there is no script {script!r}\n\n{USAGE}", file=sys.stderr)
        return EXIT_USAGE
    try:
        register()
        if script == RAY_SEARCH:
            from sb3_agpo.zoo.ray_search import main as search  # here, as Ray is optional
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    if script == RAY_SEARCH:
        return search(rest)
    run(script, rest)
    return 0


def run(script: str, arguments: Sequence[str]) -> None:
    """
    Run a script of the zoo in this process.

    :param script: a key of :data:`FUNCTIONS` or :data:`MODULES`
    :param arguments: its arguments
    """
    register()
    arguments = with_defaults(script, arguments)
    with ExitStack() as stack:
        stack.enter_context(command_line([f"{PROGRAM} {script}", *arguments]))
        if script in FUNCTIONS:
            module, name = FUNCTIONS[script]
            getattr(importlib.import_module(module), name)()
            return
        stack.enter_context(_redirected_calls())
        if script == "record_training":
            stack.enter_context(_ffmpeg_on_path())
        runpy.run_module(MODULES[script], run_name="__main__")


def with_defaults(script: str, arguments: Sequence[str]) -> list[str]:
    """
    Complete the arguments of a script.

    :param script: its name
    :param arguments: those given
    :return: those and, for a script that shows what was trained, the folder that training writes to: the zoo would look
        for agents of its own, of which there are none of AGPO's
    """
    if script == "optimize":
        return ["-optimize", *arguments]
    if script in SHOWING and (ALGORITHM_NAME in arguments or f"--algo={ALGORITHM_NAME}" in arguments):
        return ["-f", TRAINED, *arguments]  # a folder that is given comes later, and counts
    return list(arguments)


@contextmanager
def command_line(arguments: list[str]) -> Iterator[None]:
    """
    Put a command line where ``argparse`` finds it.

    :param arguments: program and its arguments
    """
    previous, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = previous


@contextmanager
def _redirected_calls() -> Iterator[None]:
    """Send the calls by which the zoo's scripts start one another through this entry point, in the same Python."""
    original = subprocess.call

    def call(command: list[str], *arguments: Any, **named: Any) -> int:
        return original(redirected(command), *arguments, **named)

    subprocess.call = call  # type: ignore[assignment]
    try:
        yield
    finally:
        subprocess.call = original


def redirected(command: list[str]) -> list[str]:
    """
    Replace a call of one of the zoo's scripts by the same call of this entry point.

    :param command: program and arguments
    :return: likewise; unchanged if it is another command
    """
    entry = [sys.executable, "-m", "sb3_agpo.zoo"]
    match command:
        case ["python", "-m", "rl_zoo3.record_video", *rest]:
            return [*entry, "record_video", *rest]
        case ["python", "enjoy.py", *rest]:  # as if in a checkout of the zoo
            return [*entry, "enjoy", *rest]
    return command


@contextmanager
def _ffmpeg_on_path() -> Iterator[None]:
    """
    Let the zoo find ``ffmpeg``, which joins videos: the system's, else the one that comes with ``moviepy``.

    :raises RuntimeError: if there is neither
    """
    if shutil.which("ffmpeg") is not None:
        yield
        return
    try:
        from imageio_ffmpeg import get_ffmpeg_exe  # type: ignore[import-untyped]

        executable = get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise RuntimeError("`record_training` needs ffmpeg: install it, or `pip install imageio-ffmpeg`") from error
    previous = os.environ["PATH"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ffmpeg").symlink_to(executable)
        os.environ["PATH"] = f"{folder}{os.pathsep}{previous}"
        try:
            yield
        finally:
            os.environ["PATH"] = previous
