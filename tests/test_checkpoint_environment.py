"""The state of environments: put back into a fresh one, every later step is the same bit for bit."""

import functools
import json
import math
import shutil
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.envs.mujoco.inverted_pendulum_v5 import InvertedPendulumEnv
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
from gymnasium.wrappers import (
    FrameStackObservation,
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
    RecordVideo,
)
from small_models import RandomEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecVideoRecorder,
)

from sb3_agpo.checkpoint.environment import capture_environment, restore_environment
from sb3_agpo.checkpoint.plain_data import decode, encode
from sb3_agpo.checkpoint.vec_environment import capture_vec_environment, restore_vec_environment

MUJOCO_TASKS = [
    "Ant-v5",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Humanoid-v5",
    "HumanoidStandup-v5",
    "InvertedDoublePendulum-v5",
    "InvertedPendulum-v5",
    "Pusher-v5",
    "Reacher-v5",
    "Swimmer-v5",
    "Walker2d-v5",
]
OTHER_TASKS = ["Pendulum-v1", "MountainCarContinuous-v0", "CartPole-v1"]


def through_files(state: Any) -> Any:
    """Encode, write as JSON, read and decode."""
    data = encode(state)
    arrays = {name: array.copy() for name, array in data.arrays.items()}  # the environment writes into its own
    return decode(json.loads(json.dumps(data.structure)), arrays)


def play(env: gym.Env[Any, Any], actions: list[Any]) -> list[Any]:
    """Everything that steps and resets return."""
    seen: list[Any] = []
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(action)
        seen.append((np.array(obs), reward, terminated, truncated, {k: v for k, v in info.items() if k != "episode"}))
        if terminated or truncated:
            seen.append(np.array(env.reset()[0]))
    return seen


def assert_same(first: Any, second: Any) -> None:
    """Compare nested results bit for bit."""
    if isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    else:
        assert np.array_equal(first, second)


def make_task(env_id: str) -> gym.Env[Any, Any]:
    """A task with short episodes, so that resets happen too."""
    return Monitor(gym.make(env_id, max_episode_steps=15))


def random_actions(env: gym.Env[Any, Any], count: int) -> list[Any]:
    """Actions that do not depend on the state of the environment's generators."""
    space = type(env.action_space)(**vars_of(env.action_space))
    space.seed(3)
    return [space.sample() for _ in range(count)]


def vars_of(space: spaces.Space[Any]) -> dict[str, Any]:
    """Arguments that make the same space."""
    if isinstance(space, spaces.Box):
        return {"low": space.low, "high": space.high, "dtype": space.dtype}
    assert isinstance(space, spaces.Discrete)
    return {"n": space.n}


@pytest.mark.parametrize("env_id", [*MUJOCO_TASKS, *OTHER_TASKS])
def test_fresh_environment_goes_on_where_another_was(env_id: str) -> None:
    env, other = make_task(env_id), make_task(env_id)
    actions = random_actions(env, 50)
    env.reset(seed=1)
    play(env, actions[:20])
    captured = through_files(capture_environment(env))
    assert not captured["lost"] and not captured["unknown"]
    expected = play(env, actions[20:])
    other.reset(seed=2)
    play(other, actions[:3])
    assert restore_environment(other, captured) == []
    assert_same(play(other, actions[20:]), expected)


def test_capturing_changes_nothing() -> None:
    env, other = make_task("Ant-v5"), make_task("Ant-v5")
    actions = random_actions(env, 30)
    seen = []
    for each in (env, other):
        each.reset(seed=1)
        seen.append([])
        for action in actions:
            if each is env:
                capture_environment(each)
            seen[-1] += play(each, [action])
    assert_same(*seen)


