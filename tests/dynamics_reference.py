"""What the tests of derivatives share: real episodes, and slow differences of ``env.step`` that are plain to see."""

from __future__ import annotations

import gc
import os
import random
import time
from importlib import import_module
from typing import Any, NamedTuple

import mujoco
import numpy as np
import torch as th
from gymnasium.envs.mujoco import MujocoEnv
from numpy.typing import NDArray

from sb3_agpo.dynamics.interface import TransitionDerivatives
from sb3_agpo.dynamics.mujoco import FiniteDifferences

Array = NDArray[np.float64]

INTEGRATION = int(mujoco.mjtState.mjSTATE_INTEGRATION.value)
STOCK = {
    "ant": "AntEnv",
    "half_cheetah": "HalfCheetahEnv",
    "hopper": "HopperEnv",
    "humanoid": "HumanoidEnv",
    "humanoidstandup": "HumanoidStandupEnv",
    "inverted_double_pendulum": "InvertedDoublePendulumEnv",
    "inverted_pendulum": "InvertedPendulumEnv",
    "pusher": "PusherEnv",
    "reacher": "ReacherEnv",
    "swimmer": "SwimmerEnv",
    "walker2d": "Walker2dEnv",
}


def stock(task: str, **options: Any) -> MujocoEnv:
    """
    An unwrapped stock environment, version 5.

    :param task: key of :data:`STOCK`
    :param options: constructor options
    :return: the environment, not reset yet
    """
    return getattr(import_module(f"gymnasium.envs.mujoco.{task}_v5"), STOCK[task])(**options)


def play(env: MujocoEnv, n_steps: int, seed: int = 0, scale: float = 1.0) -> MujocoEnv:
    """
    Step an environment with random actions from a reset on, starting anew when an episode ends.

    :param env: the environment
    :param n_steps: number of steps
    :param seed: of reset and actions
    :param scale: factor on the actions
    :return: the same environment
    """
    env.reset(seed=seed)
    env.action_space.seed(seed)
    for _ in range(n_steps):
        if env.step(scale * env.action_space.sample())[2]:
            env.reset()
    return env


def integration_state(env: MujocoEnv) -> Array:
    """
    Everything that MuJoCo's next step depends on.

    :param env: the environment, not changed
    :return: flat state
    """
    state = np.empty(mujoco.mj_stateSize(env.model, INTEGRATION))
    mujoco.mj_getState(env.model, env.data, state, INTEGRATION)
    return state


def everything_of(env: MujocoEnv) -> list[bytes]:
    """
    All that derivatives must leave alone: model, state, every array of ``MjData``, the random generators' states.

    :param env: the environment, not changed
    :return: equal for equal environments
    """
    model = np.empty(mujoco.mj_sizeModel(env.model), dtype=np.uint8)
    mujoco.mj_saveModel(env.model, None, model)
    names = ("qacc", "qacc_warmstart", "ctrl", "xpos", "xipos", "cfrc_ext", "cinert", "cvel", "qfrc_constraint", "sensordata")
    arrays = [model, integration_state(env), np.array(env.data.time), *(getattr(env.data, name) for name in names)]
    own = (env.np_random.bit_generator.state, env.action_space.np_random.bit_generator.state)
    generators = [repr(own), repr(np.random.get_state()), repr(random.getstate()), repr(th.get_rng_state().tolist())]
    plain = {k: repr(v) for k, v in vars(env).items() if k not in ("model", "data", "mujoco_renderer", "_np_random")}
    return [array.tobytes() for array in arrays] + [text.encode() for text in generators] + [repr(plain).encode()]


class Taken(NamedTuple):
    """What one step from a given situation led to."""

    qpos: Array
    qvel: Array
    act: Array
    obs: Array
    reward: float
    terminated: bool


def take_step(
    env: MujocoEnv, live: MujocoEnv, action: NDArray[np.floating], position: Array, velocity: Array, activation: Array
) -> Taken:
    """
    Step another environment from where the live one stands, moved a little.

    :param env: an environment of the same kind, used up
    :param live: not changed
    :param action: the action
    :param position: how far to move the position, tangent coordinates
    :param velocity: how far to move the velocity
    :param activation: how far to move the actuators' activations
    :return: what the step led to
    """
    model, data = env.model, env.data
    mujoco.mj_setState(model, data, integration_state(live), INTEGRATION)
    mujoco.mj_integratePos(model, data.qpos, position, 1.0)
    data.qvel += velocity
    data.act += activation
    mujoco.mj_forward(model, data)
    data.qacc_warmstart[:] = live.data.qacc_warmstart
    obs, reward, terminated, _, _ = env.step(action)
    return Taken(data.qpos.copy(), data.qvel.copy(), data.act.copy(), np.array(obs, dtype=float), float(reward), terminated)


