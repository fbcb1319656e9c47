"""Which source of derivatives is chosen and why, through wrappers, recorders and vectorised environments."""

from __future__ import annotations

import copy
import pickle
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from dynamics_reference import (
    INTEGRATION,
    Array,
    assert_same_bits,
    count_new_threads,
    everything_of,
    integration_state,
    play,
    running_threads,
    slow_derivatives,
    stock,
)
from gymnasium import spaces
from gymnasium import wrappers as gym_wrappers
from gymnasium.envs.mujoco import MujocoEnv, inverted_pendulum_v5
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.envs.mujoco.reacher_v5 import ReacherEnv
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_agpo.dynamics import recorder as recorder_module
from sb3_agpo.dynamics.interface import TransitionDerivatives
from sb3_agpo.dynamics.mujoco import FiniteDifferences, MujocoDynamics
from sb3_agpo.dynamics.provider import VecEnvDynamics, attach_dynamics
from sb3_agpo.dynamics.recorder import (
    ProviderReport,
    RecorderInstaller,
    RecorderWrapper,
    TransitionRecorder,
    choose_dynamics,
    find_recorder,
    find_wrapper,
    install_recorder,
    remove_recorder,
)
from sb3_agpo.dynamics.torch_tasks import LinearQuadraticEnv
from sb3_agpo.dynamics.wrappers import opaque_wrapper
from sb3_agpo.vec_env import MujocoVecEnv

Env = gym.Env[Any, Any]
ONE = FiniteDifferences(threads=1)


class MyHopper(HopperEnv):
    """A custom environment."""


class TinyReacher(ReacherEnv):
    """A custom environment whose observation is bounded and of another scale."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(np.full(10, -40.0, np.float32), np.full(10, 60.0, np.float32))


def chosen(env: Env) -> ProviderReport:
    """
    The choice for an environment.

    :param env: the environment
    :return: its report
    """
    dynamics, report = choose_dynamics(env, ONE)
    assert (dynamics is None) == (report.kind == "none")
    return report


# ---------------------------------------------------------------------- the choice


def test_the_best_source_is_chosen() -> None:
    report = chosen(Monitor(stock("hopper")))
    assert report[:4] == ("mujoco", "HopperEnv is a stock task: batched finite differences", 12, 15)
    report = chosen(Monitor(MyHopper()))
    assert report[:4] == ("env_step", "MyHopper is a custom MujocoEnv: finite differences through its own step", 12, 17)
    report = chosen(LinearQuadraticEnv())
    assert report[:4] == ("exact", "LinearQuadraticEnv offers its own derivatives", 2, 0)
    report = chosen(gym.make("Pendulum-v1"))
    assert report[:4] == ("none", "PendulumEnv is no MuJoCo environment and offers no derivatives", 0, 0)


class Locked(MyHopper):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.my_lock = threading.Lock()


def test_a_custom_environment_that_cannot_be_copied_has_none() -> None:
    report = chosen(Monitor(Locked()))
    assert report.kind == "none"
    assert report.reason.startswith("Locked is a custom MujocoEnv, but its attribute `my_lock` cannot be copied")


def test_a_stock_task_with_another_method_is_custom() -> None:
    """Neither the task's formulas nor, where the new method uses the original environment, a copy would do."""
    env = HopperEnv()
    original = env._get_rew
    env._get_rew = types.MethodType(lambda self, v, a: (self.data.qpos[1], {}), env)  # type: ignore[method-assign]
    report = chosen(env)
    assert report.kind == "env_step" and "HopperEnv has a method `_get_rew` that is not Gymnasium's:" in report.reason
    env._get_rew = lambda v, a: original(v, 2.0 * a)  # type: ignore[method-assign]
    report = chosen(env)
    assert report.kind == "none" and "method `_get_rew` that is not Gymnasium's, but its attribute `_get_rew`" in report.reason


@pytest.mark.skipif(not hasattr(mujoco.mjtState, "mjSTATE_HISTORY"), reason="this MuJoCo knows no delays")
@pytest.mark.parametrize("kind", ["InvertedPendulumEnv", "Custom"])
def test_a_model_with_delayed_actuators_has_none(kind: str, tmp_path: Path) -> None:
    text = (Path(inverted_pendulum_v5.__file__).parent / "assets" / "inverted_pendulum.xml").read_text()
    (tmp_path / "delay.xml").write_text(text.replace("<motor ", '<motor delay="0.04" nsample="4" ', 1))
    stock_class = inverted_pendulum_v5.InvertedPendulumEnv
    make = stock_class if kind == "InvertedPendulumEnv" else type("Custom", (stock_class,), {})
    report = chosen(make(xml_file=str(tmp_path / "delay.xml")))
    assert report.kind == "none"
    assert report.reason == f"the model of {kind} keeps a state that is not differentiated (history)"
    assert chosen(make()).kind != "none"


def test_a_model_whose_bodies_may_sleep_is_stepped_as_a_whole() -> None:
    sleep = mujoco.mjtEnableBit.__members__.get("mjENBL_SLEEP")
    if sleep is None:
        pytest.skip("this MuJoCo knows no sleep")

    def sleepy() -> Env:
        env = stock("hopper")
        env.model.opt.enableflags |= int(sleep.value)
        return env

    report = chosen(sleepy())
    assert report.kind == "env_step" and report.reason.startswith("HopperEnv has a model whose bodies may sleep: finite")
    threaded = MujocoVecEnv([sleepy])
    dynamics, report = threaded.attach_dynamics(ONE)
    assert dynamics is None and report.kind == "none" and report.reason.endswith("takes a DummyVecEnv or a SubprocVecEnv")
    threaded.close()


