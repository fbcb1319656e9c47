"""Many copies of one stock MuJoCo task, stepped in threads inside one process."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from sb3_agpo.checkpoint.environment import capture_environment, restore_environment
from sb3_agpo.dynamics.interface import Array
from sb3_agpo.dynamics.mujoco import FiniteDifferences
from sb3_agpo.dynamics.recorder import ProviderReport, StepRecords, choose_dynamics
from sb3_agpo.dynamics.tasks import TaskModel, find_task_model
from sb3_agpo.vec_env.environments import (
    GymEnv,
    build_environments,
    check_functions,
    check_integers,
    check_shared_model,
    describe_options,
    environment_functions,
    find_task,
    make_options,
)
from sb3_agpo.vec_env.episodes import Episodes
from sb3_agpo.vec_env.recording import BatchRecorder
from sb3_agpo.vec_env.simulation import BatchSimulation, own_arrays

#: types of attributes that give no access to a simulator
_PLAIN = (type(None), bool, int, float, str)


class _PendingStep(NamedTuple):
    """What :meth:`MujocoVecEnv.step_wait` needs to know of :meth:`MujocoVecEnv.step_async`."""

    actions: NDArray[Any]  # (n_envs, nu)
    recorders: list[BatchRecorder]
    states: Array | None  # (n_envs, nx) before the step, if it is recorded


class MujocoVecEnv(VecEnv):
    """
    Copies of one of Gymnasium's MuJoCo tasks (versions 4 and 5), stepped in threads inside one process.

    Observations, rewards, ends of episodes and resets equal those of a ``DummyVecEnv`` of the same environments bit for
    bit, whatever the number of threads. The simulators are stepped in parallel; observations, rewards and episode
    statistics are computed for all environments at once.

    Each environment is a real Gymnasium environment with ``TimeLimit`` and ``Monitor``, which resets and renders itself
    and can be reached by :meth:`get_attr` and :meth:`env_method`. All share one ``MjModel``: whoever changes it changes
    all of them. Options of the task that are changed later count from the next step on, and must be changed in all alike.

    What ``info`` holds: ``TimeLimit.truncated`` always; ``episode`` and ``terminal_observation`` in the last step of an
    episode. The task's own entries (``x_position``, ``reward_ctrl``, ...) come from Gymnasium's code for single
    environments, which threads do not speed up; they are left out unless ``full_info`` asks for them.

    AGPO takes the derivatives of the steps from this class directly, without recorders in the environments.

    :param env_id: id of a stock task, such as "Hopper-v5"; or functions that build one environment each, as SB3's vectorised
        environments take them, so that ``make_vec_env(..., vec_env_cls=MujocoVecEnv)`` works. Wrappers other than those
        of ``gymnasium.make`` and an outermost ``Monitor`` are refused
    :param n_envs: number of environments; None for 1, or for the number of functions
    :param env_kwargs: options of ``gymnasium.make``; ``render_mode`` is "rgb_array" unless given
    :param threads: threads to step with, the calling one included; None for one per core. Never changes a result
    :param seed: environment i is seeded with ``seed + i`` at the first reset; None for random seeds
    :param max_episode_steps: steps after which an episode is truncated; None for the task's registered number, -1 for
        no limit
    :param full_info: let each environment run Gymnasium's own step, still in threads, for the task's own entries of
        ``info``
    :raises TypeError: if an argument is of the wrong type
    :raises ValueError: if an argument is out of range, the id is not known, or an environment is not a stock task
    """

    def __init__(
        self,
        env_id: str | Sequence[Callable[[], GymEnv]],
        n_envs: int | None = None,
        *,
        env_kwargs: dict[str, Any] | None = None,
        threads: int | None = None,
        seed: int | None = None,
        max_episode_steps: int | None = None,
        full_info: bool = False,
    ) -> None:
        check_integers(n_envs=n_envs, threads=threads, seed=seed, max_episode_steps=max_episode_steps)
        options = make_options(env_kwargs, max_episode_steps)
        if isinstance(env_id, str):
            functions: Sequence[Callable[[], GymEnv]] = environment_functions(env_id, n_envs or 1, options, seed)
        else:
            functions = check_functions(env_id, n_envs, options)
        self._envs = build_environments(functions)
        first = self._envs[0]
        self._episodes = Episodes(self._envs)
        if self._episodes.info_keywords and not full_info:
            raise ValueError(f"Monitor's info_keywords {self._episodes.info_keywords} need `full_info=True`")
        self.threads = min(threads or FiniteDifferences().n_threads, len(self._envs))
        if full_info and first.render_mode == "human":
            self.threads = 1  # windows belong to the thread that opened them
        self._simulation = self._make_simulation(find_task_model(first.unwrapped), full_info)  # type: ignore[arg-type]
        self._pending: _PendingStep | None = None
        self._recorders: weakref.WeakSet[BatchRecorder] = weakref.WeakSet()
        self._to_reset = set(range(len(self._envs)))  # before they can be stepped
        self._is_closed = False
        # Whether somebody may hold an object through which a simulator can be changed behind our back, or has called
        # something since the last step that may have changed the task's options
        self._is_shared = self._is_touched = False
        super().__init__(len(self._envs), first.observation_space, first.action_space)
        self.metadata = first.metadata
        if seed is not None:
            self.seed(seed)

    @property
    def envs(self) -> list[GymEnv]:
        """The environments, wrappers included; step them through this object only."""
        self._is_shared = True
        return self._target_envs(None)

    def _make_simulation(self, task: TaskModel | None, own_step: bool) -> BatchSimulation:
        """The simulators, to be stepped with the options that the environments have now."""
        assert task is not None
        self._described = [describe_options(env) for env in self._envs]
        unwrapped: list[Any] = [env.unwrapped for env in self._envs]
        return BatchSimulation(unwrapped, task, self.threads, own_step=own_step)

    # ------------------------------------------------------------------ stepping

    def reset(self) -> Array:
        """
        Reset all environments.

        :return: observations, shape ``(n_envs, nobs)``
        """
        self._check_open()
        if self._pending is not None:
            self._pending = None
            self._simulation.finish()
        obs = self._empty_observations()
        for index, env in enumerate(self._envs):
            options = {"options": self._options[index]} if self._options[index] else {}
            obs[index], info = env.reset(seed=self._seeds[index], **options)
            self.reset_infos[index] = own_arrays(info)
            self._episodes.begin(index)
        self._simulation.read()
        # Seeds and options are only used once
        self._reset_seeds()
        self._reset_options()
        self._to_reset.clear()
        return obs

    def step_async(self, actions: NDArray[Any]) -> None:
        """
        Start a step of all environments; helper threads work on it until :meth:`step_wait` is called.

        :param actions: in the units of the action space, shape ``(n_envs, nu)``. They may exceed its bounds, as in
            Gymnasium, but must be finite
        :raises TypeError: if they are not numbers
        :raises ValueError: if their shape is wrong or one is not finite
        :raises RuntimeError: before the first reset, after closing, or if a step is under way
        """
        self._check_open()
        if self._to_reset:
            raise RuntimeError("the environments have not been reset yet; call `reset` before `step`")
        self._check_idle()
        actions = self._check_actions(actions)
        self._heed_changes()
        recorders = [recorder for recorder in self._recorders if recorder.recording]
        self._pending = _PendingStep(actions, recorders, self._simulation.states() if recorders else None)
        self._simulation.start(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """
        Wait for the step, and reset the environments whose episodes ended.

        :return: observations ``(n_envs, nobs)``, rewards ``(n_envs,)`` in float32, whether episodes ended, infos
        :raises RuntimeError: if no step is under way
        """
        if self._pending is None:
            raise RuntimeError("no step is under way; call `step_async` before `step_wait`")
        pending, self._pending = self._pending, None
        (obs, rewards, terminated), task_infos = self._simulation.finish()
        if pending.states is not None:
            records = StepRecords(pending.states, pending.actions, rewards, obs.copy())
            for recorder in pending.recorders:
                recorder.record(records)
        if self.render_mode == "human" and task_infos is None:  # Gymnasium's own step renders itself
            self._render_all()
        timed_out = self._episodes.add(rewards)
        dones = terminated | timed_out
        infos: list[dict[str, Any]] = task_infos or [{} for _ in range(self.num_envs)]
        for info in infos:
            info["TimeLimit.truncated"] = False
        for index in np.flatnonzero(dones).tolist():
            infos[index]["TimeLimit.truncated"] = not terminated[index]
            self._restart(index, obs, infos[index])
        return obs, rewards.astype(np.float32), dones, infos

    def _restart(self, index: int, obs: Array, info: dict[str, Any]) -> None:
        """End the episode of one environment and begin the next; ``obs`` and ``info`` are changed in place."""
        info["terminal_observation"] = obs[index].copy()
        self._episodes.end(index, info)
        obs[index], reset_info = self._envs[index].reset()
        self.reset_infos[index] = own_arrays(reset_info)
        self._episodes.begin(index)
        self._simulation.read((index,))

    def _heed_changes(self) -> None:
        """Read the simulators, take time limits and the options of the task anew, if somebody may have changed them."""
        if not (self._is_shared or self._is_touched):
            return
        self._episodes.read_limits()
        own_step, is_replaced = self._simulation.own_step, self._simulation.is_replaced()
        if is_replaced:
            check_shared_model(self._envs)
        # An environment's own step takes its own options in any case
        if is_replaced or (not own_step and self._described != [describe_options(env) for env in self._envs]):
            task = find_task(self._envs[:1] if own_step else self._envs)
            self._simulation.close()
            self._simulation = self._make_simulation(task, own_step)
        self._simulation.read()
        self._is_touched = False

    def _check_actions(self, actions: Any) -> NDArray[Any]:
        """A copy of valid actions, in their own dtype, in which Gymnasium takes the cost of control."""
        actions = np.array(actions)
        if actions.dtype.kind not in "fiu":
            raise TypeError(f"actions must be numbers, got an array of dtype {actions.dtype}; pass float32")
        shape = (self.num_envs, *self.action_space.shape)  # type: ignore[misc]
        if actions.shape != shape:
            raise ValueError(f"actions must have the shape {shape}, one row per environment, got {actions.shape}")
        if not np.isfinite(actions).all():
            index = int(np.flatnonzero(~np.isfinite(actions).all(axis=1))[0])
            raise ValueError(
                f"the action of environment {index} is {actions[index]}, which MuJoCo cannot simulate; "
                "find out where it became non-finite, for example with VecCheckNan"
            )
        return actions

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the environments have been closed; build a new MujocoVecEnv")

    def _check_idle(self) -> None:
        if self._pending is not None:
            raise RuntimeError("a step is under way; call `step_wait` first")

    def _empty_observations(self) -> Array:
        shape = (self.num_envs, *self.observation_space.shape)  # type: ignore[misc]
        return np.empty(shape, dtype=self.observation_space.dtype)

    # ------------------------------------------------------------------ derivatives

    def attach_dynamics(self, differences: FiniteDifferences) -> tuple[BatchRecorder | None, ProviderReport]:
        """
        Start to record steps so that they can be differentiated, see :func:`sb3_agpo.dynamics.provider.attach_dynamics`.

        Steps are recorded for as long as the returned object is kept.

        :param differences: difference options
        :return: the derivatives, None where there are none, and what to tell about it
        """
        self._check_open()
        dynamics, report = choose_dynamics(self._envs[0], differences)
        if dynamics is None:
            return None, report
        if report.kind != "mujoco":
            return None, ProviderReport("none", f"{report.reason}, which takes a DummyVecEnv or a SubprocVecEnv")
        recorder = BatchRecorder(self._envs[0], dynamics, report)
        self._recorders.add(recorder)
        return recorder, report

    # ------------------------------------------------------------------ checkpoints

    def get_checkpoint_state(self) -> dict[str, Any]:
        """
        Read the state of all environments, see :mod:`sb3_agpo.checkpoint.vec_environment`.

        :return: the state, as plain data
        """
        environments = [capture_environment(env) for env in self._target_envs(None)]
        return {"environments": environments, "episodes": self._episodes.get_state()}

    def set_checkpoint_state(self, state: dict[str, Any]) -> list[str]:
        """
        Put all environments where those of another object were.

        :param state: as :meth:`get_checkpoint_state` returned it
        :return: in words, what may differ all the same
        :raises ValueError: if it is the state of other environments
        """
        if not isinstance(state, dict) or len(state.get("environments", ())) != self.num_envs:
            raise ValueError(f"the checkpoint is not that of a {type(self).__name__} with {self.num_envs} environments")
        restored = [restore_environment(*pair) for pair in zip(self._envs, state["environments"], strict=True)]
        self._episodes.set_state(state["episodes"])
        self._simulation.read()
        self._is_touched = True
        return sorted({note for notes in restored for note in notes})

    # ------------------------------------------------------------------ single environments

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        Attribute of environments, whichever of their wrappers has it.

        :param attr_name: its name
        :param indices: indices of environments, None for all
        :return: one value per environment
        """
        values = [env.get_wrapper_attr(attr_name) for env in self._target_envs(indices)]
        self._is_shared |= not all(isinstance(value, _PLAIN) for value in values)
        return values

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        Set an attribute of environments, on the outermost wrapper as ``DummyVecEnv`` does.

        :param attr_name: its name
        :param value: its value
        :param indices: indices of environments, None for all
        """
        self._is_touched = True
        for env in self._target_envs(indices):
            setattr(env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """
        Call a method of environments; those that move the simulator, such as ``set_state`` or ``reset``, are heeded.

        :param method_name: its name
        :param method_args: its arguments
        :param indices: indices of environments, None for all
        :param method_kwargs: its keyword arguments
        :return: one result per environment
        :raises ValueError: for ``step``
        """
        if method_name == "step":
            raise ValueError("environments cannot be stepped one by one; call `step` with the actions of all of them")
        chosen = list(self._get_indices(indices))
        targets = self._target_envs(chosen)
        self._is_touched |= method_name != "reset"
        results = [env.get_wrapper_attr(method_name)(*method_args, **method_kwargs) for env in targets]
        if method_name == "reset":
            self._to_reset.difference_update(chosen)
            for index in chosen:
                self._episodes.begin(index)
        self._simulation.read(chosen)
        self._is_shared |= not all(isinstance(result, _PLAIN) for result in results)
        return results

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """
        Whether environments have a wrapper.

        :param wrapper_class: the wrapper's class
        :param indices: indices of environments, None for all
        :return: one answer per environment
        """
        return [is_wrapped(self._envs[index], wrapper_class) for index in self._get_indices(indices)]

    def _target_envs(self, indices: Iterable[int] | VecEnvIndices) -> list[GymEnv]:
        """Environments at rest, with the counters of their wrappers up to date."""
        self._check_idle()
        chosen = list(self._get_indices(indices))  # type: ignore[arg-type]
        for index in chosen:
            self._episodes.write_back(index)
        return [self._envs[index] for index in chosen]

    # ------------------------------------------------------------------ rendering and closing

    def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
        """
        Render every environment; for a single one call ``env_method("render", indices=0)``.

        :return: images, shape ``(height, width, 3)``; None for every environment unless the render mode is "rgb_array"
        """
        self._check_idle()
        if self.render_mode != "rgb_array":
            warnings.warn(f"the render mode is {self.render_mode!r}; images need 'rgb_array' in `env_kwargs`", stacklevel=2)
            return [None] * self.num_envs
        return self._render_all()

    def _render_all(self) -> list[Any]:
        return [env.render() for env in self._envs]

    def close(self) -> None:
        """Stop all threads and close the environments; more calls do nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._pending = None
        self._simulation.close()
        for recorder in self._recorders:
            recorder.close()
        for env in self._envs:
            env.close()

    def __getstate__(self) -> dict[str, Any]:
        self._check_idle()
        return {**self.__dict__, "_recorders": list(self._recorders)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The environments were made anew, without options that had been changed later
        self.__dict__.update(state, _recorders=weakref.WeakSet(state["_recorders"]), _is_touched=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
