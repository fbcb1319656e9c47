"""Playing steps of an environment and differentiating each of them, with several difference steps at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_agpo.dynamics.interface import Array, TransitionDerivatives
from sb3_agpo.dynamics.mujoco import FiniteDifferences
from sb3_agpo.dynamics.recorder import (
    ProviderReport,
    Record,
    RecorderWrapper,
    StepRecords,
    TransitionRecorder,
    choose_dynamics,
    find_recorder,
    install_recorder,
    kept_recorder,
    remove_recorder,
    stack_records,
)
from sb3_agpo.dynamics.wrappers import wrapper_scales
from sb3_agpo.gradients.environment import Act
from sb3_agpo.gradients.measures import Jacobians
from sb3_agpo.gradients.names import touching_bodies
from sb3_agpo.gradients.replay import Replay, make_replay

#: difference steps that are compared, as multiples of those that AGPO would use
SCALES = (0.01, 0.1, 1.0, 10.0)
BASE, FINER = SCALES.index(1.0), SCALES.index(0.1)
CHUNK = 50  # steps that are differentiated in one go, which bounds the memory
#: how far exact derivatives are moved to see how much they change: of the actions' half range, and of the states' spread
NEIGHBOUR = 0.01


class Effects(NamedTuple):
    """What has an effect on what, anywhere in the recorded steps."""

    observation_moves: NDArray[np.bool_]  # (nobs,) the next observation has a derivative through the step
    observation_of_state: NDArray[np.bool_]  # (nobs,) it is a function of the state
    state_matters: NDArray[np.bool_]  # (ndx,) the coordinate changes an observation, a reward, or another coordinate

    @classmethod
    def of(cls, d: TransitionDerivatives) -> Effects:
        """
        Look at derivatives.

        :param d: of some steps
        :return: where they are not zero
        """
        elsewhere = d.A - np.eye(d.A.shape[1])  # a coordinate that only moves itself along matters to nothing
        return cls(
            observation_moves=_not_zero(d.O_x, 1) | _not_zero(d.O_a, 1),
            observation_of_state=_not_zero(d.C, 1) | _not_zero(d.next_C, 1),
            state_matters=_not_zero(elsewhere[d.valid], 2) | _not_zero(d.O_x, 2) | _not_zero(d.r_x, 1),
        )

    def joined(self, other: Effects) -> Effects:
        """
        Join what was seen in different steps.

        :param other: of other steps
        :return: of both
        """
        return Effects._make(one | another for one, another in zip(self, other, strict=True))


def _not_zero(values: Array, axis: int) -> NDArray[np.bool_]:
    """Where along an axis there is anything but zeros."""
    others = tuple(other for other in range(values.ndim) if other != axis)
    return np.any(values != 0.0, axis=others)


class Moment(NamedTuple):
    """A moment of the episode to which one can go back."""

    step: int  # index of the step that comes next
    saved: Any


class Recording(NamedTuple):
    """``T`` steps and their derivatives."""

    report: ProviderReport
    differences: tuple[FiniteDifferences, ...]  # difference options that were compared; one if they do not matter
    jacobians: tuple[Jacobians, ...]  # for each of the options
    base: int  # index of the options that AGPO would use
    neighbour: Jacobians  # the same steps with a finer difference step, or at neighbouring points
    effects: Effects
    states: Array  # (T, nx) before the step
    actions: NDArray[Any]  # (T, nu) as the unwrapped environment got them
    rewards: Array  # (T,) of the unwrapped environment
    ends: NDArray[np.bool_]  # (T,) whether the episode ended with this step
    contacts: list[frozenset[tuple[str, str]]]  # bodies that touched in each step
    moments: list[Moment]
    replay: Replay
    dynamics: Any  # what differentiates
    low: Array  # (nu,) lowest action of the unwrapped environment
    high: Array  # (nu,) highest action
    action_scale: Array  # (nu,) d(environment action) / d(action in [-1, 1])


def scaled(differences: FiniteDifferences, scale: float) -> FiniteDifferences:
    """
    Change all difference steps by a factor.

    :param differences: options
    :param scale: the factor
    :return: the same options with other steps; that of actions is at most 1, half of their range
    """

    def step(value: float) -> float:
        return float(f"{scale * value:.6g}")  # without the last digits, which are rounding

    return replace(
        differences,
        position_step=step(differences.position_step),
        velocity_step=step(differences.velocity_step),
        activation_step=step(differences.activation_step),
        action_step=min(1.0, step(differences.action_step)),
    )


class Recorders:
    """
    Recorders of one environment, one inside the other, so that each step is differentiated with several options.

    :param env: environment as the agent sees it
    :param options: the first are those of the outermost recorder
    """

    def __init__(self, env: gym.Env[Any, Any], options: Sequence[FiniteDifferences]) -> None:
        env = remove_recorder(env)
        inner = [choose_dynamics(env, each) for each in options[1:]]
        self.env = install_recorder(env, options[0])
        outer = find_recorder(self.env)
        assert outer is not None
        self.outer, self.all = outer, [outer]
        if outer.provider_report.kind not in ("mujoco", "env_step"):
            return
        scales = wrapper_scales(env)
        for dynamics, report in inner:
            recorder = TransitionRecorder(outer.env, dynamics, report, *scales)
            outer.env = RecorderWrapper(recorder)
            self.all.append(recorder)

    def take(self, n_steps: int) -> tuple[list[Jacobians], Effects]:
        """
        Differentiate the last steps.

        :param n_steps: how many
        :return: derivatives with each of the options, effects by those of the first
        """
        first, *others = (recorder.take_derivatives(n_steps) for recorder in self.all)
        return [Jacobians.of(each) for each in (first, *others)], Effects.of(first)


class Player:
    """
    Plays an environment, episode after episode, and keeps what its recorders and the simulator say.

    :param recorders: of the environment
    :param act: the policy
    :param seed: of the first episode
    """

    def __init__(self, recorders: Recorders, act: Act, seed: int) -> None:
        self.recorders, self.act = recorders, act
        self.observation, _ = recorders.env.reset(seed=seed)
        self.replay = make_replay(recorders.env)
        self.records: list[Record] = []
        self.jacobians: list[list[Jacobians]] = []  # chunk by chunk, for each of the options
        self.effects: Effects | None = None
        self.ends: list[bool] = []
        self.contacts: list[frozenset[tuple[str, str]]] = []
        self.moments: list[Moment] = []

    def step(self, remember: bool) -> None:
        """
        Play one step.

        :param remember: whether to remember the moment before it
        """
        env = self.recorders.env
        if remember:
            self.moments.append(Moment(len(self.ends), self.replay.remember()))
        self.observation, _, terminated, truncated, _ = env.step(self.act(self.observation))
        self.ends.append(bool(terminated or truncated))
        self.contacts.append(touching_bodies(env))
        if self.ends[-1]:
            self.observation, _ = env.reset()

    def differentiate(self, n_steps: int) -> None:
        """
        Differentiate the steps played since the last call.

        :param n_steps: how many these are
        """
        self.records += [record._replace(derivatives=None) for record in self.recorders.outer.get_records()[-n_steps:]]
        jacobians, effects = self.recorders.take(n_steps)
        self.jacobians.append(jacobians)
        self.effects = effects if self.effects is None else self.effects.joined(effects)

    def all_jacobians(self) -> list[Jacobians]:
        """
        Join the chunks.

        :return: derivatives of all steps, for each of the options
        """
        by_options = zip(*self.jacobians, strict=True)
        return [Jacobians._make(np.concatenate(parts) for parts in zip(*chunks, strict=True)) for chunks in by_options]


def record(
    env: gym.Env[Any, Any],
    act: Act,
    differences: FiniteDifferences,
    *,
    n_steps: int,
    n_moments: int,
    seed: int,
    progress: Callable[[int], object] = lambda _: None,
) -> Recording | ProviderReport:
    """
    Play steps, episode after episode, and differentiate them.

    :param env: environment as the agent sees it; a recorder that it has comes back when this is over
    :param act: the policy
    :param differences: options that AGPO would use
    :param n_steps: how many steps to play
    :param n_moments: how many moments to remember, evenly spread
    :param seed: of the first episode
    :param progress: called with numbers of steps that are done
    :return: the recording; the report alone where there are no derivatives
    """
    options = [scaled(differences, scale) for scale in SCALES]
    order = [BASE, *(i for i in range(len(SCALES)) if i != BASE)]  # what AGPO would use is the outermost recorder
    with kept_recorder(env):
        recorders = Recorders(env, [options[i] for i in order])
        outer = recorders.outer
        if outer.dynamics is None:
            return outer.provider_report
        player = Player(recorders, act, seed)
        remembered = set(np.linspace(0, n_steps, n_moments, endpoint=False, dtype=int).tolist())
        for first in range(0, n_steps, CHUNK):
            chunk = range(first, min(first + CHUNK, n_steps))
            for step in chunk:
                player.step(step in remembered)
            player.differentiate(len(chunk))
            progress(len(chunk))
    space = env.unwrapped.action_space
    assert player.effects is not None and isinstance(space, spaces.Box)
    steps, jacobians, base = stack_records(player.records), player.all_jacobians(), BASE
    if len(jacobians) > 1:
        jacobians = [jacobians[order.index(i)] for i in range(len(SCALES))]
        neighbour = jacobians[FINER]
    else:
        options, base = [differences], 0
        neighbour = _neighbour(outer, steps, space, seed)
    return Recording(
        report=outer.provider_report,
        differences=tuple(options),
        jacobians=tuple(jacobians),
        base=base,
        neighbour=neighbour,
        effects=player.effects,
        states=steps.states,
        actions=steps.actions,
        rewards=steps.rewards,
        ends=np.array(player.ends),
        contacts=player.contacts,
        moments=player.moments,
        replay=player.replay,
        dynamics=outer.dynamics,
        low=space.low,
        high=space.high,
        action_scale=outer.action_scale,
    )


def _neighbour(recorder: TransitionRecorder, steps: StepRecords, space: spaces.Box, seed: int) -> Jacobians:
    """Exact derivatives at points near those of the recorded steps."""
    random, dynamics, scale = np.random.default_rng(seed), recorder.dynamics, recorder.action_scale
    assert dynamics is not None
    actions = steps.actions + NEIGHBOUR * scale * random.standard_normal(steps.actions.shape)
    actions = np.clip(actions, space.low, space.high).astype(steps.actions.dtype)  # outside, many environments clip
    states = steps.states
    if dynamics.state_size == dynamics.tangent_size:  # else the state may be a quaternion, and no vector to be moved
        states = states + NEIGHBOUR * states.std(axis=0) * random.standard_normal(states.shape)
    near = Jacobians.of(dynamics.differentiate(states, actions))
    finite = np.isfinite(near.A).all(axis=(1, 2)) & np.isfinite(near.B).all(axis=(1, 2))
    return near._replace(B=near.B * scale, r_a=near.r_a * scale, valid=near.valid & finite)
