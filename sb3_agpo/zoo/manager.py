"""What the zoo's experiments do differently for AGPO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import SimpleLinearSchedule
from stable_baselines3.common.callbacks import BaseCallback

import sb3_agpo.zoo
from sb3_agpo.agpo import gates
from sb3_agpo.dynamics.mujoco import FiniteDifferences

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
    The zoo's experiments, with AGPO's hyperparameter file and arguments.

    Other algorithms are left as they are.

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

    def _preprocess_hyperparams(
        self, hyperparams: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[..., Any] | None, list[BaseCallback], Callable[..., Any] | None]:
        """Turn text into objects, as the zoo does for ``policy_kwargs``, ``learning_rate`` and others."""
        if self.algo == sb3_agpo.zoo.ALGORITHM_NAME:
            for name in ("gate", "finite_differences"):
                if isinstance(hyperparams.get(name), str):
                    hyperparams[name] = eval(hyperparams[name], dict(NAMES))
            if isinstance(hyperparams.get("critic_learning_rate"), str):
                hyperparams["critic_learning_rate"] = _schedule(hyperparams["critic_learning_rate"])
        return super()._preprocess_hyperparams(hyperparams)


def _schedule(text: str) -> SimpleLinearSchedule:
    """
    Read a learning rate that decreases linearly to zero.

    :param text: ``"lin_"`` and the initial value
    :return: the schedule
    :raises ValueError: for any other text
    """
    kind, _, value = text.partition("_")
    if kind != "lin":
        raise ValueError(f"`critic_learning_rate` must be a number or like 'lin_5e-4', got {text!r}")
    return SimpleLinearSchedule(value)
