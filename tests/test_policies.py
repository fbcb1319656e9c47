"""Policies: the batched critics against separate networks, saving, observation spaces, optimisers."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.sac.policies import SACPolicy
from torch import nn

from sb3_agpo import AGPO
from sb3_agpo.agpo.policies import (
    BATCH_NORM_MOMENTUM,
    NORMALIZATIONS,
    Actor,
    AGPOPolicy,
    CnnPolicy,
    EnsembleBatchNorm,
    EnsembleCritic,
    EnsembleLayerNorm,
    EnsembleLinear,
    MlpPolicy,
    MultiInputPolicy,
)

NOBS, NU = 5, 2
OBSERVATIONS = spaces.Box(-1.0, 1.0, (NOBS,))
ACTIONS = spaces.Box(-1.0, 1.0, (NU,))
IMAGES = spaces.Box(0, 255, (3, 40, 40), np.uint8)
SMALL: dict[str, Any] = {"net_arch": [8, 6]}


@pytest.fixture(autouse=True)
def _seed() -> None:
    th.manual_seed(0)


def schedule(progress_remaining: float) -> float:
    """A constant learning rate."""
    return 1e-2


def make_policy(**kwargs: Any) -> AGPOPolicy:
    """A small policy for vectors; its weights are random but for normalisation, which gets some too."""
    policy = MlpPolicy(OBSERVATIONS, ACTIONS, schedule, **{**SMALL, **kwargs})
    for module in policy.modules():
        if isinstance(module, EnsembleLayerNorm | EnsembleBatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        if isinstance(module, EnsembleBatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return policy


class Extractor(BaseFeaturesExtractor):
    """A features extractor that can learn."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 4)
        self.layer = nn.Linear(NOBS, 4)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layer(observations)


def separate_networks(critic: EnsembleCritic) -> list[nn.Sequential]:
    """Each critic as a network of PyTorch's own layers with the same weights."""
    networks = []
    for i in range(critic.n_critics):
        layers: list[nn.Module] = []
        for module in critic.q_networks:
            if isinstance(module, EnsembleLinear):
                _, width_in, width_out = module.weight.shape
                layer = nn.Linear(width_in, width_out)
                layer.weight.data, layer.bias.data = module.weight[i].detach().T.clone(), module.bias[i, 0].detach().clone()
            elif isinstance(module, EnsembleLayerNorm):
                layer = nn.LayerNorm(module.features)  # type: ignore[assignment]
                layer.weight.data, layer.bias.data = module.weight[i, 0].detach().clone(), module.bias[i, 0].detach().clone()
            elif isinstance(module, EnsembleBatchNorm):
                layer = nn.BatchNorm1d(module.weight.shape[-1], eps=module.epsilon)  # type: ignore[assignment]
                for name in ("weight", "bias", "running_mean", "running_var"):
                    getattr(layer, name).data.copy_(getattr(module, name)[i, 0])
            else:
                layer = type(module)()  # type: ignore[assignment]
            layers.append(layer)
        networks.append(nn.Sequential(*layers).eval())
    return networks