class Spaces(gym.Env[Any, Any]):
    """Nothing but spaces."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, action_space


VECTOR = spaces.Box(-1.0, 1.0, (3,))


@pytest.mark.parametrize(
    ("observation_space", "action_space", "reason"),
    [
        (spaces.Dict(a=VECTOR), VECTOR, "the observation space Dict"),
        (spaces.Box(0, 255, (8, 8, 3), np.uint8), VECTOR, "the observation space Box"),
        (spaces.Box(0, 255, (8,), np.uint8), VECTOR, "not a one-dimensional Box of floating-point numbers"),
        (spaces.Discrete(3), VECTOR, "the observation space Discrete"),
        (VECTOR, spaces.Discrete(3), "the action space Discrete(3) is not a one-dimensional Box"),
        (VECTOR, spaces.MultiDiscrete([3, 3]), "the action space MultiDiscrete"),
        (VECTOR, spaces.Box(-1.0, np.inf, (3,)), "is not bounded"),
    ],
)
def test_spaces_without_derivatives(observation_space: Any, action_space: Any, reason: str) -> None:
    report = chosen(Spaces(observation_space, action_space))
    assert report.kind == "none" and reason in report.reason


# ---------------------------------------------------------------------- wrappers


class Shaped(gym.Wrapper[Any, Any, Any, Any]):
    """A wrapper of the user's own that changes the reward."""

    def step(self, action: Any) -> Any:
        observation, reward, *rest = super().step(action)
        return observation, reward + 1.0, *rest


class Shown(gym.Wrapper[Any, Any, Any, Any]):
    """A wrapper of the user's own that changes nothing that matters."""

    def __init__(self, env: Env, text: str = "") -> None:
        super().__init__(env)
        self.text = text

    def render(self) -> Any:
        return self.text

    def close(self) -> None:
        super().close()


class ShapedMonitor(Monitor):
    """A known wrapper, changed."""

    def step(self, action: Any) -> Any:
        observation, reward, *rest = super().step(action)
        return observation, 2.0 * float(reward), *rest


class NamedMonitor(Monitor):
    """A known wrapper, changed in what does not matter."""

    def get_episode_rewards(self) -> list[float]:
        return []


class Mirrored(gym.ActionWrapper[Any, Any, Any]):
    """An action wrapper of the user's own."""

    def action(self, action: Any) -> Any:
        return -action


class OddRescale(gym_wrappers.RescaleAction[Any, Any, Any]):
    """A known action wrapper, changed."""

    def action(self, action: Any) -> Any:
        return super().action(action) ** 3


class Sized(gym.Wrapper[Any, Any, Any, Any]):
    """Gives an action space of its own and nothing else."""

    def __init__(self, env: Env, low: float, high: float) -> None:
        super().__init__(env)
        self.action_space = spaces.Box(low, high, env.action_space.shape)  # type: ignore[arg-type]


def patched(env: Env) -> Env:
    """
    A wrapper with another ``step`` put into the instance.

    :param env: the environment
    :return: the wrapper
    """
    wrapper = Shown(env)
    wrapper.step = lambda action: env.step(-action)  # type: ignore[method-assign]
    return wrapper


