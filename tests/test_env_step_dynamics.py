"""Derivatives of custom ``MujocoEnv`` classes through their own ``step``, and that the live environment never notices."""

from __future__ import annotations

import functools
import random
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np
import pytest
import torch as th
from dynamics_reference import assert_agree, assert_same_bits, everything_of, play, slow_derivatives, stock
from gymnasium import spaces
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv
from gymnasium.envs.mujoco.inverted_pendulum_v5 import InvertedPendulumEnv
from gymnasium.envs.mujoco.pusher_v5 import PusherEnv
from gymnasium.envs.mujoco.reacher_v5 import ReacherEnv

from sb3_agpo.dynamics import references
from sb3_agpo.dynamics.env_step import EnvStepDynamics
from sb3_agpo.dynamics.interface import DifferentiableDynamics, TransitionDerivatives
from sb3_agpo.dynamics.mujoco import FiniteDifferences, MujocoDynamics
from sb3_agpo.dynamics.private_copy import PrivateCopy
from sb3_agpo.dynamics.recorder import RecorderWrapper, install_recorder

Result = tuple[Any, Any, bool, bool, dict[str, Any]]
COARSE = FiniteDifferences(1e-3, 1e-2, 1e-3, 0.1)  # the larger the action's step, the less its float32 rounding matters


class MyHopper(HopperEnv):
    """A stock task under another name."""


class MyCheetah(HalfCheetahEnv):
    """A stock task under another name."""


class MyAnt(AntEnv):
    """A stock task under another name."""


class MyHumanoid(HumanoidEnv):
    """A stock task under another name."""


class MyPusher(PusherEnv):
    """A stock task under another name."""


class MyReacher(ReacherEnv):
    """A stock task under another name."""


class MyPendulum(InvertedPendulumEnv):
    """A stock task under another name."""