def batch(n: int = 7) -> tuple[th.Tensor, th.Tensor]:
    """Observations and actions."""
    return th.randn(n, NOBS), th.rand(n, NU) * 2.0 - 1.0


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("activation_fn", [nn.SiLU, nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("n_critics,net_arch", [(1, [8]), (2, [8, 6]), (5, [8, 6, 4]), (2, [])])
def test_ensemble_equals_separate_networks(
    normalization: str, activation_fn: type[nn.Module], n_critics: int, net_arch: list[int]
) -> None:
    critic = make_policy(
        normalization=normalization, activation_fn=activation_fn, n_critics=n_critics, net_arch={"pi": [4], "qf": net_arch}
    ).critic
    kinds = {type(module) for module in critic.q_networks}
    assert (EnsembleLayerNorm in kinds) == (normalization == "layer" and bool(net_arch))
    assert (EnsembleBatchNorm in kinds) == (normalization == "batch")
    obs, actions = batch()
    expected = th.stack([network(th.cat([obs, actions], 1))[:, 0] for network in separate_networks(critic)])
    values = critic.q_values(obs, actions)
    assert values.shape == (n_critics, 7)
    th.testing.assert_close(values, expected)
    outputs = critic(obs, actions)
    assert len(outputs) == n_critics and all(output.shape == (7, 1) for output in outputs)
    th.testing.assert_close(th.cat(outputs, 1).T, expected)
    th.testing.assert_close(critic.q1_forward(obs, actions), expected[0, :, None])


def test_ensemble_without_layer_norm_equals_sb3s_critic() -> None:
    critic = make_policy(normalization="none", activation_fn=nn.ReLU).critic
    reference = ContinuousCritic(OBSERVATIONS, ACTIONS, [8, 6], FlattenExtractor(OBSERVATIONS), NOBS)
    for theirs, ours in zip(reference.q_networks, separate_networks(critic), strict=True):
        theirs.load_state_dict(ours.state_dict())
    obs, actions = batch()
    for theirs, ours in zip(reference(obs, actions), critic(obs, actions), strict=True):
        th.testing.assert_close(ours, theirs)
    th.testing.assert_close(critic.q1_forward(obs, actions), reference.q1_forward(obs, actions))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_critics_have_the_gradients_of_separate_networks(normalization: str) -> None:
    critic = make_policy(normalization=normalization).critic
    obs, actions = batch()
    weights = th.randn(2, 7)
    (critic.q_values(obs, actions) * weights).sum().backward()
    for i, network in enumerate(separate_networks(critic)):
        (network(th.cat([obs, actions], 1))[:, 0] * weights[i]).sum().backward()
        layers = [layer for layer in network if list(layer.parameters())]
        modules = [module for module in critic.q_networks if list(module.parameters())]
        for module, layer in zip(modules, layers, strict=True):
            ours, theirs = module.get_parameter("weight").grad, layer.get_parameter("weight").grad
            assert ours is not None and theirs is not None
            th.testing.assert_close(ours[i].squeeze(0), theirs.T if isinstance(module, EnsembleLinear) else theirs)
            ours = module.get_parameter("bias").grad
            assert ours is not None
            th.testing.assert_close(ours[i, 0], layer.get_parameter("bias").grad)


@pytest.mark.parametrize("n", [1, 7])
def test_joint_values_are_normalised_by_both_batches(n: int) -> None:
    """Equal to PyTorch's own batch normalisation in training mode, gradients of weights included."""
    critic = make_policy().critic
    (obs, actions), (next_obs, next_actions), weights = batch(n), batch(n), th.randn(2, n)
    values, next_values = critic.joint_q_values(obs, actions, next_obs, next_actions)
    assert values.shape == next_values.shape == (2, n) and not next_values.requires_grad
    (values * weights).sum().backward()
    modules = [module for module in critic.q_networks if list(module.parameters())]
    for i, network in enumerate(separate_networks(critic)):
        network.train()
        inputs = th.cat([th.cat([obs, next_obs]), th.cat([actions, next_actions])], 1)
        expected = network(inputs)[:, 0]
        th.testing.assert_close(th.cat([values[i], next_values[i]]), expected)
        (expected[:n] * weights[i]).sum().backward()
        layers = [layer for layer in network if list(layer.parameters())]
        for module, layer in zip(modules, layers, strict=True):
            ours, theirs = module.get_parameter("bias").grad, layer.get_parameter("bias").grad
            assert ours is not None
            th.testing.assert_close(ours[i, 0], theirs, atol=1e-4, rtol=1e-4)


def test_statistics_move_only_when_they_are_told_to() -> None:
    critic = make_policy(normalization="batch").critic
    inputs = (*batch(), *batch())
    before = {name: value.clone() for name, value in critic.named_buffers()}
    values = critic.q_values(*inputs[:2])
    critic.joint_q_values(*inputs)
    assert all(th.equal(value, before[name]) for name, value in critic.named_buffers())
    assert th.equal(critic.q_values(*inputs[:2]), values)  # by running statistics again
    critic.update_statistics()
    mean, variance = (critic.q_networks[0].get_buffer(name) for name in ("running_mean", "running_var"))
    seen = th.cat([th.cat(inputs[0::2]), th.cat(inputs[1::2])], 1)  # (2 * batch, nobs + nu)
    expected = before["q_networks.0.running_mean"].lerp(seen.mean(0), BATCH_NORM_MOMENTUM)
    th.testing.assert_close(mean, expected)
    expected = before["q_networks.0.running_var"].lerp(seen.var(0), BATCH_NORM_MOMENTUM)
    th.testing.assert_close(variance, expected)
    moved = {name: value.clone() for name, value in critic.named_buffers()}
    critic.update_statistics()  # a batch counts once
    assert all(th.equal(value, moved[name]) for name, value in critic.named_buffers())


@pytest.mark.parametrize("normalization,has_targets", [("batch", False), ("layer", True), ("none", True)])
def test_critics_normalised_by_batches_are_their_own_targets(normalization: str, has_targets: bool) -> None:
    policy = make_policy(normalization=normalization)
    assert (policy.critic_target is not policy.critic) == has_targets
    copy = make_policy(normalization=normalization)
    copy.load_state_dict(policy.state_dict())
    inputs = batch()
    assert th.equal(copy.critic.q_values(*inputs), policy.critic.q_values(*inputs))


def test_unknown_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match="`normalization` must be one of 'layer', 'batch', 'none', got 'group'"):
        make_policy(normalization="group")


def test_critics_start_different_and_targets_equal() -> None:
    policy = MlpPolicy(OBSERVATIONS, ACTIONS, schedule, **SMALL, n_critics=3, normalization="layer")
    values = policy.critic.q_values(*(inputs := batch()))
    assert not th.allclose(values[0], values[1]) and not th.allclose(values[1], values[2])
    assert th.equal(policy.critic_target.q_values(*inputs), values)
    assert not policy.critic_target.training


def test_layers_start_as_pytorch_starts_them() -> None:
    th.manual_seed(0)
    ensemble = EnsembleLinear(3, 4, 5)
    th.manual_seed(0)
    layers = [nn.Linear(4, 5) for _ in range(3)]
    assert all(th.equal(ensemble.weight[i].T, layer.weight) for i, layer in enumerate(layers))
    assert all(th.equal(ensemble.bias[i, 0], layer.bias) for i, layer in enumerate(layers))


# --- features extractors


def test_shared_features_extractor_does_not_learn_from_the_critics() -> None:
    policy = make_policy(features_extractor_class=Extractor, share_features_extractor=True, normalization="layer")
    extractor = policy.actor.features_extractor
    assert policy.critic.features_extractor is extractor
    assert policy.critic_target.features_extractor is not extractor
    in_optimizer = {id(p) for group in policy.critic.optimizer.param_groups for p in group["params"]}
    assert not in_optimizer & {id(p) for p in extractor.parameters()}
    obs, actions = batch()
    policy.critic.q_values(obs, actions).sum().backward()
    assert all(parameter.grad is None for parameter in extractor.parameters())
    assert all(parameter.grad is not None for parameter in policy.critic.q_networks.parameters())
    policy.actor(obs, deterministic=True).sum().backward()
    assert all(parameter.grad is not None for parameter in extractor.parameters())


def test_observation_gradients_pass_through_a_shared_features_extractor() -> None:
    policy = make_policy(features_extractor_class=Extractor, share_features_extractor=True, normalization="layer")
    extractor = policy.actor.features_extractor
    (network, _), (obs, actions) = separate_networks(policy.critic), batch()
    obs.requires_grad_(True)
    expected = th.autograd.grad(network(th.cat([extractor(obs), actions], 1)).sum(), obs)
    th.testing.assert_close(th.autograd.grad(policy.critic.q_values(obs, actions)[0].sum(), obs), expected)


@pytest.mark.parametrize("kwargs", [{}, {"features_extractor_class": Extractor}], ids=["raw", "extracted"])
@pytest.mark.parametrize("share_features_extractor", [True, False])
@pytest.mark.parametrize("normalization", ["layer", "batch"])
def test_input_gradients_and_their_gradients(
    kwargs: dict[str, Any], share_features_extractor: bool, normalization: str
) -> None:
    """First derivatives, and the weights' gradients of a loss on them, as gradient matching needs them."""
    kwargs = {**kwargs, "share_features_extractor": share_features_extractor, "normalization": normalization}
    critic = make_policy(**kwargs, n_critics=3).critic
    index = next(i for i, layer in enumerate(critic.q_networks) if isinstance(layer, EnsembleLinear))  # of the first layer
    obs, actions = batch()
    weights_o, weights_a = th.randn(3, 7, NOBS), th.randn(3, 7, NU)
    q_o, q_a = critic.input_gradients(obs, actions)
    ((q_o * weights_o).sum() + (q_a * weights_a).sum()).backward()
    assert obs.grad is None and not obs.requires_grad
    for i, network in enumerate(separate_networks(critic)):
        inputs = obs.clone().requires_grad_(True), actions.clone().requires_grad_(True)
        values = network(th.cat([critic.features_extractor(inputs[0]), inputs[1]], 1))
        expected_o, expected_a = th.autograd.grad(values.sum(), inputs, create_graph=True)
        th.testing.assert_close(q_o[i], expected_o)
        th.testing.assert_close(q_a[i], expected_a)
        first = network[index].get_parameter("weight")
        loss = (expected_o * weights_o[i]).sum() + (expected_a * weights_a[i]).sum()
        (expected,) = th.autograd.grad(loss, first)
        actual = critic.q_networks[index].get_parameter("weight").grad
        assert actual is not None
        th.testing.assert_close(actual[i].T, expected)


def test_own_features_extractor_learns_from_the_critics() -> None:
    policy = make_policy(features_extractor_class=Extractor)
    extractor = policy.critic.features_extractor
    assert extractor is not policy.actor.features_extractor
    in_optimizer = {id(p) for group in policy.critic.optimizer.param_groups for p in group["params"]}
    assert in_optimizer >= {id(p) for p in extractor.parameters()}
    policy.critic.q_values(*batch()).sum().backward()
    assert all(parameter.grad is not None for parameter in extractor.parameters())


def test_no_gradient_is_kept_where_none_is_wanted() -> None:
    policy = make_policy(features_extractor_class=Extractor)
    with th.no_grad():
        assert not policy.critic.q_values(*batch()).requires_grad


# --- saving


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"normalization": "none", "activation_fn": nn.Tanh, "n_critics": 3, "net_arch": {"pi": [4], "qf": [5]}},
        {"features_extractor_class": Extractor, "share_features_extractor": True},
        {"use_sde": True, "log_std_init": -2.0},
        {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.5}},
    ],
)
def test_policy_survives_saving(kwargs: dict[str, Any], tmp_path: Path) -> None:
    policy = make_policy(**kwargs)
    policy.save(str(tmp_path / "policy.pth"))
    loaded = MlpPolicy.load(str(tmp_path / "policy.pth"), device="cpu")
    assert loaded._get_constructor_parameters().keys() == policy._get_constructor_parameters().keys()
    state, loaded_state = policy.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys()
    assert all(th.equal(value, loaded_state[name]) for name, value in state.items())
    obs, actions = batch()
    assert th.equal(loaded.critic.q_values(obs, actions), policy.critic.q_values(obs, actions))
    expected, _ = policy.predict(obs.numpy(), deterministic=True)
    np.testing.assert_array_equal(loaded.predict(obs.numpy(), deterministic=True)[0], expected)
    assert type(loaded.critic.optimizer) is type(policy.critic.optimizer)
    assert loaded.share_features_extractor == policy.share_features_extractor


