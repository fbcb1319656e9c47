"""The threaded vectorised environment against DummyVecEnv, bit for bit."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.wrappers import ClipAction, TimeLimit
from sb3_contrib import ARS, TQC, TRPO, CrossQ
from small_models import small_model
from stable_baselines3 import A2C, DDPG, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize, VecVideoRecorder
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.dynamics.mujoco import FiniteDifferences
from sb3_agpo.dynamics.provider import DifferentiableVecEnv, attach_dynamics
from sb3_agpo.vec_env import MujocoVecEnv, can_be_threaded, make_mujoco_vec_env
from sb3_agpo.vec_env.simulation import SharedWork

NAMES = ["Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum", "InvertedPendulum"]
TASKS_V5 = [f"{name}-v5" for name in [*NAMES, "Pusher", "Reacher", "Swimmer", "Walker2d"]]
TASKS_V4 = [f"{name}-v4" for name in [*NAMES, "Reacher", "Swimmer", "Walker2d"]]

pytestmark = pytest.mark.filterwarnings("ignore:.*out of date.*", "ignore:.*deprecated.*")


def make_pair(env_id: str, n_envs: int = 3, seed: int | None = 5, **options: Any) -> tuple[DummyVecEnv, MujocoVecEnv]:
    """
    The same environments twice, not reset yet.

    :param env_id: the task
    :param n_envs: number of environments
    :param seed: of the environments
    :param options: of :func:`make_mujoco_vec_env`
    :return: SB3's and ours
    """
    threaded = make_mujoco_vec_env(env_id, n_envs, seed, **{"threads": 2, **options})
    env_kwargs = dict(options.get("env_kwargs") or {})
    if "max_episode_steps" in options:
        env_kwargs["max_episode_steps"] = options["max_episode_steps"]
    dummy = make_vec_env(env_id, n_envs, seed, env_kwargs=env_kwargs)
    assert isinstance(dummy, DummyVecEnv)
    return dummy, threaded


def draw_actions(env: VecEnv, n_steps: int, seed: int = 0) -> np.ndarray:
    """
    Random actions.

    :param env: the environment
    :param n_steps: number of steps
    :param seed: of the generator
    :return: shape ``(n_steps, n_envs, nu)``, float32
    """
    space = env.action_space
    assert isinstance(space, gym.spaces.Box)
    generator = np.random.default_rng(seed)
    return generator.uniform(space.low, space.high, (n_steps, env.num_envs, *space.shape)).astype(np.float32)


def assert_same_values(expected: Any, actual: Any) -> None:
    """Compare arrays, numbers or dictionaries of them, dtype included; not the time an episode took."""
    if isinstance(expected, dict):
        assert expected.keys() == actual.keys()
        for key in expected.keys() - {"t"}:
            assert_same_values(expected[key], actual[key])
    else:
        assert np.asarray(expected).dtype == np.asarray(actual).dtype
        np.testing.assert_array_equal(expected, actual)


def assert_same_step(expected: VecEnvStepReturn, actual: VecEnvStepReturn, full_info: bool = False) -> None:
    """Compare what two vectorised environments return for a step."""
    for left, right in zip(expected[:3], actual[:3], strict=True):
        assert_same_values(left, right)
    ours = ("TimeLimit.truncated", "terminal_observation", "episode")
    for left, right in zip(expected[3], actual[3], strict=True):
        assert_same_values(left if full_info else {key: left[key] for key in left if key in ours}, right)


def assert_same_run(dummy: VecEnv, threaded: VecEnv, actions: np.ndarray, full_info: bool = False) -> int:
    """
    Step both and compare everything.

    :param dummy: SB3's environments, reset
    :param threaded: ours, reset
    :param actions: shape ``(n_steps, n_envs, nu)``
    :param full_info: whether the infos must be equal in all entries
    :return: number of episodes that ended
    """
    n_ended = 0
    for row in actions:
        expected, actual = dummy.step(row), threaded.step(row)
        assert_same_step(expected, actual, full_info)
        assert_same_values(dict(enumerate(dummy.reset_infos)), dict(enumerate(threaded.reset_infos)))
        n_ended += int(np.sum(expected[2]))
    return n_ended


class TestEquality:
    """Observations, rewards, ends, infos and resets are DummyVecEnv's."""

    @pytest.mark.parametrize("env_id", TASKS_V5)
    def test_version_5(self, env_id: str) -> None:
        dummy, threaded = make_pair(env_id, max_episode_steps=35)
        with threaded:
            np.testing.assert_array_equal(dummy.reset(), threaded.reset())
            assert assert_same_run(dummy, threaded, draw_actions(dummy, 80)) >= 6

    @pytest.mark.parametrize("env_id", TASKS_V4)
    def test_version_4(self, env_id: str) -> None:
        dummy, threaded = make_pair(env_id, n_envs=2, max_episode_steps=20)
        with threaded:
            np.testing.assert_array_equal(dummy.reset(), threaded.reset())
            assert assert_same_run(dummy, threaded, draw_actions(dummy, 45)) >= 4

    @pytest.mark.parametrize(("env_id", "n_steps"), [("HalfCheetah-v5", 1010), ("Hopper-v5", 300), ("Reacher-v5", 110)])
    def test_whole_episodes(self, env_id: str, n_steps: int) -> None:
        dummy, threaded = make_pair(env_id, n_envs=2)
        np.testing.assert_array_equal(dummy.reset(), threaded.reset())
        assert assert_same_run(dummy, threaded, draw_actions(dummy, n_steps)) >= 2

    @pytest.mark.parametrize("env_id", ["Hopper-v5", "Ant-v5", "Reacher-v4"])
    def test_full_info(self, env_id: str) -> None:
        dummy, threaded = make_pair(env_id, max_episode_steps=12, full_info=True)
        np.testing.assert_array_equal(dummy.reset(), threaded.reset())
        assert assert_same_run(dummy, threaded, draw_actions(dummy, 30), full_info=True) >= 6

    @pytest.mark.parametrize(
        ("env_id", "env_kwargs"),
        [
            ("Hopper-v5", {"exclude_current_positions_from_observation": False, "terminate_when_unhealthy": False}),
            ("Ant-v5", {"include_cfrc_ext_in_observation": False, "frame_skip": 2, "main_body": 4}),
            ("Humanoid-v5", {"include_cinert_in_observation": False, "contact_cost_weight": 1e-3}),
        ],
    )
    def test_options(self, env_id: str, env_kwargs: dict[str, Any]) -> None:
        dummy, threaded = make_pair(env_id, env_kwargs=env_kwargs, max_episode_steps=15)
        np.testing.assert_array_equal(dummy.reset(), threaded.reset())
        assert_same_run(dummy, threaded, draw_actions(dummy, 35))

    def test_no_time_limit(self) -> None:
        dummy, threaded = make_pair("Reacher-v5", n_envs=1, max_episode_steps=-1)
        np.testing.assert_array_equal(dummy.reset(), threaded.reset())
        assert assert_same_run(dummy, threaded, draw_actions(dummy, 60)) == 0

    @pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64])
    def test_actions_of_any_dtype_and_size(self, dtype: Any) -> None:
        dummy, threaded = make_pair("HalfCheetah-v5")
        np.testing.assert_array_equal(dummy.reset(), threaded.reset())
        assert_same_run(dummy, threaded, (3.0 * draw_actions(dummy, 20)).astype(dtype))

    def test_a_simulation_that_diverges(self) -> None:
        dummy, threaded = make_pair("HalfCheetah-v5")
        for env in (dummy, threaded):
            env.reset()
            velocities = np.full(9, 1e9)
            env.env_method("set_state", np.zeros(9), velocities, indices=1)  # MuJoCo resets the simulation
        for row in draw_actions(dummy, 5):
            with np.errstate(all="ignore"):
                expected, actual = dummy.step(row), threaded.step(row)
            for left, right in zip(expected[:3], actual[:3], strict=True):
                np.testing.assert_array_equal(left[[0, 2]], right[[0, 2]])
            np.testing.assert_array_equal(expected[0], actual[0])

    def test_threads_do_not_change_bits(self) -> None:
        for env_id in ("Humanoid-v5", "Hopper-v5"):
            envs = [make_mujoco_vec_env(env_id, 5, 1, threads=threads, max_episode_steps=9) for threads in (1, 2, 5, 50)]
            observations = [env.reset() for env in envs]
            assert [env.threads for env in envs] == [1, 2, 5, 5]
            for row in draw_actions(envs[0], 20):
                results = [env.step(row) for env in envs]
                observations = [result[0] for result in results]
                for result in results[1:]:
                    assert_same_step(results[0], result)
            assert np.ptp(observations, axis=0).max() == 0.0
            for env in envs:
                env.close()

    def test_results_belong_to_the_caller(self) -> None:
        dummy, threaded = make_pair("InvertedPendulum-v5")
        np.testing.assert_array_equal(dummy.reset(), threaded.reset())
        for row in draw_actions(dummy, 40):
            expected, actual = dummy.step(row), threaded.step(row)
            assert_same_step(expected, actual)
            for array in actual[:3]:
                array[:] = 1
            for info in actual[3]:
                info.clear()

    def test_infos_belong_to_the_caller(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where Gymnasium gives views of MuJoCo's memory, as it did before 1.4."""
        reset_info = HopperEnv._get_reset_info
        monkeypatch.setattr(HopperEnv, "_get_reset_info", lambda self: {**reset_info(self), "qpos": self.data.qpos})
        env = make_mujoco_vec_env("Hopper-v5", 2, 0, max_episode_steps=3, full_info=True)
        step = env._simulation._step_own

        def with_views(index: int, *rest: Any) -> None:
            step(index, *rest)
            env._simulation._results[index][-1]["qvel"] = env._envs[index].unwrapped.data.qvel  # type: ignore[attr-defined]

        monkeypatch.setattr(env._simulation._work, "_function", with_views)
        env.reset()
        kept = [(env.reset_infos[0]["qpos"], env.reset_infos[0]["qpos"].copy())]
        for row in draw_actions(env, 4):
            infos = env.step(row)[3]
            kept += [
                (infos[1]["qvel"], infos[1]["qvel"].copy()),
                (env.reset_infos[1]["qpos"], env.reset_infos[1]["qpos"].copy()),
            ]
        for value, before in kept:
            np.testing.assert_array_equal(value, before)


class TestSeedsAndResets:
    """Random numbers are drawn as Gymnasium draws them."""

    def test_every_environment_has_its_own_seed(self) -> None:
        many = make_mujoco_vec_env("Hopper-v5", 3, 7)
        first = many.reset()
        for index in range(3):
            np.testing.assert_array_equal(first[index], make_mujoco_vec_env("Hopper-v5", 1, 7 + index).reset()[0])
        assert not np.array_equal(first, many.reset())  # a seed is used once
        assert many.seed(7) == [7, 8, 9]
        np.testing.assert_array_equal(first, many.reset())

    def test_action_spaces_are_seeded(self) -> None:
        dummy, threaded = make_pair("Hopper-v5", seed=3)
        direct = MujocoVecEnv("Hopper-v5", 3, seed=3)
        for left, right, other in zip(dummy.envs, threaded.envs, direct.envs, strict=True):
            sample = left.action_space.sample()
            np.testing.assert_array_equal(sample, right.action_space.sample())
            np.testing.assert_array_equal(sample, other.action_space.sample())
        np.testing.assert_array_equal(threaded.reset(), direct.reset())

    def test_without_a_seed_all_differ(self) -> None:
        observations = np.concatenate([MujocoVecEnv("Hopper-v5", 2).reset() for _ in range(2)])
        assert len(np.unique(observations, axis=0)) == 4

    def test_reset_in_the_middle(self) -> None:
        dummy, threaded = make_pair("Hopper-v5", max_episode_steps=10)
        for _ in range(3):
            np.testing.assert_array_equal(dummy.reset(), threaded.reset())
            assert_same_run(dummy, threaded, draw_actions(dummy, 7))

    def test_reset_cancels_a_step(self) -> None:
        dummy, threaded = make_pair("Hopper-v5")
        for env in (dummy, threaded):
            env.reset()
        threaded.step_async(np.zeros((3, 3), dtype=np.float32))
        np.testing.assert_array_equal(dummy.reset(), threaded.reset())
        assert_same_run(dummy, threaded, draw_actions(dummy, 20))

    def test_reset_of_some(self) -> None:
        dummy, threaded = make_pair("Ant-v5", max_episode_steps=8)
        np.testing.assert_array_equal(dummy.reset(), threaded.reset())
        assert_same_run(dummy, threaded, draw_actions(dummy, 5))
        expected = dummy.env_method("reset", indices=[1, 2], seed=9)
        actual = threaded.env_method("reset", indices=[1, 2], seed=9)
        for left, right in zip(expected, actual, strict=True):
            np.testing.assert_array_equal(left[0], right[0])
        # Lengths and returns of the episodes tell that the counters started anew
        assert assert_same_run(dummy, threaded, draw_actions(dummy, 10, seed=1)) == 3

    def test_first_reset_of_each(self) -> None:
        pair = make_pair("Hopper-v5", n_envs=2)
        for env in pair:
            env.env_method("reset", seed=3, indices=0)
        with pytest.raises(RuntimeError, match="call `reset`"):
            pair[1].step(np.zeros((2, 3)))
        for env in pair:
            env.env_method("reset", seed=4, indices=1)
        assert_same_run(*pair, draw_actions(pair[0], 5))

    def test_options_reach_the_environments_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []
        original = HopperEnv.reset

        def reset(self: HopperEnv, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            seen.append(options)
            return original(self, seed=seed, options=options)

        monkeypatch.setattr(HopperEnv, "reset", reset)
        env = make_mujoco_vec_env("Hopper-v5", 2)
        env.set_options([{"a": 1}, {"b": 2}])
        env.reset()
        env.reset()
        assert seen == [{"a": 1}, {"b": 2}, None, None]

    def test_reset_infos(self) -> None:
        dummy, threaded = make_pair("Hopper-v5")
        for env in (dummy, threaded):
            env.reset()
        assert "x_position" in threaded.reset_infos[0]
        assert_same_values(dict(enumerate(dummy.reset_infos)), dict(enumerate(threaded.reset_infos)))


class TestSimulatorsChangedByHand:
    """A step starts from where the simulators stand, whoever moved them."""

    @pytest.mark.parametrize("env_id", ["Hopper-v5", "Ant-v5", "Reacher-v4"])
    def test_set_state(self, env_id: str) -> None:
        pair = make_pair(env_id)
        for env in pair:
            env.reset()
            data = env.get_attr("data")[2]
            env.env_method("set_state", data.qpos + 0.1, data.qvel - 0.1, indices=[0, 2])
        assert_same_run(*pair, draw_actions(pair[0], 3))

    @pytest.mark.parametrize("env_id", ["Hopper-v5", "Ant-v5"])
    def test_through_an_object_that_was_handed_out(self, env_id: str) -> None:
        pair = make_pair(env_id)
        kept = []
        for env in pair:
            env.reset()
            kept.append(env.get_attr("unwrapped", indices=1)[0])
        for row in draw_actions(pair[0], 3):
            for unwrapped in kept:
                unwrapped.set_state(unwrapped.data.qpos + 0.01, 0.5 * unwrapped.data.qvel)
            assert_same_step(pair[0].step(row), pair[1].step(row))

    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Reacher-v4"])
    def test_an_interrupted_step(self, env_id: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Some simulators have moved, and others not: the next step starts where each is."""
        dummy, threaded = make_pair(env_id, threads=threads)
        np.testing.assert_array_equal(dummy.reset(), threaded.reset())
        rows, calls = draw_actions(dummy, 6), []
        assert_same_run(dummy, threaded, rows[:2])
        original = mujoco.mj_rnePostConstraint

        def interrupted(model: Any, data: Any) -> None:
            calls.append(data)
            if len(calls) == 2:
                raise KeyboardInterrupt
            original(model, data)

        with monkeypatch.context() as patch:
            patch.setattr(mujoco, "mj_rnePostConstraint", interrupted)
            with pytest.raises(KeyboardInterrupt):
                threaded.step(rows[2])
        for single, other in zip(dummy.envs, threaded._envs, strict=True):
            mujoco.mj_copyData(single.unwrapped.data, other.unwrapped.model, other.unwrapped.data)  # type: ignore[attr-defined]
        assert_same_run(dummy, threaded, rows[3:])

    @pytest.mark.parametrize("full_info", [False, True])
    def test_a_model_put_in_place_of_another(self, full_info: bool) -> None:
        pair = make_pair("HalfCheetah-v5", full_info=full_info)
        rows = draw_actions(pair[0], 5)
        for env in pair:
            env.reset()
        for gravity in (-9.0, -2.0):
            model = mujoco.MjModel.from_xml_path(pair[0].envs[0].unwrapped.fullpath)  # type: ignore[attr-defined]
            model.opt.gravity[2] = gravity
            for env in pair:
                for single in env.envs:
                    core: Any = single.unwrapped
                    core.model, core.data = model, mujoco.MjData(model)
            np.testing.assert_array_equal(pair[0].reset(), pair[1].reset())
            assert_same_run(*pair, rows, full_info)
        pair[1].envs[1].unwrapped.model = copy.copy(model)  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=r"environment 1 has another MjModel than environment 0, .* the same new one"):
            pair[1].step(rows[0])

    def test_data_put_in_place_of_others(self) -> None:
        pair = make_pair("Hopper-v5")
        cores = []
        for env in pair:
            env.reset()
            cores.append(env.get_attr("unwrapped")[1])
        assert_same_run(*pair, draw_actions(pair[0], 2))
        for core in cores:
            core.data = mujoco.MjData(core.model)
        assert_same_run(*pair, draw_actions(pair[0], 5))

    def test_the_model_is_shared(self) -> None:
        dummy, threaded = make_pair("HalfCheetah-v5")
        models = threaded.get_attr("model")
        assert all(model is models[0] for model in models)
        for env in (dummy, threaded):
            env.reset()
        models[0].opt.gravity[2] = -3.0
        for model in dummy.get_attr("model"):
            model.opt.gravity[2] = -3.0
        assert_same_run(dummy, threaded, draw_actions(dummy, 10))


class TestOptionsChangedLater:
    """The task's options are the environments' own, whoever changes them and when."""

    @pytest.mark.parametrize("env_id", ["Hopper-v5", "Ant-v5"])
    def test_by_a_method(self, env_id: str) -> None:
        pair = make_pair(env_id)
        for env in pair:
            env.reset()
        for reward in (7.0, 3.0):
            for env in pair:
                for index in (0, 1, 2):  # one by one, so that they differ in between
                    env.env_method("set_wrapper_attr", "_healthy_reward", reward, indices=index)
            assert_same_run(*pair, draw_actions(pair[0], 10))

    def test_through_an_object_that_was_handed_out(self) -> None:
        pair = make_pair("Walker2d-v5")
        kept = []
        for env in pair:
            env.reset()
            kept.append([single.unwrapped for single in env.envs])
        for i, row in enumerate(draw_actions(pair[0], 8)):
            for env in kept[0] + kept[1]:
                env._ctrl_cost_weight = 0.1 * i
                env.model.opt.timestep = 0.002 if i < 4 else 0.001
                env.frame_skip = 4 + i // 2
            assert_same_step(pair[0].step(row), pair[1].step(row))

    def test_by_a_checkpoint(self) -> None:
        pair = make_pair("Hopper-v5", n_envs=1)
        for env in pair:
            env.env_method("set_wrapper_attr", "_healthy_reward", 7.0)
            env.reset()
        restored = make_pair("Hopper-v5", n_envs=1)[1]
        restored.reset()
        restored.set_checkpoint_state(pair[1].get_checkpoint_state())
        for row in draw_actions(pair[0], 10):
            assert_same_step(pair[0].step(row), restored.step(row))

    @pytest.mark.parametrize("full_info", [False, True])
    def test_time_limits(self, full_info: bool) -> None:
        pair = make_pair("Reacher-v5", full_info=full_info)
        for env in pair:
            env.reset()
            env.env_method("set_wrapper_attr", "_max_episode_steps", 5)
            env.env_method("set_wrapper_attr", "_max_episode_steps", 7, indices=1)  # each may have its own
        assert assert_same_run(*pair, draw_actions(pair[0], 15), full_info) == 8

    def test_time_limit_of_a_checkpoint(self) -> None:
        saved, restored = (MujocoVecEnv([lambda limit=limit: TimeLimit(HopperEnv(), limit)]) for limit in (3, 9))
        for env in (saved, restored):
            env.reset()
        restored.set_checkpoint_state(saved.get_checkpoint_state())
        assert [bool(restored.step(np.zeros((1, 3)))[2][0]) for _ in range(6)] == [False, False, True] * 2

    def test_copies_have_the_original_options(self) -> None:
        dummy, threaded = make_pair("Hopper-v5")
        for env in (dummy, threaded):
            env.env_method("set_wrapper_attr", "_healthy_reward", 7.0)
        ours, theirs = copy.deepcopy(threaded), copy.deepcopy(dummy)
        for env in (ours, theirs):
            env.seed(3)
        np.testing.assert_array_equal(ours.reset(), theirs.reset())
        assert_same_run(theirs, ours, draw_actions(dummy, 5))

    def test_not_in_all_environments(self) -> None:
        dummy, threaded = make_pair("Hopper-v5")
        for env in (dummy, threaded):
            env.reset()
            env.env_method("set_wrapper_attr", "_healthy_reward", 7.0, indices=1)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"environment 1 differs from environment 0 .* equal options"):
                threaded.step(draw_actions(threaded, 1)[0])
        for env in (dummy, threaded):
            env.env_method("set_wrapper_attr", "_healthy_reward", 1.0, indices=1)
        assert_same_run(dummy, threaded, draw_actions(dummy, 5))  # nothing has happened

    def test_where_each_environment_takes_its_own_step(self) -> None:
        pair = make_pair("Hopper-v5", full_info=True)
        for env in pair:
            env.reset()
            env.env_method("set_wrapper_attr", "_healthy_reward", 7.0, indices=1)
        assert_same_run(*pair, draw_actions(pair[0], 5), full_info=True)

    @pytest.mark.parametrize(("depth", "message"), [(0, "HopperEnv.*`_get_rew`"), (1, "TimeLimit.*methods was replaced")])
    def test_a_method_replaced_later(self, depth: int, message: str) -> None:
        env = make_mujoco_vec_env("Hopper-v5", 2)
        env.reset()
        env.step(np.zeros((2, 3)))
        single = env.envs[1]
        if depth == 0:
            single.unwrapped._get_rew = lambda *_: (0.0, {})  # type: ignore[attr-defined]
        else:
            single.env.step = lambda _: None  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=message):
            env.step(np.zeros((2, 3)))


def generous(env: Any, name: str) -> Any:
    """
    Replace a method that returns a reward by one that returns more of it.

    :param env: environment or wrapper
    :param name: name of the method
    :return: the environment
    """
    original, place = getattr(env, name), 0 if name == "_get_rew" else 1

    def replaced(*arguments: Any) -> Any:
        values = list(original(*arguments))
        values[place] += 100.0
        return tuple(values)

    setattr(env, name, replaced)
    return env


class TestReplacedMethods:
    """Whose reward is another one than the task's is not stepped in threads."""

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Monitor(generous(HopperEnv(), "_get_rew")), r"HopperEnv .*: its method `_get_rew` is not the original"),
            (lambda: generous(HopperEnv(), "step"), r"HopperEnv .*: its method `step` is not the original"),
            (lambda: generous(TimeLimit(HopperEnv(), 5), "step"), "wrapper TimeLimit, one of whose methods was replaced"),
            (lambda: generous(Monitor(HopperEnv()), "step"), "wrapper Monitor, one of whose methods was replaced"),
        ],
    )
    def test_in_an_environment(self, make: Callable[[], gym.Env], message: str) -> None:
        assert not can_be_threaded(make())
        with pytest.raises(ValueError, match=message):
            MujocoVecEnv([make])

    def test_in_gymnasiums_own_class(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = HopperEnv._get_rew
        for replaced in (lambda self, *_: (0.0, {}), functools.wraps(original)(lambda self, *_: (0.0, {}))):
            with monkeypatch.context() as patch:
                patch.setattr(HopperEnv, "_get_rew", replaced)
                assert not can_be_threaded(gym.make("Hopper-v5"))
                with pytest.raises(ValueError, match="its method `_get_rew` is not the original"):
                    MujocoVecEnv("Hopper-v5")
        assert can_be_threaded(gym.make("Hopper-v5"))

    def test_what_is_no_part_of_a_step(self) -> None:
        env = HopperEnv()
        env.reset_model, env.render = env.reset_model, lambda: None  # type: ignore[method-assign]
        assert can_be_threaded(env)


class TestMonitor:
    """Statistics of episodes are Monitor's."""

    def test_statistics_and_files(self, tmp_path: Path) -> None:
        ours = make_mujoco_vec_env("Hopper-v5", 2, 5, 3, str(tmp_path / "ours"), max_episode_steps=15)
        theirs = make_vec_env("Hopper-v5", 2, 5, 3, str(tmp_path / "theirs"), env_kwargs={"max_episode_steps": 15})
        for env in (ours, theirs):
            env.reset()
            for row in draw_actions(env, 40):
                env.step(row)
        for name in ("get_episode_rewards", "get_episode_lengths", "get_total_steps"):
            assert ours.env_method(name) == theirs.env_method(name)
        assert ours.get_attr("_elapsed_steps") == theirs.get_attr("_elapsed_steps")
        assert len(ours.env_method("get_episode_times")[0]) == len(ours.env_method("get_episode_rewards")[0]) >= 2
        for name in ("3.monitor.csv", "4.monitor.csv"):
            rows = [(tmp_path / folder / name).read_text().splitlines()[1:] for folder in ("ours", "theirs")]
            ours_rows, theirs_rows = ([row.rsplit(",", 1)[0] for row in lines] for lines in rows)
            assert ours_rows == theirs_rows
            assert len(ours_rows) >= 3

    def test_info_keywords(self) -> None:
        keywords = {"info_keywords": ("x_position",)}
        with pytest.raises(ValueError, match=r"x_position.*full_info"):
            make_mujoco_vec_env("Hopper-v5", monitor_kwargs=keywords)
        env = make_mujoco_vec_env("Hopper-v5", max_episode_steps=3, monitor_kwargs=keywords, full_info=True)
        env.reset()
        infos = [env.step(np.zeros((1, 3), dtype=np.float32))[3][0] for _ in range(3)]
        assert infos[-1]["episode"]["x_position"] == infos[-1]["x_position"]

    def test_early_resets_may_be_forbidden(self) -> None:
        env = make_mujoco_vec_env("Hopper-v5", max_episode_steps=2, monitor_kwargs={"allow_early_resets": False})
        env.reset()
        for _ in range(4):
            env.step(np.zeros((1, 3), dtype=np.float32))
        env.step(np.zeros((1, 3), dtype=np.float32))
        with pytest.raises(RuntimeError, match="early resets"):
            env.reset()

    def test_environments_without_monitor(self) -> None:
        functions = [lambda: gym.make("Hopper-v5", max_episode_steps=2), lambda: TimeLimit(HopperEnv(), 4)]
        envs = MujocoVecEnv(functions, seed=1), DummyVecEnv(functions)
        envs[1].seed(1)
        np.testing.assert_array_equal(envs[0].reset(), envs[1].reset())
        assert assert_same_run(envs[1], envs[0], draw_actions(envs[0], 8)) == 6
        assert envs[0].env_is_wrapped(Monitor) == [False, False]


class TestAttributes:
    """Single environments can be reached."""

    def test_attributes(self) -> None:
        env = make_mujoco_vec_env("Hopper-v5", 3)
        assert env.get_attr("frame_skip") == [4, 4, 4]
        assert env.get_attr("render_mode", indices=1) == ["rgb_array"]
        assert env.has_attr("spec") and not env.has_attr("no_such_attribute")
        env.set_attr("mark", 5, indices=[0, 2])
        assert [hasattr(single, "mark") for single in env.envs] == [True, False, True]
        assert env.env_method("get_body_com", "torso", indices=[1])[0].shape == (3,)
        assert env.env_is_wrapped(Monitor) == [True] * 3
        assert env.env_is_wrapped(TimeLimit, indices=2) == [True]
        assert env.env_is_wrapped(ClipAction) == [False] * 3
        assert env.metadata["render_fps"] == 125
        assert env.unwrapped is env

    def test_a_single_environment_cannot_be_stepped(self) -> None:
        env = make_mujoco_vec_env("Hopper-v5", 2)
        with pytest.raises(ValueError, match="one by one"):
            env.env_method("step", np.zeros(3))

    def test_no_access_during_a_step(self) -> None:
        env = make_mujoco_vec_env("Hopper-v5", 2)
        env.reset()
        env.step_async(np.zeros((2, 3)))
        for call in (lambda: env.get_attr("data"), lambda: env.step_async(np.zeros((2, 3))), env.get_images):
            with pytest.raises(RuntimeError, match="step_wait"):
                call()
        env.step_wait()


@pytest.fixture
def offscreen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Render without a screen, or skip the test where that is not possible."""
    monkeypatch.setenv("MUJOCO_GL", "egl")
    env = gym.make("Reacher-v5", render_mode="rgb_array")
    env.reset()
    try:
        env.render()
    except Exception as error:
        pytest.skip(f"no rendering here: {error!r}")
    finally:
        env.close()


@pytest.mark.usefixtures("offscreen")
class TestRendering:
    """Images are those of Gymnasium."""

    def test_images(self) -> None:
        dummy, threaded = make_pair("Hopper-v5", n_envs=2, env_kwargs={"width": 64, "height": 48})
        for env in (dummy, threaded):
            env.reset()
            env.step(np.ones((2, 3), dtype=np.float32))
        images = threaded.get_images()
        np.testing.assert_array_equal(dummy.get_images(), images)
        np.testing.assert_array_equal(threaded.env_method("render", indices=1)[0], images[1])
        big = threaded.render()
        assert big is not None and big.shape == (48 * 2, 64, 3)
        assert not np.array_equal(images[0], images[1])
        for env in (dummy, threaded):
            env.close()

    def test_video(self, tmp_path: Path) -> None:
        pytest.importorskip("moviepy")
        env = make_mujoco_vec_env("Reacher-v5", 2, env_kwargs={"width": 64, "height": 64})
        recorder = VecVideoRecorder(env, str(tmp_path), lambda step: step == 0, video_length=3)
        recorder.reset()
        for _ in range(4):
            recorder.step(np.zeros((2, 2), dtype=np.float32))
        recorder.close()
        assert list(tmp_path.glob("*.mp4"))


def test_no_images_without_render_mode() -> None:
    env = make_mujoco_vec_env("Reacher-v5", 2, env_kwargs={"render_mode": None})
    with pytest.warns(UserWarning, match="rgb_array"):
        assert env.get_images() == [None, None]


def helper_threads() -> list[threading.Thread]:
    """Threads that step environments."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("sb3_agpo_vec_env")]


@pytest.fixture
def no_threads() -> Iterator[None]:
    """Start without threads of environments that earlier tests left to the garbage collector."""
    gc.collect()
    for thread in helper_threads():
        thread.join(timeout=120.0)
    assert helper_threads() == []
    yield
    assert helper_threads() == []


@pytest.mark.usefixtures("no_threads")
class TestClosing:
    """Nothing is left behind."""

    def test_close(self) -> None:
        with make_mujoco_vec_env("Hopper-v5", 4, threads=3) as env:
            env.reset()
            env.step(np.zeros((4, 3)))
            assert 1 <= len(helper_threads()) <= 2
            env.step_async(np.zeros((4, 3)))
        assert helper_threads() == []
        env.close()
        for call in (env.reset, lambda: env.step(np.zeros((4, 3)))):
            with pytest.raises(RuntimeError, match="closed"):
                call()

    def test_forgotten_environments_stop_their_threads(self) -> None:
        env = make_mujoco_vec_env("Hopper-v5", 2, threads=2)
        env.reset()
        env.step(np.zeros((2, 3)))
        thread = helper_threads()[0]
        del env
        gc.collect()
        thread.join(timeout=120.0)
        assert not thread.is_alive()

    def test_closing_ends_the_threads_of_derivatives(self) -> None:
        before = set(threading.enumerate())
        env = make_mujoco_vec_env("Ant-v5", 2, threads=2)
        dynamics, _ = attach_dynamics(env, FiniteDifferences(threads=2))
        assert dynamics is not None
        env.reset()
        env.step(np.zeros((2, 8)))
        dynamics.take(1)
        assert not set(threading.enumerate()) <= before
        env.close()
        assert set(threading.enumerate()) <= before

    def test_an_error_in_a_thread_is_raised(self) -> None:
        def fail(index: int) -> None:
            done.append(index)
            if index == 3:
                raise ZeroDivisionError("job 3")

        done: list[int] = []
        work = SharedWork(fail, threads=3)
        for _ in range(5):
            work.start([(index,) for index in range(3)])
            work.finish()
            work.start([(index,) for index in range(3, 6)])
            with pytest.raises(ZeroDivisionError, match="job 3"):
                work.finish()
        work.close()
        assert [done.count(index) for index in range(3)] == [5, 5, 5]


class CustomHopper(HopperEnv):
    """Not stock, as it may have changed anything."""


class TestBadArguments:
    """Errors name the value and say what to do."""

    @pytest.mark.parametrize("make", [MujocoVecEnv, make_mujoco_vec_env])
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"env_id": "NoSuchTask-v5"}, ValueError, "'NoSuchTask-v5'.*Hopper-v5"),
            ({"env_id": "Hopper-v99"}, ValueError, "'Hopper-v99'.*Hopper-v5"),
            ({"env_id": "no id"}, ValueError, "'no id'.*Hopper-v5"),
            ({"env_id": "CartPole-v1"}, ValueError, "CartPoleEnv.*DummyVecEnv"),
            ({"n_envs": 0}, ValueError, "`n_envs`.*0"),
            ({"n_envs": 2.0}, TypeError, "`n_envs`.*2.0"),
            ({"n_envs": True}, TypeError, "`n_envs`.*True"),
            ({"threads": 0}, ValueError, "`threads`.*0.*None"),
            ({"threads": "2"}, TypeError, "`threads`.*'2'"),
            ({"seed": -1}, ValueError, "`seed`.*-1"),
            ({"seed": 1.5}, TypeError, "`seed`.*1.5"),
            ({"max_episode_steps": 0}, ValueError, "`max_episode_steps`.*0.*-1"),
            ({"max_episode_steps": 10.0}, TypeError, "`max_episode_steps`.*10.0"),
            ({"env_kwargs": 3}, TypeError, "`env_kwargs`.*3"),
            ({"env_kwargs": {"no_such_option": 1}}, TypeError, "no_such_option"),
        ],
    )
    def test_constructors(self, make: Callable[..., VecEnv], arguments: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            make(**{"env_id": "Hopper-v5", "n_envs": 1, **arguments})

    @pytest.mark.parametrize(
        ("functions", "arguments", "error", "message"),
        [
            ([], {}, ValueError, "0 functions"),
            ([lambda: gym.make("Hopper-v5")], {"n_envs": 2}, ValueError, "`n_envs` 2"),
            ([lambda: gym.make("Hopper-v5")], {"max_episode_steps": 2}, ValueError, "max_episode_steps"),
            (["Hopper-v5"], {}, TypeError, "list of functions"),
            (lambda: gym.make("Hopper-v5"), {}, TypeError, "list of functions"),
            ([CustomHopper], {}, ValueError, "CustomHopper.*DummyVecEnv"),
            ([lambda: ClipAction(HopperEnv())], {}, ValueError, "ClipAction"),
            ([lambda: TimeLimit(Monitor(HopperEnv()), 5)], {}, ValueError, "Monitor, which must be the outermost"),
            ([HopperEnv, lambda: HopperEnv(frame_skip=2)], {}, ValueError, "environment 1 differs from environment 0"),
            ([HopperEnv, lambda: HopperEnv(healthy_reward=2.0)], {}, ValueError, "environment 1 differs"),
        ],
    )
    def test_functions(self, functions: Any, arguments: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            MujocoVecEnv(functions, **arguments)

    def test_the_same_environment_twice(self) -> None:
        env = HopperEnv()
        with pytest.raises(ValueError, match=r"function 1.*new one"):
            MujocoVecEnv([lambda: env, lambda: env])

    @pytest.mark.parametrize(
        ("actions", "error", "message"),
        [
            (np.zeros(3), ValueError, r"\(2, 3\).*\(3,\)"),
            (np.zeros((3, 3)), ValueError, r"\(2, 3\).*\(3, 3\)"),
            (np.array([[0.0, 0.0, 0.0], [0.0, np.nan, 0.0]]), ValueError, "environment 1.*nan"),
            (np.array([[0.0, 0.0, np.inf], [0.0, 0.0, 0.0]]), ValueError, "environment 0.*inf"),
            (np.array([["a"] * 3] * 2), TypeError, "numbers"),
            (np.zeros((2, 3), dtype=bool), TypeError, "bool"),
            (None, TypeError, "object"),
        ],
    )
    def test_actions(self, actions: Any, error: type[Exception], message: str) -> None:
        dummy, threaded = make_pair("Hopper-v5", n_envs=2)
        for env in (dummy, threaded):
            env.reset()
        with pytest.raises(error, match=message):
            threaded.step(actions)
        assert_same_run(dummy, threaded, draw_actions(dummy, 3))  # nothing has happened

    def test_order_of_calls(self) -> None:
        env = make_mujoco_vec_env("Hopper-v5")
        with pytest.raises(RuntimeError, match="call `reset`"):
            env.step(np.zeros((1, 3)))
        env.reset()
        with pytest.raises(RuntimeError, match="step_async"):
            env.step_wait()


class TestDerivatives:
    """AGPO's derivatives come from the vectorised environment itself, and are those of the recorders."""

    @pytest.mark.parametrize("env_id", ["Hopper-v5", "Ant-v5", "InvertedDoublePendulum-v4", "Reacher-v4"])
    @pytest.mark.parametrize("full_info", [False, True])
    def test_equal_to_recorders(self, env_id: str, full_info: bool) -> None:
        pair = make_pair(env_id, n_envs=2, max_episode_steps=4, full_info=full_info)
        assert isinstance(pair[1], DifferentiableVecEnv)
        results = []
        for env in pair:
            wrapped = VecNormalize(env)
            dynamics, report = attach_dynamics(wrapped, FiniteDifferences(threads=1))
            assert dynamics is not None and report == dynamics.report and report.kind == "mujoco"
            wrapped.reset()
            for row in draw_actions(env, 11):
                wrapped.step(row)
            dynamics.keep_oldest(7)
            taken = dynamics.take(6)
            with pytest.raises(RuntimeError, match="0 were recorded"):
                dynamics.take(1)
            results.append((taken, report, dynamics.simulator_calls))
        (expected, expected_report, expected_calls), (actual, actual_report, actual_calls) = results
        assert expected_report == actual_report and expected_calls == actual_calls
        assert expected.valid.all() and len(expected.reward) == 12
        for left, right in zip(expected, actual, strict=True):
            assert_same_values(left, right)

    def test_steps_differentiated_by_the_action_alone(self) -> None:
        results = []
        for env in make_pair("Hopper-v5", n_envs=2):
            dynamics, _ = attach_dynamics(env, FiniteDifferences(threads=1))
            assert dynamics is not None
            env.reset()
            for row in draw_actions(env, 3):
                env.step(row)
            results.append((dynamics.take(3, np.array([False, True, True])), dynamics.simulator_calls))
        assert results[0][1] == results[1][1] == 2 * (2 * (1 + 11 + 3) + (1 + 3))
        assert not results[0][0].A[:2].any() and results[0][0].A[2:].any()
        for left, right in zip(results[0][0], results[1][0], strict=True):
            assert_same_values(left, right)

    def test_two_at_a_time(self) -> None:
        """Two models may train in one environment by turns: each keeps its own records."""
        env = make_mujoco_vec_env("Hopper-v5", 2, 0)
        first, second = (env.attach_dynamics(FiniteDifferences(threads=1))[0] for _ in range(2))
        assert first is not None and second is not None
        env.reset()
        rows = draw_actions(env, 3)
        first.pause()
        env.step(rows[0])
        first.discard()
        second.pause()
        env.step(rows[1])
        env.step(rows[2])
        assert (first.n_recorded, second.n_recorded) == (2, 1)

    def test_recording_only_when_it_is_wanted(self) -> None:
        env = make_mujoco_vec_env("Hopper-v5", 2, 0)
        dynamics, _ = env.attach_dynamics(FiniteDifferences(threads=1))
        assert dynamics is not None
        env.reset()
        rows = draw_actions(env, 3)
        dynamics.pause()
        env.step(rows[0])
        dynamics.discard()
        env.step(rows[1])
        with pytest.raises(RuntimeError, match="only 1 were recorded"):
            dynamics.take(2)
        with pytest.raises(ValueError, match="n_steps"):
            dynamics.take(0)
        assert len(dynamics.take(1).reward) == 2
        del dynamics
        gc.collect()
        assert not env._recorders
        env.step(rows[2])


@pytest.mark.parametrize("threads", [1, 2])
def test_copies_step_like_copies_of_dummy_vec_env(threads: int) -> None:
    """Gymnasium's tasks are copied as they were made, with the state of their generators lost; so are ours."""
    dummy, threaded = make_pair("Hopper-v5", threads=threads)
    for duplicate in (copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))):
        ours, theirs = duplicate(threaded), copy.deepcopy(dummy)
        assert len({id(model) for model in ours.get_attr("model")}) == 1
        for env in (ours, theirs):
            env.seed(3)
        assert np.array_equal(ours.reset(), theirs.reset())
        for actions in draw_actions(dummy, 100):
            assert_same_step(theirs.step(actions), ours.step(actions))
        ours.close()


