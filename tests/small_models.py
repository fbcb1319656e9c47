"""Small models and environments that several test files use."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces

from sb3_agpo import AGPO

#: settings under which a model learns something measurable within a second
SMALL: dict[str, Any] = {
    "buffer_size": 500,
    "learning_starts": 20,
    "train_freq": 1,
    "gradient_steps": 1,
    "batch_size": 16,
    "rollout_size": 16,
    "critic_grad_coef": 1.0,
    "critic_grad_batch_size": 8,
    "seed": 0,
}


def small_model(env: Any, policy: Any = "MlpPolicy", policy_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> AGPO:
    """
    A model with small networks and buffers.

    :param env: environment or its id
    :param policy: policy class or alias
    :param policy_kwargs: of the policy; 16 hidden units unless it says otherwise
    :param kwargs: other arguments than those of ``SMALL``
    :return: the model
    """
    return AGPO(policy, env, policy_kwargs={"net_arch": [16], **(policy_kwargs or {})}, **{**SMALL, **kwargs})


class RandomEnv(gym.Env[Any, Any]):
    """Random observations of a space, random rewards, episodes of ten steps that end by a time limit."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any] | None = None) -> None:
        self.observation_space = observation_space
        self.action_space = action_space or spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.steps += 1
        return self.observation_space.sample(), float(self.np_random.normal()), False, self.steps >= 10, {}


def parameters_equal(model: AGPO, other: AGPO) -> bool:
    """
    Compare all networks and optimisers bit for bit.

    :param model: a model
    :param other: another
    :return: whether they are equal
    """
    return all(
        th.equal(value, others) if isinstance(value, th.Tensor) else value == others
        for value, others in zip(flat_state(model), flat_state(other), strict=True)
    )


def flat_state(model: AGPO) -> list[Any]:
    """
    All numbers that learning changes.

    :param model: a model
    :return: tensors and plain values of its networks, optimisers and temperature
    """
    values: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            for key in node:
                visit(node[key])
        elif isinstance(node, (list, tuple)):
            for item in node:
                visit(item)
        else:
            values.append(node)

    visit(model.get_parameters())
    visit([getattr(model, name) for name in model._get_torch_save_params()[1]])
    return values
