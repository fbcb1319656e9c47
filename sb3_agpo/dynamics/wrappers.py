"""What wrappers of an environment do to its derivatives: nothing, a change of scale, or what cannot be followed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import (
    ClipAction,
    DtypeObservation,
    HumanRendering,
    OrderEnforcing,
    PassiveEnvChecker,
    RecordEpisodeStatistics,
    RecordVideo,
    RenderCollection,
    RescaleAction,
    RescaleObservation,
    TimeLimit,
)
from stable_baselines3.common.monitor import Monitor

from sb3_agpo.dynamics.interface import Array

#: wrappers that override ``step`` and still leave observation, action and reward as they are
TRANSPARENT_WRAPPERS = (
    TimeLimit,
    Monitor,
    OrderEnforcing,
    PassiveEnvChecker,
    RecordEpisodeStatistics,
    RecordVideo,
    RenderCollection,
    HumanRendering,
)
#: the same, by name: RL Zoo puts its own TimeLimit, which differs in ``info`` alone, in the place of Gymnasium's, before or
#: after this module is imported, and in worker processes too
TIME_LIMITS = ("gymnasium.wrappers.common.TimeLimit", "rl_zoo3.gym_patches.PatchedTimeLimit")
#: wrappers that rescale, which the chain rule follows
AFFINE_WRAPPERS = (RescaleAction, RescaleObservation, ClipAction, DtypeObservation)
#: methods by which a wrapper can change what the agent sees, does and gets
WRAPPER_METHODS = ("step", "reset", "action", "observation")


def opaque_wrapper(env: gym.Env[Any, Any]) -> str | None:
    """
    The first wrapper that derivatives cannot be followed through.

    :param env: wrapped environment, its action space a bounded box
    :return: the wrapper's name, None if all can be seen through
    """
    assert isinstance(env.action_space, spaces.Box)
    actions = np.stack([env.action_space.low, env.action_space.high]).astype(np.float64)
    while isinstance(env, gym.Wrapper):
        if not is_transparent(env):
            return type(env).__name__
        if isinstance(env, gym.ActionWrapper):
            before, actions = actions, np.stack([env.action(bound) for bound in actions])
            # Clipping is no rescaling, except where there is nothing to clip (more than a rounding error)
            if isinstance(env, ClipAction) and np.any(np.abs(actions - before) > 1e-5 * (before[1] - before[0])):
                return type(env).__name__
        env = env.env
    return None


def is_time_limit(env: gym.Env[Any, Any]) -> bool:
    """
    Whether a wrapper is Gymnasium's ``TimeLimit``, or the one that RL Zoo puts in its place.

    :param env: a wrapper or an environment
    :return: False for classes derived from them, which may do anything
    """
    return f"{type(env).__module__}.{type(env).__qualname__}" in TIME_LIMITS


def is_transparent(env: gym.Wrapper[Any, Any, Any, Any]) -> bool:
    """
    Whether a wrapper is known to change nothing, or only by rescaling.

    :param env: a wrapper; the environment inside does not matter
    :return: True also for classes derived from known ones or from ``gymnasium.Wrapper`` that override none of
        :data:`WRAPPER_METHODS`
    """
    if is_patched(env):
        return False
    if isinstance(env, DtypeObservation) and not np.issubdtype(env.observation_space.dtype, np.floating):
        return False
    named = (base for base in type(env).__mro__ if f"{base.__module__}.{base.__qualname__}" in TIME_LIMITS)
    known = (*TRANSPARENT_WRAPPERS, *AFFINE_WRAPPERS, gym.Wrapper, *named)
    return any(inherits_unchanged(type(env), base, WRAPPER_METHODS) for base in known)


def is_patched(env: gym.Wrapper[Any, Any, Any, Any]) -> bool:
    """
    Whether somebody has put a method into a wrapper, in the place of its class's.

    :param env: a wrapper; the environment inside does not matter
    :return: True if it is one of :data:`WRAPPER_METHODS`
    """
    return any(callable(vars(env).get(name)) for name in WRAPPER_METHODS)


def inherits_unchanged(kind: type, base: type, methods: Sequence[str]) -> bool:
    """
    Whether a class has some methods from another class as they are there.

    :param kind: the class
    :param base: a class it may be derived from
    :param methods: names of methods, which ``base`` need not have
    :return: False also if ``kind`` is not derived from ``base``
    """
    same = (getattr(kind, name, None) is getattr(base, name, None) for name in methods)
    return issubclass(kind, base) and all(same)


def wrapper_scales(env: gym.Env[Any, Any]) -> tuple[Array, Array]:
    """
    Chain-rule factors of the wrappers of an environment, all of them affine.

    :param env: wrapped environment
    :return: d(environment action) / d(action in [-1, 1]), d(agent's observation) / d(environment observation)
    """
    assert isinstance(env.action_space, spaces.Box)
    low, high = env.action_space.low.astype(np.float64), env.action_space.high.astype(np.float64)
    rescaling: list[RescaleObservation[Any, Any, Any]] = []
    while isinstance(env, gym.Wrapper):
        if isinstance(env, gym.ActionWrapper):
            low, high = env.action(low), env.action(high)
        if isinstance(env, RescaleObservation):
            rescaling.append(env)
        env = env.env
    space = env.observation_space
    assert isinstance(space, spaces.Box)
    # From bound to bound, where there are bounds: the further apart two points, the less their slope suffers from rounding
    bounded = np.isfinite(space.low) & np.isfinite(space.high) & (space.high > space.low)
    start = np.where(bounded, space.low, 0.0).astype(np.float64)
    end = np.where(bounded, space.high, 1.0).astype(np.float64)
    moved_start, moved_end = start, end
    for wrapper in reversed(rescaling):
        moved_start, moved_end = wrapper.observation(moved_start), wrapper.observation(moved_end)
    return 0.5 * (high - low), (moved_end - moved_start) / (end - start)


def unusable_spaces(env: gym.Env[Any, Any]) -> str | None:
    """
    What about the spaces of an environment makes derivatives impossible.

    :param env: environment, wrapped or not
    :return: a description, None if they are usable
    """
    for space, what in ((env.action_space, "action"), (env.observation_space, "observation")):
        vector = isinstance(space, spaces.Box) and len(space.shape) == 1 and np.issubdtype(space.dtype, np.floating)
        if not vector:
            return f"the {what} space {space} is not a one-dimensional Box of floating-point numbers"
    if not np.isfinite([env.action_space.low, env.action_space.high]).all():  # type: ignore[attr-defined]
        return f"the action space {env.action_space} is not bounded"
    return None
