"""The losses of AGPO as functions of its networks: critics, replayed policy update, policy update on fresh windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_agpo.agpo.adaptive_gradient import (
    AdaptiveGradient,
    CriticGradients,
    GateFunction,
    WindowDerivatives,
    adaptive_gradient,
    matching_loss,
    matching_targets,
    policy_loss,
)
from sb3_agpo.agpo.policies import Actor, AGPOPolicy, samples_by_itself
from sb3_agpo.agpo.rollout_buffer import DerivativeSamples, RolloutWindows
from sb3_agpo.agpo.squashed_gaussian import infer_noise, squashed_sample

#: maps observations and actions, each a batch of ``n``, to what is to be added to dQ/da, without gradient, ``(n, nu)``
Correction = Callable[[th.Tensor, th.Tensor], th.Tensor]


class RecordedAction(NamedTuple):
    """One window step as the policy of now acts with the noise of then."""

    observations: th.Tensor  # (W, nobs), a leaf of the graph
    actions: th.Tensor  # (W, nu)
    log_prob: th.Tensor  # (W,)


class CriticBatch(NamedTuple):
    """What one update of the critics learns from."""

    observations: Any  # batch of n
    actions: th.Tensor  # (n, nu), in [-1, 1]
    rewards: th.Tensor  # (n,), of the whole return, and of the entropy where it ends
    discounts: th.Tensor  # (n,), of the value where the return ends; 0 where the episode does
    next_observations: Any  # batch of n, where the return ends
    next_actions: th.Tensor  # (n, nu), the policy's


class WindowUpdate(NamedTuple):
    """A policy loss on fresh windows, and what it was made from."""

    loss: th.Tensor  # scalar
    gradient: AdaptiveGradient
    critic: CriticGradients


def gaussian_parameters(actor: Actor, observations: Any) -> tuple[th.Tensor, th.Tensor]:
    """
    The policy's Gaussian before squashing.

    :param actor: the actor, with or without gSDE
    :param observations: batch of ``n``
    :return: mean and log standard deviation, shape ``(n, nu)`` each
    """
    mean, log_std, sde = actor.get_action_dist_params(observations)
    if not actor.use_sde:
        return mean, log_std
    gaussian = actor.action_dist.proba_distribution(mean, log_std, **sde).distribution
    return gaussian.mean, gaussian.stddev.log()


def sample_actions(actor: Actor, observations: Any) -> tuple[th.Tensor, th.Tensor]:
    """
    Reparametrised actions with fresh noise.

    :param actor: the actor
    :param observations: batch of ``n``
    :return: actions in [-1, 1] ``(n, nu)``, log-densities ``(n,)``
    """
    if actor.use_sde or samples_by_itself(actor):
        return actor.action_log_prob(observations)
    mean, log_std = gaussian_parameters(actor, observations)
    return squashed_sample(mean, log_std, th.randn_like(mean))


def next_values(policy: AGPOPolicy, observations: Any, ent_coef: th.Tensor) -> th.Tensor:
    """
    V(o') of equation (6), from the target critics.

    :param policy: actor and critics
    :param observations: batch of ``n``
    :param ent_coef: entropy temperature alpha
    :return: values, shape ``(n,)``
    """
    actions, log_prob = sample_actions(policy.actor, observations)
    return policy.critic_target.q_values(observations, actions).min(0).values - ent_coef * log_prob


def critic_batches(
    policy: AGPOPolicy, data: ReplayBufferSamples, gamma: float, ent_coef: th.Tensor, batch_size: int
) -> list[CriticBatch]:
    """
    Let the policy act where the returns of replayed transitions end, and cut all that into batches, one for each update.

    :param policy: actor and critics
    :param data: replayed transitions, ``n`` of them
    :param gamma: discount factor, where the replay buffer gives none
    :param ent_coef: entropy temperature alpha
    :param batch_size: transitions of each batch
    :return: the batches, without gradient
    """
    with th.no_grad():
        next_actions, next_log_prob = sample_actions(policy.actor, data.next_observations)
        discounts = (1.0 - data.dones.squeeze(-1)) * (gamma if data.discounts is None else data.discounts.squeeze(-1))
        rewards = data.rewards.squeeze(-1) - discounts * ent_coef * next_log_prob
    whole = CriticBatch(data.observations, data.actions, rewards, discounts, data.next_observations, next_actions)
    return [CriticBatch(*parts) for parts in zip(*(_split(field, batch_size) for field in whole), strict=True)]


def _split(field: Any, batch_size: int) -> list[Any]:
    """Cut observations, which may be dictionaries, or anything else of a batch."""
    if isinstance(field, dict):
        parts = zip(*(value.split(batch_size) for value in field.values()), strict=True)
        return [dict(zip(field, part, strict=True)) for part in parts]
    return list(field.split(batch_size))


def temporal_difference_errors(policy: AGPOPolicy, batch: CriticBatch) -> th.Tensor:
    """
    What SAC's critics lack of their targets, which have no gradient.

    With batch normalisation the critics are their own targets, see :meth:`EnsembleCritic.joint_q_values`.

    :param policy: actor and critics
    :param batch: what to learn from, ``n`` transitions
    :return: shape ``(n_critics, n)``
    """
    if policy.critic.batch_norms:
        q_values, next_q_values = policy.critic.joint_q_values(
            batch.observations, batch.actions, batch.next_observations, batch.next_actions
        )
    else:
        q_values = policy.critic.q_values(batch.observations, batch.actions)  # (n_critics, n)
        with th.no_grad():
            next_q_values = policy.critic_target.q_values(batch.next_observations, batch.next_actions)
    targets = batch.rewards + batch.discounts * next_q_values.min(0).values  # (n,)
    return q_values - targets


def gradient_matching_loss(policy: AGPOPolicy, batch: DerivativeSamples, gamma: float, ent_coef: th.Tensor) -> th.Tensor:
    """
    How far the critics are from the differentiated Bellman equation, (8) and (9).

    :param policy: actor and critics
    :param batch: transitions with derivatives
    :param gamma: discount factor
    :param ent_coef: entropy temperature alpha
    :return: scalar, summed over critics
    """
    next_obs = batch.next_observations.requires_grad_(True)
    (v_o,) = th.autograd.grad(next_values(policy, next_obs, ent_coef).sum(), next_obs)
    discount = gamma * (1.0 - batch.terminated)
    q_o, q_a = policy.critic.input_gradients(batch.observations, batch.actions)  # (n_critics, batch, ...)
    q_x = th.einsum("nbo,box->nbx", q_o, batch.C)
    action_targets = matching_targets(batch.r_a, batch.O_a, v_o, discount)  # (8)
    state_targets = matching_targets(batch.r_x, batch.O_x, v_o, discount)  # (9)
    return matching_loss(q_a, action_targets) + matching_loss(q_x, state_targets)


def replayed_policy_loss(
    policy: AGPOPolicy, observations: Any, ent_coef: th.Tensor, correction: Correction | None = None
) -> tuple[th.Tensor, th.Tensor]:
    """
    SAC's policy loss, whose critic's gradient may be corrected, equation (11) of :mod:`sb3_agpo.agpo.gradient_correction`.

    :param policy: actor and critics
    :param observations: replayed observations, batch of ``n``
    :param ent_coef: entropy temperature alpha
    :param correction: what dQ/da lacks; None for nothing
    :return: scalar, and the log-densities of the policy's actions, shape ``(n,)``
    """
    actions, log_prob = sample_actions(policy.actor, observations)
    values = policy.critic.q_values(observations, actions).min(0).values  # (n,)
    if correction is not None:
        values = values + (correction(observations, actions.detach()) * actions).sum(-1)
    return (ent_coef * log_prob - values).mean(), log_prob


def act_as_recorded(actor: Actor, windows: RolloutWindows, step: int) -> RecordedAction:
    """
    Act with the recorded noise; where none was recorded, with the noise that explains the recorded action.

    :param actor: the actor
    :param windows: fresh windows
    :param step: step of the window
    :return: the actions, differentiable by observations and weights
    """
    observations = windows.observations[step].detach().requires_grad_(True)
    mean, log_std = gaussian_parameters(actor, observations)
    inferred = infer_noise(windows.actions[step], mean.detach(), log_std.detach())
    noise = th.where(th.isnan(windows.noise[step]), inferred, windows.noise[step])
    return RecordedAction(observations, *squashed_sample(mean, log_std, noise))


def critic_gradients(policy: AGPOPolicy, windows: RolloutWindows, ent_coef: th.Tensor) -> CriticGradients:
    """
    Gradients of Q at every step of the windows, and of V after it.

    :param policy: actor and critics
    :param windows: fresh windows
    :param ent_coef: entropy temperature alpha
    :return: the gradients
    """
    obs, actions, next_obs = (
        field.detach().flatten(0, 1).requires_grad_(True)
        for field in (windows.observations, windows.actions, windows.next_observations)
    )
    q_values = policy.critic.q_values(obs, actions).min(0).values
    q_o, q_a = th.autograd.grad(q_values.sum(), (obs, actions))
    (v_o,) = th.autograd.grad(next_values(policy, next_obs, ent_coef).sum(), next_obs)
    shape = windows.terminated.shape
    return CriticGradients(*(gradient.reshape(*shape, -1) for gradient in (q_a, q_o, v_o)))


def window_update(
    policy: AGPOPolicy, windows: RolloutWindows, gate: GateFunction, gamma: float, ent_coef: th.Tensor
) -> WindowUpdate:
    """
    Policy loss on fresh windows, equations (1) to (7).

    :param policy: actor and critics
    :param windows: fresh windows
    :param gate: weight of the analytic gradient
    :param gamma: discount factor
    :param ent_coef: entropy temperature alpha
    :return: loss and gradients
    """
    recorded = [act_as_recorded(policy.actor, windows, step) for step in range(len(windows.actions))]

    def pullback(step: int, action_gradient: th.Tensor) -> th.Tensor:
        taken = recorded[step]
        outputs = (action_gradient * taken.actions).sum() - (ent_coef * taken.log_prob).sum()
        return th.autograd.grad(outputs, taken.observations, retain_graph=True)[0]

    critic = critic_gradients(policy, windows, ent_coef)
    gradient = adaptive_gradient(
        WindowDerivatives(*(getattr(windows, name) for name in WindowDerivatives._fields)),
        critic,
        pullback,
        gate,
        gamma=gamma,
        terminated=windows.terminated,
        boundary=windows.boundary,
        valid=windows.valid,
    )
    loss = policy_loss(
        th.cat([taken.actions for taken in recorded]),
        th.cat([taken.log_prob for taken in recorded]),
        gradient.g_a.flatten(0, 1),
        ent_coef,
        windows.mask.flatten(),
    )
    return WindowUpdate(loss, gradient, critic)
