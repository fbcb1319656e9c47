"""Batched critics and SB3's separate ones: the same numbers under other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from torch import nn

from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.agpo.critic_conversion import join_critics, separate_critics
from sb3_agpo.benchmark.algorithms import LayerNormSACPolicy

ENV = "Pendulum-v1"


def make_pair(layer_norm: bool, **policy_kwargs: Any) -> tuple[AGPO, SAC]:
    """Both algorithms with networks of one architecture and different weights."""
    common = {"net_arch": [7, 5], "activation_fn": nn.SiLU, **policy_kwargs}
    normalization = "layer" if layer_norm else "none"
    ours = AGPO("MlpPolicy", ENV, policy_kwargs={**common, "normalization": normalization}, seed=0, device="cpu")
    policy = LayerNormSACPolicy if layer_norm else "MlpPolicy"
    return ours, SAC(policy, ENV, policy_kwargs=common, seed=1, device="cpu")


def assert_same_values(ours: AGPO, reference: SAC) -> None:
    """Compare the functions, not the weights."""
    env = gym.make(ENV)
    assert env.observation_space.shape is not None
    random = np.random.default_rng(0)
    obs = th.as_tensor(random.normal(size=(16, *env.observation_space.shape)), dtype=th.float32)
    actions = th.as_tensor(random.uniform(-1, 1, (16, 1)), dtype=th.float32)
    for name in ("critic", "critic_target"):
        values = [th.cat(getattr(model, name)(obs, actions), dim=1) for model in (ours, reference)]
        assert values[0].shape == (16, ours.critic.n_critics)
        th.testing.assert_close(values[0], values[1])
    predicted = [model.predict(obs.numpy(), deterministic=True)[0] for model in (ours, reference)]
    np.testing.assert_array_equal(*predicted)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("policy_kwargs", [{}, {"n_critics": 3}, {"net_arch": {"pi": [4], "qf": [1, 6]}}])
class TestConversion:
    """Functions are equal on either side, and there and back is where it began."""

    def test_to_separate(self, layer_norm: bool, policy_kwargs: dict[str, Any]) -> None:
        ours, reference = make_pair(layer_norm, **policy_kwargs)
        reference.policy.load_state_dict(separate_critics(ours.policy))
        assert_same_values(ours, reference)

    def test_to_batched(self, layer_norm: bool, policy_kwargs: dict[str, Any]) -> None:
        ours, reference = make_pair(layer_norm, **policy_kwargs)
        state = reference.policy.state_dict()
        ours.policy.load_state_dict(join_critics(ours.policy, state))
        assert_same_values(ours, reference)
        again = separate_critics(ours.policy)
        assert again.keys() == state.keys() and all(th.equal(again[name], state[name]) for name in state)

    def test_critics_alone(self, layer_norm: bool, policy_kwargs: dict[str, Any]) -> None:
        ours, reference = make_pair(layer_norm, **policy_kwargs)
        before = {name: value.clone() for name, value in ours.critic.state_dict().items()}
        reference.critic.load_state_dict(separate_critics(ours.critic))
        joined = join_critics(ours.critic, reference.critic.state_dict())
        assert joined.keys() == before.keys() and all(th.equal(joined[name], before[name]) for name in before)


def test_a_saved_agent_of_sac(tmp_path: Path) -> None:
    """AGPO goes on from a file of SAC's, with the same critics, and the other way round."""
    ours, reference = make_pair(layer_norm=False)
    reference.learning_starts = 10
    reference.learn(20).save(tmp_path / "sac")
    ours.policy.load_state_dict(join_critics(ours.policy, SAC.load(tmp_path / "sac").policy.state_dict()))
    assert_same_values(ours, reference)
    ours.learning_starts = 10
    before = [parameter.clone() for parameter in ours.critic.parameters()]
    ours.learn(20).save(tmp_path / "agpo")
    assert all(not th.equal(*pair) for pair in zip(before, ours.critic.parameters(), strict=True))
    reference.policy.load_state_dict(separate_critics(AGPO.load(tmp_path / "agpo").policy))
    assert_same_values(ours, reference)


def test_refusals() -> None:
    """Weights of another number of critics or of layers are not loaded in part."""
    ours, two = make_pair(layer_norm=False)
    three = make_pair(layer_norm=False, n_critics=3)[1]
    with pytest.raises(ValueError, match=r"'critic\.qf2\.0\.weight'.*no place"):
        join_critics(ours.policy, three.policy.state_dict())
    many = make_pair(layer_norm=False, n_critics=3)[0]
    with pytest.raises(ValueError, match=r"no 'critic\.qf2\.0\.weight'"):
        join_critics(many.policy, two.policy.state_dict())
    deep = make_pair(layer_norm=False, net_arch=[7, 5, 3])[1]
    with pytest.raises(ValueError, match=r"'critic\.qf0\.6\.weight'.*no place"):
        join_critics(ours.policy, deep.policy.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.policy.load_state_dict(join_critics(ours.policy, make_pair(False, net_arch=[7, 4])[1].policy.state_dict()))


def test_batch_normalisation_cannot_be_converted() -> None:
    policy_kwargs = {"net_arch": [7, 5], "normalization": "batch"}
    ours = AGPO("MlpPolicy", ENV, policy_kwargs=policy_kwargs, seed=0, device="cpu")
    with pytest.raises(ValueError, match="no critics with batch normalisation"):
        separate_critics(ours.policy)
    with pytest.raises(ValueError, match="no critics with batch normalisation"):
        join_critics(ours.policy, {})