class Eventful(HopperEnv):
    """An own reward, noise in what is observed, and much in Python that the next step depends on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.history: list[float] = [0.0]
        self.my_data, self.my_model, self.my_reward = self.data, self.model, self.torque_price
        self.factors = {"bonus": np.array([0.5, 0.25])}
        self.other_name = self.factors["bonus"]

    def torque_price(self, action: np.ndarray[Any, Any]) -> float:
        return 0.1 * float(np.abs(action).sum())

    def step(self, action: np.ndarray[Any, Any]) -> Result:
        assert self.action_space.contains(action)
        action *= 0.9 + 0.1 * np.cos(len(self.history))  # in place, on purpose
        observation, reward, terminated, truncated, info = super().step(action)
        self.history.append(float(self.my_data.qvel[0]))
        self.other_name *= 0.9
        self.seen = getattr(self, "seen", 0) + 1
        self.my_model.geom_rgba[0, 0] = 0.5
        reward = reward + self.history[-2] * self.factors["bonus"][0] + self.seen - self.my_reward(action)
        return observation, reward, terminated, truncated, info

    def _get_obs(self) -> np.ndarray[Any, Any]:
        observation = super()._get_obs()
        observation[:2] *= 1.0 + 0.1 * len(self.history)
        return observation + 0.1 * self.np_random.standard_normal(observation.shape)


def make_pair(kind: type[MujocoEnv], n_steps: int, **options: Any) -> tuple[Any, Any]:
    """
    Two environments that have gone through the same.

    :param kind: their class
    :param n_steps: steps that they have taken
    :param options: constructor options
    :return: the two
    """
    pair = []
    for _ in range(2):
        random.seed(1)
        np.random.seed(1)
        pair.append(play(kind(**options), n_steps, scale=0.5))
    return pair[0], pair[1]


def differentiate(env: MujocoEnv, action: Any, differences: FiniteDifferences = COARSE) -> TransitionDerivatives:
    """
    Differentiate the step that the environment is about to take.

    :param env: the environment
    :param action: the action
    :param differences: step sizes and scheme
    :return: a batch of one
    """
    dynamics = EnvStepDynamics(env, differences)
    return dynamics.differentiate(dynamics.get_state()[None], action[None])


def assert_reproduces(derivatives: TransitionDerivatives, result: Result) -> None:
    """
    The unperturbed row is the live step.

    :param derivatives: a batch of one
    :param result: what the live ``step`` returned
    """
    assert derivatives.valid[0]
    np.testing.assert_array_equal(derivatives.next_obs[0], result[0])
    assert derivatives.reward[0] == result[1] and derivatives.terminated[0] == result[2]


# ---------------------------------------------------------------------- agreement


@pytest.mark.parametrize("kind", [MyHopper, MyCheetah, MyAnt, MyHumanoid, MyPusher, MyReacher, MyPendulum])
@pytest.mark.parametrize("centred", [False, True])
def test_trivial_subclasses_agree_with_slow_differences_and_with_their_stock_task(
    kind: type[MujocoEnv], centred: bool
) -> None:
    live, reference = make_pair(kind, 40)
    differences = FiniteDifferences(action_step=0.1, centred=centred, threads=1)
    action = live.action_space.sample()
    action[0] = live.action_space.high[0]
    actual = differentiate(live, action, differences)
    assert_agree(actual, slow_derivatives(reference, live, action, differences), tolerance=1e-5)
    original = play(kind.__mro__[1](), 40, scale=0.5)
    dynamics = MujocoDynamics(original, differences)
    expected = dynamics.differentiate(dynamics.get_state()[None], action[None])
    for name in ("A", "B", "O_x", "O_a", "r_x", "r_a"):
        value = getattr(expected, name)
        atol = 1e-5 * max(1.0, np.abs(value).max())
        np.testing.assert_allclose(getattr(actual, name), value, rtol=0, atol=atol, err_msg=name)
    for name in ("next_obs", "reward", "terminated", "next_state"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)
    if kind is not MyPusher:  # whose object rests, so that where it was seen is where it is
        np.testing.assert_allclose(actual.C, expected.C, atol=1e-6 if centred else 1e-3)
        np.testing.assert_allclose(actual.next_C, expected.next_C, atol=1e-6 if centred else 1e-3)
    assert_reproduces(actual, live.step(action))


def test_frame_skip_and_options_are_the_environments_own() -> None:
    options = {"frame_skip": 2, "ctrl_cost_weight": 0.7, "exclude_current_positions_from_observation": False}
    live, reference = make_pair(MyHopper, 10, **options)
    action = live.action_space.sample()
    actual = differentiate(live, action)
    assert actual.O_x.shape == (1, 12, 12)
    assert_agree(actual, slow_derivatives(reference, live, action, COARSE), tolerance=1e-5)
    assert_reproduces(actual, live.step(action))


# ---------------------------------------------------------------------- Python state


@pytest.mark.parametrize("n_steps", [0, 12])  # without a step yet, some attributes do not exist
def test_everything_in_python_is_part_of_where_a_step_starts(n_steps: int) -> None:
    live, twin = make_pair(Eventful, n_steps)
    dynamics = EnvStepDynamics(live, COARSE)
    for _ in range(4):
        action = live.action_space.sample()
        twin.action_space.sample()
        given = action.copy()
        before = everything_of(live)
        d = dynamics.differentiate(dynamics.get_state()[None], action[None])
        assert everything_of(live) == before
        np.testing.assert_array_equal(action, given)
        result = live.step(action.copy())
        assert_reproduces(d, result)
        np.testing.assert_array_equal(twin.step(action.copy())[0], result[0])
        # Nothing of a row is left in the next: one more step counted would be 1 over a distance of 1e-3
        assert np.abs(d.r_x).max() < 100.0
    # How the reward depends on the action, by hand
    scale = 0.9 + 0.1 * np.cos(len(live.history))
    action = np.full(3, 0.5, np.float32)
    own = dynamics.differentiate(dynamics.get_state()[None], action[None])
    stock_env = play(stock("hopper"), 0)
    mujoco.mj_copyData(stock_env.data, stock_env.model, live.data)
    plain = differentiate(stock_env, (scale * action).astype(np.float32))
    np.testing.assert_allclose(own.r_a, scale * (plain.r_a - 0.1), atol=1e-4)


def test_noise_is_common_to_all_rows() -> None:
    noisy, _ = make_pair(Eventful, 12)
    action = noisy.action_space.sample()
    d = differentiate(noisy, action)
    quiet = play(stock("hopper"), 0)
    mujoco.mj_copyData(quiet.data, quiet.model, noisy.data)
    scaled = ((0.9 + 0.1 * np.cos(len(noisy.history))) * action).astype(np.float32)
    expected = differentiate(quiet, scaled)
    np.testing.assert_allclose(d.O_x[0, 2:], expected.O_x[0, 2:], atol=1e-6)
    # What is observed before the step, and after it, when the history is longer
    phases = 1.0 + 0.1 * len(noisy.history), 1.0 + 0.1 * (len(noisy.history) + 1)
    for actual, stock_c, phase in ((d.C, expected.C, phases[0]), (d.next_C, expected.next_C, phases[1])):
        assert stock_c[0, :2].any()
        factors = np.ones(11)
        factors[:2] = phase
        np.testing.assert_allclose(actual[0], factors[:, None] * stock_c[0], atol=1e-6)


class Gambler(MyHopper):
    """Draws from every random generator in reach."""

    def step(self, action: np.ndarray[Any, Any]) -> Result:
        luck = np.random.standard_normal() + random.random() + self.np_random.random() + self.action_space.sample()[0]
        luck += float(th.rand(()))
        observation, reward, *rest = super().step(action)
        return observation + 0.1 * luck, reward + 10.0 * luck, *rest

    def _get_obs(self) -> np.ndarray[Any, Any]:
        return super()._get_obs() + np.random.standard_normal()


def test_all_random_generators_are_left_alone_and_repeated() -> None:
    live, twin = make_pair(Gambler, 5)
    dynamics = EnvStepDynamics(live, COARSE)
    action = np.full(3, 0.1, np.float32)
    quiet = play(stock("hopper"), 0)
    for _ in range(3):  # also from the second time on, when it is known that it draws globally
        before = everything_of(live)
        d = dynamics.differentiate(dynamics.get_state()[None], action[None])
        assert everything_of(live) == before
        mujoco.mj_copyData(quiet.data, quiet.model, live.data)
        plain = differentiate(quiet, action)
        np.testing.assert_allclose(d.r_x, plain.r_x, atol=1e-8)
        np.testing.assert_allclose(d.O_a, plain.O_a, atol=1e-8)
        assert_reproduces(d, live.step(action))
    assert live.np_random.random() != twin.np_random.random()  # the twin has not been stepped


class TorchGambler(MyHopper):
    """Draws from torch's global generator alone."""

    def step(self, action: np.ndarray[Any, Any]) -> Result:
        observation, reward, *rest = super().step(action)
        return observation, reward + 10.0 * float(th.randn(())), *rest


