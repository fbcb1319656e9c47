"""The state of a vectorised environment, its wrappers and all its environments included, as plain data."""

from __future__ import annotations

import os
import random
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecVideoRecorder
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

from sb3_agpo.checkpoint.environment import (
    KNOWN_PACKAGES,
    State,
    capture_environment,
    is_inert,
    output_attributes,
    restore_environment,
)
from sb3_agpo.checkpoint.plain_data import is_plain

#: attributes of wrappers that are no state of their own
STRUCTURAL = ("venv", "class_attributes", "num_envs", "render_mode", "reset_infos", "metadata")
#: attributes of SB3's vectorised environments, which are no state either or are saved with the environments
STOCK = (
    *STRUCTURAL,
    "envs",
    "keys",
    "buf_obs",
    "buf_dones",
    "buf_rews",
    "buf_infos",
    "actions",
    "waiting",
    "closed",
    "remotes",
    "work_remotes",
    "processes",
)
#: what waits for the next reset
FOR_RESET = ("_seeds", "_options")


def capture_vec_environment(env: VecEnv) -> State:
    """
    Read the state of a vectorised environment between two steps, without changing anything.

    :param env: vectorised environment, wrapped or not
    :return: its state; ``environments`` is None if it cannot be read, and ``reason`` says why
    """
    wrappers: list[State] = []
    while isinstance(env, VecEnvWrapper):
        wrappers.append(_capture_wrapper(env))
        env = env.venv
    environments, reason = _capture_environments(env)
    notes = [name for wrapper in wrappers for name in wrapper.pop("unknown")]
    own, unknown = _capture_own(env)
    notes += unknown
    for_reset = {name: getattr(env, name) for name in FOR_RESET}
    notes += [f"`{name[1:]}` for the next reset could not be saved" for name in FOR_RESET if not is_plain(for_reset[name])]
    return {
        "wrappers": wrappers,
        "environments": environments,
        "reason": reason,
        "notes": notes,
        "own": own,
        "for_reset": {name: value for name, value in for_reset.items() if is_plain(value)},
    }


def restore_vec_environment(env: VecEnv, state: State) -> list[str] | None:
    """
    Put a vectorised environment where another one was.

    :param env: environment made as the other one was; it is reset first
    :param state: as :func:`capture_vec_environment` returned it
    :return: in words, what may differ all the same; None if the environments could not be put back and begin new episodes
    :raises ValueError: if the environment is made in another way
    """
    wrappers: list[VecEnvWrapper] = []
    inner = env
    while isinstance(inner, VecEnvWrapper):
        wrappers.append(inner)
        inner = inner.venv
    names, expected = ([type(w).__name__ for w in wrappers], [w["class"] for w in state["wrappers"]])
    if names != expected:
        raise ValueError(
            f"the wrappers of the vectorised environment are {names}, those of the checkpoint {expected}; wrap it in the same "
            "way"
        )
    env.reset()  # whatever is not saved begins as it does in any run
    inner._reset_seeds()
    inner._reset_options()
    vars(inner).update(state.get("for_reset", {}))
    vars(inner).update(state.get("own", {}))  # not in checkpoints of before
    for wrapper, wrapper_state in zip(wrappers, state["wrappers"], strict=True):
        _restore_wrapper(wrapper, wrapper_state)
    if state["environments"] is None:
        return None
    return [*state["notes"], *_restore_environments(inner, state["environments"])]


# ---------------------------------------------------------------------- wrappers of vectorised environments


def _capture_wrapper(wrapper: VecEnvWrapper) -> State:
    """Plain attributes and stacked frames of a wrapper."""
    attributes: State = {}
    stacks: State = {}
    unknown: list[str] = []
    for key, value in vars(wrapper).items():
        if key in STRUCTURAL or isinstance(value, gym.Space):
            continue
        if isinstance(value, StackedObservations):
            stacks[key] = _frames(value)
        elif is_plain(value):
            attributes[key] = value
        elif type(wrapper).__module__.split(".")[0] not in KNOWN_PACKAGES and not is_inert(value):
            unknown.append(f"{type(wrapper).__name__}.{key} is a {type(value).__name__}")
    return {"class": type(wrapper).__name__, "attributes": attributes, "stacks": stacks, "unknown": unknown}


def _capture_own(env: VecEnv) -> tuple[State, list[str]]:
    """Plain attributes that a class derived from one of SB3's has of its own, and the names of those that are not plain."""
    stock = type(env) in (DummyVecEnv, SubprocVecEnv) or not isinstance(env, DummyVecEnv | SubprocVecEnv)
    if stock or callable(getattr(type(env), "get_checkpoint_state", None)):
        return {}, []
    own = {
        key: value for key, value in vars(env).items() if key not in (*STOCK, *FOR_RESET) and not isinstance(value, gym.Space)
    }
    unknown = [
        f"{type(env).__name__}.{key} is a {type(value).__name__}"
        for key, value in own.items()
        if not (is_plain(value) or is_inert(value))
    ]
    return {key: value for key, value in own.items() if is_plain(value)}, unknown


