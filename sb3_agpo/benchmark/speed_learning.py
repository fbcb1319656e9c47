"""Whole runs: environment steps per second of ``learn`` and memory, beside SB3's SAC, each at its own defaults."""

from __future__ import annotations

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3 import SAC
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.benchmark.reliability_cycles import resident_mb
from sb3_agpo.benchmark.speed_timing import Case, Effort, Medians, compare, timed, torch_threads
from sb3_agpo.dynamics.mujoco import FiniteDifferences

#: environment steps of one repetition, at least
STEPS, QUICK_STEPS = 128, 8
#: steps of the warm-up; the defaults would only make it longer
LEARNING_STARTS = 100
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
    differences = FiniteDifferences(threads=case.threads)
    common: dict[str, Any] = {"seed": 0, "device": "cpu", "learning_starts": LEARNING_STARTS}
    ours = AGPO("MlpPolicy", case.task, finite_differences=differences, **common, **changes)
    reference = SAC("MlpPolicy", case.task, **common)
    least = QUICK_STEPS if effort.quick else STEPS
    n_steps = ours.rollout_size * -(-least // ours.rollout_size)  # whole batches of windows
    clock = effort.clock(case.threads)
    with torch_threads(case.threads):
        for model in (ours, reference):
            model.learn(LEARNING_STARTS)
        ours_seconds, reference_seconds = compare(
            timed(lambda: ours.learn(n_steps, reset_num_timesteps=False), clock),
            timed(lambda: reference.learn(n_steps, reset_num_timesteps=False), clock),
            effort,
        )
    for model in (ours, reference):
        assert model.env is not None
        model.env.close()
    return Medians(n_steps / ours_seconds, n_steps / reference_seconds)


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
