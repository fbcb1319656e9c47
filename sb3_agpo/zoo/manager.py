"""What the zoo's experiments do differently for AGPO."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import gymnasium as gym
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import SimpleLinearSchedule
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

import sb3_agpo.zoo
from sb3_agpo.agpo import gates
from sb3_agpo.dynamics.mujoco import FiniteDifferences
from sb3_agpo.vec_env import MujocoVecEnv, can_be_threaded

#: names that hyperparameters given as text may use
NAMES = {
    **{name: value for name, value in vars(gates).items() if isinstance(value, type) and issubclass(value, gates.Gate)},
    "FiniteDifferences": FiniteDifferences,
}


class FirstTrial(int):
    """Number 0 that counts as given: the zoo ignores a ``--trial-id`` that is false."""

    def __bool__(self) -> bool:
        return True


class AGPOExperimentManager(ExperimentManager):
    """
    The zoo's experiments, with AGPO's hyperparameter file and arguments, and its environments in threads.

    Several environments of a stock MuJoCo task are a :class:`~sb3_agpo.vec_env.MujocoVecEnv`, unless ``--vec-env`` is on
    the command line. Other algorithms are left as they are.

    :param arguments: see ``rl_zoo3.exp_manager.ExperimentManager``
    :param named: likewise
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.algo != sb3_agpo.zoo.ALGORITHM_NAME:
            return
        # The zoo looks into its own folder only; a file that the user put there has precedence.
        if not named.get("config") and not Path(self.config).is_file():
            self.config = str(sb3_agpo.zoo.HYPERPARAMETER_FILE)
        if self.trial_id == 0:
            self.trial_id = FirstTrial(0)

    def load_trial(self, storage: str, study_name: str, trial_id: int | None = None, convert: bool = True) -> dict[str, Any]:
        """
        Read what a trial of a search had, see ``rl_zoo3.exp_manager.ExperimentManager.load_trial``.

        :param storage: the study's storage
        :param study_name: its name
        :param trial_id: number of the trial; None for the best
        :param convert: whether to turn what was drawn into arguments
        :return: the arguments; where the search drew some of the replay buffer's, the file's others are there too
        """
        params = super().load_trial(storage, study_name, trial_id, convert)
        if self.algo == sb3_agpo.zoo.ALGORITHM_NAME and convert and "replay_buffer_kwargs" in params:
            own = self._hyperparameters_of_file().get("replay_buffer_kwargs") or {}
            own = eval(own) if isinstance(own, str) else own  # as the zoo does
            params["replay_buffer_kwargs"] = {**own, **params["replay_buffer_kwargs"]}
        return params

    def _hyperparameters_of_file(self) -> dict[str, Any]:
        """Hyperparameters without those of a trial."""
        trial_id, self.trial_id = self.trial_id, None
        try:
            with redirect_stdout(StringIO()):
                return self.read_hyperparameters()[0]
        finally:
            self.trial_id = trial_id

    def _preprocess_hyperparams(
        self, hyperparams: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[..., Any] | None, list[BaseCallback], Callable[..., Any] | None]:
        """Turn text into objects, as the zoo does for ``policy_kwargs``, ``learning_rate`` and others."""
        if self.algo == sb3_agpo.zoo.ALGORITHM_NAME:
            for name in ("gate", "finite_differences"):
                if isinstance(hyperparams.get(name), str):
                    hyperparams[name] = eval(hyperparams[name], dict(NAMES))
            for name in ("critic_learning_rate", "ent_coef_learning_rate"):
                if isinstance(hyperparams.get(name), str):
                    hyperparams[name] = _schedule(name, hyperparams[name])
        return super()._preprocess_hyperparams(hyperparams)

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """
        Make environments, see ``rl_zoo3.exp_manager.ExperimentManager.create_envs``.

        :param n_envs: their number
        :param eval_env: whether they are for evaluation
        :param no_log: whether Monitor writes no files
        :return: the environments
        """
        chosen = self.vec_env_class
        # By the number of environments to train with: SB3 warns where those to evaluate with are of another class
        if self.n_envs > 1 and self._can_be_threaded(eval_env):
            self.vec_env_class = MujocoVecEnv  # type: ignore[assignment]
        try:
            return super().create_envs(n_envs, eval_env, no_log)
        finally:
            self.vec_env_class = chosen

    def _can_be_threaded(self, eval_env: bool) -> bool:
        """Whether nobody asked for another class and the environments can be stepped in threads."""
        # argparse takes abbreviations
        asked = self.vec_env_class is not DummyVecEnv or any(argument.startswith("--vec") for argument in sys.argv[1:])
        if self.algo != sb3_agpo.zoo.ALGORITHM_NAME or asked:
            return False
        if self.env_wrapper is not None or self.monitor_kwargs.get("info_keywords"):
            return False
        options = self.eval_env_kwargs if eval_env else self.env_kwargs
        with closing(gym.make(self.env_name.gym_id, **options)) as env:
            return can_be_threaded(env)


def _schedule(name: str, text: str) -> SimpleLinearSchedule:
    """
    Read a learning rate that decreases linearly to zero.

    :param name: the hyperparameter's
    :param text: ``"lin_"`` and the initial value
    :return: the schedule
    :raises ValueError: for any other text
    """
    kind, _, value = text.partition("_")
    if kind != "lin":
        raise ValueError(f"`{name}` must be a number or like 'lin_5e-4', got {text!r}")
    return SimpleLinearSchedule(value)
