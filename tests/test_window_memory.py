"""The memory of the newest windows: what stays, what gives way, and what goes into a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch as th
from gymnasium import spaces
from small_models import RandomEnv, parameters_equal, small_model
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_agpo import AGPO
from sb3_agpo.agpo import agpo
from sb3_agpo.agpo.rollout_buffer import RolloutWindows
from sb3_agpo.agpo.updates import WindowUpdate, temporal_difference_loss, window_matching_loss
from sb3_agpo.agpo.window_memory import WindowMemory, WindowSamples
from sb3_agpo.tracking.callbacks import ResumableCheckpointCallback


def numbered(first: int, n: int) -> WindowSamples:
    """Samples that carry their number in every field."""
    numbers = th.arange(float(first), float(first + n)).unsqueeze(-1)
    return WindowSamples(numbers.expand(n, 3), numbers.expand(n, 2), numbers.expand(n, 2))


def kept(memory: WindowMemory) -> list[float]:
    return sorted(memory.samples.targets[:, 0].tolist())


def test_oldest_samples_give_way() -> None:
    memory = WindowMemory(10)
    for first in (0, 7):
        memory.remember(numbered(first, 7))
    assert len(memory) == 10
    assert kept(memory) == list(range(4, 14))
    memory.remember(numbered(100, 25))  # more at once than there is room for
    assert kept(memory) == list(range(115, 125))


def test_fields_of_a_sample_stay_together() -> None:
    memory = WindowMemory(10)
    memory.remember(numbered(0, 13))
    samples = memory.draw(50)
    assert [field.shape for field in samples] == [(50, 3), (50, 2), (50, 2)]
    assert th.equal(samples.observations[:, 0], samples.targets[:, 0])
    assert th.equal(samples.actions, samples.targets)
    assert set(samples.targets[:, 0].tolist()) <= set(range(3, 13))


def test_draws_come_from_all_samples_and_no_empty_place() -> None:
    memory = WindowMemory(100)
    memory.remember(numbered(1, 5))
    assert set(memory.draw(200).targets[:, 0].tolist()) == {1.0, 2.0, 3.0, 4.0, 5.0}


@pytest.mark.parametrize("n", [0, 5, 10, 13])
def test_goes_into_another_memory(n: int) -> None:
    """Both go on alike: the next samples take the same places."""
    first, second = WindowMemory(10), WindowMemory(10)
    second.remember(numbered(50, 4))  # which is replaced
    for number in range(n):
        first.remember(numbered(number, 1))
    second.set_state(first.get_state())
    assert len(first) == len(second) == min(n, 10)
    for memory in (first, second):
        memory.remember(numbered(90, 3))
    assert all(th.equal(*fields) for fields in zip(first.samples, second.samples, strict=True))


def test_nothing_to_draw_from() -> None:
    memory = WindowMemory(10)
    with pytest.raises(ValueError, match="remember"):
        memory.draw(1)
    memory.remember(numbered(0, 3))
    memory.forget()
    with pytest.raises(ValueError, match="remember"):
        memory.draw(1)


# ---------------------------------------------------------------------- in training


def pendulum(n_envs: int = 1) -> VecEnv:
    return make_vec_env("InvertedPendulum-v5", n_envs, seed=0)


def trained(**options: Any) -> AGPO:
    return small_model(pendulum(), **{"critic_grad_coef": 0.0, "critic_window_coef": 1.0, **options}).learn(120)


def test_loss_of_the_critics() -> None:
    """A step of plain gradient descent goes along the gradient of (13), in which L_TD is a constant factor of M."""
    model = trained()
    coefficient = model.critic_window_coef = 0.7
    parameters = list(model.critic.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    model.critic.optimizer = th.optim.SGD(parameters, lr=1.0)
    (batch,) = model._sample_for_critic(1, 16)
    model._n_updates = 8  # a multiple of the interval
    difference = temporal_difference_loss(model.policy, batch)
    th.manual_seed(5)
    matching = window_matching_loss(model.policy, model.window_memory.draw(agpo.WINDOW_BATCH_SIZE))
    assert matching > 0.0
    expected = th.autograd.grad(difference + coefficient * difference.item() * matching, parameters)
    th.manual_seed(5)
    model._update_critic(batch)
    for parameter, old, gradient in zip(parameters, before, expected, strict=True):
        assert th.allclose(parameter, old - gradient, rtol=1e-4, atol=1e-6)


def test_weight_means_the_same_for_larger_rewards() -> None:
    """The loss of scaled critics that see scaled returns and gradients is the loss times the square of the scale."""
    model = trained()
    (batch,) = model._sample_for_critic(1, 16)
    samples = model.window_memory.draw(32)
    losses = []
    for factor in (1.0, 10.0):
        with th.no_grad():
            for networks in (model.critic, model.critic_target):
                for parameter in list(networks.q_networks)[-1].parameters():  # of the last layer
                    parameter.mul_(factor)
        difference = temporal_difference_loss(model.policy, batch._replace(rewards=factor * batch.rewards))
        matching = window_matching_loss(model.policy, samples._replace(targets=factor * samples.targets))
        losses.append((difference * matching).item())
    assert losses[1] == pytest.approx(100.0 * losses[0], rel=1e-3)


def test_in_every_fourth_update(monkeypatch: pytest.MonkeyPatch) -> None:
    at: list[int] = []
    model = small_model(pendulum(), critic_window_coef=1.0)
    draw = model.window_memory.draw
    monkeypatch.setattr(model.window_memory, "draw", lambda n: (at.append(model._n_updates), draw(n))[1])
    model.learn(120)
    assert len(at) > 15
    assert at == list(range(at[0], model._n_updates, 4)) and at[0] % 4 == 0


def test_memory_has_the_newest_windows() -> None:
    """As the networks see them, with the adaptive gradient: older than that, and gradients are those of another policy."""
    model = small_model(pendulum(), critic_window_coef=1.0, rollout_epochs=1)
    seen: list[WindowUpdate] = []
    inputs: list[RolloutWindows] = []
    update = model._update_policy_from_windows

    def watch(windows: RolloutWindows) -> WindowUpdate:
        inputs.append(windows)
        seen.append(update(windows))
        return seen[-1]

    model._update_policy_from_windows = watch  # type: ignore[method-assign]
    model.learn(120)
    samples = model.window_memory.samples
    kept = [(windows.mask > 0) & (result.gradient.weight > 0.0) for windows, result in zip(inputs, seen, strict=True)]
    assert 64 < len(samples.targets) == sum(int(mask.sum()) for mask in kept)
    assert not all(mask.all() for mask in kept)  # episodes ended: the simulator has nothing to say about some steps
    for field, values in (("observations", inputs), ("actions", inputs)):
        expected = th.cat([getattr(windows, field)[mask] for windows, mask in zip(values, kept, strict=True)])
        assert th.equal(getattr(samples, field), expected)
    assert th.equal(samples.targets, th.cat([result.gradient.g_a[mask] for result, mask in zip(seen, kept, strict=True)]))


def test_it_changes_training_and_is_logged() -> None:
    assert not parameters_equal(trained(), trained(critic_window_coef=0.0))
    model = small_model(pendulum(), critic_window_coef=1.0)
    seen: list[float] = []
    record = model._record
    model._record = lambda name, value: (  # type: ignore[method-assign]
        seen.append(value) if name == "window_matching_loss" else None,
        record(name, value),
    )[1]
    model.learn(120)
    assert len(seen) > 10 and all(0.0 < loss < 100.0 for loss in seen)


@pytest.mark.parametrize("options", [{"gradient_mode": "q"}, {"rollout_epochs": 0}])
def test_it_changes_nothing_where_there_is_nothing_to_learn_from(options: dict[str, Any]) -> None:
    """The critic's own gradient of a while ago, for example, is nothing to learn from."""
    with_it, without = (trained(critic_window_coef=coefficient, **options) for coefficient in (1.0, 0.0))
    assert len(with_it.window_memory) == 0
    assert parameters_equal(with_it, without)