class SlowDerivatives(NamedTuple):
    """Those of one step, without a batch axis; names as in :class:`TransitionDerivatives`."""

    A: Array
    B: Array
    O_x: Array
    O_a: Array
    r_x: Array
    r_a: Array


def slow_derivatives(
    env: MujocoEnv, live: MujocoEnv, action: NDArray[np.floating], differences: FiniteDifferences
) -> SlowDerivatives:
    """
    Differences of ``env.step``, one coordinate after the other.

    :param env: an environment of the same kind as the live one, used up
    :param live: not changed
    :param action: the action
    :param differences: step sizes and scheme
    :return: derivatives relative to ``action``
    """
    nv, na, nu = live.model.nv, live.model.na, len(action)
    sizes = [differences.position_step] * nv + [differences.velocity_step] * nv + [differences.activation_step] * na
    half_range = 0.5 * (live.action_space.high.astype(float) - live.action_space.low)
    columns = []
    for i, size in enumerate([*sizes, *(differences.action_step * half_range)]):
        move = np.zeros(2 * nv + na + nu)
        move[i] = size
        high, low = move[2 * nv + na :], -move[2 * nv + na :]
        if differences.centred:
            high = np.minimum(high, live.action_space.high - action)
            low = np.maximum(low, live.action_space.low - action)
        else:
            low = np.zeros(nu)
            if np.any(action + high > live.action_space.high):
                high = -high
        backward = -move if differences.centred else np.zeros_like(move)
        ends = []
        for state, act in ((move[: 2 * nv + na], high), (backward[: 2 * nv + na], low)):
            parts = np.split(state, [nv, 2 * nv])
            ends.append(take_step(env, live, action.astype(float) + act, *parts))
        distance = (high - low).sum() if i >= 2 * nv + na else size * (2 if differences.centred else 1)
        columns.append(difference_of(env, *ends) / distance)
    jacobian = np.stack(columns, axis=1)
    ndx, nobs = 2 * nv + na, live.observation_space.shape[0]
    change, obs, reward = np.split(jacobian, [ndx, ndx + nobs])
    reward = reward[0]
    return SlowDerivatives(change[:, :ndx], change[:, ndx:], obs[:, :ndx], obs[:, ndx:], reward[:ndx], reward[ndx:])


def difference_of(env: MujocoEnv, forward: Taken, backward: Taken) -> Array:
    """
    What changed between two steps: state, observation, reward (not where only one ended the episode).

    :param env: whose model tells how positions differ
    :param forward: the one
    :param backward: the other
    :return: shape ``(ndx + nobs + 1,)``
    """
    position = np.empty(env.model.nv)
    mujoco.mj_differentiatePos(env.model, position, 1.0, backward.qpos, forward.qpos)
    reward = 0.0 if forward.terminated != backward.terminated else forward.reward - backward.reward
    changes = [position, forward.qvel - backward.qvel, forward.act - backward.act, forward.obs - backward.obs, [reward]]
    return np.concatenate(changes)


def assert_agree(actual: TransitionDerivatives, expected: SlowDerivatives, index: int = 0, tolerance: float = 1e-6) -> None:
    """
    Compare derivatives, relative to the largest entry of each matrix.

    :param actual: a batch
    :param expected: of one step
    :param index: of that step in the batch
    :param tolerance: relative
    """
    assert actual.valid[index]
    for name, value in expected._asdict().items():
        scale = max(1.0, np.abs(value).max())
        np.testing.assert_allclose(getattr(actual, name)[index], value, rtol=0, atol=tolerance * scale, err_msg=name)


def assert_same_bits(actual: TransitionDerivatives, expected: TransitionDerivatives) -> None:
    """
    Compare two batches bit for bit.

    :param actual: the one
    :param expected: the other
    """
    for name in TransitionDerivatives._fields:
        first, second = getattr(actual, name), getattr(expected, name)
        assert first.shape == second.shape and first.dtype == second.dtype, name
        np.testing.assert_array_equal(first, second, err_msg=name)


def running_threads() -> set[str]:
    """
    List the threads of this process, those of MuJoCo included.

    :return: their numbers
    """
    gc.collect()
    return set(os.listdir("/proc/self/task"))


def count_new_threads(known: set[str], most: int) -> int:
    """
    Count the threads that were not there before.

    The system lists a thread for a moment after it was waited for, a long one on a busy machine.

    :param known: those that were, which may have ended in the meantime
    :param most: how many new ones there may be: the end of others is waited for
    :return: the number
    """
    deadline = time.monotonic() + 120.0
    while (count := len(running_threads() - known)) > most and time.monotonic() < deadline:
        time.sleep(0.02)
    return count