OPAQUE: dict[str, Callable[[Env], Env]] = {
    "FrameStackObservation": lambda env: gym_wrappers.FrameStackObservation(env, 2),
    "TransformObservation": lambda env: gym_wrappers.TransformObservation(env, np.sin, env.observation_space),
    "NormalizeObservation": lambda env: gym_wrappers.NormalizeObservation(env),
    "TransformReward": lambda env: gym_wrappers.TransformReward(env, float),
    "NormalizeReward": lambda env: gym_wrappers.NormalizeReward(env),
    "FlattenObservation": lambda env: gym_wrappers.FlattenObservation(env),
    "TransformAction": lambda env: gym_wrappers.TransformAction(env, np.negative, env.action_space),
    "StickyAction": lambda env: gym_wrappers.StickyAction(env, 0.1),
    "Shaped": Shaped,
    "ShapedMonitor": ShapedMonitor,
    "Mirrored": Mirrored,
    "OddRescale": lambda env: OddRescale(env, -1.0, 1.0),
    "Shown": patched,
    "ClipAction": lambda env: Sized(gym_wrappers.ClipAction(env), -2.0, 2.0),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_wrappers_are_named(name: str) -> None:
    # On top of and below others
    for env in (OPAQUE[name](Monitor(stock("hopper"))), Shown(OPAQUE[name](stock("hopper")))):
        report = chosen(env)
        reason = "the observation space" if len(env.observation_space.shape) > 1 else f"the wrapper {name} cannot"
        assert report.kind == "none" and report.reason.startswith(reason)


def test_integers_cannot_be_differentiated() -> None:
    env = Shown(gym_wrappers.DtypeObservation(stock("hopper"), np.int64))
    assert opaque_wrapper(env) == "DtypeObservation"
    assert chosen(env).kind == "none"


def zoo_time_limit(env: Env) -> Env:
    """
    What RL Zoo puts in the place of ``TimeLimit``; by a class of the same name, as the zoo changes Gymnasium when imported.

    :param env: the environment
    :return: the wrapped environment
    """

    def step(self: Any, action: Any) -> Any:
        return gym_wrappers.TimeLimit.step(self, action)

    names = {"__module__": "rl_zoo3.gym_patches", "__qualname__": "PatchedTimeLimit", "step": step}
    return type("PatchedTimeLimit", (gym_wrappers.TimeLimit,), names)(env, 50)


TRANSPARENT: dict[str, Callable[[Env], Env]] = {
    "PatchedTimeLimit": zoo_time_limit,
    "nothing": lambda env: env,
    "TimeLimit": lambda env: gym_wrappers.TimeLimit(env, 50),
    "Monitor": Monitor,
    "NamedMonitor": NamedMonitor,
    "OrderEnforcing": gym_wrappers.OrderEnforcing,
    "PassiveEnvChecker": gym_wrappers.PassiveEnvChecker,
    "RecordEpisodeStatistics": gym_wrappers.RecordEpisodeStatistics,
    "RenderCollection": lambda env: gym_wrappers.RenderCollection(pictured(env)),
    "HumanRendering": lambda env: gym_wrappers.HumanRendering(pictured(env)),
    "RecordVideo": lambda env: gym_wrappers.RecordVideo(pictured(env), "videos"),
    "Shown": lambda env: Shown(env, "me"),
    "DtypeObservation": lambda env: gym_wrappers.DtypeObservation(env, np.float32),
    "ClipAction": lambda env: Sized(gym_wrappers.ClipAction(env), -0.5, 0.7),
    "RescaleAction": lambda env: gym_wrappers.RescaleAction(env, -3.0, 0.5),
    "RescaleTwice": lambda env: gym_wrappers.RescaleAction(gym_wrappers.RescaleAction(env, 0.0, 5.0), -1.0, 1.0),
    "RescaleAndClip": lambda env: gym_wrappers.RescaleAction(Sized(gym_wrappers.ClipAction(env), -1.0, 1.0), -1.0, 1.0),
}


def pictured(env: Env) -> Env:
    """
    Say that an environment can draw.

    :param env: the environment
    :return: the same
    """
    env.unwrapped.render_mode = "rgb_array"  # type: ignore[misc]
    return env


def through_wrappers(env: Env, live: MujocoEnv, action: Array, step: float) -> tuple[Array, Array]:
    """
    Differences of the wrapped environment's step with respect to the action in [-1, 1].

    :param env: wrapped environment whose unwrapped environment is put where the live one stands
    :param live: not changed
    :param action: in [-1, 1]
    :param step: centred
    :return: of observation and reward
    """
    other: Any = env.unwrapped
    columns = []
    for i in range(len(action)):
        ends = []
        for sign in (1.0, -1.0):
            moved = action.copy()
            moved[i] += sign * step
            mujoco.mj_setState(other.model, other.data, integration_state(live), INTEGRATION)
            mujoco.mj_forward(other.model, other.data)
            other.data.qacc_warmstart[:] = live.data.qacc_warmstart
            low, high = env.action_space.low.astype(float), env.action_space.high  # type: ignore[attr-defined]
            observation, reward = env.step(low + 0.5 * (moved + 1.0) * (high - low))[:2]
            ends.append(np.append(np.asarray(observation, dtype=float), float(reward)))
        columns.append((ends[0] - ends[1]) / (2 * step))
    jacobian = np.stack(columns, axis=1)
    return jacobian[:-1], jacobian[-1]


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_wrappers_and_their_chain_rule(name: str) -> None:
    if name == "RecordVideo":
        pytest.importorskip("moviepy")
    if name == "HumanRendering":
        pytest.importorskip("pygame")
    env, reference = (TRANSPARENT[name](stock("reacher")) for _ in range(2))
    assert chosen(env).kind == "mujoco"
    env = install_recorder(env, FiniteDifferences(action_step=1e-2, centred=True, threads=1))
    drawing = name in ("RenderCollection", "HumanRendering", "RecordVideo")
    stepped = (find_wrapper(env) if drawing else env) or env  # there may be no screen to draw on
    reference = reference.unwrapped if drawing else reference
    stepped.reset(seed=0), reference.reset(seed=0)
    live = env.unwrapped
    assert isinstance(live, MujocoEnv)
    recorder = env.get_wrapper_attr("agpo_recorder")
    generator = np.random.default_rng(0)
    low, high = (bound.astype(float) for bound in (stepped.action_space.low, stepped.action_space.high))
    for _ in range(8):
        action = generator.uniform(-0.9, 0.9, 2)
        obs_a, r_a = through_wrappers(reference, live, action, 1e-2)
        result = stepped.step((low + 0.5 * (action + 1.0) * (high - low)).astype(np.float32))
        assert result[0].shape == (10,)
        d = recorder.take_derivatives(1)
        assert d.valid[0]
        coarse = 1e-3 if name == "DtypeObservation" else 1e-4
        np.testing.assert_allclose(d.O_a[0], obs_a, atol=coarse)
        np.testing.assert_allclose(d.r_a[0], r_a, atol=coarse)
        of_state = d.next_C[0].any(axis=1)
        np.testing.assert_allclose((d.next_C @ d.B)[0][of_state], d.O_a[0][of_state], atol=1e-3)
        if name == "Shown":
            assert env.render() == "me"  # wrappers stay where they were


def test_rescaled_observations() -> None:
    def make() -> Env:
        env = gym_wrappers.RescaleObservation(TinyReacher(), np.float32(-1.0), np.linspace(0.5, 2.0, 10, dtype=np.float32))
        return gym_wrappers.RescaleObservation(Monitor(env), np.float32(0.0), np.float32(1.0))

    env, plain = install_recorder(make(), ONE), install_recorder(TinyReacher(), ONE)
    recorder = env.get_wrapper_attr("agpo_recorder")
    np.testing.assert_allclose(recorder.observation_scale, 0.01, rtol=1e-6)
    first = np.asarray(env.reset(seed=1)[0]), np.asarray(plain.reset(seed=1)[0])
    for _ in range(3):
        action = np.array([0.3, -0.2], np.float32)
        second = np.asarray(env.step(action)[0]), np.asarray(plain.step(action)[0])
        np.testing.assert_allclose(second[0] - first[0], 0.01 * (second[1] - first[1]), atol=1e-6)
        first = second
    actual, expected = recorder.take_derivatives(3), plain.get_wrapper_attr("agpo_recorder").take_derivatives(3)
    assert actual.valid.all() and expected.O_x.any()
    for field in ("C", "next_C", "O_x", "O_a"):
        np.testing.assert_allclose(getattr(actual, field), 0.01 * getattr(expected, field), rtol=1e-5, atol=1e-12)
    for field in ("A", "B", "r_x", "r_a", "next_obs"):
        np.testing.assert_array_equal(getattr(actual, field), getattr(expected, field))


# ---------------------------------------------------------------------- the recorder


def test_a_recorder_is_put_in_once_and_taken_out() -> None:
    bare = stock("hopper")
    first = install_recorder(bare, ONE)
    assert isinstance(first, RecorderWrapper) and first.env is bare
    second = install_recorder(first, ONE)
    assert isinstance(second, RecorderWrapper) and second is not first and second.env is bare
    assert remove_recorder(second) is bare and remove_recorder(bare) is bare
    wrapped = Monitor(gym_wrappers.TimeLimit(stock("hopper"), 5))
    for _ in range(3):
        assert install_recorder(wrapped, ONE) is wrapped
        time_limit = wrapped.env
        assert isinstance(time_limit.env, RecorderWrapper)  # type: ignore[attr-defined]
        assert isinstance(time_limit.env.env, HopperEnv)  # type: ignore[attr-defined]
    assert wrapped.spec is None
    assert find_recorder(wrapped) is wrapped.get_wrapper_attr("agpo_recorder") and find_recorder(bare) is None
    made = gym.make("Reacher-v5")
    assert install_recorder(made, ONE).spec == gym.make("Reacher-v5").spec
    assert remove_recorder(wrapped) is wrapped and wrapped.env.env is wrapped.unwrapped  # type: ignore[attr-defined]


def test_the_newest_steps_are_taken() -> None:
    env = install_recorder(Monitor(stock("reacher")), ONE)
    recorder: TransitionRecorder = env.get_wrapper_attr("agpo_recorder")
    env.reset(seed=0)
    rewards = [env.step(np.full(2, 0.1 * i, np.float32))[1] for i in range(5)]
    assert recorder.n_recorded == 5
    d = recorder.take_derivatives(2)
    np.testing.assert_allclose(d.reward, rewards[-2:])
    for method in (recorder.take_derivatives, recorder.take_records):
        with pytest.raises(RuntimeError, match="1 steps were to be differentiated but only 0 were recorded"):
            method(1)
        for n_steps in (0, -1):
            with pytest.raises(ValueError, match="`n_steps` must be at least 1"):
                method(n_steps)


def test_records_can_be_paused_discarded_and_kept() -> None:
    env = install_recorder(stock("reacher"), ONE)
    recorder: TransitionRecorder = env.get_wrapper_attr("agpo_recorder")
    env.reset(seed=0)

    def step(n_steps: int) -> list[float]:
        return [float(env.step(np.full(2, 0.1, np.float32))[1]) for _ in range(n_steps)]

    rewards = step(4)
    recorder.pause_records()
    step(3)
    assert recorder.n_recorded == 4
    recorder.keep_oldest_records(2)
    rewards = rewards[:2] + step(1)
    np.testing.assert_allclose(recorder.take_records(3).rewards, rewards)
    step(1)
    recorder.pause_records()
    recorder.discard_records()
    step(2)
    assert recorder.n_recorded == 2


def test_forgotten_records_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    env = install_recorder(stock("reacher"), ONE)
    recorder: TransitionRecorder = env.get_wrapper_attr("agpo_recorder")
    env.reset(seed=0)
    env.step(np.zeros(2, np.float32))
    size = recorder.get_records()[0].n_bytes
    monkeypatch.setattr(recorder_module, "MAX_RECORD_BYTES", 5 * size)
    recorder.discard_records()
    for _ in range(12):
        env.step(np.zeros(2, np.float32))
    assert recorder.n_recorded == 5
    assert recorder.take_derivatives(5).valid.all()


def test_a_run_with_a_recorder_equals_a_run_without() -> None:
    recorded, plain = install_recorder(Monitor(stock("ant")), ONE), Monitor(stock("ant"))
    recorded.reset(seed=5), plain.reset(seed=5)
    for env in (recorded, plain):
        env.action_space.seed(5)
    for i in range(30):
        actions = recorded.action_space.sample(), plain.action_space.sample()
        first, second = (env.step(action) for env, action in zip((recorded, plain), actions, strict=True))
        np.testing.assert_array_equal(first[0], second[0])
        assert first[1:4] == second[1:4]
        if i % 10 == 9:
            recorded.get_wrapper_attr("agpo_recorder").take_derivatives(5)
        assert everything_of(recorded.unwrapped) == everything_of(plain.unwrapped)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", ["inverted_pendulum", "hopper"])
def test_a_model_changed_later_is_noticed(task: str) -> None:
    env = install_recorder(Monitor(stock(task)), ONE)
    recorder: TransitionRecorder = env.get_wrapper_attr("agpo_recorder")
    env.reset(seed=0)
    action = np.full(env.action_space.shape, 0.3, np.float32)  # type: ignore[arg-type]
    env.step(action)
    env.unwrapped.model.body_mass *= 2.0  # type: ignore[attr-defined]
    env.step(action)
    d = recorder.take_derivatives(2)
    np.testing.assert_array_equal(d.valid, [True, False])
    for field in (d.A, d.B, d.C, d.next_C, d.O_x, d.O_a, d.r_x, d.r_a):
        assert field[0].any() or task == "inverted_pendulum"
        assert not field[1].any()


def test_an_option_changed_later_is_noticed() -> None:
    env = install_recorder(stock("hopper"), ONE)
    env.reset(seed=0)
    env.unwrapped._ctrl_cost_weight = 5.0  # type: ignore[attr-defined]
    env.step(np.full(3, 0.5, np.float32))
    assert not env.get_wrapper_attr("agpo_recorder").take_derivatives(1).valid[0]


def test_exact_derivatives_through_wrappers() -> None:
    env = LinearQuadraticEnv(action_limit=2.0)
    wrapped = install_recorder(gym_wrappers.RescaleAction(Monitor(env), 0.0, 8.0), ONE)
    recorder: TransitionRecorder = wrapped.get_wrapper_attr("agpo_recorder")
    wrapped.reset(seed=0)
    states = []
    for action in (1.0, 7.0):
        states.append(env.get_state())
        wrapped.step(np.array([action], np.float32))
    d = recorder.take_derivatives(2)
    assert d.valid.all()
    for i, force in enumerate((-1.5, 1.5)):
        np.testing.assert_allclose(d.A[i], env.A)
        np.testing.assert_allclose(d.B[i], 2.0 * env.B)
        np.testing.assert_allclose(d.O_a[i], 2.0 * env.C @ env.B)
        np.testing.assert_allclose(d.r_x[i], -2.0 * env.Q @ states[i])
        np.testing.assert_allclose(d.r_a[i], 2.0 * (-2.0 * env.R @ [force]))


class Broken(LinearQuadraticEnv):
    """Offers derivatives that are not finite, or of another environment."""

    fault: Any = "nan"

    def differentiate(self, states: Any, actions: Any) -> TransitionDerivatives:
        d = super().differentiate(states, actions)
        if callable(self.fault):
            return self.fault(d) or d
        if self.fault == "nan":
            d.O_x[0] = np.nan
        if self.fault == "other":
            d.next_obs[0] += 0.1
        return d


def test_exact_derivatives_are_checked_too() -> None:
    for fault in ("nan", "other", "none"):
        env = Broken()
        env.fault = fault
        recorded = install_recorder(env, ONE)
        recorded.reset(seed=0)
        for _ in range(2):
            recorded.step(np.array([0.5], np.float32))
        d = recorded.get_wrapper_attr("agpo_recorder").take_derivatives(2)
        np.testing.assert_array_equal(d.valid, [fault == "none", True])
        assert d.A[0].any() == (fault == "none") and d.A[1].any()


@pytest.mark.parametrize(("size", "valid"), [(1e12, True), (np.inf, False)])
def test_exact_derivatives_know_no_largest_state(size: float, valid: bool) -> None:
    """MuJoCo's bound, beyond which it resets a simulation, is no concern of other simulators."""
    env = Broken()
    env.fault = lambda d: d.next_state.fill(size)
    recorded = install_recorder(env, ONE)
    recorded.reset(seed=0)
    recorded.step(np.zeros(1, np.float32))
    assert recorded.get_wrapper_attr("agpo_recorder").take_derivatives(1).valid == [valid]


def test_what_an_environment_returns_is_not_written_into() -> None:
    """It may be constants of the environment, views of one number, or the state itself, which the next step changes."""
    env = Broken()
    C = np.broadcast_to(np.ones((1, 1, 1)), (2, 2, 2))  # read-only
    valid = np.array([False, True])
    env.fault = lambda d: d._replace(C=C, valid=valid, A=constant)
    constant = np.ones((2, 2, 2))
    recorded = install_recorder(env, ONE)
    recorded.reset(seed=0)
    for _ in range(2):
        recorded.step(np.zeros(1, np.float32))
    d = recorded.get_wrapper_attr("agpo_recorder").take_derivatives(2)
    assert not d.A[0].any() and not d.C[0].any() and d.A[1].all()
    assert constant.all() and C.all()


class InPlace(LinearQuadraticEnv):
    """Its state is one array, for good."""

    def get_state(self) -> Any:
        self._shown = getattr(self, "_shown", None)
        if self._shown is None:
            self._shown = super().get_state().copy()
        self._shown[:] = super().get_state()
        return self._shown


def test_a_state_that_is_always_the_same_array() -> None:
    recorded = install_recorder(InPlace(), ONE)
    recorded.reset(seed=0)
    for _ in range(2):
        recorded.step(np.ones(1, np.float32))
    assert recorded.get_wrapper_attr("agpo_recorder").take_derivatives(2).valid.all()


@pytest.mark.parametrize("name", ["A", "B", "C", "r_a"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e39])
def test_exact_derivatives_beyond_single_precision_are_left_out(name: str, value: float) -> None:
    env = Broken()
    env.fault = lambda d: getattr(d, name).__setitem__(0, value)
    recorded = install_recorder(env, ONE)
    recorded.reset(seed=0)
    for _ in range(2):
        recorded.step(np.zeros(1, np.float32))
    d = recorded.get_wrapper_attr("agpo_recorder").take_derivatives(2)
    np.testing.assert_array_equal(d.valid, [False, True])
    assert not d.A[0].any() and d.A[1].any()


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (lambda d: tuple(d), TypeError, "must return a TransitionDerivatives, got a tuple"),
        (lambda d: d._replace(A=d.A[:, :1]), ValueError, r"`A` as a NumPy array of the shape \(1, 2, 2\), got \(1, 1, 2\)"),
        (lambda d: d._replace(B=d.B[:, :, 0]), ValueError, r"`B` as a NumPy array of the shape \(1, 2, 1\), got \(1, 2\)"),
        (lambda d: d._replace(r_x=d.r_x[:, None]), ValueError, r"`r_x` .* \(1, 2\), got \(1, 1, 2\)"),
        (lambda d: d._replace(reward=d.reward[:, None]), ValueError, r"`reward` .* \(1,\), got \(1, 1\)"),
        (lambda d: d._replace(next_state=d.next_state[0]), ValueError, r"`next_state` .* \(1, 'any'\), got \(2,\)"),
        (lambda d: d._replace(valid=d.valid.astype(int)), TypeError, "`valid` as a NumPy array of bool, got int64"),
        (lambda d: d._replace(O_x=d.O_x.tolist()), TypeError, "`O_x` as a NumPy array, got a list"),
        (lambda d: d._replace(C=d.C.astype(object)), TypeError, "`C` as a NumPy array of float64, got object"),
    ],
)
def test_exact_derivatives_of_the_wrong_form(fault: Any, error: type[Exception], message: str, deferred: bool) -> None:
    env = Broken()
    env.fault, env.deferred = fault, deferred  # type: ignore[attr-defined]
    recorded = install_recorder(env, ONE)
    recorded.reset(seed=0)
    with pytest.raises(error, match=f"`differentiate` of Broken .*{message}"):
        recorded.step(np.zeros(1, np.float32))
        recorded.get_wrapper_attr("agpo_recorder").take_derivatives(1)


