"""What the recorded moments really lead to with other actions, what the reward's parts depend on, and what it all costs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_agpo.dynamics.mujoco import Perturbations
from sb3_agpo.dynamics.private_copy import kept_global_generators
from sb3_agpo.dynamics.stepping import FULL_PHYSICS
from sb3_agpo.dynamics.tangent import PositionTangent
from sb3_agpo.gradients.measures import Prediction, prediction, reward_gradient, windows
from sb3_agpo.gradients.recording import Moment, Recording
from sb3_agpo.gradients.replay import MujocoReplay

#: steps to measure the time of
TIMED_STEPS, TIMED_DERIVATIVES = 100, 20
#: smaller relative changes are rounding
TINY = 1e-9


@contextmanager
def _noted(errors: list[Exception]) -> Iterator[None]:
    """Go on if the environment's own code fails at an odd state, and note with what."""
    try:
        yield
    except Exception as error:
        errors.append(error)


def _warn(errors: list[Exception], n_moments: int) -> None:
    """Tell at how many moments the environment's own code failed."""
    if errors:
        description = f"{len(errors)} of {n_moments} moments are left out, at which the environment's own code failed"
        warnings.warn(f"{description}; the first with {type(errors[0]).__name__}: {errors[0]}", RuntimeWarning, stacklevel=3)


def _play(env: gym.Env[Any, Any], actions: NDArray[Any]) -> float:
    """Sum of the rewards of some actions, up to the end of the episode."""
    total = 0.0
    for action in actions:
        _, reward, terminated, _, _ = env.step(action.copy())
        total += float(reward)
        if terminated:
            break
    return total


def measure_predictions(
    recording: Recording,
    *,
    horizon: int,
    noise: float,
    n_actions: int,
    seed: int,
    progress: Callable[[int], object] = lambda _: None,
) -> list[Prediction]:
    """
    Compare the changes of the summed reward that derivatives predict with those that other first actions really lead to.

    :param recording: steps with moments to go back to
    :param horizon: steps of a window; the actions after the first are those of the recording
    :param noise: standard deviation of the first action, in units of the action in [-1, 1]
    :param n_actions: other first actions at each moment
    :param seed: of the noise
    :param progress: called with 1 for each moment
    :return: agreement with each of the difference options; left out are moments whose window has a step without usable
        derivatives and, with a warning, those at which the environment's own code fails
    """
    random = np.random.default_rng(seed)
    usable = recording.jacobians[recording.base].valid
    fits = {first for first in windows(recording.ends, horizon).tolist() if usable[first : first + horizon].all()}
    moments = [moment for moment in recording.moments if moment.step in fits]
    gradients, deviations, changes = [], [], []
    errors: list[Exception] = []
    for moment in moments:
        progress(1)
        actions = recording.actions[moment.step : moment.step + horizon]
        tried = np.clip(
            actions[0] + noise * recording.action_scale * random.standard_normal((n_actions, len(actions[0]))),
            recording.low,
            recording.high,
        ).astype(actions.dtype)
        returns: list[float] = []
        with kept_global_generators(), _noted(errors):
            sequences = [actions, *(np.concatenate([first[None], actions[1:]]) for first in tried)]
            returns = [_play(recording.replay.restart(moment.saved), sequence) for sequence in sequences]
        if not returns:
            continue
        moved, scale = tried.astype(np.float64) - actions[0], recording.action_scale
        deviations.append(np.divide(moved, scale, out=np.zeros_like(moved), where=scale != 0.0))
        changes.append(np.array(returns[1:]) - returns[0])
        gradients.append([reward_gradient(jacobians, moment.step, horizon) for jacobians in recording.jacobians])
    _warn(errors, len(moments))
    if not changes:
        return [Prediction(float("nan"), float("nan"), 0, 0) for _ in recording.jacobians]
    return [prediction(np.stack(own), np.stack(deviations), np.stack(changes)) for own in zip(*gradients, strict=True)]


class RewardPart(NamedTuple):
    """What a part of the reward depends on, over the recorded moments."""

    name: str
    mean: float
    deviation: float  # standard deviation over the moments
    by_action: float  # share of the moments at which it has a derivative by the action
    by_state: float  # share of the moments at which it has a derivative by the state