def test_noise_of_torch_is_common_to_all_rows() -> None:
    live = play(TorchGambler(), 5)
    action = np.full(3, 0.1, np.float32)
    before = everything_of(live)
    d = differentiate(live, action)
    assert everything_of(live) == before
    quiet = play(stock("hopper"), 0)
    mujoco.mj_copyData(quiet.data, quiet.model, live.data)
    np.testing.assert_allclose(d.r_x, differentiate(quiet, action).r_x, atol=1e-8)
    assert_reproduces(d, live.step(action))


class Recycler(MyHopper):
    """Hands out the same array at each step."""

    buffer = np.zeros(11)

    def step(self, action: np.ndarray[Any, Any]) -> Result:
        observation, *rest = super().step(action)
        self.buffer[:] = observation
        return self.buffer, *rest


def test_environments_may_reuse_their_arrays() -> None:
    live, reference = make_pair(Recycler, 5)
    action = live.action_space.sample()
    assert_agree(differentiate(live, action), slow_derivatives(reference, live, action, COARSE), tolerance=1e-5)


class Painter(MyHopper):
    """Draws at each step, as Gymnasium's tasks do for a human onlooker."""

    painted = 0

    def render(self) -> Any:
        type(self).painted += 1


def test_nothing_is_drawn() -> None:
    live = play(Painter(), 2)
    live.render_mode = "human"
    differentiate(live, live.action_space.sample())
    assert Painter.painted == 0
    live.step(live.action_space.sample())
    assert Painter.painted == 1 and live.mujoco_renderer is not None


def test_running_with_derivatives_equals_running_without() -> None:
    live, twin = make_pair(Eventful, 0)
    recorded = install_recorder(live, COARSE)
    assert isinstance(recorded, RecorderWrapper) and recorded.agpo_report.kind == "env_step"
    first, second = recorded.reset(seed=3)[0], twin.reset(seed=3)[0]
    for i in range(12):
        np.testing.assert_array_equal(first, second)
        action = np.full(3, np.sin(i), np.float32)
        first, second = recorded.step(action.copy())[0], twin.step(action.copy())[0]
        assert everything_of(live)[:5] == everything_of(twin)[:5]
    assert recorded.agpo_recorder.take_derivatives(10).valid.all()