class Tuned(LinearQuadraticEnv):
    """Has attributes of the names that a recorder might have, and one that wrappers set."""

    action_scale = 0.5
    goal = 1.0


class Teller(gym.Wrapper[Any, Any, Any, Any]):
    """Uses the environment below as if nothing could come in between."""

    def tell(self) -> tuple[Any, ...]:
        return self.env.action_scale, self.env.A[0, 1], hasattr(self.env, "recorder")  # type: ignore[attr-defined]

    def tune(self, goal: float) -> None:
        self.env.goal = goal  # type: ignore[attr-defined]
        self.env.new = goal  # type: ignore[attr-defined]
        self.env.action_space = spaces.Box(-goal, goal, (1,))
        del self.env.new  # type: ignore[attr-defined]


def test_a_recorder_hides_nothing_from_the_wrapper_above() -> None:
    env = Tuned()
    recorded = install_recorder(Monitor(Teller(env)), ONE)
    recorder: TransitionRecorder = recorded.get_wrapper_attr("agpo_recorder")
    scale = recorder.action_scale.copy()
    assert recorded.get_wrapper_attr("tell")() == (0.5, env.A[0, 1], False)
    recorded.get_wrapper_attr("tune")(3.0)
    assert env.goal == 3.0 and not hasattr(env, "new") and env.action_space.high == 3.0
    assert recorded.get_wrapper_attr("dynamics") == env.dynamics
    for name in ("action_scale", "recorder", "_own"):
        recorded.set_wrapper_attr(name, 2.0)
        assert recorded.get_wrapper_attr(name) == 2.0
    assert env.action_scale == 2.0 and not hasattr(recorder, "recorder")
    np.testing.assert_array_equal(recorder.action_scale, scale)
    with pytest.raises(AttributeError, match="'Tuned' object has no attribute 'missing'"):
        recorded.env.env.missing  # type: ignore[attr-defined]  # noqa: B018


