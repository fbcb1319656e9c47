"""
Demonstration, ``python -m sb3_agpo.demo``: train AGPO on a task for a few minutes and show what came of it.

The results lie in a folder of their own, ``runs/demo`` unless it exists already: the model, the logged numbers as CSV and
for TensorBoard, and figures of the returns and of the gradients.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from tqdm import tqdm

from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.benchmark.run import Evaluator, show_warnings_once
from sb3_agpo.command_line import EXIT_USAGE
from sb3_agpo.demo_options import check, parse
from sb3_agpo.demo_training import (
    Budget,
    DemoCallback,
    Evaluation,
    first_interrupt_stops,
)

RANDOM_EPISODES = 10
MAX_THREADS = 4  # networks of this size are too small to gain from more
NO_LIMIT = 10**12  # steps
BUFFER_SIZE = 1_000_000  # AGPO's default

EXIT_INTERRUPTED = 130  # as shells report a program ended by Ctrl-C


def limit_threads() -> None:
    """
    Let torch use all cores but one, and not many.

    Its threads wait for each other at every operation, many times a millisecond: where one of them has to share its core
    with another program, learning with two threads is several times slower than with one.
    """
    # Not every platform tells how many of its cores this process may use
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    th.set_num_threads(max(1, min(th.get_num_threads(), cores - 1, MAX_THREADS)))


def make_model(options: argparse.Namespace) -> AGPO:
    """
    Make the environments and AGPO with its defaults.

    :param options: of the command line
    :return: the model
    """
    env = make_vec_env(options.env, n_envs=options.n_envs, seed=options.seed)
    # A saved buffer is as large as its capacity, whatever is in it; one that is never full learns the same
    buffer_size = BUFFER_SIZE if options.steps is None else min(BUFFER_SIZE, options.steps + options.n_envs)
    return AGPO("MlpPolicy", env, seed=options.seed, device=options.device, buffer_size=buffer_size)


def fresh_folder(path: Path) -> Path:
    """
    Make a folder that did not exist: earlier results are never overwritten.

    :param path: wanted
    :return: made; the wanted one, or the first of ``path-2``, ``path-3``... that was free
    :raises ValueError: if it cannot be made
    """
    path = path if path.name not in ("", "..") else path.resolve()
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"--output: {error}; give a folder that can be made") from error
        if number > 1:
            print(f"{path} exists already and is kept: writing to {folder}")
        return folder
    raise AssertionError("unreachable")


def train(model: AGPO, options: argparse.Namespace) -> tuple[DemoCallback, bool]:
    """
    Train until the budget is used up or Ctrl-C.

    :param model: to be trained; its logger is set up
    :param options: of the command line
    :return: the callback, whether it was Ctrl-C
    """
    budget = Budget(None if options.minutes is None else 60 * options.minutes, options.steps)
    interval = 0.2 if sys.stderr.isatty() else 20.0  # seconds; in a log file, every refresh stays
    layout = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with (
        first_interrupt_stops() as stop,
        tqdm(total=1.0, bar_format=layout, mininterval=interval, dynamic_ncols=True) as bar,
    ):
        callback = DemoCallback(options.env, budget, stop, bar)
        # No dumps by SB3, which would come every few episodes and hold none of the callback's numbers
        model.learn(options.steps or NO_LIMIT, callback=callback, log_interval=sys.maxsize)
        return callback, stop.is_set()


def save(model: AGPO, folder: Path, replay_buffer: bool, title: str, random_return: float) -> list[tuple[str, str]]:
    """
    Write the model and the figures.

    :param model: after training
    :param folder: of the results
    :param replay_buffer: whether to write the replay buffer too
    :param title: above the figures
    :param random_return: mean return of a random policy
    :return: name and description of every file, those of the logger included
    """
    from sb3_agpo.tracking import figures

    model.save(folder / "model.zip")
    written = [("model.zip", "the model, for AGPO.load")]
    if replay_buffer:
        model.save_replay_buffer(folder / "replay_buffer.pkl")
        written.append(("replay_buffer.pkl", "replay buffer and derivatives, for load_replay_buffer"))
    model.logger.close()
    progress = folder / "progress.csv"
    written += [(progress.name, "everything logged"), ("events.out.tfevents.*", "the same for TensorBoard")]
    figures.learning_curve(progress, folder / "learning_curve.png", random_return=random_return, title=title)
    written.append(("learning_curve.png", "returns against steps and seconds"))
    try:
        figures.gradient_statistics(progress, folder / "gradients.png", title=title)
        written.append(("gradients.png", "gate, norms, variances and cosine of the gradients"))
    except figures.NothingToDraw:
        reason = "not one update yet" if model.dynamics is not None else model.provider_report.reason
        print(f"No gradients.png: no policy gradient came through the simulator ({reason})")
    return written


def summary(model: AGPO, callback: DemoCallback, random: Evaluation) -> str:
    """
    The table shown at the end.

    :param model: after training
    :param callback: that it was trained with
    :param random: returns of a random policy
    :return: text
    """
    first, last = callback.evaluations[0], callback.evaluations[-1]
    learning = callback.seconds - callback.evaluation_seconds
    rows = [("", "return", "")]
    for name, evaluation in (
        ("random policy", random),
        (f"first evaluation, step {first.steps:,}", first),
        (f"last evaluation, step {last.steps:,}", last),
    ):
        rows.append((name, f"{evaluation.mean:,.1f}", f"± {evaluation.deviation:,.1f} over {evaluation.episodes} episodes"))
    rows += [
        ("", "", ""),
        ("environment steps", f"{model.num_timesteps:,}", ""),
        ("simulator calls", f"{model.simulator_calls:,}", "environment steps, those for finite differences included"),
        ("seconds", f"{callback.seconds:,.1f}", f"{learning:,.1f} learning, {callback.evaluation_seconds:,.1f} evaluating"),
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {note}".rstrip() for name, value, note in rows)


def prepare(options: argparse.Namespace) -> tuple[AGPO, Evaluation, Path]:
    """
    Do everything that must work before the training can start.

    :param options: of the command line
    :return: the model with its logger, returns of a random policy, the folder of the results
    :raises ValueError: for options that cannot work, with what to change; nothing has been written then
    :raises ImportError: if an optional library is missing, with how to install it
    """
    check(options)
    limit_threads()
    model = make_model(options)
    with closing(Evaluator(options.env)) as evaluator:
        random = Evaluation.of(0, evaluator.play_random(options.seed, RANDOM_EPISODES))
    folder = fresh_folder(options.output)
    model.set_logger(configure(str(folder), ["csv", "tensorboard"]))
    return model, random, folder


def run(options: argparse.Namespace, model: AGPO, random: Evaluation, folder: Path) -> int:
    """
    Train, write the results and show them.

    :param options: of the command line
    :param model: with its logger
    :param random: returns of a random policy
    :param folder: of the results
    :return: exit code
    """
    title = f"AGPO on {options.env}, seed {options.seed}"
    source = model.provider_report.kind if model.dynamics is not None else "none"
    print(f"{title}, device {model.device}, {th.get_num_threads()} torch thread(s)")
    print(f"Simulator derivatives: {source} ({model.provider_report.reason})", flush=True)
    callback, interrupted = train(model, options)
    written = save(model, folder, options.save_replay_buffer, title, random.mean)
    assert model.env is not None
    model.env.close()
    print(f"\n{summary(model, callback, random)}\n\n  {folder}/")
    for name, description in written:
        print(f"    {name:<22} {description}")
    return EXIT_INTERRUPTED if interrupted else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the demonstration.

    :param arguments: command line without the program's name; None: that of this process
    :return: exit code
    """
    options = parse(arguments)
    show_warnings_once()
    try:
        try:
            prepared = prepare(options)
        except (ValueError, ImportError) as error:
            # Wrong options are the user's to correct: the message says how, a traceback would only hide it
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USAGE
        return run(options, *prepared)
    except KeyboardInterrupt:
        print("Ctrl-C: quit", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