def test_actor_is_sacs() -> None:
    policy = make_policy()
    reference = SACPolicy(OBSERVATIONS, ACTIONS, schedule, activation_fn=nn.SiLU, **SMALL)
    reference.actor.load_state_dict(policy.actor.state_dict())
    obs, _ = batch()
    assert th.equal(policy.actor(obs, deterministic=True), reference.actor(obs, deterministic=True))


# --- observation spaces


@pytest.mark.parametrize("share_features_extractor", [True, False])
@pytest.mark.parametrize(
    "policy_class,space",
    [
        (MlpPolicy, OBSERVATIONS),
        (MlpPolicy, spaces.Box(-1.0, 1.0, (2, 3))),
        (MlpPolicy, spaces.Discrete(4)),
        (CnnPolicy, IMAGES),
        (MultiInputPolicy, spaces.Dict({"image": IMAGES, "vector": OBSERVATIONS})),
    ],
    ids=["vector", "matrix", "discrete", "image", "dict"],
)
def test_observation_spaces(policy_class: type[AGPOPolicy], space: gym.Space[Any], share_features_extractor: bool) -> None:
    actions = spaces.Box(np.array([-2.0, 0.0], dtype=np.float32), np.array([2.0, 1.0], dtype=np.float32))
    policy = policy_class(space, actions, schedule, share_features_extractor=share_features_extractor, **SMALL)
    space.seed(0)
    observation = space.sample()
    action, _ = policy.predict(observation)
    assert actions.contains(action)
    tensor, _ = policy.obs_to_tensor(observation)
    (value,) = policy.critic.q_values(tensor, th.zeros(1, 2)).mean(0).tolist()
    assert np.isfinite(value)