def test_recorders_and_installers_can_be_copied() -> None:
    env = install_recorder(Monitor(stock("reacher")), FiniteDifferences(threads=2))
    env.reset(seed=0)
    env.step(np.zeros(2, np.float32))
    twin = copy.deepcopy(env)
    assert twin.unwrapped is twin.get_wrapper_attr("agpo_recorder").dynamics.env is not env.unwrapped
    results = [e.get_wrapper_attr("agpo_recorder").take_derivatives(1) for e in (env, twin)]
    assert_same_bits(results[0], results[1])
    env.close(), twin.close()
    installer = pickle.loads(pickle.dumps(RecorderInstaller(ONE)))
    assert isinstance(Monitor(stock("reacher")), installer)
    assert installer.differences == ONE


# ---------------------------------------------------------------------- vectorised environments


def hopper(**options: Any) -> Env:
    """
    A short-lived, monitored hopper.

    :param options: constructor options
    :return: the environment
    """
    return Monitor(gym_wrappers.TimeLimit(stock("hopper", **options), 7))


def custom() -> Env:
    """
    A short-lived, monitored custom hopper.

    :return: the environment
    """
    return Monitor(gym_wrappers.TimeLimit(MyHopper(), 7))


def linear() -> Env:
    """
    A monitored linear quadratic environment.

    :return: the environment
    """
    return Monitor(gym_wrappers.TimeLimit(LinearQuadraticEnv(), 7))


