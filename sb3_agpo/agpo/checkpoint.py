"""
Checkpoints of AGPO that a run goes on from bit for bit: what is saved of a model, and how it is put back.

Files and environments are the matter of :mod:`sb3_agpo.checkpoint`. What cannot be saved as plain data (a function for a
schedule, a policy class of the user's own) has to be given to ``resume`` again, which says so.
"""

from __future__ import annotations

import inspect
import random
import re
import warnings
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import recursive_getattr, recursive_setattr
from stable_baselines3.common.type_aliases import GymEnv, TrainFreq
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_agpo.__about__ import __version__
from sb3_agpo.agpo.faults import explained_faults
from sb3_agpo.agpo.n_step import end_last_episode
from sb3_agpo.checkpoint.directory import read_newest, write_checkpoint
from sb3_agpo.checkpoint.plain_data import decode, encode, is_plain, same_data, set_space_generators, space_generators
from sb3_agpo.checkpoint.vec_environment import capture_vec_environment, restore_vec_environment

if TYPE_CHECKING:
    from sb3_agpo.agpo.agpo import AGPO

AGPOType = TypeVar("AGPOType", bound="AGPO")
State = dict[str, Any]

#: constructor arguments that are given anew on resuming
GIVEN_ANEW = ("self", "policy", "env", "device", "_init_setup_model")
#: attributes of a model that are made of others, or belong to one call of ``learn``; ``save`` leaves them out too
MADE_ANEW = (
    "actor",
    "critic",
    "critic_target",
    "_critic_parameters",
    "_target_parameters",
    "_actor_parameters",
    "_average_parameters",
    "critic_lr_schedule",
    "ent_coef_lr_schedule",
    "dynamics",
    "derivative_buffer",
    "gradient_correction",
    "_statistics",
    "_state_before_rollout",
    "_is_mid_rollout",
    "_stored_timesteps",
    "_is_step_unrecorded",
)
#: attributes of a model that are not saved as they are, but in another way if at all
NOT_ATTRIBUTES = (
    *MADE_ANEW,
    "policy",
    "policy_class",
    "log_ent_coef",
    "ent_coef_tensor",
    "ent_coef_optimizer",
    "batch_norm_stats",
    "batch_norm_stats_target",
    "lr_schedule",
    "replay_buffer",
    "rollout_buffer",
    "_automatic_buffer",
    "env",
    "provider_report",
    "_vec_normalize_env",
    "observation_space",
    "action_space",
    "n_envs",
    "device",
    "_logger",
    "_custom_logger",
    "start_time",
)
#: attributes of buffers that are no experience
NOT_EXPERIENCE = ("device", "env", "observation_space", "action_space")
#: constructor arguments that buffers keep too, and that may be changed on the way
ARGUMENTS_OF_BUFFERS = ("n_steps", "gamma", "horizon", "rollout_size")
#: what else a replay buffer makes of an argument
MADE_OF_ARGUMENTS = {"n_sampled_goal": ("her_ratio",)}
#: arguments that cannot be changed on the way, and what the checkpoint holds instead
NOT_TO_CHANGE = {
    "optimize_memory_usage": "transitions that are stored in another way",
    "replay_buffer_kwargs.copy_info_dict": "transitions without their infos",
    "policy_kwargs.optimizer_class": "the optimisers' state, settings included",
    "policy_kwargs.optimizer_kwargs": "the optimisers' state, settings included",
}


class TorchGenerators(NamedTuple):
    """States of torch's generators."""

    cpu: th.Tensor
    gpus: list[th.Tensor]  # empty if the model is on none


def torch_generators(device: th.device) -> TorchGenerators:
    """
    Read the generators that a model draws from.

    :param device: the model's device
    :return: their states
    """
    return TorchGenerators(th.get_rng_state(), th.cuda.get_rng_state_all() if _is_gpu(device) else [])


def _is_gpu(device: th.device) -> bool:
    return device.type == "cuda"


