"""
The ``fidelity`` command: how well each estimate of dJ/da agrees with a reference by brute force.

The policy gradient is an action gradient g_a pulled back through the policy, so that an algorithm is as good as its g_a. This
command takes a saved model, measures g_a by perturbed rollouts at states that its policy visits, and compares with it what
AGPO would use: the critic's gradient, the gradient through the simulator at several horizons and difference steps, and the
gates' mixtures of both.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.envs.mujoco import MujocoEnv
from tqdm import tqdm

from sb3_agpo.benchmark import fidelity_figures, fidelity_records, records
from sb3_agpo.benchmark.fidelity_metrics import Agreement, PolicyPullback, agreement, reference_quality
from sb3_agpo.benchmark.fidelity_model import SavedModel, load_model
from sb3_agpo.benchmark.fidelity_refit import load_with_buffer, refit
from sb3_agpo.benchmark.fidelity_rollouts import BatchSimulator, visit_states
from sb3_agpo.benchmark.fidelity_table import AS_SAVED, markdown, overview, split, title
from sb3_agpo.benchmark.fidelity_windows import (
    ANALYTIC,
    CORRECTED,
    CRITIC,
    DEFAULT_STEP,
    GATES,
    Estimates,
    Estimator,
    differences_of,
    estimate_all,
    make_recorder,
)
from sb3_agpo.benchmark.records import Row
from sb3_agpo.benchmark.reference_gradient import Perturbation, reference_gradient
from sb3_agpo.benchmark.run import show_warnings_once
from sb3_agpo.command_line import check_at_least
from sb3_agpo.dynamics.tasks import find_task_model

DEFAULT_OUTPUT = Path("docs/benchmarks/fidelity.csv")
# Least value of every size.
SIZES = {
    "states": 2, "spacing": 1, "rollouts": 8, "rollout_steps": 0, "windows": 1, "threads": 1, "seed": 0, "refit": 0,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Define the command's options.

    :param parser: gets them
    """

    def add(flag: str, description: str, **kwargs: Any) -> None:
        default = kwargs.get("default")
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        parser.add_argument(flag, help=description + (f" (default: {shown})" if shown is not None else ""), **kwargs)

    add("--env", "Gymnasium's name of one of its own MuJoCo tasks, such as HalfCheetah-v5", required=True)
    trust = "models that AGPO or SAC saved, trained on that task without VecNormalize; pickles: give files you trust only"
    add("--models", trust, nargs="+", type=Path, required=True, metavar="FILE")
    add("--states", "states that the stochastic policy visits", type=int, default=60)
    add("--spacing", "steps of the policy per state", type=int, default=50)
    add("--rollouts", "rollouts per state for the reference, half of them each way", type=int, default=1500)
    add("--rollout-steps", "steps of a rollout before the critic takes over", type=int, default=40, metavar="K")
    add("--sigma", "standard deviation of the first action in a rollout", type=float, default=0.1)
    add("--horizons", "steps of windows", nargs="+", type=int, default=[1, 2, 4, 8, 16], metavar="H")
    sizes = f"steps of finite differences: a number for all quantities, or '{DEFAULT_STEP}' for the package's"
    add("--difference-steps", sizes, nargs="+", default=["1e-5", DEFAULT_STEP, "0.03"], metavar="SIZE")
    add("--gates", "gates to compare; none with no name after it", nargs="*", default=list(GATES), metavar="GATE")
    add("--windows", "windows from each state, judged one by one and averaged", type=int, default=6)
    further = "compare the critics after so many more updates with the same policy, too; for one model of AGPO"
    add("--refit", further, type=int, default=0, metavar="UPDATES")
    add("--replay-buffer", "what --refit trains on, saved by the model's save_replay_buffer", type=Path, metavar="FILE")
    weights = "weights of gradient matching that --refit compares"
    add("--matching", weights, nargs="+", type=float, default=[0.0, 1.0], metavar="WEIGHT")
    add("--seed", "seed of everything random", type=int, default=0)
    add("--threads", "threads of simulator and networks", type=int, default=1)
    beside = "CSV file; table and figure of this run lie beside it as .md and .png"
    add("--output", beside, type=Path, default=DEFAULT_OUTPUT)


class Candidate(NamedTuple):
    """A policy, and the critics to compare on it."""

    model: SavedModel  # with the critics that the reference ends in
    critics: Mapping[str, SavedModel]