# --- optimisers


def test_adam_is_the_default() -> None:
    policy = make_policy()
    for optimizer in (policy.actor.optimizer, policy.critic.optimizer):
        assert type(optimizer) is th.optim.Adam
        assert optimizer.defaults["lr"] == 1e-2
        assert {name: optimizer.defaults[name] for name in ("betas", "eps")} == {"betas": (0.9, 0.999), "eps": 1e-8}


@pytest.mark.parametrize(
    "optimizer_class,optimizer_kwargs",
    [
        (th.optim.Adam, {"eps": 1e-3, "betas": (0.5, 0.9)}),
        (th.optim.Adam, {"fused": False}),
        (th.optim.Adam, {"foreach": True}),
        (th.optim.AdamW, {"weight_decay": 0.3}),
        (th.optim.AdamW, None),
        (th.optim.SGD, {"momentum": 0.7}),
    ],
)
def test_users_optimiser_is_respected(
    optimizer_class: type[th.optim.Optimizer], optimizer_kwargs: dict[str, Any] | None
) -> None:
    given = None if optimizer_kwargs is None else optimizer_kwargs.copy()
    policy = make_policy(optimizer_class=optimizer_class, optimizer_kwargs=optimizer_kwargs)
    assert optimizer_kwargs == given  # the user's own dictionary is left alone
    for network in (policy.actor, policy.critic):
        assert type(network.optimizer) is optimizer_class
        assert (given or {}).items() <= network.optimizer.defaults.items()
        before = [parameter.detach().clone() for parameter in network.parameters()]
        for parameter in network.parameters():
            parameter.grad = th.ones_like(parameter)
        network.optimizer.step()
        assert all(not th.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_fused_adam_is_adam() -> None:
    policies = []
    for kwargs in ({}, {"optimizer_kwargs": {"fused": False}}):
        th.manual_seed(0)
        policies.append(make_policy(**kwargs))
    inputs = batch()
    for _ in range(5):
        for policy in policies:
            policy.critic.optimizer.zero_grad()
            policy.critic.q_values(*inputs).square().sum().backward()
            policy.critic.optimizer.step()
    for fused, plain in zip(policies[0].parameters(), policies[1].parameters(), strict=True):
        th.testing.assert_close(fused, plain)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"activation_fn": nn.RReLU}, {"features_extractor_class": Extractor}])