# ---------------------------------------------------------------------- references


class Height:
    """A sensor that keeps a view of the place where it reads."""

    def __init__(self, qpos: Any) -> None:
        self.places = {"height": qpos[1::-1]}

    def read(self) -> float:
        return float(self.places["height"][0])


def view(env: Any) -> Callable[[], float]:
    env.view = env.data.qpos[1:3]
    return env.read_view


def sensor(env: Any) -> Callable[[], float]:
    env.sensor = Height(env.data.qpos)
    return env.sensor.read


def options(env: Any) -> Callable[[], float]:
    env.options = env.model.opt
    return env.read_options


def closure(env: Any) -> Callable[[], float]:
    data = env.data
    return lambda: float(data.qpos[1])


def default(env: Any) -> Callable[[], float]:
    return lambda owner=env: float(owner.data.qpos[1])


def list_of_functions(env: Any) -> Callable[[], float]:
    qpos = env.data.qpos
    env.terms = {"height": [functools.lru_cache(env.read_view), lambda: qpos[1]]}
    return env.read_terms


class Looking(MyHopper):
    """Pays for the height before the step, of which it knows in one way or another."""

    def __init__(self, look: Callable[[Any], Callable[[], float]]) -> None:
        super().__init__()
        self.look = look(self)

    def read_view(self) -> float:
        return float(self.view[0])

    def read_options(self) -> float:
        self.options.gravity[0] = 0.1 * self.data.qpos[1]  # of this step, and of the model that it is made with
        return float(self.data.qpos[1])

    def read_terms(self) -> float:
        return float(self.terms["height"][1]())

    def step(self, action: np.ndarray[Any, Any]) -> Result:
        height = self.look()
        observation, reward, *rest = super().step(action)
        return observation, reward + 10.0 * height, *rest


@pytest.mark.parametrize("look", [view, sensor, options])
def test_parts_of_the_simulator_in_attributes_are_those_of_the_copy(look: Callable[[Any], Callable[[], float]]) -> None:
    live, reference = (play(Looking(look), 5, scale=0.5) for _ in range(2))
    dynamics = EnvStepDynamics(live, COARSE)
    for _ in range(2):
        action = live.action_space.sample()
        before = everything_of(live)
        d = dynamics.differentiate(dynamics.get_state()[None], action[None])
        assert everything_of(live) == before
        assert_agree(d, slow_derivatives(reference, live, action, COARSE), tolerance=1e-5)
        assert d.r_x[0, 1] > 5.0  # without the height before the step it is small
        assert_reproduces(d, live.step(action))


@pytest.mark.parametrize("look", [closure, default, list_of_functions])
def test_functions_that_keep_a_hold_of_the_environment_are_named(look: Callable[[Any], Callable[[], float]]) -> None:
    name = "terms" if look is list_of_functions else "look"
    with pytest.raises(TypeError, match=f"its attribute `{name}` holds a function that keeps .* make the function a method"):
        EnvStepDynamics(play(Looking(look), 0))