def _check_numbers(options: argparse.Namespace) -> None:
    """
    Refuse numbers that make no sense.

    :param options: of the command line
    :raises ValueError: with what to change
    """
    for name, least in SIZES.items():
        check_at_least(least, options, name)
    if options.rollouts % 2:
        raise ValueError(f"--rollouts is {options.rollouts}; rollouts come in pairs, give an even number")
    if not 0.0 < options.sigma <= 1.0:
        raise ValueError(f"--sigma is {options.sigma:g}; give a number above 0 and up to 1, such as 0.1")
    if any(horizon < 1 for horizon in options.horizons):
        raise ValueError(f"--horizons has {min(options.horizons)}; give numbers of 1 or more")
    for weight in options.matching:
        if not (np.isfinite(weight) and weight >= 0.0):
            raise ValueError(f"--matching has {weight:g}; give numbers of 0 or more")
    for gate in options.gates:
        if gate not in GATES:
            raise ValueError(f"--gates: there is no '{gate}'; choose from {', '.join(GATES)}")
    for step in options.difference_steps:
        differences_of(step, options.threads)


def _check_files(options: argparse.Namespace) -> None:
    """
    Refuse files that cannot be meant.

    :param options: of the command line
    :raises ValueError: with what to change
    """
    names = [path.name for path in options.models]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--models: two files have the name {name}, and results are filed by it; rename one")
    if options.output.suffix != ".csv" or options.output.is_dir():
        raise ValueError(f"--output is {options.output}; give the name of a file that ends in .csv")
    fidelity_records.read(options.output)
    if options.refit and (options.replay_buffer is None or len(options.models) != 1):
        raise ValueError(f"--refit {options.refit} needs one model and its --replay-buffer; give both")
    if options.replay_buffer is not None and not options.refit:
        raise ValueError(f"--replay-buffer {options.replay_buffer} is of no use without --refit; give a number of updates")


def _make_env(name: str) -> gym.Env[Any, Any]:
    """
    Make the task.

    :param name: Gymnasium's name
    :return: the environment
    :raises ValueError: if there is no such task, or if it is none of Gymnasium's own MuJoCo tasks
    """
    try:
        env = gym.make(name)
    except gym.error.Error as error:
        raise ValueError(f"--env: '{name}' cannot be made ({error}); give a task such as HalfCheetah-v5") from error
    if not isinstance(env.unwrapped, MujocoEnv) or find_task_model(env.unwrapped) is None:
        env.close()
        raise ValueError(f"--env: '{name}' is none of Gymnasium's own MuJoCo tasks; give one, such as HalfCheetah-v5")
    return env


def prepare(options: argparse.Namespace) -> tuple[gym.Env[Any, Any], list[Candidate]]:
    """
    Check the options, load everything, and refit critics if asked to.

    :param options: of the command line
    :return: the task, the models
    :raises ValueError: with what to change; nothing has been computed or written then
    """
    _check_numbers(options)
    _check_files(options)
    env = _make_env(options.env)
    assert env.action_space.shape is not None
    least = 4 * (env.action_space.shape[0] + 1)
    if options.rollouts < least:
        raise ValueError(f"--rollouts is {options.rollouts}, too few for the actions of {options.env}; give {least} or more")
    models = [(path, SavedModel.of(load_model(path, env), path.name)) for path in options.models]
    candidates = [Candidate(model, {AS_SAVED: model}) for _, model in models]
    if options.refit:
        path, model = models[0]
        loaded = {w: load_with_buffer(path, options.replay_buffer, env, w) for w in dict.fromkeys(options.matching)}
        th.manual_seed(options.seed)
        np.random.seed(options.seed)  # of SB3's buffers
        critics = {AS_SAVED: model}
        for weight, other in loaded.items():
            critics[f"{options.refit} more updates, matching {weight:g}"] = refit(other, path.name, options.refit, weight)
        candidates = [Candidate(model, critics)]
    return env, candidates


def list_estimators(options: argparse.Namespace, candidate: Candidate) -> list[Estimator]:
    """
    Everything that is compared.

    :param options: of the command line
    :param candidate: the model
    :return: the critic first, corrected where all critics of the model are
    """
    corrected = all(critics.correction is not None for critics in candidate.critics.values())
    methods = [ANALYTIC, *dict.fromkeys(options.gates)]
    steps, horizons = dict.fromkeys(options.difference_steps), dict.fromkeys(options.horizons)
    mixed = [Estimator(method, horizon, step) for method in methods for step in steps for horizon in horizons]
    return [Estimator(CRITIC), *([Estimator(CORRECTED)] if corrected else []), *mixed]