@pytest.mark.parametrize("normalization", ["batch", "layer"])
def test_training_mode_is_that_of_every_module_that_may_care(kwargs: dict[str, Any], mode: bool, normalization: str) -> None:
    policy = make_policy(**kwargs, normalization=normalization)
    policy.set_training_mode(not mode)
    policy.set_training_mode(mode)
    assert policy.training == policy.actor.training == policy.critic.training == mode
    # RReLU is random in training alone; nobody knows what an extractor of one's own does
    modules = [*policy.actor.modules(), *policy.critic.modules()]
    caring = [module for module in modules if isinstance(module, (nn.RReLU, Extractor))]
    assert bool(caring) == bool(kwargs)
    assert all(module.training == mode for module in caring)
    assert not policy.average_actor.training
    assert policy.critic_target is policy.critic or not policy.critic_target.training


class OwnSampling(Actor):
    """An actor with a density of its own."""

    n_calls = 0

    def action_log_prob(self, obs: Any) -> tuple[th.Tensor, th.Tensor]:
        """SB3's, counted."""
        type(self).n_calls += 1
        return super().action_log_prob(obs)


class OwnSamplingPolicy(AGPOPolicy):
    """A policy whose actor has a density of its own."""

    def make_actor(self, features_extractor: Any = None) -> Actor:
        """Build the actor."""
        return OwnSampling(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(self.device)


def test_an_actor_that_samples_by_itself_is_asked() -> None:
    """Wherever SAC asks it; windows, which need the noise of a Gaussian, are left out and told."""
    model = AGPO(OwnSamplingPolicy, "Hopper-v5", learning_starts=10, policy_kwargs={"net_arch": [8]}, seed=0).learn(40)
    assert "OwnSampling samples actions in its own way" in model.provider_report.reason
    assert OwnSampling.n_calls > 30


def test_returns_are_not_cut_by_a_gaussian_that_does_not_act() -> None:
    """An actor that samples by itself may have none, or one that says nothing about its actions."""

    class WithoutGaussian(OwnSampling):
        def get_action_dist_params(self, obs: Any) -> Any:
            raise AssertionError("nobody samples from it")

        def forward(self, obs: Any, deterministic: bool = False) -> th.Tensor:
            return th.tanh(self.mu(self.latent_pi(self.extract_features(obs, self.features_extractor))))

        def action_log_prob(self, obs: Any) -> tuple[th.Tensor, th.Tensor]:
            actions = self(obs)
            return actions, actions.sum(-1)

    class Policy(OwnSamplingPolicy):
        def make_actor(self, features_extractor: Any = None) -> Actor:
            arguments = self._update_features_extractor(self.actor_kwargs, features_extractor)
            return WithoutGaussian(**arguments).to(self.device)

    model = AGPO(Policy, "Pendulum-v1", learning_starts=10, policy_kwargs={"net_arch": [8]}, seed=0).learn(40)
    assert model.n_steps == 3 and model._n_updates > 0


def test_critics_of_another_kind_are_refused() -> None:
    class Plain(AGPOPolicy):
        def make_critic(self, features_extractor: Any = None) -> Any:
            kwargs = {k: v for k, v in self.critic_kwargs.items() if k != "normalization"}
            return ContinuousCritic(**self._update_features_extractor(kwargs, features_extractor))

    with pytest.raises(TypeError, match="`make_critic` must return an `EnsembleCritic`, got a ContinuousCritic"):
        AGPO(Plain, "Pendulum-v1")