class Imitator(MyHopper):
    """Follows a table of heights, and tries in odd ways to change it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = np.linspace(1.0, 1.3, 1000).copy()  # without, it is a view of memory that can be written
        self.table.setflags(write=False)
        self.parts = {"end": self.table[-10:], "own": np.zeros(3), "shown": np.broadcast_to(np.zeros(1), (4,))}
        self.n_failures = 0

    def step(self, action: np.ndarray[Any, Any]) -> Result:
        try:
            if not self.table.flags.owndata:  # in a copy
                self.table.setflags(write=True)
        except ValueError:
            self.n_failures += 1
        self.parts["own"] += 1.0
        observation, reward, *rest = super().step(action)
        return observation, reward - (self.data.qpos[1] - self.table[0] - self.parts["end"][0]) ** 2, *rest


def test_read_only_arrays_are_shared() -> None:
    live, reference = play(Imitator(), 5), play(Imitator(), 5)
    action = live.action_space.sample()
    before = everything_of(live)
    dynamics = EnvStepDynamics(live, COARSE)
    d = dynamics.differentiate(dynamics.get_state()[None], action[None])
    assert everything_of(live) == before and not live.table.flags.writeable
    copy = dynamics._private.env
    assert copy.n_failures == 1  # type: ignore[attr-defined]
    for mine, theirs in ((live.table, copy.table), (live.parts["end"], copy.parts["end"])):  # type: ignore[attr-defined]
        assert np.shares_memory(mine, theirs) and not theirs.flags.writeable
    for name in ("own", "shown"):
        assert not np.shares_memory(live.parts[name], copy.parts[name])  # type: ignore[attr-defined]
    assert_agree(d, slow_derivatives(reference, live, action, COARSE), tolerance=1e-5)
    assert_reproduces(d, live.step(action))


def test_other_functions_are_no_obstacle() -> None:
    price = 10.0
    live, reference = (play(Looking(lambda env: env.read_view), 0) for _ in range(2))
    for env in (live, reference):
        env.view, env.other = env.data.qpos[1:], [functools.partial(env.read_view), np.random.uniform, lambda: price]
    action = live.action_space.sample()
    assert_agree(differentiate(live, action), slow_derivatives(reference, live, action, COARSE), tolerance=1e-5)


def without_environment(env: Any) -> Callable[[], float]:
    filtered, rows = np.ones(1), [0.0]
    add, draw = rows.append, random.Random(0).random

    def read(weights: list[float] = [0.5]) -> float:  # noqa: B006
        filtered[:] *= weights[0]
        weights[0] *= 0.9
        add(filtered[0])
        return rows[-2] + draw()

    return read


class Meter:
    """A part of an environment that knows its owner without keeping it alive."""

    def __init__(self, env: Any, refer: Callable[[Any], Any]) -> None:
        self.env, self.sum = refer(env), 0.0

    def read(self) -> float:
        env = self.env if isinstance(self.env, weakref.ProxyTypes) else self.env()
        env.n_read = getattr(env, "n_read", 0) + 1
        self.sum += float(env.data.qpos[1])
        return float(env.data.qpos[1]) + 0.01 * self.sum + 0.01 * env.n_read


def weak_reference(env: Any) -> Callable[[], float]:
    env.meter = Meter(env, weakref.ref)
    return env.meter.read


def proxy(env: Any) -> Callable[[], float]:
    return Meter(env, weakref.proxy).read


def buffer(env: Any) -> Callable[[], float]:
    env.buffer = np.zeros((2, 3))
    env.parts = [env.buffer[0, ::-1], env.buffer[1:]]

    def read(buffer: Any = env.buffer) -> float:
        return float(buffer[0, 2] + buffer[1, 0])

    return read


class Remembering(Looking):
    """Writes into a part of an array before it looks at the whole."""

    def step(self, action: np.ndarray[Any, Any]) -> Result:
        if hasattr(self, "buffer"):
            self.parts[0][0] = self.data.qpos[1]
            self.parts[1][:] += 0.1
        return super().step(action)


@pytest.mark.parametrize("look", [without_environment, weak_reference, proxy, buffer])
def test_what_is_shared_by_usual_copies_is_copied(look: Callable[[Any], Callable[[], float]]) -> None:
    live, twin, reference = (play(Remembering(look), 5, scale=0.5) for _ in range(3))
    dynamics = EnvStepDynamics(live, COARSE)
    for _ in range(3):
        action = live.action_space.sample()
        d = dynamics.differentiate(dynamics.get_state()[None], action[None])
        result, expected = live.step(action), twin.step(action)
        np.testing.assert_array_equal(result[0], expected[0])
        assert result[1] == expected[1]
        assert_reproduces(d, result)
    if look is not without_environment:
        assert d.r_x[0, 1] > 5.0
    if look is weak_reference:
        assert live.n_read == twin.n_read and reference.meter.env() is reference


def test_other_views_and_weak_references_are_copied_as_usual() -> None:
    live = play(MyHopper(), 0)
    table = np.zeros((1000, 3))
    live.rows = [table[0], table[5]]
    live.parts = [Meter(live, weakref.ref)]
    live.known = weakref.WeakSet(live.parts)  # whose references have callbacks
    dynamics = EnvStepDynamics(live, COARSE)
    attributes = dynamics._private.capture_live().attributes
    assert all(row.base is None for row in attributes["rows"]) and len(attributes["known"]) == 1


def test_many_views_are_looked_up_together(monkeypatch: pytest.MonkeyPatch) -> None:
    live = play(MyHopper(), 0)
    live.rows, live.height = list(np.zeros((20, 3))), live.data.qpos[1:2]
    private, listed = PrivateCopy(live), []
    monkeypatch.setattr(references, "dir", lambda part: [listed.append(part), *dir(part)][1:], raising=False)
    assert len(private.capture_live().places) == 1 and len(listed) == 2  # data and model


def tensor(env: Any) -> Any:
    return th.from_numpy(env.data.qpos)


def called_back(env: Any) -> Any:
    return weakref.ref(env, lambda _: None)


@pytest.mark.parametrize(("make", "problem"), [(tensor, "a tensor of MuJoCo's memory"), (called_back, "without a callback")])
def test_what_a_copy_would_not_follow_is_named(make: Callable[[Any], Any], problem: str) -> None:
    live = play(MyHopper(), 0)
    live.held = [make(live)]
    with pytest.raises(TypeError, match=f"its attribute `held` .*{problem}"):
        EnvStepDynamics(live)


# ---------------------------------------------------------------------- models


def test_the_live_model_counts() -> None:
    live, reference = make_pair(MyHopper, 10)
    dynamics = EnvStepDynamics(live, COARSE)
    for env in (live, reference):
        env.model.body_mass *= 2.0
        env.model.opt.gravity[2] = -5.0
    action = live.action_space.sample()
    d = dynamics.differentiate(dynamics.get_state()[None], action[None])
    assert_agree(d, slow_derivatives(reference, live, action, COARSE), tolerance=1e-5)
    assert_reproduces(d, live.step(action))


class Grower(MyHopper):
    """Becomes heavier with each step."""

    def step(self, action: np.ndarray[Any, Any]) -> Result:
        self.model.body_mass *= 1.2
        return super().step(action)


def test_steps_may_change_the_model() -> None:
    live, _ = make_pair(Grower, 1)
    dynamics = EnvStepDynamics(live, COARSE)
    for _ in range(3):
        action = live.action_space.sample()
        before = everything_of(live)
        d = dynamics.differentiate(dynamics.get_state()[None], action[None])
        assert everything_of(live) == before
        heavy = play(MyHopper(), 0)
        heavy.model.body_mass[:] = 1.2 * live.model.body_mass
        mujoco.mj_copyData(heavy.data, heavy.model, live.data)
        expected = differentiate(heavy, action)
        for name in ("A", "B", "O_x", "r_x", "r_a"):
            np.testing.assert_allclose(getattr(d, name), getattr(expected, name), atol=1e-8, err_msg=name)
        assert_reproduces(d, live.step(action))


# ---------------------------------------------------------------------- what cannot be done


class Locked(MyHopper):
    """Holds what cannot be copied, from the start or from a later step on."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        if not late:
            self.my_lock = threading.Lock()

    def step(self, action: np.ndarray[Any, Any]) -> Result:
        self.my_lock = threading.Lock()
        return super().step(action)


