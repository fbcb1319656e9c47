"""Saved models as the fidelity benchmark sees them: AGPO and SAC alike, nothing trained, all noise passed in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import gymnasium as gym
import numpy as np
import torch as th
from numpy.typing import NDArray
from stable_baselines3 import SAC
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.sac.policies import Actor, SACPolicy

from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.agpo.gradient_correction import GradientCorrection
from sb3_agpo.agpo.policies import AGPOPolicy
from sb3_agpo.agpo.squashed_gaussian import squashed_sample
from sb3_agpo.agpo.updates import gaussian_parameters

FloatArray = NDArray[np.float32]


class CriticEnsemble:
    """
    Critics of SB3 with the one method of AGPO's that gradients need.

    :param critic: the critics
    """

    def __init__(self, critic: ContinuousCritic) -> None:
        self._critic = critic

    def q_values(self, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        Values of all critics; gradients pass through a features extractor that the actor shares, too.

        :param obs: observations, shape ``(n, nobs)``
        :param actions: actions in [-1, 1], shape ``(n, nu)``
        :return: shape ``(n_critics, n)``
        """
        features = self._critic.extract_features(obs, self._critic.features_extractor)
        inputs = th.cat([features, actions], dim=1)
        return th.stack([network(inputs).squeeze(-1) for network in self._critic.q_networks])


class SACNetworks(NamedTuple):
    """SAC's networks under the names that AGPO's have in its policy."""

    actor: Actor
    critic: CriticEnsemble
    critic_target: CriticEnsemble


@dataclass(frozen=True)
class SavedModel:
    """
    A trained model whose gradients are measured.

    :param algorithm: ``AGPO`` or ``SAC``
    :param file: name of its file
    :param steps: environment steps that it was trained for
    :param policy: actor, online critics and target critics
    :param gamma: discount factor
    :param ent_coef: entropy temperature alpha
    :param low: lowest actions of the environment, shape ``(nu,)``
    :param high: highest actions, shape ``(nu,)``
    :param correction: of the critic's gradient in replayed policy updates, None where there is none
    """

    algorithm: str
    file: str
    steps: int
    policy: AGPOPolicy
    gamma: float
    ent_coef: th.Tensor
    low: FloatArray
    high: FloatArray
    correction: GradientCorrection | None = None

    @classmethod
    def of(cls, model: AGPO | SAC, file: str) -> SavedModel:
        """
        Take a model as it stands; it must not be trained while this object is in use.

        :param model: the model
        :param file: name of its file
        :return: its networks and constants
        """
        model.policy.set_training_mode(False)
        for critic in (model.critic, model.critic_target):
            critic.requires_grad_(False)
        policy = model.policy
        if not isinstance(policy, AGPOPolicy):
            assert isinstance(model.critic, ContinuousCritic) and isinstance(model.critic_target, ContinuousCritic)
            networks = SACNetworks(model.actor, CriticEnsemble(model.critic), CriticEnsemble(model.critic_target))
            policy = cast(AGPOPolicy, networks)
        learned = model.log_ent_coef
        ent_coef = learned.detach().exp() if learned is not None else model.ent_coef_tensor
        space = cast(gym.spaces.Box, model.action_space)
        name = "AGPO" if isinstance(model, AGPO) else "SAC"
        low, high = (bound.astype(np.float32) for bound in (space.low, space.high))
        correction = model.gradient_correction if isinstance(model, AGPO) and model._corrects_replay() else None
        return cls(name, file, model.num_timesteps, policy, model.gamma, ent_coef, low, high, correction)

    def act(self, observations: NDArray[Any], noise: NDArray[Any]) -> tuple[FloatArray, NDArray[np.float64]]:
        """
        The stochastic policy's actions.

        :param observations: shape ``(n, nobs)``
        :param noise: standard normal, shape ``(n, nu)``
        :return: actions in [-1, 1] ``(n, nu)``, their log-densities ``(n,)``
        """
        with th.no_grad():
            actions, log_prob = self._sample(_tensor(observations), _tensor(noise))
        return actions.numpy(), log_prob.double().numpy()

    def values(self, observations: NDArray[Any], noise: NDArray[Any]) -> NDArray[np.float64]:
        """
        The values that end a window, V(o) = min Q(o, a) - alpha log pi(a | o) of the target critics.

        :param observations: shape ``(n, nobs)``
        :param noise: standard normal, shape ``(n, nu)``
        :return: shape ``(n,)``
        """
        with th.no_grad():
            tensor = _tensor(observations)
            actions, log_prob = self._sample(tensor, _tensor(noise))
            values = self.policy.critic_target.q_values(tensor, actions).min(0).values - self.ent_coef * log_prob
        return values.double().numpy()

    def _sample(self, observations: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return squashed_sample(*gaussian_parameters(self.policy.actor, observations), noise)

    def unscale(self, actions: FloatArray) -> FloatArray:
        """
        Actions in the units of the environment, as SB3 gives them to it.

        :param actions: in [-1, 1], shape ``(n, nu)``
        :return: the same shape
        """
        return self.low + (0.5 * (actions + 1.0) * (self.high - self.low))


def _tensor(values: NDArray[Any]) -> th.Tensor:
    return th.as_tensor(np.asarray(values, dtype=np.float32))


def load_model(path: Path, env: gym.Env[Any, Any]) -> AGPO | SAC:
    """
    Load a model. The file is a pickle: load only files that you trust.

    :param path: file that ``save`` of AGPO or SAC wrote
    :param env: the task it was trained on
    :return: the model, without an environment
    :raises ValueError: if there is no such file, if it holds another algorithm's model, or one of another task
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give files that `AGPO.save` or `SAC.save` wrote")
    try:
        data, _, _ = load_from_zip_file(path, device="cpu")
    # Whatever a file that is no model makes of the unpickling
    except Exception as error:
        raise ValueError(f"{path} is not a saved model ({error}); give files that `AGPO.save` wrote") from error
    policy_class = (data or {}).get("policy_class")
    if not (isinstance(policy_class, type) and issubclass(policy_class, SACPolicy)):
        raise ValueError(f"{path} has a policy of the class {policy_class}; give a model of AGPO or SAC")
    for name in ("observation_space", "action_space"):
        saved, wanted = (data or {})[name], getattr(env, name)
        if saved != wanted:
            raise ValueError(f"{path} has the {name} {saved}, the task {wanted}; give the task it was trained on")
    algorithm = AGPO if issubclass(policy_class, AGPOPolicy) else SAC
    # A replay buffer of the size it was trained with would only take memory
    return algorithm.load(path, device="cpu", custom_objects={"buffer_size": 1})