@pytest.fixture
def opened() -> Iterator[Callable[[VecEnv], VecEnv]]:
    """Close environments also when a test fails."""
    environments: list[VecEnv] = []

    def register(env: VecEnv) -> VecEnv:
        environments.append(env)
        return env

    yield register
    for env in environments:
        env.close()


def attached(env: VecEnv, differences: FiniteDifferences = ONE) -> VecEnvDynamics:
    """
    Attach derivatives that must be there.

    :param env: the environment
    :param differences: options
    :return: the derivatives
    """
    dynamics, report = attach_dynamics(env, differences)
    assert isinstance(dynamics, VecEnvDynamics), report.reason
    assert dynamics.report == report
    return dynamics


def roll(env: VecEnv, n_steps: int) -> dict[str, NDArray[Any]]:
    """
    Step with fixed random actions from a reset on.

    :param env: the environment
    :param n_steps: number of steps
    :return: what happened: next observations without auto-reset, rewards, dones, each of shape ``(n_steps, n_envs, ...)``
    """
    env.seed(3)
    env.reset()
    generator = np.random.default_rng(0)
    happened: dict[str, list[Any]] = {"next_obs": [], "rewards": [], "dones": []}
    for _ in range(n_steps):
        actions = generator.uniform(-1, 1, (env.num_envs, *env.action_space.shape)).astype(np.float32)  # type: ignore[misc]
        observations, rewards, dones, infos = env.step(actions)
        successors = [
            info["terminal_observation"] if done else observation
            for observation, done, info in zip(observations, dones, infos, strict=True)  # type: ignore[arg-type]
        ]
        for name, value in (("next_obs", np.stack(successors)), ("rewards", rewards), ("dones", dones)):
            happened[name].append(value.copy())
    return {name: np.stack(values) for name, values in happened.items()}


@pytest.mark.parametrize("make", [hopper, custom, linear])
def test_steps_belong_to_their_episodes(make: Callable[[], Env], opened: Callable[[VecEnv], VecEnv]) -> None:
    env = opened(DummyVecEnv([make] * 3))
    dynamics = attached(env)
    happened = roll(env, 10)
    assert happened["dones"].sum() == 3 and happened["dones"][6].all()
    d = dynamics.take(6)  # steps 4 to 9, with auto-resets after step 6
    assert d.valid.all() and len(d.valid) == 18
    np.testing.assert_allclose(d.next_obs.reshape(6, 3, -1), happened["next_obs"][4:], rtol=1e-6)
    np.testing.assert_allclose(d.reward.reshape(6, 3), happened["rewards"][4:], rtol=1e-6, atol=1e-7)
    assert dynamics.simulator_calls == 18 * dynamics.report.rows_per_transition
    with pytest.raises(RuntimeError, match="only 0 were recorded"):
        dynamics.take(1)
    roll(env, 2)
    dynamics.discard()
    with pytest.raises(RuntimeError, match="1 steps were to be differentiated but only 0 were recorded"):
        dynamics.take(1)
    with pytest.raises(ValueError, match="`n_steps`"):
        dynamics.take(0)


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_worker_processes_give_the_same_bits(start_method: str, opened: Callable[[VecEnv], VecEnv]) -> None:
    makers: list[Callable[[], Env]] = [hopper, hopper] if start_method == "spawn" else [custom, custom]
    here, there = opened(DummyVecEnv(makers)), opened(SubprocVecEnv(makers, start_method=start_method))
    results = []
    for env in (here, there):
        dynamics = attached(env, FiniteDifferences())
        roll(env, 9)
        dynamics.pause()
        env.step(np.zeros((2, 3), np.float32))
        dynamics.keep_oldest(8)
        results.append(dynamics.take(5))
        # An error must not end a worker
        with pytest.raises(RuntimeError, match="3 steps were to be differentiated but only 0 were recorded"):
            dynamics.take(3)
    assert_same_bits(results[0], results[1])
    assert results[0].valid.all()
    for _ in range(2):  # replaced, not stacked
        dynamics = attached(there)
    roll(there, 2)
    assert there.get_attr("agpo_n_recorded") == [2, 2]
    assert [type(e).__name__ for e in there.get_attr("agpo_recorder")] == ["TransitionRecorder"] * 2
    assert all(isinstance(e.env, HopperEnv) for e in there.get_attr("agpo_recorder"))


@pytest.mark.parametrize("make", [hopper, custom, linear])
def test_steps_differentiated_by_the_action_alone(make: Callable[[], Env], opened: Callable[[VecEnv], VecEnv]) -> None:
    here, there = opened(DummyVecEnv([make] * 2)), opened(SubprocVecEnv([make] * 2, start_method="spawn"))
    by_state, results = np.array([True, False, False]), []
    for env, chosen in ((here, None), (here, by_state), (there, by_state)):
        dynamics = attached(env)
        roll(env, 3)
        results.append(dynamics.take(3, chosen))
        report = dynamics.report
        by_action = 2 * 2 * report.rows_by_action + 2 * report.rows_per_transition
        assert dynamics.simulator_calls == (6 * report.rows_per_transition if chosen is None else by_action)
    expected, batched, apart = results
    assert_same_bits(batched, apart)
    first = slice(0, 2)
    assert_same_bits(batched.take(first), expected.take(first))
    # Other sources have nothing to save
    saved = () if make is not hopper else ("A", "O_x", "r_x")
    without = expected._replace(**{name: np.zeros_like(getattr(expected, name)) for name in saved})
    assert_same_bits(batched.take(slice(2, 6)), without.take(slice(2, 6)))


