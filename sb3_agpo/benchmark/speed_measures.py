"""What the ``speed`` command measures: rows by section, their units and the ratios they are to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from stable_baselines3 import SAC

from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.benchmark.algorithms import BATCH_NORM_SETTINGS
from sb3_agpo.benchmark.speed_derivatives import (
    EULER_TASKS,
    N_TRANSITIONS,
    TASKS,
    count_columns,
    measure_floor,
    measure_threads,
    measure_transition_fd,
)
from sb3_agpo.benchmark.speed_learning import (
    MEMORY_LIMIT,
    measure_growth,
    measure_learning,
    measure_matmul_precision,
    project_memory,
)
from sb3_agpo.benchmark.speed_profile import PARTS, measure_limit, measure_part
from sb3_agpo.benchmark.speed_timing import Case, Effort, Medians
from sb3_agpo.benchmark.speed_updates import (
    measure_critic,
    measure_matching,
    measure_policy,
    measure_products,
    measure_windows,
)
from sb3_agpo.benchmark.speed_vec_env import measure_dummy, measure_subproc


@dataclass(frozen=True)
class Goal:
    """
    A ratio to reach.

    :param ratio: the bound
    :param at_most: whether the ratio is to be at most as large, else at least
    :param tasks: tasks that it holds for; None for all
    :param n_envs: number of environments that it holds for; None for all
    """

    ratio: float
    at_most: bool
    tasks: tuple[str, ...] | None = None
    n_envs: int | None = None

    def concerns(self, case: Case) -> bool:
        """
        Whether a row is to reach it.

        :param case: the row
        :return: whether it is
        """
        return (self.tasks is None or case.task in self.tasks) and self.n_envs in (None, case.n_envs)

    def is_reached(self, ratio: float) -> bool:
        """
        Whether a ratio is good enough.

        :param ratio: the ratio
        :return: whether it is
        """
        return ratio <= self.ratio if self.at_most else ratio >= self.ratio

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.ratio:g}"


@dataclass(frozen=True)
class Measure:
    """
    One kind of row.

    :param measure: measures a row, ours and the reference in ``unit``
    :param unit: of both
    :param ours: what is measured, in words
    :param reference: what it is measured beside, in words
    :param goals: ratios to reach, ours divided by the reference
    """

    measure: Callable[[Case, Effort], Medians]
    unit: str
    ours: str
    reference: str
    goals: tuple[Goal, ...] = ()

    def goal(self, case: Case) -> Goal | None:
        """
        Find the ratio that a row is to reach.

        :param case: the row
        :return: the goal, None if there is none
        """
        return next((goal for goal in self.goals if goal.concerns(case)), None)


_BATCH = f"ms per {N_TRANSITIONS} transitions"
_EASY, _HARD = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"), ("Ant-v5", "Humanoid-v5")
_STEPS, _UPDATE, _STEP = "environment steps/s", "ms per update", "ms per environment step"

#: measure -> what it is
MEASURES: dict[str, Measure] = {
    "jacobian": Measure(
        measure_floor, _BATCH, "all derivatives", "`mujoco.rollout` of the same rows alone", (Goal(1.25, True),)
    ),
    "transition_fd": Measure(
        measure_transition_fd, _BATCH, "all derivatives", "`mjd_transitionFD`, state and action only", (Goal(1.0, True),)
    ),
    "jacobian_threads": Measure(
        measure_threads, "transitions/s", "all derivatives, several threads", "one thread", (Goal(1.7, False),)
    ),
    "columns": Measure(count_columns, "rows per transition", "rows simulated", "one for every coordinate"),
    "vec_env_dummy": Measure(
        measure_dummy, _STEPS, "`MujocoVecEnv`", "`DummyVecEnv`", (Goal(2.5, False, ("Hopper-v5",), 16),)
    ),
    "vec_env_subproc": Measure(
        measure_subproc, _STEPS, "`MujocoVecEnv`", "`SubprocVecEnv`", (Goal(3.0, False, ("Hopper-v5",), 16),)
    ),
    "critic_update": Measure(measure_critic, _UPDATE, "critics, no matching", "SAC's critics", (Goal(0.6, True),)),
    "critic_update_matching": Measure(
        measure_matching, _UPDATE, "critics, gradient matching", "SAC's critics", (Goal(1.3, True),)
    ),
    "critic_products": Measure(measure_products, _UPDATE, "matrix products of a critic update alone", "SAC's critics"),
    "policy_update": Measure(measure_policy, _UPDATE, "policy, replayed states", "SAC's policy", (Goal(1.0, True),)),
    "window_update": Measure(measure_windows, _UPDATE, "policy, fresh windows", "SAC's policy"),
    "learn": Measure(
        measure_learning, _STEPS, "`AGPO.learn`", "`SAC.learn`", (Goal(3.0, False, _EASY), Goal(1.5, False, _HARD))
    ),
    "learn_batch_norm": Measure(
        partial(measure_learning, **BATCH_NORM_SETTINGS), _STEPS, "`AGPO.learn`, critics normalised by batches", "`SAC.learn`"
    ),
    **{
        f"learn_medium_{algorithm.__name__.lower()}": Measure(
            partial(measure_matmul_precision, algorithm=algorithm),
            _STEPS,
            f'`{algorithm.__name__}.learn`, `set_float32_matmul_precision("medium")`',
            '"highest", the default',
        )
        for algorithm in (AGPO, SAC)
    },
    "memory_growth": Measure(measure_growth, "MB", "growth of a run's memory", "size of the arrays it filled"),
    "memory_1m_steps": Measure(
        project_memory, "MB", "memory of a million steps, projected", f"{MEMORY_LIMIT:g} MB", (Goal(1.0, True),)
    ),
    **{f"profile_{part}": Measure(measure_part, _STEP, part.replace("_", " "), "the whole run") for part in PARTS},
    "profile_limit": Measure(measure_limit, _STEP, "the whole run", "its simulation alone"),
}

#: numbers of environments
N_ENVS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: as many processes as a computer of modest size can hold
N_PROCESSES = (1, 4, 16)
VEC_ENV_TASKS = ("Hopper-v5", "HalfCheetah-v5", "Ant-v5", "Humanoid-v5")
UPDATE_TASKS = ("HalfCheetah-v5", "Humanoid-v5")
MEMORY_TASKS = ("Humanoid-v5",)
PROFILED_TASKS = ("Hopper-v5", "Humanoid-v5")
#: environments of the rows that compare tasks
MANY = 16


def _product(measures: Sequence[str], tasks: Sequence[str], n_envs: Sequence[int], threads: Sequence[int]) -> Iterator[Case]:
    """Rows in an order in which those that share a set-up follow each other."""
    return (Case(m, task, n, count) for task in tasks for n in n_envs for count in threads for m in measures)


def _vec_env(threads: Sequence[int]) -> Iterator[Case]:
    yield from _product(["vec_env_dummy"], VEC_ENV_TASKS[:1], N_ENVS, threads)
    yield from _product(["vec_env_dummy"], VEC_ENV_TASKS[1:], [MANY], threads)
    yield from _product(["vec_env_subproc"], VEC_ENV_TASKS[:1], N_PROCESSES, [max(threads)])


def _jacobian(threads: Sequence[int]) -> Iterator[Case]:
    yield from _product(["jacobian"], TASKS, [1], threads)
    yield from _product(["transition_fd"], EULER_TASKS, [1], [1])


_UPDATES = ("critic_update", "critic_update_matching", "critic_products", "policy_update", "window_update")
_PROFILE = (*(f"profile_{part}" for part in PARTS), "profile_limit")

#: section -> its rows, for numbers of threads to measure with
SECTIONS: dict[str, Callable[[Sequence[int]], Iterator[Case]]] = {
    "columns": lambda _: _product(["columns"], TASKS, [1], [1]),
    "jacobian": _jacobian,
    "threads": lambda threads: _product(["jacobian_threads"], TASKS, [1], [count for count in threads if count > 1]),
    "vec_env": _vec_env,
    "updates": lambda threads: _product(_UPDATES, UPDATE_TASKS, [1], threads),
    "end_to_end": lambda threads: _product(["learn", "learn_batch_norm"], [*_EASY, *_HARD], [1], threads),
    "precision": lambda threads: _product(["learn_medium_agpo", "learn_medium_sac"], UPDATE_TASKS, [1], threads),
    "memory": lambda _: _product(["memory_growth", "memory_1m_steps"], MEMORY_TASKS, [1], [1]),
    "profile": lambda _: _product(_PROFILE, PROFILED_TASKS, [1], [1]),
}


def section_of(case: Case) -> str:
    """
    Find the section of a row.

    :param case: the row
    :return: the section's name
    """
    return next(name for name, cases in SECTIONS.items() if any(case.measure == other.measure for other in cases((1, 2))))