def test_attributes_that_cannot_be_copied_are_named() -> None:
    with pytest.raises(TypeError, match=r"its attribute `my_lock` cannot be copied \(cannot pickle '_thread.lock' object\)"):
        EnvStepDynamics(play(Locked(), 0))
    live = play(Locked(late=True), 0)
    dynamics = EnvStepDynamics(live)
    arguments = dynamics.get_state()[None], np.zeros((1, 3), np.float32)
    live.step(arguments[1][0])
    with pytest.warns(RuntimeWarning, match="Locked cannot be differentiated at some steps.*`my_lock`"):
        d = dynamics.differentiate(*arguments)
    assert not d.valid[0] and not d.A.any()


class Picky(MyHopper):
    """Refuses some actions."""

    def step(self, action: np.ndarray[Any, Any]) -> Result:
        if action[0] > 0.5:
            raise ValueError("too much")
        return super().step(action)


def test_steps_that_fail_are_left_out_and_warned_about_once() -> None:
    live = play(Picky(), 0)
    dynamics = EnvStepDynamics(live, COARSE)
    states = np.stack([dynamics.get_state()] * 4)
    actions = np.zeros((4, 3), np.float32)
    actions[:, 0] = 0.0, 0.45, 0.9, 0.2  # fine, one row fails, all fail, fine
    before = everything_of(live)
    with pytest.warns(RuntimeWarning, match="Picky cannot .* raised ValueError: too much") as caught:
        d = dynamics.differentiate(states, actions)
    assert len(caught) == 1 and everything_of(live) == before
    np.testing.assert_array_equal(d.valid, [True, False, False, True])
    assert not d.A[1:3].any() and not d.r_a[1:3].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = dynamics.differentiate(states, actions)
    assert_same_bits(again, d)
    alone = dynamics.differentiate(states[:1], actions[:1])
    assert_same_bits(alone, d.take(slice(0, 1)))