WRAPPED: dict[str, Callable[[], gym.Env[Any, Any]]] = {
    "normalized": lambda: NormalizeReward(NormalizeObservation(gym.make("Pendulum-v1"))),
    "statistics": lambda: RecordEpisodeStatistics(gym.make("Pendulum-v1", max_episode_steps=15)),
    "stacked": lambda: FrameStackObservation(gym.make("Pendulum-v1"), 3),
    "random": lambda: RandomEnv(spaces.Box(-1.0, 1.0, (3,), np.float32)),
}


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_wrappers(make: Callable[[], gym.Env[Any, Any]]) -> None:
    env, other = make(), make()
    env.observation_space.seed(4)
    actions = random_actions(env, 40)
    env.reset(seed=1)
    play(env, actions[:22])
    captured = through_files(capture_environment(env))
    assert not captured["lost"]
    expected = play(env, actions[22:])
    other.reset(seed=2)
    restore_environment(other, captured)
    assert_same(play(other, actions[22:]), expected)


class ViewsEnv(InvertedPendulumEnv):
    """Rewards by views of the simulator that are made once."""

    def __init__(self) -> None:
        super().__init__()
        self.velocities, self.masses = self.data.qvel[:], self.model.body_mass[1:]

    def step(self, action: Any) -> Any:
        obs, _, *rest = super().step(action)
        return obs, float(self.velocities.sum() * self.masses.sum()), *rest


class ViewsWrapper(gym.Wrapper[Any, Any, Any, Any]):
    """The same from outside, and the simulator itself."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        core: Any = env.unwrapped
        self.model, self.data = core.model, core.data
        self.velocities, self.masses = core.data.qvel[:], core.model.body_mass[1:]

    def step(self, action: Any) -> Any:
        obs, _, *rest = self.env.step(action)
        return obs, float(self.velocities.sum() * self.masses.sum()), *rest


class QueueOfTheSimulator(InvertedPendulumEnv):
    """Memory of the simulator in other containers than lists, and as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.position = deque([self.data.qpos], maxlen=3), th.from_numpy(self.data.qpos)


def test_queues_and_tensors_of_the_simulators_memory() -> None:
    first, second = QueueOfTheSimulator(), QueueOfTheSimulator()
    for seed, env in enumerate((first, second)):
        env.reset(seed=seed)
    assert restore_environment(second, through_files(capture_environment(first))) == []
    play(second, [np.ones(1)] * 3)
    assert np.array_equal(second.places[0], second.data.qpos) and np.array_equal(second.position, second.data.qpos)


@pytest.mark.parametrize("make", [ViewsEnv, lambda: ViewsWrapper(gym.make("InvertedPendulum-v5"))], ids=["env", "wrapper"])
def test_views_of_the_simulator_stay_views(make: Callable[[], Any]) -> None:
    """A copy would for ever be what the simulator was at the checkpoint."""
    env, other = make(), make()
    actions = [np.array([0.3]), np.array([-0.1])] * 4
    env.reset(seed=1)
    play(env, actions[:3])
    captured = through_files(capture_environment(env))
    expected = play(env, actions[3:])
    other.reset(seed=2)
    assert restore_environment(other, captured) == []
    assert np.shares_memory(other.velocities, other.unwrapped.data.qvel)
    assert np.shares_memory(other.masses, other.unwrapped.model.body_mass)
    assert_same(play(other, actions[3:]), expected)


class Opaque:
    """Something that cannot be saved."""


class Counting:
    """A function that remembers how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, value: float) -> float:
        self.calls += 1
        return value


class EnvWith(RandomEnv):
    """An environment with one more attribute."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__(spaces.Box(-1.0, 1.0, (3,), np.float32))
        setattr(self, name, value)


class VecWrapperWith(VecEnvWrapper):
    """A wrapper of the user's own around all environments."""

    def __init__(self, thing: Any) -> None:
        super().__init__(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
        self.thing = thing

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()


@pytest.mark.parametrize("name", ["model", "data"])
def test_names_of_the_simulator_are_state_elsewhere(name: str) -> None:
    other = EnvWith(name, np.zeros(2))
    assert restore_environment(other, through_files(capture_environment(EnvWith(name, np.arange(2.0))))) == []
    assert np.array_equal(getattr(other, name), [0.0, 1.0])
    captured = capture_environment(EnvWith(name, Opaque()))
    assert captured["lost"] and captured["unknown"] == [f"EnvWith.{name} is a Opaque"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reward", Counting()),
        ("reward", th.nn.Linear(1, 1)),
        ("window", Opaque()),
        ("clock", Opaque()),
        ("counts", defaultdict(int, a=1)),
    ],
    ids=["callable", "network", "window", "clock", "defaultdict"],
)
def test_what_may_hold_state_is_named(name: str, value: Any) -> None:
    """Whatever its name, and even if it can be called or is a kind of dictionary."""
    captured = capture_environment(EnvWith(name, value))
    assert captured["lost"] and captured["unknown"] == [f"EnvWith.{name} is a {type(value).__name__}"]
    assert capture_vec_environment(VecWrapperWith(value))["notes"] == [f"VecWrapperWith.thing is a {type(value).__name__}"]


