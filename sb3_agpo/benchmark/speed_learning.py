"""Whole runs: environment steps per second of ``learn``, and memory, beside SAC, each with the updates of its defaults."""

from __future__ import annotations

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.benchmark.reliability_cycles import resident_mb
from sb3_agpo.benchmark.speed_timing import Case, Effort, Medians, compare, timed, torch_threads
from sb3_agpo.dynamics.mujoco import FiniteDifferences

#: environment steps of one repetition: whole batches of AGPO's windows
STEPS, QUICK_STEPS = 128, 64
#: steps of the warm-up; the defaults would only make it longer
LEARNING_STARTS = 100
#: transitions kept while speed is measured: a million of every row's models may not fit into memory
BUFFER_SIZE = 10_000
#: memory that a run of a million steps may take, in MB
MEMORY_LIMIT = 4000.0
#: environment steps of the run that is projected
PROJECTED_STEPS = 1_000_000
#: environment steps by which memory is seen to grow
GROWTH_STEPS, QUICK_GROWTH_STEPS = 30_000, 3_000


def measure_learning(case: Case, effort: Effort, **changes: Any) -> Medians:
    """
    Speed of ``learn`` after the warm-up: collecting, derivatives and all updates.

    :param case: task and threads, which are torch's and those of the derivatives
    :param effort: how long
    :param changes: arguments of AGPO that are not to have their defaults
    :return: environment steps per second
    """
    ours, reference = _warmed_up(AGPO, case, **changes), _warmed_up(SAC, case)
    n_steps, clock = QUICK_STEPS if effort.quick else STEPS, effort.clock(case.threads)
    assert isinstance(ours, AGPO) and n_steps % ours.rollout_size == 0
    with torch_threads(case.threads):
        ours_seconds, reference_seconds = compare(
            timed(lambda: ours.learn(n_steps, reset_num_timesteps=False), clock),
            timed(lambda: reference.learn(n_steps, reset_num_timesteps=False), clock),
            effort,
        )
    _close(ours, reference)
    return Medians(n_steps / ours_seconds, n_steps / reference_seconds)


def measure_matmul_precision(case: Case, effort: Effort, algorithm: type[OffPolicyAlgorithm]) -> Medians:
    """
    Speed of ``learn`` where PyTorch may choose other routines for matrix products, beside its default.

    :param case: task and threads, which are torch's and those of the derivatives
    :param effort: how long
    :param algorithm: SAC or AGPO, at its defaults
    :return: environment steps per second after ``torch.set_float32_matmul_precision("medium")``, and without
    """
    model = _warmed_up(algorithm, case)
    n_steps, clock = QUICK_STEPS if effort.quick else STEPS, effort.clock(case.threads)

    def learn(precision: str) -> None:
        th.set_float32_matmul_precision(precision)
        model.learn(n_steps, reset_num_timesteps=False)

    before = th.get_float32_matmul_precision()
    try:
        with torch_threads(case.threads):
            medium, highest = compare(timed(lambda: learn("medium"), clock), timed(lambda: learn("highest"), clock), effort)
    finally:
        th.set_float32_matmul_precision(before)
    _close(model)
    return Medians(n_steps / medium, n_steps / highest)


def _warmed_up(algorithm: type[OffPolicyAlgorithm], case: Case, **changes: Any) -> OffPolicyAlgorithm:
    """A model after its warm-up."""
    if issubclass(algorithm, AGPO):
        changes["finite_differences"] = FiniteDifferences(threads=case.threads)
    common: dict[str, Any] = {"seed": 0, "device": "cpu", "learning_starts": LEARNING_STARTS, "buffer_size": BUFFER_SIZE}
    model = algorithm("MlpPolicy", case.task, **common, **changes)
    with torch_threads(case.threads):
        return model.learn(LEARNING_STARTS)


def _close(*models: OffPolicyAlgorithm) -> None:
    for model in models:
        assert model.env is not None
        model.env.close()


class MemoryUse(NamedTuple):
    """Memory of a run in MB."""

    peak: float  # most that the process had
    growth: float  # from when every kind of update has been made, with an almost empty buffer, to the end
    per_step: float  # what the replay buffer should take for each step
    derivatives: float  # most that stored derivatives take


def measure_growth(case: Case, effort: Effort) -> Medians:
    """
    Memory by which a run grew, beside that of the arrays it filled.

    :param case: the task
    :param effort: how much; a quick one takes fewer steps
    :return: MB
    """
    n_steps = _growth_steps(effort)
    use = memory_use(case.task, n_steps)
    return Medians(use.growth, n_steps * use.per_step)


def project_memory(case: Case, effort: Effort) -> Medians:
    """
    Memory of a run of ``PROJECTED_STEPS`` steps with default settings, projected, beside ``MEMORY_LIMIT``.

    :param case: the task
    :param effort: how much; a quick one takes fewer steps
    :return: MB
    """
    n_steps = _growth_steps(effort)
    use = memory_use(case.task, n_steps)
    return Medians(use.peak + (PROJECTED_STEPS - n_steps) * use.per_step + use.derivatives, MEMORY_LIMIT)


def _growth_steps(effort: Effort) -> int:
    return QUICK_GROWTH_STEPS if effort.quick else GROWTH_STEPS


@lru_cache(maxsize=1)  # both measures look at the same run
def memory_use(task: str, n_steps: int) -> MemoryUse:
    """
    Run AGPO at its defaults in a process of its own, and look at its memory.

    :param task: id of an environment
    :param n_steps: environment steps by which the replay buffer is filled
    :return: its memory
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_use_memory, task, n_steps).result()


def _use_memory(task: str, n_steps: int) -> MemoryUse:
    """What :func:`memory_use` does in its process."""
    model = AGPO("MlpPolicy", task, seed=0, device="cpu", learning_starts=LEARNING_STARTS)
    model.learn(LEARNING_STARTS + model.rollout_size)
    start = resident_mb()
    gradient_steps, model.gradient_steps = model.gradient_steps, 0
    model.learn(n_steps, reset_num_timesteps=False)
    model.gradient_steps = gradient_steps
    model.learn(model.rollout_size, reset_num_timesteps=False)
    derivatives = 1e3 * model.derivative_memory if model.critic_grad_coef > 0.0 else 0.0
    return MemoryUse(peak_mb(), resident_mb() - start, replay_bytes(model) / 1e6, derivatives)


def peak_mb() -> float:
    """
    Most memory that this process has had since its program began.

    :return: MB
    """
    # ru_maxrss of getrusage would count the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)[1]) * 1024 / 1e6  # type: ignore[index]


def replay_bytes(model: OffPolicyAlgorithm) -> float:
    """
    Memory that a model's replay buffer takes for one step of an environment.

    :param model: the model
    :return: bytes
    """
    assert model.replay_buffer is not None
    arrays = [value for value in vars(model.replay_buffer).values() if isinstance(value, np.ndarray)]
    return sum(array.nbytes for array in arrays) / model.buffer_size