def save_checkpoint(
    model: AGPO, directory: str | Path, keep: int = 1, torch_generator: TorchGenerators | th.Tensor | None = None
) -> Path:
    """
    Add a checkpoint to a directory; the last one stays until the new one is complete.

    To be called between two calls of ``learn`` or when a rollout begins, not in the middle of one. Every run needs a directory
    of its own.

    :param model: the model
    :param directory: directory of checkpoints, made if it does not exist
    :param keep: checkpoints to keep, the new one included
    :param torch_generator: state of torch's generators to go on with, or of that of the CPU alone; None for those of now
    :return: the new checkpoint
    :raises ValueError: if ``keep`` is not positive, or the model has no environment
    :raises OSError: if it cannot be written; checkpoints that were there stay as they were
    :raises RuntimeError: in the middle of a rollout, when the last step is not stored yet; or if a worker process of the
        environment has ended, naming it
    """
    if keep < 1:
        raise ValueError(f"`keep` must be at least 1, got {keep!r}")
    if model.env is None:
        raise ValueError("a model without environment has no run to go on with; call `set_env`, or use `save`")
    if model._is_mid_rollout:
        raise RuntimeError(
            "the last step is not stored yet, so that nothing could go on from here; let `ResumableCheckpointCallback` save "
            "checkpoints while learning, or call `save_checkpoint` between two calls of `learn`"
        )
    with explained_faults(model.env):
        state = capture_model(model, torch_generator)
    return write_checkpoint(Path(directory), encode(state, "model"), model.num_timesteps, keep)


def resume(cls: type[AGPOType], directory: str | Path, env: GymEnv | str, **kwargs: Any) -> AGPOType:
    """
    Make a model that goes on where a checkpoint was saved.

    :param cls: class of the model
    :param directory: directory of checkpoints, or one of them
    :param env: environment made as that of the checkpoint was; it is put back to where it was
    :param kwargs: constructor arguments to change, and those that could not be saved
    :return: the model; call ``learn(..., reset_num_timesteps=False)``
    :raises ValueError: if there is no checkpoint, it is damaged or of another version, the environment does not fit, or an
        argument that could not be saved is missing
    """
    checkpoint, data = read_newest(Path(directory))
    try:
        state = decode(data.structure, data.arrays)
        arguments = dict(state["arguments"])
        missing = sorted(set(state["to_be_given"]) - set(kwargs))
    except (KeyError, TypeError) as error:
        raise ValueError(f"the checkpoint {checkpoint} is not that of a model ({error!r})") from error
    if missing:
        names = ", ".join(f"{name}=..." for name in missing)
        raise ValueError(
            f"the checkpoint {checkpoint} could not hold {missing}; give them again: resume(directory, env, {names})"
        )
    changed = check_changes(arguments, kwargs)
    model = make_model(cls, env, arguments, kwargs)
    check_same_task(model, state["task"])
    restore_model(model, state, changed)
    return model