def test_different_options_have_engines_of_their_own(opened: Callable[[VecEnv], VecEnv]) -> None:
    costs = (1e-3, 0.5)
    env = opened(DummyVecEnv([lambda cost=cost: hopper(ctrl_cost_weight=cost) for cost in costs]))
    dynamics = attached(env)
    assert dynamics._batched is None
    roll(env, 3)
    d = dynamics.take(3)
    assert d.valid.all()
    # The second environment's derivatives are those of a vectorised environment with its options only
    both = opened(DummyVecEnv([lambda: hopper(ctrl_cost_weight=0.5)] * 2))
    expected = attached(both)
    assert expected.report.signature != dynamics.report.signature
    roll(both, 3)
    second = slice(1, None, 2)
    assert_same_bits(d.take(second), expected.take(3).take(second))


def test_equal_options_share_one_engine(opened: Callable[[VecEnv], VecEnv]) -> None:
    env = opened(DummyVecEnv([hopper] * 3))
    dynamics = attached(env)
    assert dynamics._batched is env.envs[0].get_wrapper_attr("agpo_recorder")  # type: ignore[attr-defined]
    roll(env, 4)
    together = dynamics.take(4)
    roll(env, 4)
    dynamics._batched = None
    assert_same_bits(dynamics.take(4), together)


def test_different_wrappers_do_not_share_an_engine(opened: Callable[[VecEnv], VecEnv]) -> None:
    def rescaled() -> Env:
        return Sized(hopper(), -0.5, 0.5)

    def clipped_twice() -> Env:
        return Sized(gym_wrappers.RescaleAction(hopper(), -0.5, 0.5), -0.5, 0.5)

    env = opened(DummyVecEnv([rescaled, clipped_twice]))
    dynamics = attached(env)
    assert dynamics._batched is None
    roll(env, 2)
    d = dynamics.take(2)
    scales = [e.get_wrapper_attr("agpo_recorder").action_scale for e in env.envs]  # type: ignore[attr-defined]
    np.testing.assert_allclose(scales, [[0.5] * 3, [1.0] * 3])
    assert d.valid.all()


@pytest.mark.parametrize("wrap", [VecMonitor, VecNormalize, VecCheckNan, lambda env: VecNormalize(VecMonitor(env))])
def test_transparent_vec_wrappers(wrap: Callable[[VecEnv], VecEnv], opened: Callable[[VecEnv], VecEnv]) -> None:
    plain, wrapped = opened(DummyVecEnv([hopper])), opened(wrap(DummyVecEnv([hopper])))
    results = []
    for env in (plain, wrapped):
        dynamics = attached(env)
        roll(env, 3)
        results.append(dynamics.take(3))
    assert_same_bits(results[0], results[1])