def test_divergence_is_marked() -> None:
    live = play(MyHopper(), 3)
    dynamics = EnvStepDynamics(live)
    states, actions = np.stack([dynamics.get_state()] * 3), np.zeros((3, 3), np.float32)
    states[1, 7:] = 1e12
    d = dynamics.differentiate(states, actions)
    np.testing.assert_array_equal(d.valid, [True, False, True])
    assert not d.A[1].any() and d.A[2].any()


def other_observation(kind: str) -> Callable[..., Any]:
    """
    Something called ``_get_obs`` that is not the observation after a step.

    :param kind: how it differs
    :return: the method
    """
    if kind == "argument":
        return lambda self, x: HopperEnv._get_obs(self)
    if kind == "dictionary":
        return lambda self: {"o": HopperEnv._get_obs(self)}
    return lambda self: HopperEnv._get_obs(self)[:5]


@pytest.mark.parametrize("kind", ["argument", "dictionary", "shorter"])
def test_without_the_usual_method_there_is_no_observation_jacobian(kind: str) -> None:
    def step(self: Any, action: np.ndarray[Any, Any]) -> Result:
        self.do_simulation(action, self.frame_skip)
        return HopperEnv._get_obs(self), 0.0, False, False, {}

    own = type("Own", (HopperEnv,), {"step": step, "reset_model": HopperEnv._get_obs, "_get_obs": other_observation(kind)})
    live = play(own(), 3)
    d = differentiate(live, live.action_space.sample())
    assert d.valid[0] and d.O_x.any() and d.A.any()
    assert not d.C.any() and not d.next_C.any()


class Scaled(MyHopper):
    """Scales some of what it observes where it hands it out, and rounds the rest; the last entry may be noisy."""

    noise = 0.0

    def step(self, action: np.ndarray[Any, Any]) -> Result:
        observation, *rest = super().step(action)
        observation[:2] *= 10.0
        return observation.astype(np.float32), *rest

    def _get_obs(self) -> np.ndarray[Any, Any]:
        observation = super()._get_obs()
        observation[-1] += self.noise * self.np_random.standard_normal()
        return observation


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_observations_changed_by_step_have_no_observation_jacobian(noise: float) -> None:
    live = play(Scaled(), 3)
    live.noise = noise
    d = differentiate(live, live.action_space.sample())
    assert d.valid[0] and d.O_x[0, :2].any()
    for jacobian in (d.C[0], d.next_C[0]):
        np.testing.assert_array_equal(jacobian.any(axis=1), [False] * 2 + [True] * 9)


def test_wrong_shapes_are_refused() -> None:
    dynamics = EnvStepDynamics(play(MyHopper(), 0))
    assert isinstance(dynamics, DifferentiableDynamics)
    with pytest.raises(ValueError, match=r"`states` must have the shape \(n, 13\), got \(1, 12\)"):
        dynamics.differentiate(np.zeros((1, 12)), np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"`actions` must have the shape \(1, 3\), got \(1, 4\)"):
        dynamics.differentiate(np.zeros((1, 13)), np.zeros((1, 4)))
    empty = dynamics.differentiate(np.zeros((0, 13)), np.zeros((0, 3)))
    assert empty.A.shape == (0, 12, 12) and empty.next_obs.shape == (0, 11)


class Mapped(MyHopper):
    """Two actions for three motors, and a range of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 5.0], np.float32))

    def step(self, action: np.ndarray[Any, Any]) -> Result:
        return super().step(np.array([action[0] / 2.0, action[1] / 5.0, 0.1], np.float32))


def test_actions_need_not_be_controls() -> None:
    live, twin = play(Mapped(), 3), play(stock("hopper"), 0)
    mujoco.mj_copyData(twin.data, twin.model, live.data)
    d = differentiate(live, np.array([0.4, 1.0], np.float32))
    expected = differentiate(twin, np.array([0.2, 0.2, 0.1], np.float32))
    np.testing.assert_allclose(d.B[0], expected.B[0][:, :2] * [0.5, 0.2], atol=1e-4)