def make_renderer(kind: str) -> Any:
    """Something that only makes pictures."""
    model = mujoco.MjModel.from_xml_string("<mujoco/>")
    if kind == "gymnasium":
        return MujocoRenderer(model, mujoco.MjData(model))
    if kind == "mujoco":
        renderer = object.__new__(mujoco.Renderer)  # its constructor needs a screen
        renderer._gl_context = renderer._mjr_context = None
        return renderer
    if kind == "PIL":
        return pytest.importorskip("PIL.Image").new("RGB", (2, 2))
    return pytest.importorskip("matplotlib.figure").Figure()


@pytest.mark.parametrize("kind", ["gymnasium", "mujoco", "PIL", "matplotlib"])
def test_pictures_are_no_state(kind: str) -> None:
    assert not capture_environment(EnvWith("camera", make_renderer(kind)))["unknown"]


def test_functions_classes_and_modules_are_no_state() -> None:
    for value in (len, math.sin, np.tanh, lambda x: x, Counting, functools.partial(max, 0.0), Counting().__call__, math):
        assert not capture_environment(EnvWith("shape", value))["unknown"]
        assert not capture_vec_environment(VecWrapperWith(value))["notes"]


def test_box2d_world_cannot_be_saved() -> None:
    pytest.importorskip("Box2D")
    env = gym.make("BipedalWalker-v3")
    env.reset(seed=0)
    captured = capture_environment(env)
    assert captured["lost"] and any("world" in name for name in captured["unknown"])


