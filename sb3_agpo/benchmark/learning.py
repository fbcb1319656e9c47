"""The ``learning`` command: plan the runs of the matrix, do those that are missing, each in a process of its own."""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym

from sb3_agpo.benchmark import records
from sb3_agpo.benchmark.algorithms import NAMES, AlgorithmSpec, called, check_arguments, find_algorithm, torch_module
from sb3_agpo.benchmark.plan import RunPlan, counterparts, differences, title
from sb3_agpo.benchmark.pool import Pool
from sb3_agpo.benchmark.records import BUDGETS, DEFAULT_FILE, RunKey
from sb3_agpo.command_line import check_at_least

OTHER_BUDGET = 50_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Define the command's options.

    :param parser: gets them
    """
    add = parser.add_argument
    add("--algorithms", nargs="+", default=list(NAMES), metavar="NAME", help=f"from {', '.join(NAMES)} (default: all)")
    add("--envs", nargs="+", default=list(BUDGETS), metavar="ENV", help="Gymnasium names (default: the ten MuJoCo tasks)")
    add("--seeds", nargs="+", default=["0-4"], metavar="SEED", help="numbers or ranges such as 0-4 (default: 0-4)")
    add("--steps", type=int, help="environment steps of every run (default: 100k for walkers, 50k for the other tasks)")
    add("--eval-every", type=int, default=5000, metavar="STEPS", help="steps between evaluations (default: 5000)")
    add("--processes", type=int, default=1, help="runs at the same time on this machine (default: 1)")
    add("--engine", choices=["processes", "ray"], default="processes", help=
        "what starts runs: processes of this machine, or Ray (extra 'ray') on one or many (default: %(default)s)")  # fmt: skip
    add("--address", metavar="HOST:PORT", help="Ray cluster to run on, as many runs at a time as it has room for "
        "(default: a cluster of --processes workers is started here)")  # fmt: skip
    add("--retries", type=int, default=2, help="how often Ray repeats a failed run (default: %(default)s)")
    add("--threads", type=int, default=1, help="threads of each run (default: 1)")
    add("--n-envs", type=int, help="training environments of every run (default: the algorithm's own)")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides", help=
        "change constructor arguments of every selected algorithm: a Python literal, a class of torch.nn, a gate, or "
        "LinearSchedule(START, END, END_FRACTION); "
        "policy_kwargs.net_arch=[64,64] changes one entry of a dictionary")  # fmt: skip
    add("--label", help="name in the algorithm column, for a single algorithm changed by --set or --n-envs")
    add("--output", type=Path, default=DEFAULT_FILE, help=f"CSV file of finished runs (default: {DEFAULT_FILE})")
    add("--models", type=Path, metavar="FOLDER", help="save models to this folder")
    add("--save-at", type=int, nargs="+", default=[], metavar="STEPS", help="steps to save models at (default: the end)")
    add(
        "--redo",
        action="store_true",
        help="redo finished runs whose settings, versions or --eval-every are different now",
    )
    add("--dry-run", action="store_true", help="only print what is to be done")


def parse_seeds(texts: Iterable[str]) -> list[int]:
    """
    Read seeds from the command line.

    :param texts: numbers and inclusive ranges, such as ``0`` and ``2-4``
    :return: seeds in order, each once
    :raises ValueError: for anything else
    """
    seeds: list[int] = []
    for text in texts:
        first, dash, last = text.partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)) or (dash and int(last) < int(first)):
            raise ValueError(f"'{text}' is no seed; give numbers or ranges such as 0 1 2 or 0-4")
        seeds += range(int(first), int(last if dash else first) + 1)
    return list(dict.fromkeys(seeds))


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """
    Read ``--set`` from the command line.

    :param texts: each ``key=value``
    :return: key -> value
    :raises ValueError: if one has no key or its value cannot be read
    """
    overrides: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ValueError(f"--set '{text}' is not of the form key=value")
        overrides[key] = _read_value(key, value)
    return overrides


def _read_value(key: str, text: str) -> Any:
    """The value of ``--set``: a Python literal, a class of torch.nn, a gate, or a schedule."""
    if text.startswith("torch.nn."):
        return torch_module(text)
    try:
        made = called(text)
        return ast.literal_eval(text) if made is None else made
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(
            f"--set {key}: {text} is no Python literal, gate or LinearSchedule ({error}); "
            f"a string needs quotes, {key}=\"'{text}'\""
        ) from None


def _check(options: argparse.Namespace) -> None:
    """
    Refuse options that make no sense.

    :param options: of the command line
    :raises ValueError: with what to change
    """
    check_at_least(1, options, "steps", "eval_every", "processes", "threads", "n_envs")
    check_at_least(0, options, "retries")
    if options.address and options.engine != "ray":
        raise ValueError(f"--address {options.address} is of a Ray cluster; add --engine ray")
    if options.label and len(options.algorithms) != 1:
        raise ValueError(
            f"--label {options.label} names one algorithm, but {len(options.algorithms)} are selected; select one"
        )
    if options.label in NAMES:
        raise ValueError(f"--label {options.label} is the name of an algorithm; choose another one")
    if options.output.suffix != ".csv" or options.output.is_dir():
        raise ValueError(f"--output is {options.output}; give the name of a file that ends in .csv")
    if options.save_at and not options.models:
        raise ValueError(f"--save-at {options.save_at[0]} saves nothing without a folder; add --models FOLDER")
    if min(options.save_at, default=1) < 1:
        raise ValueError(f"--save-at is {min(options.save_at)}; give numbers of 1 or more")
    if options.models and options.models.exists() and not options.models.is_dir():
        raise ValueError(f"--models: {options.models} is a file; give a folder")
    for env in options.envs:
        _check_task(env)


def _check_task(name: str) -> None:
    """
    Refuse a task that does not exist, or whose evaluation might never end.

    :param name: of the command line
    :raises ValueError: with what to change
    """
    module, _, task = name.rpartition(":")
    try:
        if module:  # which registers it
            importlib.import_module(module)
        spec = gym.spec(task)
    except (gym.error.Error, ImportError) as error:
        raise ValueError(f"unknown task '{name}': {error}") from error
    if spec.max_episode_steps is None:
        raise ValueError(f"task '{name}' has no time limit, so that an evaluation might never end; register it with one")


def plan_runs(options: argparse.Namespace) -> list[tuple[RunPlan, AlgorithmSpec]]:
    """
    The whole matrix, finished runs included.

    :param options: of the command line
    :return: runs with their algorithms; seed by seed, so that an interrupted matrix has a few seeds of everything
    :raises ValueError: for options that make no sense
    """
    _check(options)
    overrides = parse_overrides(options.overrides)
    specs = {name: find_algorithm(name, options.n_envs, overrides) for name in dict.fromkeys(options.algorithms)}
    for spec in specs.values():
        check_arguments(spec)
    plans = []
    for i, seed in enumerate(parse_seeds(options.seeds)):
        for env in dict.fromkeys(options.envs):
            for name, spec in specs.items():
                if spec.algorithm is None and i > 0:
                    continue  # the random policy learns nothing: one run of many episodes says it all
                budget = (options.steps or BUDGETS.get(env, OTHER_BUDGET)) if spec.algorithm else 0
                if spec.algorithm and (late := [step for step in options.save_at if step > budget]):
                    raise ValueError(f"--save-at {late[0]} is after the {budget} steps of {env}; give earlier ones or --steps")
                key = RunKey(options.label or name, env, seed if spec.algorithm else 0, spec.settings_hash(), budget)
                plan = RunPlan(
                    key, name, options.output, options.eval_every, options.threads, options.n_envs,
                    overrides, options.models, tuple(options.save_at),
                )  # fmt: skip
                plans.append((plan, spec))
    return plans


def select_missing(runs: list[tuple[RunPlan, AlgorithmSpec]], redo: bool) -> tuple[list[RunPlan], int]:
    """
    Leave out what is finished, and say so.

    :param runs: the whole matrix
    :param redo: whether to redo runs whose settings or versions are different now
    :return: what is to be done; the number of runs left out although they are different now
    """
    missing, outdated, n_finished = [], 0, 0
    finished = records.read_rows(runs[0][0].output) if runs else []
    for plan, spec in runs:
        changed = differences(plan, spec.own, finished)
        if changed is None or (changed and redo):
            replaced = frozenset(records.key_of(row) for row in counterparts(plan.key, finished))
            missing.append(replace(plan, replaced=replaced))
        elif changed:
            outdated += 1
            print(f"kept, not redone without --redo: {title(plan)} is finished, but {changed}", file=sys.stderr)
        else:
            n_finished += 1
    print(f"{len(runs)} runs: {n_finished} finished, {outdated} finished but different, {len(missing)} to do", flush=True)
    return missing, outdated


def _work(plans: Sequence[RunPlan], options: argparse.Namespace) -> int:
    """
    Do runs with the engine of the command line.

    :param plans: the runs
    :param options: of the command line
    :return: number of runs that failed
    """
    if options.engine == "processes" or not plans:
        return Pool(plans, options.processes).work()
    from sb3_agpo.benchmark.ray_engine import RayPool  # here, as Ray is optional

    return RayPool(plans, options.processes, options.address, options.retries).work()


def main(options: argparse.Namespace) -> int:
    """
    Run the command.

    :param options: of the command line
    :return: exit code: 1 if a run failed or was kept although different, 0 otherwise
    :raises ValueError: for options that make no sense
    """
    missing, outdated = select_missing(plan_runs(options), options.redo)
    if options.dry_run:
        for plan in missing:
            print(f"to do: {title(plan)}, {plan.key.budget} steps, settings {plan.key.settings}")
        return 0
    failed = _work(missing, options)
    if failed:
        print(f"{failed} of {len(missing)} runs failed; the same command redoes them", file=sys.stderr)
    return int(bool(failed or outdated))