def _restore_wrapper(wrapper: VecEnvWrapper, state: State) -> None:
    kept = output_attributes(wrapper)
    vars(wrapper).update({key: value for key, value in state["attributes"].items() if key not in kept})
    if isinstance(wrapper, VecVideoRecorder) and wrapper.recording:
        wrapper.video_path = os.path.join(wrapper.video_folder, wrapper.video_name)
    for key, frames in state["stacks"].items():
        _set_frames(getattr(wrapper, key), frames)


def _frames(stack: StackedObservations[Any]) -> Any:
    """Frames of a stack, by key for dictionary observations."""
    if hasattr(stack, "sub_stacked_observations"):
        return {key: _frames(part) for key, part in stack.sub_stacked_observations.items()}
    return stack.stacked_obs


def _set_frames(stack: StackedObservations[Any], frames: Any) -> None:
    if hasattr(stack, "sub_stacked_observations"):
        for key, part in stack.sub_stacked_observations.items():
            _set_frames(part, frames[key])
    else:
        stack.stacked_obs = frames


# ---------------------------------------------------------------------- environments


class AccessInstaller:
    """
    Gives the environments inside a worker process methods by which their state can be read and written.

    As with :class:`~sb3_agpo.dynamics.recorder.RecorderInstaller`, ``env_is_wrapped`` is the one call of SB3 that hands the
    worker's environment to something of ours.
    """

    def __instancecheck__(self, env: Any) -> bool:
        env.capture_checkpoint = partial(_capture_with_generators, env)
        env.restore_checkpoint = partial(_restore_or_explain, env)
        return True


def _capture_with_generators(env: gym.Env[Any, Any]) -> State:
    """What :func:`capture_environment` does, and the state of the global generators of the worker process."""
    generators = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False), "torch": th.get_rng_state()}
    return {**capture_environment(env), "generators": generators}


def _restore_or_explain(env: gym.Env[Any, Any], state: State) -> list[str] | ValueError:
    """What :func:`restore_environment` does; its error is returned, as raising it would end the worker process."""
    try:
        notes = restore_environment(env, state)
    except ValueError as error:
        return error
    if "generators" in state:  # not in checkpoints of before
        random.setstate(state["generators"]["python"])
        np.random.set_state(state["generators"]["numpy"])
        th.set_rng_state(state["generators"]["torch"])
    return notes


def _capture_environments(env: VecEnv) -> tuple[Any, str]:
    """State of the environments, or None and the reason."""
    if callable(getattr(type(env), "get_checkpoint_state", None)):
        return env.get_checkpoint_state(), ""  # type: ignore[attr-defined]
    if isinstance(env, DummyVecEnv):
        states = [capture_environment(single) for single in env.envs]
    elif _install_access(env):
        states = env.env_method("capture_checkpoint")
    else:
        return None, f"{type(env).__name__} gives no access to its environments; wrap each in Monitor"
    lost = [name for state in states if state["lost"] for name in state["unknown"]]
    if lost:
        return None, f"{lost[0]}, which cannot be saved; offer `get_checkpoint_state` and `set_checkpoint_state`"
    return states, ""


def _restore_environments(env: VecEnv, state: Any) -> list[str]:
    """Put the environments back; in words, what may differ all the same."""
    if callable(getattr(type(env), "set_checkpoint_state", None)):
        return env.set_checkpoint_state(state) or []  # type: ignore[attr-defined]
    if isinstance(state, dict):
        raise ValueError(
            f"the checkpoint is of another kind of vectorised environment than {type(env).__name__}; use the same"
        )
    if isinstance(env, DummyVecEnv):
        notes = [restore_environment(single, own) for single, own in zip(env.envs, state, strict=True)]
    elif _install_access(env):
        notes = [env.env_method("restore_checkpoint", own, indices=index)[0] for index, own in enumerate(state)]
        for note in notes:
            if isinstance(note, ValueError):
                raise note
    else:
        raise ValueError(f"{type(env).__name__} gives no access to its environments; wrap each in Monitor")
    return sorted({note for own in notes for note in own})


def _install_access(env: VecEnv) -> bool:
    """Whether environments in other processes can be reached."""
    try:
        env.env_is_wrapped(AccessInstaller())  # type: ignore[arg-type]
        return env.has_attr("capture_checkpoint")
    except (AttributeError, NotImplementedError):
        return False