class Views(RandomEnv):
    """State with two names, a generator with two names, and arrays that are equal by chance when an episode begins."""

    def __init__(self) -> None:
        super().__init__(spaces.Box(-np.inf, np.inf, (3,), np.float64))
        self.state = np.zeros(2)
        self.parts = {"position": self.state[:1], "velocity": [self.state[1:]]}
        self.start = np.zeros(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = super().reset(seed=seed)
        self.noise = self.np_random
        self.state[:] = 0.0
        self.place = self.start
        return obs, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.parts["velocity"][0] += self.np_random.normal(size=1)
        self.parts["position"] += self.parts["velocity"][0]
        self.place = self.place + 1.0
        return np.array([*self.state, self.noise.normal() + self.place[0] - self.start[0]]), 0.0, False, False, {}


def test_memory_and_generators_with_two_names_keep_both() -> None:
    first, second = Views(), Views()
    first.reset(seed=1)
    second.reset(seed=2)
    play(first, [np.zeros(1)] * 3)
    assert restore_environment(second, through_files(capture_environment(first))) == []
    assert np.shares_memory(second.parts["position"], second.state)
    assert_same(play(first, [np.zeros(1)] * 5), play(second, [np.zeros(1)] * 5))


class Shared(RandomEnv):
    """Objects with several names: in containers of every kind, a tensor that is a view, an array that a tensor is made of."""

    def __init__(self) -> None:
        super().__init__(spaces.Box(-np.inf, np.inf, (6,), np.float64))
        self.balls = [{"x": 0.0}, {"x": 0.0}]
        self.queue: list[float] = []
        self.views = {"queue": self.queue, "balls": (0, self.balls)}
        self.array = np.zeros((2, 3))
        self.tensor = th.from_numpy(self.array)
        self.column = self.tensor[:, 1]
        self.statistics = RunningMeanStd(shape=(1,))
        self.same = deque([self.statistics, self.queue])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = super().reset(seed=seed)
        self.target = self.balls[int(self.np_random.integers(2))]
        self.queue.clear()
        return obs, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        for sign, ball in zip((1, -1), self.balls, strict=True):
            ball["x"] += sign * float(self.np_random.normal())
        self.queue.append(self.target["x"])
        self.array[1] += self.target["x"]
        self.column += 1.0
        self.same[0].update(np.array([[self.target["x"]]]))
        numbers = [self.target["x"], sum(self.views["queue"]), sum(self.same[1]), self.views["balls"][1][0]["x"]]
        return np.array([*numbers, float(self.tensor.sum()), self.statistics.mean[0]]), 0.0, False, False, {}


class Sharing(gym.Wrapper[Any, Any, Any, Any]):
    """Draws from the environment's generator and reads its array and its list."""

    def reset(self, **kwargs: Any) -> Any:
        results = self.env.reset(**kwargs)
        core: Any = self.env.unwrapped
        self.generator, self.row, self.core_queue = core.np_random, core.array[1], core.queue
        return results

    def step(self, action: Any) -> Any:
        obs, *rest = self.env.step(action)
        return obs + self.generator.normal() + self.row.sum() + sum(self.core_queue), *rest


def test_what_is_shared_stays_shared() -> None:
    """Within an environment, and between it and its wrappers."""
    first, second = Sharing(Shared()), Sharing(Shared())
    for seed in range(4):
        first.reset(seed=1)
        play(first, [np.zeros(1)] * 3)
        second.reset(seed=seed)
        state = through_files(capture_environment(first))
        assert restore_environment(second, state) == []
        assert second.unwrapped.tensor.data_ptr() == second.unwrapped.array.ctypes.data  # type: ignore[attr-defined]
        assert_same(play(first, [np.zeros(1)] * 5), play(second, [np.zeros(1)] * 5))


def test_sharing_in_checkpoints_of_before() -> None:
    """They describe it for each layer."""
    first, second = Views(), Views()
    first.reset(seed=1)
    second.reset(seed=2)
    play(first, [np.zeros(1)] * 3)
    state = through_files(capture_environment(first))
    sharing, layer = state.pop("sharing"), state["layers"][0]
    layer["sharing"] = {
        "generators": [[path[2:] for path in paths] for paths in sharing["objects"]],
        "memory": sharing["memory"],
    }
    for memory in sharing["memory"]:
        for view in memory["views"]:
            view["path"] = view["path"][2:]
    del layer["names"]
    assert restore_environment(second, state) == []
    assert_same(play(first, [np.zeros(1)] * 5), play(second, [np.zeros(1)] * 5))


@pytest.mark.parametrize(
    "draw", [lambda generator: generator.normal, lambda generator: functools.partial(generator.normal, 1.0)]
)
def test_methods_of_generators_are_named(draw: Callable[[Any], Any]) -> None:
    """The generator that is put back is another object."""
    for generator in (np.random.default_rng(0), np.random.RandomState(0)):
        captured = capture_environment(EnvWith("draw", draw(generator)))
        assert not captured["lost"] and captured["unknown"] == [f"EnvWith.draw is a method of a {type(generator).__name__}"]
    assert not capture_environment(EnvWith("draw", np.random.normal))["unknown"]  # saved with the model, and put back in place


class Forgetful(RandomEnv):
    """An attribute that is there in the first step of an episode alone."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.first = True
        return super().reset(seed=seed)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, *rest = super().step(action)
        bonus = 5.0 if hasattr(self, "first") else 0.0
        vars(self).pop("first", None)
        return obs + bonus, *rest


def test_attributes_that_a_reset_makes_do_not_come_back() -> None:
    first, second = (Forgetful(spaces.Box(-1.0, 1.0, (3,), np.float64)) for _ in range(2))
    for seed, env in enumerate((first, second)):
        env.reset(seed=seed)
    play(first, [np.zeros(1, np.float32)] * 3)
    restore_environment(second, through_files(capture_environment(first)))
    assert_same(play(first, [np.zeros(1, np.float32)] * 20), play(second, [np.zeros(1, np.float32)] * 20))


TABLE = np.arange(10.0).reshape(5, 2)


class Rows(RandomEnv):
    """A row of a table, and arrays that are one when an episode begins and two later; a view that comes on the way."""

    def __init__(self) -> None:
        super().__init__(spaces.Box(-np.inf, np.inf, (2,), np.float64))
        self.table = TABLE
        self.place = self.previous = self.seen = np.zeros(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = super().reset(seed=seed)
        self.row = self.table[self.np_random.integers(5)]
        self.place = self.previous = self.seen = self.row.copy()
        return obs, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.previous, self.place = self.place, self.place + self.row
        self.seen = self.place
        self.late = self.place[::-1]
        return self.late + self.previous, 0.0, False, False, {}


def test_nothing_but_the_environment_is_written_to() -> None:
    """The new one's arrays may be views of others than the old one's, of constants of a module even."""
    first, second = Rows(), Rows()
    for seed in range(6):
        first.reset(seed=1)
        play(first, [np.zeros(1)] * 3)
        second.reset(seed=seed)
        assert restore_environment(second, through_files(capture_environment(first))) == []
        assert np.array_equal(TABLE, np.arange(10.0).reshape(5, 2))
        assert_same([first.table, first.row, first.place], [second.table, second.row, second.place])
        assert second.seen is not second.previous and np.shares_memory(second.row, second.table)
        assert np.shares_memory(second.late, second.seen) and np.shares_memory(second.place, second.seen)
        assert_same(play(first, [np.zeros(1)] * 3), play(second, [np.zeros(1)] * 3))


class PartsOfTheSimulator(InvertedPendulumEnv):
    """Views of the simulator in a container, alone or with something else."""

    def __init__(self, **others: Any) -> None:
        super().__init__()
        self.parts = {"position": self.data.qpos, "velocity": self.data.qvel, **others}


def test_views_of_the_simulator_in_containers() -> None:
    first, second = PartsOfTheSimulator(), PartsOfTheSimulator()
    for seed, env in enumerate((first, second)):
        env.reset(seed=seed)
    play(first, [np.ones(1)] * 3)
    assert restore_environment(second, through_files(capture_environment(first))) == []
    second.step(np.ones(1))
    assert np.array_equal(second.parts["velocity"], second.data.qvel)
    assert any(
        "holds memory of the simulator" in what for what in capture_environment(PartsOfTheSimulator(count=3))["unknown"]
    )


def test_other_environment_is_refused() -> None:
    env = make_task("Hopper-v5")
    env.reset(seed=0)
    captured = capture_environment(env)
    with pytest.raises(ValueError, match=r"Walker2dEnv, that of the checkpoint .* HopperEnv; make it with the same wrappers"):
        restore_environment(make_task("Walker2d-v5"), captured)
    captured["simulator"]["arrays"]["qpos"] = np.zeros(3)
    with pytest.raises(ValueError, match="`qpos` has another size"):
        restore_environment(env, captured)


def test_options_of_all_kinds_are_compared() -> None:
    """Those of the checkpoint would replace them."""
    captured = through_files(capture_environment(gym.make("Hopper-v5", healthy_z_range=(1.1, 9.0))))
    restore_environment(gym.make("Hopper-v5", healthy_z_range=[1.1, 9.0], render_mode="rgb_array"), captured)
    with pytest.raises(ValueError, match=r"made with healthy_z_range=\(0.7, inf\), that of the checkpoint with \(1.1, 9.0\)"):
        restore_environment(gym.make("Hopper-v5"), captured)
    before = {**captured, "made_with": {"max_episode_steps": 1000}}  # checkpoints of before held numbers alone
    del before["options"]
    restore_environment(gym.make("Hopper-v5", healthy_z_range=(0.9, 9.0)), before)
    with pytest.raises(ValueError, match="made with max_episode_steps=5"):
        restore_environment(gym.make("Hopper-v5", max_episode_steps=5), before)


def make_vec_task() -> VecMonitor:
    """Two environments under every wrapper that has a state."""
    envs = DummyVecEnv([lambda: gym.make("Hopper-v5", max_episode_steps=15)] * 2)
    return VecMonitor(VecFrameStack(VecNormalize(envs), 2))


@pytest.mark.parametrize("override", [True, False])
def test_monitors_count_seconds_from_the_head_of_their_file(override: bool, tmp_path: Path) -> None:
    """A new file begins with when the new Monitor was made, an old one that is added to with when the old one was."""

    def make_monitor(name: str) -> Monitor:
        return Monitor(gym.make("Pendulum-v1"), str(tmp_path / name), override_existing=override)

    first, second = make_monitor("first"), make_monitor("second")
    first.reset()
    first.t_start = 0.0
    restore_environment(second, through_files(capture_environment(first)))
    assert (second.t_start > 0.0) == override
    envs = [VecMonitor(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), str(tmp_path / name)) for name in ("a", "b")]
    envs[0].t_start = 0.0
    restore_vec_environment(envs[1], through_files(capture_vec_environment(envs[0])))
    assert envs[1].t_start > 0.0  # it always begins a new one
    for env in (first, second, *envs):
        env.close()


class Painted(RandomEnv):
    """Random observations, and a picture of nothing."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self) -> None:
        super().__init__(gym.spaces.Box(-1.0, 1.0, (1,)))
        self.render_mode = "rgb_array"

    def render(self) -> Any:
        """Black."""
        return np.zeros((16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("vectorised", [True, False])
def test_videos_go_where_the_new_recorder_writes(vectorised: bool, tmp_path: Path) -> None:
    """Also that of the episode under way, and where the old folder is gone."""

    def make_recorder(name: str) -> VecEnv:
        if vectorised:
            env = DummyVecEnv([Painted])
            return VecVideoRecorder(env, str(tmp_path / name), lambda step: step % 8 == 0, video_length=5, name_prefix=name)
        return DummyVecEnv([lambda: RecordVideo(Painted(), str(tmp_path / name), lambda _: True, name_prefix=name)])

    def play(env: VecEnv, n_steps: int) -> None:
        for _ in range(n_steps):
            env.step(np.zeros((1, 1), dtype=np.float32))

    first = make_recorder("first")
    first.reset()
    play(first, 11)
    captured = through_files(capture_vec_environment(first))
    first.close()
    shutil.rmtree(tmp_path / "first")
    second = make_recorder("second")
    assert restore_vec_environment(second, captured) == []
    play(second, 20)
    second.close()
    assert not (tmp_path / "first").exists()
    assert len([path for path in (tmp_path / "second").glob("*.mp4") if path.name.startswith("second")]) >= 2


class Curriculum(DummyVecEnv):
    """A vectorised environment with a state of its own."""

    def __init__(self, fns: Any, opaque: Any = None) -> None:
        super().__init__(fns)
        self.level, self.opaque = 0, opaque

    def step_wait(self) -> Any:
        """Count."""
        self.level += 1
        return super().step_wait()


def test_a_vectorised_environments_own_state() -> None:
    env, other = (Curriculum([lambda: gym.make("Pendulum-v1")]) for _ in range(2))
    env.reset()
    env.step(np.zeros((1, 1)))
    captured = through_files(capture_vec_environment(env))
    assert restore_vec_environment(other, captured) == [] and other.level == 1
    del captured["own"]  # checkpoints of before
    assert restore_vec_environment(other, captured) == []
    notes = capture_vec_environment(Curriculum([lambda: gym.make("Pendulum-v1")], object()))["notes"]
    assert notes == ["Curriculum.opaque is a object"]


def test_vectorized_environment() -> None:
    env, other = make_vec_task(), make_vec_task()
    env.seed(1)
    env.reset()
    actions = [np.array([env.action_space.sample() for _ in range(2)]) for _ in range(60)]
    for action in actions[:30]:
        env.step(action)
    captured = through_files(capture_vec_environment(env))
    other.seed(5)
    assert restore_vec_environment(other, captured) == []
    for action in actions[30:]:
        results = [each.step(action) for each in (env, other)]
        for infos in (results[0][3], results[1][3]):
            for info in infos:
                info.get("episode", {}).pop("t", None)
        assert_same(*results)