def check_changes(saved: State, given: State) -> set[str]:
    """
    Find the arguments that are changed, and refuse those that the checkpoint would silently replace.

    :param saved: constructor arguments of the checkpoint's model
    :param given: those given anew
    :return: names of what is changed; of what dictionaries hold in the form "replay_buffer_kwargs.n_sampled_goal"
    :raises ValueError: naming one that cannot be changed
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for name in given.keys() & saved.keys():
        here, there = given[name], saved[name]
        if name in ("policy_kwargs", "replay_buffer_kwargs"):
            here, there = here or {}, there or {}
            changed |= {f"{name}.{key}": (here.get(key), there.get(key)) for key in {*here, *there}}
        else:
            changed[name] = here, there
    changed = {name: values for name, values in changed.items() if not same_data(*values)}
    for name, (here, there) in sorted(changed.items()):
        reason = NOT_TO_CHANGE.get(name)
        if name == "ent_coef" and isinstance(here, str) and isinstance(there, str):
            reason = "the temperature as it has been learned"
        if reason is not None:
            raise ValueError(
                f"`{name}` is {here!r}, that of the checkpoint was {there!r}; do not change it, as the checkpoint holds "
                f"{reason}"
            )
    return set(changed)


def make_model(cls: type[AGPOType], env: GymEnv | str, saved: State, given: State) -> AGPOType:
    """
    Make a model with the arguments of another one.

    :param cls: class of the model
    :param env: environment
    :param saved: constructor arguments of the other model, the policy among them
    :param given: those that are to be changed
    :return: the model
    :raises TypeError: if there is no such argument
    """
    arguments = {**saved, **given}
    policy = arguments.pop("policy")
    while True:
        try:
            return cls(policy, env, **arguments)
        except TypeError as error:
            # A subclass that hands `**kwargs` on may choose some arguments itself: then its choice holds
            chosen = re.search(r"multiple values for keyword argument '(\w+)'", str(error))
            if chosen is None or chosen[1] in given or chosen[1] not in arguments:
                raise
            del arguments[chosen[1]]


# ---------------------------------------------------------------------- saving


def capture_model(model: AGPO, torch_generator: TorchGenerators | th.Tensor | None = None) -> State:
    """
    Everything that the rest of a run depends on.

    :param model: the model
    :param torch_generator: state of torch's generators, or of that of the CPU alone; None for those of now
    :return: the state, made of what plain data can hold
    """
    assert model.env is not None and model.replay_buffer is not None
    arguments, to_be_given = capture_arguments(model)
    attributes, left_out = capture_attributes(model)
    replay_buffer, lost = capture_replay_buffer(model.replay_buffer)
    return {
        "package_version": __version__,
        "arguments": arguments,
        "to_be_given": to_be_given,
        "task": describe_task(model),
        "attributes": attributes,
        "left_out": [*left_out, *(f"replay_buffer.{name}" for name in lost)],
        "parameters": model.get_parameters(),
        "variables": {name: recursive_getattr(model, name) for name in model._get_torch_save_params()[1]},
        "replay_buffer": replay_buffer,
        "rollout_buffer": _without_device(model.rollout_buffer),
        "derivative_buffer": _without_device(model.derivative_buffer),
        "correction_memory": model.gradient_correction.get_memory() if model.gradient_correction is not None else None,
        "records": list(model.dynamics.get_records()) if model.dynamics is not None else [],
        "environment": capture_vec_environment(model.env),
        "generators": capture_generators(model, torch_generator),
    }


def capture_arguments(model: AGPO) -> tuple[State, list[str]]:
    """
    Arguments that make the same model again.

    :param model: the model
    :return: those that plain data can hold, and the names of the others
    """
    arguments: State = {"policy": model.policy_class}
    for name in constructor_arguments(type(model)):
        stored = name if hasattr(model, name) else f"_{name}"
        if name not in GIVEN_ANEW and hasattr(model, stored):
            value = getattr(model, stored)
            arguments[name] = str(value) if isinstance(value, Path) else value
    frequency = model.train_freq
    if isinstance(frequency, TrainFreq) and "train_freq" in arguments:
        arguments["train_freq"] = (frequency.frequency, frequency.unit.value)
    if model._automatic_buffer and "replay_buffer_class" in arguments:
        arguments["replay_buffer_class"] = None
    to_be_given = [name for name, value in arguments.items() if not is_plain(value)]
    return {name: value for name, value in arguments.items() if name not in to_be_given}, to_be_given


def constructor_arguments(cls: type[AGPO]) -> list[str]:
    """
    Names of the arguments that a class can be made with.

    :param cls: AGPO, or a subclass
    :return: those of its constructor and, as long as one hands ``**kwargs`` on, of the constructors that it inherits
    """
    names: dict[str, None] = {}
    for ancestor in cls.__mro__:  # up to AGPO, which hands nothing on
        if "__init__" not in vars(ancestor):
            continue
        parameters = inspect.signature(vars(ancestor)["__init__"]).parameters.values()
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names.update(dict.fromkeys(parameter.name for parameter in parameters if parameter.kind not in variable))
        if all(parameter.kind != inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return list(names)


def capture_attributes(model: AGPO) -> tuple[State, list[str]]:
    """
    Counters, statistics and whatever else a model keeps in plain attributes.

    :param model: the model
    :return: the attributes, and the names of those that plain data cannot hold
    """
    arguments = constructor_arguments(type(model))
    own = {
        name: value
        for name, value in vars(model).items()
        if name not in NOT_ATTRIBUTES and name not in arguments and name.removeprefix("_") not in arguments
    }
    # The networks learn in place: a tensor put back as a new object would be another one than the optimiser's
    left_out = [name for name, value in own.items() if isinstance(value, th.Tensor) or not is_plain(value)]
    return {name: value for name, value in own.items() if name not in left_out}, left_out


def capture_replay_buffer(buffer: ReplayBuffer) -> tuple[State, list[str]]:
    """
    The experience in a replay buffer; memory that is not in use yet is left out.

    :param buffer: the buffer
    :return: its attributes, and the names of those that plain data cannot hold
    """
    memory = (buffer.buffer_size, buffer.n_envs)
    used = _rows_in_use(buffer.buffer_size, buffer.full, buffer.pos)

    def in_use(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: in_use(item) for key, item in value.items()}
        return value[:used] if isinstance(value, np.ndarray) and value.shape[:2] == memory else value

    state = {name: in_use(value) for name, value in vars(buffer).items() if name not in NOT_EXPERIENCE}
    if isinstance(buffer, HerReplayBuffer):
        if buffer.copy_info_dict:
            raise ValueError("`infos` of a HerReplayBuffer with copy_info_dict=True cannot be saved; use copy_info_dict=False")
        del state["infos"]  # empty
    lost = [name for name, value in state.items() if not is_plain(value)]
    return {name: value for name, value in state.items() if name not in lost}, lost


def _rows_in_use(size: int, full: bool, pos: int) -> int:
    """One more than written: with `optimize_memory_usage` the next observation is where the next transition will be."""
    return size if full else min(pos + 1, size)


def _without_device(buffer: Any) -> State:
    state: State = dict(buffer.__getstate__())
    state.pop("device", None)
    return state


def capture_generators(model: AGPO, torch_generator: TorchGenerators | th.Tensor | None) -> State:
    """
    All sources of random numbers except those of the environments.

    :param model: the model
    :param torch_generator: state of torch's generators, or of that of the CPU alone; None for those of now
    :return: their states
    """
    generators = torch_generators(model.device)
    if isinstance(torch_generator, TorchGenerators):
        generators = torch_generator
    elif torch_generator is not None:
        generators = generators._replace(cpu=torch_generator)
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": generators.cpu,
        "cuda": generators.gpus,
        "action_space": space_generators(model.action_space),
    }


def describe_task(model: AGPO) -> State:
    """
    What must be equal in the environment of a resumed run.

    :param model: the model
    :return: its spaces and the number of environments, in words and numbers
    """
    return {
        "observation space": repr(model.observation_space),
        "action space": repr(model.action_space),
        "number of environments": model.n_envs,
    }


# ---------------------------------------------------------------------- going on


def check_same_task(model: AGPO, task: State) -> None:
    """
    Refuse another task than the checkpoint's.

    :param model: the new model
    :param task: as :func:`describe_task` returned it
    :raises ValueError: naming what differs
    """
    for name, value in describe_task(model).items():
        if value != task[name]:
            raise ValueError(
                f"the {name} of the environment is {value}, that of the checkpoint is {task[name]}; pass an environment like "
                "the one that was trained in, or use `load` to train in another one"
            )


def restore_model(model: AGPO, state: State, changed: set[str]) -> None:
    """
    Put a new model where another one was.

    :param model: made with the same arguments
    :param state: as :func:`capture_model` returned it
    :param changed: names of arguments that are not the same, as :func:`check_changes` returned them
    """
    assert model.env is not None and model.replay_buffer is not None
    restore_networks(model, state, changed)
    prefix = "replay_buffer_kwargs."
    options = {name.removeprefix(prefix) for name in changed if name.startswith(prefix)}
    restore_replay_buffer(model.replay_buffer, state["replay_buffer"], options)
    vars(model).update(state["attributes"])
    for name in ("ep_info_buffer", "ep_success_buffer"):
        if getattr(model, name) is not None:
            setattr(model, name, deque(getattr(model, name), maxlen=model._stats_window_size))
    restore_derivatives(model, state)
    notes = restore_vec_environment(model.env, state["environment"])
    if model.dynamics is not None:
        model.dynamics.set_records(state["records"])
        model.dynamics.pause()
    if notes is None:
        begin_new_episodes(model)
        notes = [f"the environments begin new episodes, as {state['environment']['reason']}"]
    notes += [f"{name} could not be saved" for name in state["left_out"]]
    if notes:
        warnings.warn(f"The resumed run will not go on bit for bit: {'; '.join(notes)}", stacklevel=4)
    if "seed" in changed:
        model.set_random_seed(model.seed)
    else:
        restore_generators(model, state["generators"])


def restore_networks(model: AGPO, state: State, changed: set[str]) -> None:
    """
    Put networks, optimisers and temperature back.

    :param model: the model
    :param state: as :func:`capture_model` returned it
    :param changed: names of arguments that are not the same
    :raises ValueError: if the networks have other sizes
    """
    try:
        model.set_parameters(state["parameters"], exact_match=True, device=model.device)
    except (RuntimeError, AttributeError, ValueError) as error:
        raise ValueError(
            "the networks differ from those of the checkpoint; do not change `policy_kwargs`, nor `ent_coef` from a learned "
            f"temperature to a fixed one or back ({error})"
        ) from error
    for name, value in state["variables"].items():
        if name == "ent_coef_tensor" and "ent_coef" in changed:
            continue
        # The tensor itself stays, as the optimiser holds it
        recursive_setattr(model, f"{name}.data", value.to(model.device))


def restore_replay_buffer(buffer: ReplayBuffer, state: State, changed: set[str]) -> None:
    """
    Put the experience back.

    :param buffer: an empty replay buffer of the same sizes
    :param state: as :func:`capture_replay_buffer` returned it
    :param changed: names of the buffer's own arguments that are not the same
    :raises ValueError: if the sizes differ, or it cannot be told what the buffer has made of an argument
    """
    size = state["buffer_size"]
    if size != buffer.buffer_size:
        raise ValueError(
            f"the replay buffer has room for {buffer.buffer_size} steps, that of the checkpoint had for {size}; "
            "do not change `buffer_size`"
        )
    hidden = sorted(name for name in changed if not hasattr(buffer, name))
    if hidden:
        raise ValueError(
            f"`replay_buffer_kwargs` differ from the checkpoint's in {hidden}, which {type(buffer).__name__} keeps under "
            "other names; do not change them"
        )
    as_made = {*ARGUMENTS_OF_BUFFERS, *changed, *(name for key in changed for name in MADE_OF_ARGUMENTS.get(key, ()))}
    used = _rows_in_use(size, state["full"], state["pos"])
    memory = (size, buffer.n_envs)

    def put_back(current: Any, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(current, dict):
            return type(value)((key, put_back(current.get(key), item)) for key, item in value.items())
        arrays = isinstance(value, np.ndarray) and isinstance(current, np.ndarray)
        if arrays and current.shape == memory + value.shape[2:] and value.shape[:2] == (used, buffer.n_envs):
            current[:used] = value  # the rest was not in use
            return current
        return value

    for name, value in state.items():
        if name in as_made:
            continue
        setattr(buffer, name, put_back(getattr(buffer, name, None), value))


def restore_derivatives(model: AGPO, state: State) -> None:
    """
    Put windows and stored derivatives back.

    :param model: the model
    :param state: as :func:`capture_model` returned it
    :raises ValueError: if the memory for derivatives differs, and some are stored
    """
    windows, stored = state["rollout_buffer"], state["derivative_buffer"]
    same_memory = stored["memory_bytes"] == model.derivative_buffer.memory_bytes
    if stored["size"] > 0 and not same_memory:
        raise ValueError(
            f"`derivative_memory` is {model.derivative_memory:g} GB, that of the checkpoint was "
            f"{stored['memory_bytes'] / 1e9:g} GB; do not change it"
        )
    vars(model.rollout_buffer).update({name: windows[name] for name in windows if name not in ARGUMENTS_OF_BUFFERS})
    if same_memory:
        model.derivative_buffer.__setstate__(stored)
    if model.gradient_correction is not None:
        model.gradient_correction.set_memory(state["correction_memory"])


def begin_new_episodes(model: OffPolicyAlgorithm) -> None:
    """
    Make an end of the episodes that cannot be gone on with.

    :param model: the model; its environment is reset by the next ``learn``, if it has not been already
    """
    model._last_obs = None  # `learn` resets the environment, and drops steps that wait for their derivatives
    if isinstance(model.replay_buffer, HerReplayBuffer):
        model.replay_buffer.truncate_last_trajectory()
    elif hasattr(model.replay_buffer, "dones"):  # a buffer of the user's own may keep its transitions elsewhere
        end_last_episode(model.replay_buffer)  # type: ignore[arg-type]


def restore_generators(model: AGPO, state: State) -> None:
    """
    Put all sources of random numbers back. Last of all, as making a model uses them.

    :param model: the model
    :param state: as :func:`capture_generators` returned it
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    th.set_rng_state(state["torch"])
    if state["cuda"] and _is_gpu(model.device):
        th.cuda.set_rng_state_all(state["cuda"])
    set_space_generators(model.action_space, state["action_space"])