def measure(env: gym.Env[Any, Any], candidate: Candidate, options: argparse.Namespace, bar: tqdm) -> list[Row]:
    """
    Measure one model.

    :param env: the task
    :param candidate: the model
    :param options: of the command line
    :param bar: shows how many environment steps are done
    :return: rows of the CSV file
    """
    assert isinstance(env.unwrapped, MujocoEnv)
    model, estimators = candidate.model, list_estimators(options, candidate)
    simulator = BatchSimulator(env.unwrapped, options.threads)
    recorders = {step: make_recorder(options.env, step, options.threads) for step in options.difference_steps}
    perturbation = Perturbation(options.rollouts, options.rollout_steps, options.sigma)
    rows_per_step = sum(1 + recorder.provider_report.rows_per_transition for recorder in recorders.values())
    window_steps = options.windows * max(options.horizons) * rows_per_step
    bar.total += options.states * (options.rollouts * (options.rollout_steps + 1) + window_steps)

    start = time.perf_counter()
    visited = visit_states(env, simulator, model, n_states=options.states, spacing=options.spacing, seed=options.seed)
    reference = reference_gradient(simulator, model, visited, perturbation, options.seed, bar.update)
    cost = {"reference_simulator_calls": simulator.simulator_calls, "reference_seconds": time.perf_counter() - start}
    found = estimate_all(
        simulator, candidate.critics, visited, estimators, recorders, options.windows, options.seed, bar.update
    )
    simulator.close()
    for recorder in recorders.values():
        recorder.close()

    pullback = PolicyPullback(model, visited)
    shared = _shared_columns(model, options) | cost | reference_quality(reference, pullback)._asdict()
    rows = []
    for critics in candidate.critics:
        for estimator in estimators:
            estimates = found[critics, estimator]
            for n_averaged in (0,) if estimator.horizon == 0 else dict.fromkeys((1, options.windows)):
                agreed = agreement(np.stack(estimates.gradients), reference, pullback, n_averaged)
                rows.append(_row(shared | {"critics": critics}, estimator, estimates, agreed, n_averaged))
    return rows


def _shared_columns(model: SavedModel, options: argparse.Namespace) -> dict[str, Any]:
    """
    What all rows about a model have in common.

    :param model: the model
    :param options: of the command line
    :return: column -> value
    """
    return {
        "env": options.env,
        "seed": options.seed,
        "n_states": options.states,
        "spacing": options.spacing,
        "n_rollouts": options.rollouts,
        "rollout_steps": options.rollout_steps,
        "sigma": options.sigma,
        "steps": model.steps,
        "algorithm": model.algorithm,
        "model": model.file,
        **records.versions(),
        "git_commit": records.git_commit(),
        "machine": records.machine(),
    }


def _row(shared: Mapping[str, Any], estimator: Estimator, estimates: Estimates, agreed: Agreement, windows: int) -> Row:
    """
    Write one row of the CSV file.

    :param shared: column -> value, the same for all estimators
    :param estimator: what was measured
    :param estimates: what it said
    :param agreed: how well that agrees with the reference
    :param windows: number of windows that were averaged, 0 for none
    :return: column -> text
    """
    share = windows / len(estimates.gradients)
    name = f"{estimator.method} H={estimator.horizon} step={estimator.difference_step} windows={windows}"
    values: dict[str, Any] = {
        **shared,
        **agreed._asdict(),
        "estimator": estimator.method if windows == 0 else name,
        "method": estimator.method,
        "horizon": estimator.horizon,
        "difference_step": estimator.difference_step,
        "windows": windows,
        "gate": float(np.mean(estimates.weights)),
        "valid": float(np.mean(estimates.valid)),
        "simulator_calls": round(share * estimates.simulator_calls),
        "seconds": (share or 1.0) * estimates.seconds,
    }
    return {column: _text(values[column]) for column in fidelity_records.COLUMNS}


def _text(value: Any) -> str:
    """Write a value into the CSV file; what is not known is empty."""
    if isinstance(value, float):
        return f"{value:.6g}" if np.isfinite(value) else ""
    return str(value)


def main(options: argparse.Namespace) -> int:
    """
    Run the command.

    :param options: of the command line
    :return: exit code
    :raises ValueError: for options that make no sense
    """
    show_warnings_once()
    th.set_num_threads(options.threads)
    options.difference_steps = list(dict.fromkeys(options.difference_steps))
    env, candidates = prepare(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with tqdm(total=0, unit="step", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for candidate in candidates:
            new = measure(env, candidate, options, bar)
            fidelity_records.merge(options.output, new)
            rows += new
    groups = split(rows)
    text = "\n".join([*filter(None, [overview(groups)]), *(markdown(group) for group in groups)])
    records.replace_file(options.output.with_suffix(".md"), text)
    panels = [fidelity_figures.Panel(title(group[0]), group) for group in groups]
    fidelity_figures.fidelity(panels, options.output.with_suffix(".png"))
    print(text)
    return 0
