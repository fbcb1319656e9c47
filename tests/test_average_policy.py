"""The averaged policy that acts deterministically."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch as th
from small_models import small_model

from sb3_agpo import AGPO


def test_average_follows_the_recursion() -> None:
    """After each policy update, the average moves by ``policy_tau`` of the way to the policy."""
    model = small_model("Pendulum-v1", policy_tau=0.25)
    expected = [weights.clone() for weights in model.actor.parameters()]
    update = model._update_average_policy

    def follow() -> None:
        for mean, weights in zip(expected, model.actor.parameters(), strict=True):
            mean += 0.25 * (weights.detach() - mean)
        update()

    model._update_average_policy = follow  # type: ignore[method-assign]
    model.learn(60)
    for mean, weights in zip(expected, model.policy.average_actor.parameters(), strict=True):
        assert th.allclose(mean, weights, atol=1e-6)


def test_default_averages_over_a_share_of_all_updates() -> None:
    """The coefficient is at most 0.01, then 20 over the number of policy updates."""
    model = small_model("Pendulum-v1")
    coefficients = []
    for n_updates in (1, 2_000, 4_000, 20_000):
        model._n_policy_updates = n_updates - 1
        with th.no_grad():
            for mean, weights in zip(model._average_parameters, model._actor_parameters, strict=True):
                mean.zero_()
                weights.fill_(1.0)
        model._update_average_policy()
        coefficients.append(model._average_parameters[0].flatten()[0].item())
    assert coefficients == pytest.approx([0.01, 0.01, 0.005, 0.001])


def test_average_acts_and_the_policy_explores() -> None:
    model = small_model("Pendulum-v1", policy_tau=0.25).learn(60)
    obs = np.zeros((1, 3), dtype=np.float32)
    with th.no_grad():
        average = model.policy.average_actor(th.as_tensor(obs), deterministic=True).numpy()
        own = model.actor(th.as_tensor(obs), deterministic=True).numpy()
    assert not np.allclose(average, own)
    assert np.allclose(model.predict(obs, deterministic=True)[0], model.policy.unscale_action(average))
    model.policy.average_actor.load_state_dict({k: 0 * v for k, v in model.actor.state_dict().items()})
    th.manual_seed(0)
    explored = model.predict(obs, deterministic=False)[0]
    th.manual_seed(0)
    with th.no_grad():
        sampled = model.actor(th.as_tensor(obs), deterministic=False).numpy()
    assert np.allclose(explored, model.policy.unscale_action(sampled))


def test_average_begins_with_weights_that_were_put_into_the_actor(tmp_path: Path) -> None:
    """As after cloning: they act at once, are saved, and learning goes on from them."""
    model, obs = small_model("Pendulum-v1", policy_tau=1e-6), np.ones((1, 3), dtype=np.float32)
    before = model.predict(obs, deterministic=True)[0]
    with th.no_grad():
        for weights in model.actor.parameters():
            weights += 0.3
        cloned = model.actor(th.as_tensor(obs), deterministic=True).numpy()
    wanted = model.policy.unscale_action(cloned)
    assert not np.allclose(before, wanted)
    assert np.allclose(model.predict(obs, deterministic=True)[0], wanted)
    model.save(tmp_path / "cloned")
    loaded = AGPO.load(tmp_path / "cloned")
    assert np.allclose(loaded.predict(obs, deterministic=True)[0], wanted)
    model.learn(60)
    assert np.allclose(model.predict(obs, deterministic=True)[0], wanted, atol=1e-4)


def test_without_averaging_the_policy_acts() -> None:
    model = small_model("Pendulum-v1", policy_tau=1.0).learn(60)
    for own, average in zip(model.actor.parameters(), model.policy.average_actor.parameters(), strict=True):
        assert th.equal(own, average)


@pytest.mark.parametrize("use_sde", [False, True])
def test_averaging_changes_nothing_in_training(use_sde: bool) -> None:
    """Neither its random numbers nor its weights."""
    models: list[AGPO] = [small_model("Pendulum-v1", policy_tau=tau, use_sde=use_sde, seed=0).learn(60) for tau in (0.1, 1.0)]
    for name in ("actor", "critic"):
        first, second = (getattr(model, name).parameters() for model in models)
        assert all(th.equal(a, b) for a, b in zip(first, second, strict=True))


def test_loading_the_actor_alone_begins_the_average_anew() -> None:
    """Weights of SAC or of a cloned policy: evaluations show them, not an average that was never one of them."""
    obs = np.ones((1, 3), dtype=np.float32)
    trained, other = small_model("Pendulum-v1", seed=1).learn(40), small_model("Pendulum-v1", seed=2).learn(40)
    weights = {k: v for k, v in trained.policy.state_dict().items() if not k.startswith("average_actor.")}
    other.policy.load_state_dict(weights, strict=False)
    with th.no_grad():
        expected = trained.actor(th.as_tensor(obs), deterministic=True).numpy()
    assert np.allclose(other.predict(obs, deterministic=True)[0], other.policy.unscale_action(expected))
    average = [weights.clone() for weights in trained._average_parameters]
    trained.policy.load_state_dict({k: v for k, v in weights.items() if k.startswith("critic")}, strict=False)
    trained.predict(obs, deterministic=True)
    assert all(map(th.equal, average, trained._average_parameters)), "critics have no part in it"


def test_a_loaded_model_that_was_not_trained_follows_its_actor(tmp_path: Path) -> None:
    small_model("Pendulum-v1", seed=1).save(tmp_path / "model")
    model = AGPO.load(tmp_path / "model")
    cloned = small_model("Pendulum-v1", seed=2).actor
    model.actor.load_state_dict(cloned.state_dict())
    obs = np.ones((1, 3), dtype=np.float32)
    with th.no_grad():
        expected = cloned(th.as_tensor(obs), deterministic=True).numpy()
    assert np.allclose(model.predict(obs, deterministic=True)[0], model.policy.unscale_action(expected))
