"""One run of the learning benchmark: an algorithm on a task with a seed, evaluated as it learns."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import closing
from multiprocessing.connection import Connection
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_agpo.benchmark import records
from sb3_agpo.benchmark.algorithms import AlgorithmSpec, find_algorithm
from sb3_agpo.benchmark.clock import LearningClock
from sb3_agpo.benchmark.plan import BusyError, RunPlan, claimed
from sb3_agpo.benchmark.recovery import Recovery

EVALUATION_SEED = 1_000_000  # far from the seeds of training environments, which count up from the run's seed
EVALUATION_EPISODES = 5
FINAL_EPISODES = 10
RANDOM_EPISODES = 20

EXIT_FAILED = 1
EXIT_BUSY = 75  # another process is at the same run, or has finished it (the value of os.EX_TEMPFAIL)


class Evaluator:
    """
    Plays episodes from the same initial states for every algorithm.

    :param env: Gymnasium's name of the task
    """

    def __init__(self, env: str) -> None:
        self._name = env
        self._envs: list[gym.Env[Any, Any]] = []

    def play(self, choose: Callable[[np.ndarray], np.ndarray], episodes: int) -> list[float]:
        """
        Play episodes side by side.

        :param choose: actions ``(n, n_actions)`` of observations ``(n, n_observations)``
        :param episodes: number of episodes; the i-th always begins in the same state
        :return: undiscounted return of each
        """
        while len(self._envs) < episodes:
            self._envs.append(gym.make(self._name))
        observations = np.stack([env.reset(seed=EVALUATION_SEED + i)[0] for i, env in enumerate(self._envs[:episodes])])
        returns = np.zeros(episodes)
        active = np.arange(episodes)
        while len(active):
            actions = choose(observations[active])
            ended = np.zeros(len(active), dtype=bool)
            for i, (index, action) in enumerate(zip(active, actions, strict=True)):
                observations[index], reward, terminated, truncated, _ = self._envs[index].step(action)
                returns[index] += float(reward)
                ended[i] = terminated or truncated
            active = active[~ended]
        return returns.tolist()

    def play_model(self, model: BaseAlgorithm, episodes: int) -> list[float]:
        """
        Play with a model's deterministic policy.

        :param model: the model
        :param episodes: number of episodes
        :return: undiscounted return of each
        """
        normalize = model.get_vec_normalize_env()

        def choose(observations: np.ndarray) -> np.ndarray:
            normalized = observations if normalize is None else np.asarray(normalize.normalize_obs(observations))
            return model.predict(normalized, deterministic=True)[0]

        return self.play(choose, episodes)

    def play_random(self, seed: int, episodes: int) -> list[float]:
        """
        Play with uniformly random actions.

        :param seed: seed of the actions
        :param episodes: number of episodes
        :return: undiscounted return of each
        """
        with closing(gym.make(self._name)) as env:
            space = env.action_space
        space.seed(seed)
        return self.play(lambda observations: np.stack([space.sample() for _ in observations]), episodes)

    def close(self) -> None:
        """Close the environments; the next episodes are played in new ones."""
        while self._envs:
            self._envs.pop().close()


class EvaluationCallback(BaseCallback):
    """
    Evaluates at regular steps and at the end, and saves models.

    :param plan: the run
    :param record: called with the numbers of each evaluation, by column
    :param clock: stopped while evaluating and saving
    """

    def __init__(self, plan: RunPlan, record: Callable[[dict[str, Any]], None], clock: LearningClock) -> None:
        super().__init__()
        self.plan = plan
        self.record = record
        self.clock = clock
        self.evaluator = Evaluator(plan.key.env)
        self.next_evaluation = plan.eval_every
        self.to_save = sorted(plan.save_at or (plan.key.budget,)) if plan.models else []
        self.parent_process = os.getppid()
        self.orphaned = False

    def _on_training_start(self) -> None:
        # What a run that goes on from a checkpoint has behind it, it does not do again
        self.next_evaluation = (self.num_timesteps // self.plan.eval_every + 1) * self.plan.eval_every
        self.to_save = [step for step in self.to_save if step > self.num_timesteps or step == self.plan.key.budget]
        self.clock.start()

    def _on_step(self) -> bool:
        # Whoever kills the benchmark wants its runs to end too, and a new benchmark must be able to redo them.
        self.orphaned = os.getppid() != self.parent_process
        # At the budget's last step the learning is not over yet: on_training_end evaluates what came of it.
        if self.next_evaluation <= self.num_timesteps < self.plan.key.budget:
            while self.next_evaluation <= self.num_timesteps:
                self.next_evaluation += self.plan.eval_every
            self._evaluate(EVALUATION_EPISODES)
        if self.to_save and self.to_save[0] <= self.num_timesteps < self.plan.key.budget:
            self._save()
        return not self.orphaned

    def _on_training_end(self) -> None:
        if self.orphaned:
            raise RuntimeError("the process that started this run is gone")
        self._evaluate(FINAL_EPISODES)
        self._save()
        self.clock.stop()

    def _evaluate(self, episodes: int) -> None:
        self.clock.stop()
        returns = self.evaluator.play_model(self.model, episodes)
        seconds, cpu_seconds = self.clock.read()
        self.record(
            {
                "steps": self.num_timesteps,
                # AGPO counts the rows of its finite differences too: each one is one more simulated environment step.
                "simulator_calls": int(getattr(self.model, "simulator_calls", self.num_timesteps)),
                "seconds": round(seconds, 3),
                "cpu_seconds": round(cpu_seconds, 3),
                **_summary(returns),
            }
        )
        self.clock.start()

    def _save(self) -> None:
        self.clock.stop()
        while self.to_save and self.to_save[0] <= self.num_timesteps:
            assert self.plan.models is not None
            key = self.plan.key
            self.plan.models.mkdir(parents=True, exist_ok=True)
            name = records.as_file_name(f"{key.algorithm}-{key.env}-{key.seed}-{self.to_save.pop(0)}.zip")
            self.model.save(self.plan.models / name)
        self.clock.start()


def _summary(returns: list[float]) -> dict[str, Any]:
    """
    Summarise an evaluation.

    :param returns: return of each episode
    :return: by column
    """
    return {
        "return": round(float(np.mean(returns)), 4),
        "return_std": round(float(np.std(returns)), 4),
        "episodes": len(returns),
    }


def learn(
    plan: RunPlan, spec: AlgorithmSpec, record: Callable[[dict[str, Any]], None], recovery: Recovery | None = None
) -> None:
    """
    Do the learning of a run.

    :param plan: the run
    :param spec: its algorithm
    :param record: called with the numbers of each evaluation, by column
    :param recovery: where to go on from after a failure; None to start over then
    """
    if spec.algorithm is None:
        returns = Evaluator(plan.key.env).play_random(plan.key.seed, RANDOM_EPISODES)
        record({"steps": 0, "simulator_calls": 0, "seconds": 0.0, "cpu_seconds": 0.0, **_summary(returns)})
        return
    env = make_vec_env(plan.key.env, n_envs=spec.n_envs, seed=plan.key.seed)
    model = None if recovery is None else recovery.resume(env)
    if model is None or recovery is None:
        model = spec.algorithm(env=env, seed=plan.key.seed, **spec.kwargs)
    clock = LearningClock(env)
    if recovery is not None:
        clock = LearningClock(env, recovery.replay(model.num_timesteps, plan.key.budget, record))
        record = recovery.recorder(record)
    callbacks: list[BaseCallback] = [EvaluationCallback(plan, record, clock)]
    if recovery is not None and spec.own:
        callbacks.append(recovery.callback(plan.eval_every))
    model.learn(plan.key.budget - model.num_timesteps, callback=callbacks, reset_num_timesteps=model.num_timesteps == 0)
    env.close()


def describe(plan: RunPlan, spec: AlgorithmSpec) -> dict[str, Any]:
    """
    What all rows of a run have in common, as seen by the process that does the run.

    :param plan: the run
    :param spec: its algorithm
    :return: by column
    """
    return {
        **plan.key._asdict(),
        **records.versions(),
        "n_envs": spec.n_envs,
        "threads": plan.threads,
        "git_commit": records.git_commit(),
        "eval_every": plan.eval_every,
        "machine": records.machine(),
    }


def complete_row(constants: Mapping[str, Any], numbers: Mapping[str, Any]) -> records.Row:
    """
    Make a row of the CSV file.

    :param constants: see :func:`describe`
    :param numbers: of an evaluation, by column
    :return: the row
    """
    return {column: str({**constants, **numbers}[column]) for column in records.COLUMNS}


def execute(plan: RunPlan, spec: AlgorithmSpec, file: Any, notify: Callable[[records.Row], None]) -> None:
    """
    Do a run, keep its rows in its own file as they come, move them to the main file at the end.

    :param plan: the run
    :param spec: its algorithm
    :param file: the run's own file, open for writing, held exclusively
    :param notify: called with every row
    """
    constants = describe(plan, spec)
    rows: list[records.Row] = []
    # Only now are the rows of an earlier, unfinished attempt given up.
    file.truncate(0)

    def record(numbers: dict[str, Any]) -> None:
        row = complete_row(constants, numbers)
        file.write(records.to_csv([row], header=not rows))
        file.flush()
        rows.append(row)
        notify(row)

    records.remember_settings(plan.output, plan.key.settings, spec.settings())
    learn(plan, spec, record)
    records.merge_run(plan.output, plan.key, rows, plan.replaced)
    records.partial_path(plan.output, plan.key).unlink()


def show_warnings_once() -> None:
    """Show each of MuJoCo's warnings once: by default every copy of a task repeats it, and a log file grows in this folder."""
    shown: set[str] = set()

    def show(text: str) -> None:
        if text not in shown:
            shown.add(text)
            print(f"MuJoCo warns: {text.strip()}", file=sys.stderr, flush=True)

    mujoco.set_mju_user_warning(show)


def prepare(plan: RunPlan) -> AlgorithmSpec:
    """
    Make a process ready for a run.

    :param plan: the run
    :return: its algorithm
    :raises RuntimeError: if the algorithm's settings here are not those that the run was planned with
    """
    show_warnings_once()
    torch.set_num_threads(plan.threads)
    spec = find_algorithm(plan.base, plan.n_envs, plan.overrides)
    if spec.settings_hash() != plan.key.settings:
        raise RuntimeError("the algorithm's settings in the code were changed after the benchmark was started; start it again")
    return spec


def child(plan: RunPlan, connection: Connection) -> None:
    """
    Do a run in a process of its own; ends the process.

    :param plan: the run
    :param connection: takes every row as a dictionary, and as a string why a run is left out or the traceback of a failure
    """
    try:
        spec = prepare(plan)
        with claimed(plan, spec.own) as file:
            execute(plan, spec, file, connection.send)
    except BusyError as error:
        connection.send(str(error))
        raise SystemExit(EXIT_BUSY) from None
    except Exception:
        try:
            connection.send(traceback.format_exc())
        except OSError:
            pass  # nobody is left to tell
        raise SystemExit(EXIT_FAILED) from None