class OwnVecWrapper(VecEnvWrapper):
    """A wrapper of the user's own."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()


def test_two_normalizations_are_one_too_many() -> None:
    """SB3 knows the outer one alone, so that the scale of the inner one would be missing in every derivative."""
    env = VecNormalize(VecNormalize(DummyVecEnv([lambda: gym.make("InvertedPendulum-v5")]), norm_reward=False), norm_obs=False)
    dynamics, report = attach_dynamics(env, FiniteDifferences())
    assert dynamics is None
    assert report.kind == "none" and "two VecNormalize" in report.reason


class ShapedNormalize(VecNormalize):
    """A known wrapper, changed."""

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = super().step_wait()
        return observations, rewards + 1.0, dones, infos


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda env: VecFrameStack(env, 2), "VecFrameStack"),
        (OwnVecWrapper, "OwnVecWrapper"),
        (lambda env: VecNormalize(OwnVecWrapper(env)), "OwnVecWrapper"),
        (ShapedNormalize, "ShapedNormalize"),
        (VecTransposeImage, "VecTransposeImage"),
    ],
)
def test_opaque_vec_wrappers(wrap: Callable[[VecEnv], VecEnv], name: str, opened: Callable[[VecEnv], VecEnv]) -> None:
    picture = Spaces(spaces.Box(0, 255, (8, 8, 3), np.uint8), VECTOR)
    inner = opened(DummyVecEnv([(lambda: picture) if wrap is VecTransposeImage else hopper]))
    dynamics, report = attach_dynamics(wrap(inner), ONE)
    assert dynamics is None and report == ProviderReport("none", f"the wrapper {name} cannot be differentiated through")
    assert inner.env_is_wrapped(RecorderWrapper) == [False]


def _with_a_method(kind: type[VecEnv], name: str) -> type[VecEnv]:
    def method(self: Any, *args: Any) -> Any:
        return getattr(super(own, self), name)(*args)

    own = type("Own", (kind,), {name: method})
    return own


@pytest.mark.parametrize("method", ["step_async", "step_wait", "reset"])
@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv, MujocoVecEnv])
def test_vectorised_environments_with_steps_of_their_own(
    kind: type[VecEnv], method: str, opened: Callable[[VecEnv], VecEnv]
) -> None:
    """A subclass may change what the agent sees, does and gets; one that adds something else may not."""

    def attach(subclass: Any) -> ProviderReport:
        fns = [lambda: Monitor(gym.make("InvertedPendulum-v5"))]
        env = subclass("InvertedPendulum-v5", 1) if kind is MujocoVecEnv else subclass(fns)
        return attach_dynamics(opened(env), FiniteDifferences())[1]

    reason = "Own has steps or resets of its own, which cannot be differentiated through"
    assert attach(_with_a_method(kind, method)) == ProviderReport("none", reason)
    assert attach(_with_a_method(kind, "seed")).kind == "mujoco"


def test_without_derivatives_nothing_is_changed(opened: Callable[[VecEnv], VecEnv]) -> None:
    env = opened(DummyVecEnv([lambda: gym.make("Pendulum-v1"), lambda: gym.make("Pendulum-v1").unwrapped]))
    before = list(env.envs)  # type: ignore[attr-defined]
    dynamics, report = attach_dynamics(env, ONE)
    assert dynamics is None and report.kind == "none" and "PendulumEnv" in report.reason
    assert all(first is second for first, second in zip(env.envs, before, strict=True))  # type: ignore[attr-defined]
    assert env.env_is_wrapped(RecorderWrapper) == [False, False]


def test_one_environment_without_derivatives_is_enough(opened: Callable[[VecEnv], VecEnv]) -> None:
    env = opened(DummyVecEnv([hopper, lambda: Shaped(hopper())]))
    dynamics, report = attach_dynamics(env, ONE)
    assert dynamics is None and report.reason == "the wrapper Shaped cannot be differentiated through"
    assert env.env_is_wrapped(RecorderWrapper) == [False, False]


def test_simulators_of_different_sizes(opened: Callable[[VecEnv], VecEnv]) -> None:
    small, large = (lambda: LinearQuadraticEnv()), (lambda: LinearQuadraticEnv(noise_std=0.1))
    env = opened(DummyVecEnv([small, large]))
    dynamics, report = attach_dynamics(env, ONE)
    assert dynamics is None and "different sizes" in report.reason


def bare() -> Env:
    """
    A hopper without any wrapper.

    :return: the environment
    """
    return stock("hopper")


def test_worker_processes_need_a_wrapper(opened: Callable[[VecEnv], VecEnv]) -> None:
    env = opened(SubprocVecEnv([bare, hopper], start_method="fork"))
    dynamics, report = attach_dynamics(env, ONE)
    assert dynamics is None and report.kind == "none"
    assert "SubprocVecEnv holds environments without any wrapper" in report.reason and "Monitor" in report.reason
    assert env.env_is_wrapped(RecorderWrapper) == [False, False]
    # In this process there is a place for it
    here = opened(DummyVecEnv([bare]))
    assert attached(here).report.kind == "mujoco"


def test_worker_processes_without_derivatives(opened: Callable[[VecEnv], VecEnv]) -> None:
    env = opened(SubprocVecEnv([lambda: Monitor(Locked()), hopper], start_method="fork"))
    dynamics, report = attach_dynamics(env, ONE)
    assert dynamics is None and "`my_lock` cannot be copied" in report.reason
    assert env.env_is_wrapped(RecorderWrapper) == [False, False]


class MinimalVecEnv(VecEnv):
    """A vectorised environment that offers as little as possible."""

    def __init__(self, answer: str) -> None:
        self.answer = answer
        super().__init__(2, VECTOR, VECTOR)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name == "render_mode" or self.answer == "nothing":
            return [None, None]
        raise AttributeError(attr_name) if self.answer == "attribute" else NotImplementedError

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        if self.answer == "implemented":
            raise NotImplementedError
        return [self.answer != "false"] * 2

    def reset(self) -> Any: ...
    def step_async(self, actions: Any) -> None: ...
    def step_wait(self) -> Any: ...
    def close(self) -> None: ...
    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None: ...
    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError


@pytest.mark.parametrize("answer", ["implemented", "attribute", "nothing", "false"])
def test_vectorised_environments_that_offer_little(answer: str) -> None:
    dynamics, report = attach_dynamics(MinimalVecEnv(answer), ONE)
    assert dynamics is None and report.kind == "none" and "MinimalVecEnv" in report.reason


def test_attaching_again_replaces_recorders_and_their_threads(opened: Callable[[VecEnv], VecEnv]) -> None:
    env = opened(DummyVecEnv([hopper, hopper]))
    before = running_threads()
    for _ in range(3):
        dynamics = attached(env, FiniteDifferences(threads=2))
        roll(env, 2)
        assert dynamics.take(2).valid.all()
        for single in env.envs:  # type: ignore[attr-defined]
            assert single.env.env.env is single.unwrapped
    assert 0 < count_new_threads(before, most=2) <= 2
    env.close()
    assert count_new_threads(before, most=0) == 0


def test_two_owners_of_one_environment(opened: Callable[[VecEnv], VecEnv]) -> None:
    # As when a model is loaded with the environment of another that goes on learning
    env = opened(DummyVecEnv([hopper]))
    first = attached(env)
    roll(env, 3)
    expected = first.take(3)
    second = attached(env)
    roll(env, 3)
    assert_same_bits(first.take(3), expected)
    roll(env, 3)
    assert_same_bits(second.take(3), expected)


def test_derivatives_of_a_vectorised_environment_equal_slow_differences(opened: Callable[[VecEnv], VecEnv]) -> None:
    env = opened(DummyVecEnv([lambda: gym_wrappers.RescaleAction(stock("pusher"), -1.0, 1.0)] * 2))
    differences = FiniteDifferences(threads=1)
    dynamics = attached(env, differences)
    env.seed(0)
    env.reset()
    actions = np.random.default_rng(0).uniform(-0.9, 0.9, (2, 7)).astype(np.float32)
    for _ in range(3):
        env.step(actions)
    reference = play(stock("pusher"), 1)
    singles: list[Any] = env.envs  # type: ignore[attr-defined]
    scale = singles[0].unwrapped.action_space.high.astype(float)
    expected = [
        slow_derivatives(reference, single.unwrapped, scale * actions[i], differences) for i, single in enumerate(singles)
    ]
    env.step(actions)
    d = dynamics.take(1)
    for i, slow in enumerate(expected):
        np.testing.assert_allclose(d.A[i], slow.A, atol=1e-6)
        np.testing.assert_allclose(d.B[i], slow.B * scale, atol=1e-6)
        np.testing.assert_allclose(d.O_a[i], slow.O_a * scale, atol=1e-6)
        np.testing.assert_allclose(d.r_a[i], slow.r_a * scale, atol=1e-5)
        np.testing.assert_allclose(d.r_x[i], slow.r_x, atol=1e-6)


def test_engines_of_stock_tasks_start_no_threads_before_they_are_used() -> None:
    before = running_threads()
    environments = [stock("reacher") for _ in range(4)]
    engines = [MujocoDynamics(env, FiniteDifferences(threads=4)) for env in environments]
    assert running_threads() <= before and len(engines) == 4
