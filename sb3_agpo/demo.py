"""
Demonstration, ``python -m sb3_agpo.demo``: train AGPO on a task for a few minutes and show what came of it.

The results lie in a folder of their own, ``runs/demo`` unless it exists already: the model, the logged numbers as CSV and
for TensorBoard, and figures of the returns and of the gradients.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import gymnasium as gym
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from tqdm import tqdm

from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.benchmark.run import Evaluator, show_warnings_once
from sb3_agpo.command_line import EXIT_USAGE, check_at_least

DEFAULT_MINUTES = 4.0
LOGS = 100  # rows of numbers that a run of the full budget logs
LOGS_PER_EVALUATION = 4
EVALUATION_EPISODES = 5
RANDOM_EPISODES = 10
# Share of the time that evaluations may take where time is what ends the run: on a slow task, or a machine that is busy
# with other things, they would leave little of it to learn in.
EVALUATION_SHARE = 0.15
MAX_THREADS = 4  # networks of this size are too small to gain from more
NO_LIMIT = 10**12  # steps
BUFFER_SIZE = 1_000_000  # AGPO's default

EXIT_INTERRUPTED = 130  # as shells report a program ended by Ctrl-C


class Evaluation(NamedTuple):
    """Undiscounted returns of a few episodes."""

    steps: int  # environment steps of training before them
    mean: float
    deviation: float  # standard deviation over the episodes
    episodes: int

    @classmethod
    def of(cls, steps: int, returns: Sequence[float]) -> Evaluation:
        """
        Summarise episodes.

        :param steps: environment steps of training before them
        :param returns: one of each episode
        :return: the summary
        """
        mean = sum(returns) / len(returns)
        variance = sum((value - mean) ** 2 for value in returns) / len(returns)
        return cls(steps, mean, math.sqrt(variance), len(returns))


class Budget(NamedTuple):
    """When to stop: what comes first."""

    seconds: float | None
    steps: int | None

    def used(self, seconds: float, steps: int) -> float:
        """
        How much of the budget is used up.

        :param seconds: since the training started
        :param steps: environment steps
        :return: fraction, 1 or more at the end
        """
        by_time = seconds / self.seconds if self.seconds is not None else 0.0
        by_steps = steps / self.steps if self.steps is not None else 0.0
        return max(by_time, by_steps)


class DemoCallback(BaseCallback):
    """
    Evaluates the deterministic policy in environments of its own, logs, moves the progress bar and ends the training.

    :param env: Gymnasium's name of the task
    :param budget: when to stop
    :param stop: set when the training is to stop earlier
    :param bar: progress bar with a total of 1
    """

    model: AGPO

    def __init__(self, env: str, budget: Budget, stop: threading.Event, bar: tqdm) -> None:
        super().__init__()
        self.evaluator = Evaluator(env)
        self.budget, self.stop, self.bar = budget, stop, bar
        self.evaluations: list[Evaluation] = []
        self.seconds = self.evaluation_seconds = 0.0
        self._started, self._n_logs = 0.0, 0

    def _on_training_start(self) -> None:
        self._started = time.perf_counter()
        self._evaluate()
        self._log()

    def _on_step(self) -> bool:
        used = self._show_progress()
        if used >= 1.0 or self.stop.is_set():
            return False  # on_training_end evaluates
        # One evaluation or batch of updates can take longer than the time between two logs: catch up, but log once
        due = int(used * LOGS)
        if due > self._n_logs:
            if due // LOGS_PER_EVALUATION > self._n_logs // LOGS_PER_EVALUATION and self._worth_evaluating():
                self._evaluate()
            self._log()
            self._n_logs = due
        return True

    def _on_training_end(self) -> None:
        self._evaluate()
        self._log()
        self._show_progress()

    def _show_progress(self) -> float:
        """Move the bar; :return: the fraction of the budget that is used up."""
        self.seconds = time.perf_counter() - self._started
        used = self.budget.used(self.seconds, self.num_timesteps)
        last = f", return {self.evaluations[-1].mean:,.1f}" if self.evaluations else ""
        self.bar.set_postfix_str(f"{self.num_timesteps:,} steps{last}", refresh=False)
        self.bar.update(min(used, 1.0) - self.bar.n)
        return used

    def _worth_evaluating(self) -> bool:
        """Whether the policy can have changed since the first evaluation, and evaluations have not taken too long."""
        affordable = self.budget.seconds is None or self.evaluation_seconds <= EVALUATION_SHARE * self.seconds
        return affordable and self.num_timesteps > self.model.learning_starts

    def _evaluate(self) -> None:
        start = time.perf_counter()
        returns = self.evaluator.play_model(self.model, EVALUATION_EPISODES)
        self.evaluation_seconds += time.perf_counter() - start
        self.evaluations.append(Evaluation.of(self.num_timesteps, returns))
        self.logger.record("eval/mean_reward", self.evaluations[-1].mean)
        self.logger.record("eval/std_reward", self.evaluations[-1].deviation)

    def _log(self) -> None:
        """Write what was recorded since the last time: means over all updates in between."""
        self.seconds = time.perf_counter() - self._started
        self.logger.record("time/learning_seconds", self.seconds - self.evaluation_seconds)
        self.logger.record("time/simulator_calls", self.model.simulator_calls)
        self.model.dump_logs()


@contextmanager
def first_interrupt_stops() -> Iterator[threading.Event]:
    """
    Let the first Ctrl-C stop the training after its current step, so that nothing is left half-done; a second one quits.

    :return: context with the event that the first Ctrl-C sets
    """
    stop = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)
        tqdm.write("Ctrl-C: stopping and saving; press it again to quit at once", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """
    Read the command line.

    :param arguments: without the program's name; None: those of this process
    :return: options
    """
    parser = argparse.ArgumentParser(
        prog="python -m sb3_agpo.demo", description="Train AGPO for a few minutes and show what came of it."
    )
    add = parser.add_argument
    add("--env", default="HalfCheetah-v5", help="Gymnasium's name of the task (default: %(default)s)")
    add("--minutes", type=float, help=f"stop after this time (default: {DEFAULT_MINUTES:g}, or no limit with --steps)")
    add("--steps", type=int, help="stop after this many environment steps (default: no limit)")
    add("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    add("--n-envs", type=int, default=1, help="training environments, stepped in turn (default: %(default)s)")
    add("--device", default="cpu", help="device of the networks: cpu, cuda or auto (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/demo"), help="folder of the results; if it exists, the next free "
        "number is appended (default: %(default)s)")  # fmt: skip
    add("--save-replay-buffer", action="store_true", help="save the replay buffer too: hundreds of megabytes on large tasks")
    options = parser.parse_args(arguments)
    if options.minutes is None and options.steps is None:
        options.minutes = DEFAULT_MINUTES
    return options


def check(options: argparse.Namespace) -> None:
    """
    Refuse what cannot work, before anything is written.

    :param options: of the command line
    :raises ValueError: with what to change
    :raises ImportError: if an optional library is missing, with how to install it
    """
    if options.minutes is not None and not (math.isfinite(options.minutes) and options.minutes > 0):
        raise ValueError(f"--minutes is {options.minutes:g}; give a number above 0")
    check_at_least(1, options, "steps", "n_envs")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed is {options.seed}; give a number from 0 to {2**32 - 1}")
    _check_device(options.device)
    _check_env(options.env)
    import sb3_agpo.tracking.figures  # noqa: F401 - raises ImportError without matplotlib

    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError("the demo logs for TensorBoard, which is not installed: pip install 'sb3-agpo[plot]'")


def _check_device(name: str) -> None:
    """
    Refuse a device that torch does not have.

    :param name: of the command line
    :raises ValueError: with what to change
    """
    try:
        th.empty(0, device="cpu" if name == "auto" else name)
    # AssertionError: torch without CUDA
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device '{name}' cannot be used ({reason}); give cpu, cuda or auto") from error


def _check_env(name: str) -> None:
    """
    Refuse a task that AGPO cannot learn or whose episodes need not end.

    :param name: of the command line
    :raises ValueError: with what to change
    """
    try:
        env = gym.make(name)
    except (gym.error.Error, ImportError) as error:
        raise ValueError(f"--env '{name}' cannot be made: {error}") from error
    observations, actions, spec = env.observation_space, env.action_space, env.spec
    env.close()
    if not isinstance(actions, spaces.Box):
        raise ValueError(f"--env '{name}' has the action space {actions}; AGPO needs continuous actions (Box)")
    if not isinstance(observations, spaces.Box) or len(observations.shape) != 1:
        raise ValueError(f"--env '{name}' has the observation space {observations}; the demo needs a one-dimensional Box")
    if spec is None or spec.max_episode_steps is None:
        raise ValueError(f"--env '{name}' has no time limit, so an evaluation might never end; give one that has")


def limit_threads() -> None:
    """
    Let torch use all cores but one, and not many.

    Its threads wait for each other at every operation, many times a millisecond: where one of them has to share its core
    with another program, learning with two threads is several times slower than with one.
    """
    cores = len(os.sched_getaffinity(0))
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
    random = Evaluation.of(0, Evaluator(options.env).play_random(options.seed, RANDOM_EPISODES))
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