def test_copies_of_a_model_have_derivatives_of_their_own() -> None:
    model = small_model(make_mujoco_vec_env("Hopper-v5", 2, 0, threads=2)).learn(60)
    other = copy.deepcopy(model)
    calls = model.simulator_calls
    other.learn(60, reset_num_timesteps=False)
    assert other.simulator_calls > calls + 60
    assert all(other._valid_history)
    assert model.simulator_calls == calls


def parameters(model: BaseAlgorithm) -> dict[str, torch.Tensor]:
    """All parameters of a policy."""
    return dict(model.policy.state_dict())


class TestAlgorithms:
    """What is learned is equal bit for bit."""

    @pytest.mark.parametrize(
        ("algorithm", "arguments", "n_steps"),
        [
            (PPO, {"n_steps": 32, "batch_size": 32, "n_epochs": 2}, 256),
            (SAC, {"learning_starts": 50, "batch_size": 16, "gradient_steps": 1}, 200),
            (AGPO, {"learning_starts": 50, "batch_size": 16, "rollout_size": 16}, 240),
        ],
    )
    @pytest.mark.parametrize("normalised", [False, True])
    def test_learning(self, algorithm: Any, arguments: dict[str, Any], n_steps: int, normalised: bool) -> None:
        learned = []
        for env in make_pair("Hopper-v5", n_envs=4, max_episode_steps=20):
            wrapped = VecNormalize(env) if normalised else env
            small = {"policy_kwargs": {"net_arch": [16]}, "seed": 1, "device": "cpu"}
            model = algorithm("MlpPolicy", wrapped, **small, **arguments).learn(n_steps)
            assert len(model.ep_info_buffer) >= 4
            assert not isinstance(model, AGPO) or model.simulator_calls > 2 * n_steps  # derivatives were taken
            learned.append((parameters(model), [(info["r"], info["l"]) for info in model.ep_info_buffer]))
            env.close()
        (expected, expected_episodes), (actual, actual_episodes) = learned
        assert expected_episodes == actual_episodes
        for name, value in expected.items():
            assert torch.equal(value, actual[name]), name

    @pytest.mark.parametrize("algorithm", [A2C, ARS, CrossQ, DDPG, PPO, SAC, TD3, TQC, TRPO, AGPO])
    def test_every_algorithm(self, algorithm: type[BaseAlgorithm]) -> None:
        on_policy = issubclass(algorithm, OnPolicyAlgorithm)
        arguments: dict[str, Any] = {"n_steps": 8} if on_policy else {"learning_starts": 16, "batch_size": 8}
        if algorithm is ARS:
            arguments = {"n_delta": 2, "n_eval_episodes": 1}
        if algorithm in (TRPO, PPO):
            arguments["batch_size"] = 8
        with make_mujoco_vec_env("Walker2d-v5", 4, 0, threads=2, max_episode_steps=10) as env:
            model = algorithm("MlpPolicy", env, policy_kwargs={"net_arch": [8]}, seed=0, device="cpu", **arguments)  # type: ignore
            before = {name: value.clone() for name, value in parameters(model).items()}
            model.learn(64)
            assert model.num_timesteps >= 64 and len(model.ep_info_buffer or ()) > 0
            changed = [name for name, value in parameters(model).items() if not torch.equal(value, before[name])]
            assert changed and all(bool(value.isfinite().all()) for value in parameters(model).values())

    def test_can_be_threaded(self) -> None:
        assert can_be_threaded(gym.make("Hopper-v5")) and can_be_threaded(Monitor(gym.make("Ant-v4")))
        assert not can_be_threaded(ClipAction(gym.make("Hopper-v5"))) and not can_be_threaded(gym.make("Pendulum-v1"))
        assert not can_be_threaded(CustomHopper())

    def test_vec_monitor(self) -> None:
        functions = [lambda: gym.make("Hopper-v5", max_episode_steps=5)] * 2
        env = VecMonitor(MujocoVecEnv(functions, seed=0))
        env.reset()
        lengths = [info["episode"]["l"] for row in draw_actions(env, 11) for info in env.step(row)[3] if "episode" in info]
        assert lengths == [5] * 4

    def test_evaluation(self) -> None:
        results = []
        for env in make_pair("Hopper-v5", n_envs=2, max_episode_steps=15):
            model = PPO("MlpPolicy", env, seed=2, device="cpu")
            env.seed(4)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # no hint that a Monitor is missing
                results.append(evaluate_policy(model, env, n_eval_episodes=5, return_episode_rewards=True))
        assert results[0] == results[1]

    def test_as_class_for_make_vec_env(self) -> None:
        env = make_vec_env("Hopper-v5", 2, seed=3, vec_env_cls=MujocoVecEnv, vec_env_kwargs={"threads": 1})
        assert isinstance(env, MujocoVecEnv) and env.threads == 1
        np.testing.assert_array_equal(env.reset(), make_vec_env("Hopper-v5", 2, seed=3).reset())