def reward_parts(recording: Recording, progress: Callable[[int], object] = lambda _: None) -> list[RewardPart]:
    """
    Differentiate the parts of the reward that a MuJoCo environment reports, ``reward...`` in the ``info`` of its steps.

    :param recording: steps with moments to go back to
    :param progress: called with 1 for each moment
    :return: one for each part that is a number; none if the environment reports none or is no MuJoCo environment. Moments at
        which its own code fails are left out, with a warning
    """
    if not isinstance(recording.replay, MujocoReplay):
        return []
    values: dict[str, list[float]] = {}
    by_action: dict[str, list[bool]] = {}
    by_state: dict[str, list[bool]] = {}
    errors: list[Exception] = []
    for moment in recording.moments:
        progress(1)
        infos: list[dict[str, Any]] = [{}]
        with kept_global_generators(), _noted(errors):
            infos, is_action = _perturbed_infos(recording, moment, recording.replay)
        for name, value in infos[0].items():
            if not (name.startswith("reward") and isinstance(value, int | float | np.number)):
                continue
            rows = np.array([float(info.get(name, np.nan)) for info in infos])
            moves = np.abs(rows[1:] - rows[0]) > TINY * max(1.0, abs(rows[0]))
            values.setdefault(name, []).append(rows[0])
            by_action.setdefault(name, []).append(bool(moves[is_action].any()))
            by_state.setdefault(name, []).append(bool(moves[~is_action].any()))
    _warn(errors, len(recording.moments))
    return [
        RewardPart(
            name,
            mean=float(np.mean(values[name])),
            deviation=float(np.std(values[name])),
            by_action=float(np.mean(by_action[name])),
            by_state=float(np.mean(by_state[name])),
        )
        for name in values
    ]


def _perturbed_infos(
    recording: Recording, moment: Moment, replay: MujocoReplay
) -> tuple[list[dict[str, Any]], NDArray[np.bool_]]:
    """``info`` of one step from a moment and from points beside it; which of the latter differ in the action."""
    live = replay.private.live
    assert isinstance(live.action_space, spaces.Box)
    scheme = Perturbations(
        PositionTangent(live.model), int(live.model.na), live.action_space, recording.differences[recording.base]
    )
    physics = np.empty(mujoco.mj_stateSize(live.model, FULL_PHYSICS))
    mujoco.mj_getState(live.model, moment.saved.data, physics, FULL_PHYSICS)
    rows, actions, _ = scheme.perturb(physics[None], recording.actions[moment.step][None])
    infos = []
    for row, action in zip(rows[0], actions[0], strict=True):
        infos.append(replay.private.restore(moment.saved, row).step(action.copy())[4].copy())
    return infos, np.tile(scheme.columns >= scheme.ndx, 2 if scheme.centred else 1)


class Cost(NamedTuple):
    """What one step costs on this machine."""

    step: float  # seconds to play it
    derivative: float  # seconds to differentiate it
    rows: int  # simulated steps to differentiate it, 0 for exact derivatives


def measure_cost(recording: Recording) -> Cost:
    """
    Take the time of playing and of differentiating a step.

    :param recording: steps with at least one moment to go back to
    :return: the cost
    """
    moment = recording.moments[0]
    action = recording.actions[moment.step]
    step = 0.0
    env = recording.replay.restart(moment.saved)
    for _ in range(TIMED_STEPS):
        start, ended = time.perf_counter(), True
        with _noted([]):  # the same action again and again may lead where the environment does not go on
            ended = env.step(action.copy())[2]
        step += time.perf_counter() - start
        if ended:
            env = recording.replay.restart(moment.saved)
    n = min(TIMED_DERIVATIVES, len(recording.states))
    # What was recorded first may have had to start threads or compile something: that is not what later steps cost
    start = time.perf_counter()
    recording.dynamics.differentiate(recording.states[:n], recording.actions[:n])
    return Cost(step / TIMED_STEPS, (time.perf_counter() - start) / n, recording.report.rows_per_transition)