def test_spaces_without_derivatives() -> None:
    env = RandomEnv(spaces.Dict({"x": spaces.Box(-1.0, 1.0, (2,))}))
    model = small_model(env, policy="MultiInputPolicy", critic_window_coef=1.0).learn(60)
    assert len(model.window_memory) == 0 and model._n_updates > 0


def test_nonfinite_gradients_are_not_remembered() -> None:
    model = small_model(pendulum(), critic_window_coef=1.0, critic_grad_coef=0.0)
    with th.no_grad():
        model.critic.q_networks[0].weight.fill_(th.inf)  # type: ignore[union-attr, operator]
    model.learn(80)
    assert len(model.window_memory) == 0


def test_observations_in_double_precision() -> None:
    env = VecNormalize(pendulum(), norm_obs=False)
    model = small_model(env, critic_window_coef=1.0).learn(100)
    assert len(model.window_memory) > 0


@pytest.mark.parametrize("normalization", ["layer", "batch"])
def test_resumed_run_equals_uninterrupted_one(normalization: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "critic_window_coef": 1.0,
        "critic_grad_coef": 0.0,
        "policy_kwargs": {"normalization": normalization},
    }
    whole = small_model(pendulum(2), **options).learn(240)
    small_model(pendulum(2), **options).learn(140, callback=ResumableCheckpointCallback(tmp_path, 120))
    resumed = AGPO.resume(tmp_path, pendulum(2))
    assert len(resumed.window_memory) > 0
    resumed.learn(240 - resumed.num_timesteps, reset_num_timesteps=False)
    assert parameters_equal(whole, resumed)
    first, second = whole.window_memory.samples, resumed.window_memory.samples
    assert all(th.equal(*fields) for fields in zip(first, second, strict=True))


def test_saved_and_loaded(tmp_path: Path) -> None:
    """A file has no memory of windows; new ones come soon."""
    model = trained(critic_window_coef=0.5)
    model.save(tmp_path / "model")
    loaded = AGPO.load(tmp_path / "model", env=pendulum())
    assert loaded.critic_window_coef == 0.5 and len(loaded.window_memory) == 0
    loaded.learn(60)
    assert len(loaded.window_memory) > 0
