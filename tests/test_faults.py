"""Faults, each the real thing: broken environments, dead workers, diverging simulators, full disks."""

import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from small_models import flat_state, small_model
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from sb3_agpo import AGPO
from sb3_agpo.agpo.agpo import MAX_NONFINITE
from sb3_agpo.benchmark.reliability_kills import kill_again_and_again
from sb3_agpo.checkpoint.directory import complete_checkpoints, read_checkpoint
from sb3_agpo.dynamics.mujoco import FiniteDifferences
from sb3_agpo.dynamics.stepping import silent_mujoco
from sb3_agpo.vec_env import MujocoVecEnv

#: steps of the single environment before its fault
BEFORE = 44


class FaultyEnv(gym.Env[Any, Any]):
    """
    Sound for a while, then what a function makes of its observation and reward. Episodes have ten steps.

    :param fault: (observation, reward) -> both, from the fault on
    :param when: first step with the fault
    """

    def __init__(self, fault: Callable[[Any, float], tuple[Any, Any]], when: int = BEFORE + 1) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (3,), np.float64)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.fault, self.when, self.steps = fault, when, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.uniform(-1.0, 1.0, 3), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.steps += 1
        obs, reward = self.np_random.uniform(-1.0, 1.0, 3), -float(np.square(action).sum())
        if self.steps >= self.when:
            obs, reward = self.fault(obs, reward)
        return obs, reward, False, self.steps % 10 == 0, {}


def finite_weights(model: AGPO) -> bool:
    """Whether networks, optimisers and temperature hold finite numbers only."""
    return all(bool(th.isfinite(value).all()) for value in flat_state(model) if isinstance(value, th.Tensor))


# ---------------------------------------------------------------------- what environments return

REFUSED: dict[str, tuple[Callable[[Any, float], tuple[Any, Any]], str]] = {
    "nan_observation": (
        lambda o, r: (o * np.array([1.0, np.nan, 1.0]), r),
        r"observation nan \(entry \[1\]\), which is not fin",
    ),
    "infinite_observation": (lambda o, r: (o + np.inf, r), "observation inf .*which is not finite"),
    "observation_beyond_float32": (lambda o, r: (0 * o + 1e39, r), r"observation 1e\+39 .*too large for networks in float32"),
    "observation_whose_square_overflows": (lambda o, r: (0 * o + 1e20, r), r"observation 1e\+20 .*too large for networks"),
    "nan_reward": (lambda o, r: (o, np.nan), "reward nan, which is not finite"),
    "infinite_reward": (lambda o, r: (o, -np.inf), "reward -inf, which is not finite"),
    "reward_beyond_float32": (lambda o, r: (o, 1e39), "reward inf, which is not finite"),
    "reward_whose_square_overflows": (lambda o, r: (o, 1e30), r"reward 1e\+30, which is too large for networks"),
    "longer_observation": (lambda o, r: (np.zeros(4), r), "(?s)broadcast.*check_env"),
    "reward_of_two": (lambda o, r: (o, np.zeros(2)), "(?s)0-dimensional.*check_env"),
    "reward_in_words": (lambda o, r: (o, "much"), "(?s)could not convert.*check_env"),
}


@pytest.mark.parametrize(("fault", "message"), REFUSED.values(), ids=REFUSED)
def test_what_networks_cannot_use_is_refused_before_it_is_stored(
    fault: Callable[[Any, float], tuple[Any, Any]], message: str
) -> None:
    model = small_model(FaultyEnv(fault))
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        model.learn(200)
    assert "environment" in str(caught.value) or caught.value.__notes__
    assert model.replay_buffer is not None and model.replay_buffer.pos == BEFORE
    assert model._n_updates > 0 and finite_weights(model)
    # Nothing is lost: the same model goes on in a sound environment
    model.set_env(FaultyEnv(fault, when=10**9))
    model.learn(40, reset_num_timesteps=False)
    assert model.replay_buffer.pos == BEFORE + 40 and finite_weights(model)


@pytest.mark.parametrize("shape", [(), (1,), (1, 3)])
def test_shapes_that_numpy_would_stretch_are_noticed_at_the_end_of_the_episode(shape: tuple[int, ...]) -> None:
    model = small_model(FaultyEnv(lambda o, r: (np.zeros(shape), r)))
    with pytest.raises(ValueError, match=r"environment 0 returned an observation of the shape .* space has the shape \(3,\)"):
        model.learn(200)
    assert model.num_timesteps == 50


def test_faults_name_their_environment() -> None:
    sound, faulty = (lambda: FaultyEnv(lambda o, r: (o, r))), (lambda: FaultyEnv(lambda o, r: (o, np.nan)))
    model = small_model(DummyVecEnv([sound, sound, faulty]))
    with pytest.raises(ValueError, match=f"at step {3 * (BEFORE + 1)} environment 2 returned the reward nan"):
        model.learn(400)


def test_faults_at_a_reset() -> None:
    env = FaultyEnv(lambda o, r: (o, r))
    env.reset = lambda **_: (np.full(3, np.nan), {})  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="after the reset environment 0 returned the observation nan"):
        small_model(env).learn(10)


def test_the_environment_is_reset_again_after_a_bad_reset() -> None:
    env = FaultyEnv(lambda o, r: (o, r))
    model = small_model(env)
    sound = env.reset
    env.reset = lambda **_: (np.full(3, np.nan), {})  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="after the reset"):
        model.learn(10)
    env.reset = sound  # type: ignore[method-assign]
    assert model.learn(10, reset_num_timesteps=False).num_timesteps == 10


def test_faults_in_dictionaries_are_named_by_key() -> None:
    class DictEnv(FaultyEnv):
        def __init__(self) -> None:
            super().__init__(lambda o, r: (o * np.nan, r))
            self.observation_space = spaces.Dict({"here": spaces.Box(-1.0, 1.0, (3,), np.float64)})  # type: ignore[assignment]

        def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:  # type: ignore[override]
            obs, info = super().reset(**options)
            return {"here": obs}, info

        def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
            obs, *rest = super().step(action)
            return ({"here": obs}, *rest)  # type: ignore[return-value]

    with pytest.raises(ValueError, match="environment 0 returned the observation 'here' nan"):
        small_model(DictEnv(), "MultiInputPolicy").learn(200)


def test_running_statistics_that_took_it_in_are_mentioned() -> None:
    env = VecNormalize(DummyVecEnv([lambda: FaultyEnv(lambda o, r: (o, np.inf))]))
    with pytest.raises(ValueError, match=r"reward inf.* The running statistics of `VecNormalize` hold it already"):
        small_model(env).learn(200)


ENDURED: dict[str, Callable[[Any, float], tuple[Any, Any]]] = {
    "reward_1e9": lambda o, r: (o, 1e9),
    "reward_of_both_signs_1e9": lambda o, r: (o, 1e9 * np.sign(o[0])),
    "observation_1e9": lambda o, r: (1e9 * o, r),
    "constant_observation": lambda o, r: (0.0 * o, r),
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("fault", ENDURED.values(), ids=ENDURED)
def test_huge_and_constant_values_leave_weights_finite(
    fault: Callable[[Any, float], tuple[Any, Any]], normalize: bool
) -> None:
    env: VecEnv = DummyVecEnv([lambda: FaultyEnv(fault, when=30)] * 2)
    model = small_model(VecNormalize(env) if normalize else env).learn(300)
    assert model._n_updates > 100 and finite_weights(model)
    assert np.isfinite(model.predict(model.observation_space.sample())[0]).all()


def test_window_gradients_that_are_never_finite_end_in_an_error() -> None:
    """Replayed policy updates in between, whose gradients are finite, must not hide it."""
    model = small_model("InvertedPendulum-v5", gate=lambda analytic, critic, step: th.full((len(critic),), th.nan))
    with pytest.raises(ValueError, match=rf"last {MAX_NONFINITE} actor \(on windows\) gradients were not finite"):
        model.learn(1000)
    assert finite_weights(model)


@pytest.mark.parametrize("terminated", [False, True])
@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "Pendulum-v1"])
def test_episodes_of_one_step(env_id: str, terminated: bool) -> None:
    class OneStep(gym.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
            obs, reward, _, _, info = super().step(action)
            return obs, reward, terminated, not terminated, info

    env = OneStep(gym.make(env_id)) if terminated else gym.make(env_id, max_episode_steps=1)
    model = small_model(env).learn(150)
    assert model.replay_buffer is not None and model.replay_buffer.dones[:150].all()
    assert model._n_updates > 0 and finite_weights(model)


def test_a_thousand_resets_in_a_row() -> None:
    model = small_model(make_vec_env("InvertedPendulum-v5", 2)).learn(60)
    env = model.get_env()
    assert env is not None
    threads = set(threading.enumerate())
    for _ in range(1000):
        assert np.isfinite(env.reset()).all()
    assert set(threading.enumerate()) <= threads
    assert max(env.get_attr("agpo_n_recorded")) <= model.rollout_buffer.n_pending
    model.learn(60, reset_num_timesteps=False)
    assert finite_weights(model)


# ---------------------------------------------------------------------- worker processes


class KillWorker(BaseCallback):
    """Kills a worker of the training environment after some steps."""

    def __init__(self, worker: int, steps: int = 40) -> None:
        super().__init__()
        self.worker, self.steps = worker, steps

    def _on_step(self) -> bool:
        if self.num_timesteps == self.steps:
            os.kill(self.training_env.processes[self.worker].pid, signal.SIGKILL)  # type: ignore[attr-defined]
        return True


def raising(observation: Any, reward: float) -> tuple[Any, Any]:
    """The environment's own code fails."""
    raise OSError("the robot is gone")


def leaving(observation: Any, reward: float) -> tuple[Any, Any]:
    """The environment's process ends without a word, as after an error in a C library."""
    os._exit(3)


def faulty_env(fault: Any) -> gym.Env[Any, Any]:
    """An environment for a worker, which a wrapper makes accessible."""
    return gym.wrappers.OrderEnforcing(FaultyEnv(fault))


@pytest.fixture
def _orphans() -> Iterator[list[VecEnv]]:
    """Ends the workers that are left of environments whose `close` can no longer work."""
    environments: list[Any] = []
    yield environments
    for env in environments:
        for process in env.processes:
            process.kill()
            process.join()


def test_a_killed_worker_is_named_and_learning_goes_on(_orphans: list[VecEnv], tmp_path: Path) -> None:
    env = make_vec_env("InvertedPendulum-v5", 2, vec_env_cls=SubprocVecEnv)
    _orphans.append(env)
    model = small_model(env)
    message = (
        r"of the 2 environments of SubprocVecEnv, worker 1 \(process \d+\) was ended by SIGKILL; .*`set_env`.*`AGPO.resume`"
    )
    with pytest.raises(RuntimeError, match=message):
        model.learn(200, callback=KillWorker(1))
    assert model.num_timesteps == 40 and finite_weights(model)
    with pytest.raises(RuntimeError, match="worker 1"):
        model.save_checkpoint(tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()
    model.save(tmp_path / "model")  # needs no environment, like this
    model.save_replay_buffer(tmp_path / "buffer")
    model.set_env(make_vec_env("InvertedPendulum-v5", 2))
    model.learn(40, reset_num_timesteps=False)
    assert model.num_timesteps == 80


def test_replay_buffer_of_a_closed_environment(tmp_path: Path) -> None:
    """The zoo closes the environment first, and saves then."""
    env = make_vec_env("InvertedPendulum-v5", 2, vec_env_cls=SubprocVecEnv)
    model = small_model(env).learn(60)
    model.save_replay_buffer(tmp_path / "before")
    env.close()
    model.save_replay_buffer(tmp_path / "after")
    model.load_replay_buffer(tmp_path / "before")
    assert model.replay_buffer.size() == 30  # type: ignore[union-attr]
    other = small_model(make_vec_env("InvertedPendulum-v5", 2))
    other.load_replay_buffer(tmp_path / "after")
    assert other.learn(60).replay_buffer.size() == 60  # type: ignore[union-attr]


class Waiting(gym.Wrapper[Any, Any, Any, Any]):
    """
    An environment that waits for a file in one of its steps, in which there is time enough for an interrupt.

    :param folder: of the file ``go_on``, and of ``begun``, which it writes before it waits
    """

    def __init__(self, env: gym.Env[Any, Any], folder: Path) -> None:
        super().__init__(env)
        self.begun, self.go_on, self.n_taken = folder / "begun", folder / "go_on", 0

    def step(self, action: Any) -> Any:
        """Step, the 21st time when it may go on."""
        self.n_taken += 1
        if self.n_taken == 21:
            self.begun.touch()
            while not self.go_on.exists():
                time.sleep(0.01)
        return self.env.step(action)


def test_an_interrupt_inside_a_step_of_workers(_orphans: list[VecEnv], tmp_path: Path) -> None:
    """It reaches this process alone, as ``kill -INT`` does: the workers still owe an answer, and no other is to be read."""
    env = SubprocVecEnv([lambda: Waiting(gym.make("InvertedPendulum-v5"), tmp_path)] * 2)
    _orphans.append(env)
    model = small_model(env)

    def interrupt(here: int) -> None:
        while not ((tmp_path / "begun").exists() and env.waiting):  # for the workers, which wait for the file
            time.sleep(0.01)
        signal.pthread_kill(here, signal.SIGINT)

    thread = threading.Thread(target=interrupt, args=(threading.get_ident(),), daemon=True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # libraries of other tests may have put theirs
    try:
        with pytest.raises(KeyboardInterrupt):
            thread.start()
            model.learn(1000)
    finally:
        signal.signal(signal.SIGINT, before)
        (tmp_path / "go_on").touch()
    assert model.num_timesteps == 40
    model.save_replay_buffer(tmp_path / "buffer")
    with pytest.raises(RuntimeError, match="interrupted inside a step"):
        model.learn(100, reset_num_timesteps=False)
    model.set_env(make_vec_env("InvertedPendulum-v5", 2))
    model.load_replay_buffer(tmp_path / "buffer")
    model.learn(60, reset_num_timesteps=False)


@pytest.mark.parametrize(("fault", "code"), [(leaving, 3), (raising, 1)])
def test_a_worker_that_ends_is_named(fault: Any, code: int, _orphans: list[VecEnv]) -> None:
    env = SubprocVecEnv([lambda: faulty_env(fault)])
    _orphans.append(env)
    with pytest.raises(RuntimeError, match=rf"worker 0 \(process \d+\) ended with exit code {code}"):
        small_model(env).learn(200)


def test_a_dead_worker_is_named_on_construction(_orphans: list[VecEnv]) -> None:
    env = make_vec_env("InvertedPendulum-v5", 1, vec_env_cls=SubprocVecEnv)
    _orphans.append(env)
    env.processes[0].kill()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="worker 0"):
        small_model(env)


def test_errors_of_other_connections_are_left_alone() -> None:
    class Broken(BaseCallback):
        def _on_step(self) -> bool:
            raise BrokenPipeError("somebody else's pipe")

    with pytest.raises(BrokenPipeError, match="somebody else's"):
        small_model("Pendulum-v1").learn(10, callback=Broken())


# ---------------------------------------------------------------------- diverging simulators

UNSTABLE = FiniteDifferences(velocity_step=1e12)


@pytest.mark.parametrize(
    "make", [lambda: make_vec_env("Hopper-v5", 2), lambda: MujocoVecEnv("Ant-v5", 2), lambda: HopperEnv()]
)
def test_rows_that_diverge_are_counted_without_a_flood_of_warnings(make: Callable[[], Any], tmp_path: Path) -> None:
    """MuJoCo would write a line of BADQACC for each perturbed row, to the terminal and to a file."""
    model = small_model(make(), finite_differences=UNSTABLE, max_invalid_fraction=1.0).learn(100, log_interval=10**6)
    assert model.logger.name_to_value["train/derivatives_skipped"] == 1.0
    assert model._n_updates > 0 and finite_weights(model)
    assert not (tmp_path / "MUJOCO_LOG.TXT").exists()


def test_too_many_rows_that_diverge_are_an_error() -> None:
    env = make_vec_env("InvertedPendulum-v5", 4)
    model = small_model(env, finite_differences=UNSTABLE, max_invalid_fraction=0.9, train_freq=20)
    with pytest.raises(ValueError, match=r"100% of the last 1000 simulator derivatives .*90%.*smaller ones if they make"):
        model.learn(1200)
    assert finite_weights(model)


@pytest.mark.parametrize("own", [True, False])
def test_where_an_environment_may_keep_its_state_is_told(own: bool) -> None:
    model = small_model(type("Own", (HopperEnv,), {})() if own else HopperEnv())
    with pytest.raises(ValueError, match="100% of the last 1000") as caught:
        model._check_derivatives(np.zeros(1000, dtype=np.bool_))
    assert ("attributes of its class" in str(caught.value)) == own


def test_warnings_reach_their_listener_again() -> None:
    model, heard = HopperEnv().model, []

    def diverge() -> None:
        data = mujoco.MjData(model)
        data.qvel[:] = 1e15
        mujoco.mj_step(model, data)

    previous = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(heard.append)
    try:
        with silent_mujoco():
            with silent_mujoco():
                diverge()
            diverge()
        assert heard == []
        diverge()
        assert heard and all("unstable" in message for message in heard)
    finally:
        mujoco.set_mju_user_warning(previous)


class ExplodingHopper(HopperEnv):
    """A simulation that diverges every now and then; MuJoCo puts it back to its start and warns."""

    n_taken = 0

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.n_taken += 1
        if self.n_taken % 25 == 0:
            self.data.qvel[:] = 1e15
        return super().step(action)


def test_a_simulation_that_diverges_is_survived() -> None:
    model = small_model(gym.wrappers.TimeLimit(ExplodingHopper(), 100)).learn(110, log_interval=10**6)
    assert model.provider_report.kind == "env_step"
    assert 0.0 < model.logger.name_to_value["train/derivatives_skipped"] < 0.5
    assert finite_weights(model) and model.derivative_buffer.size > 0


# ---------------------------------------------------------------------- full disks


@pytest.fixture
def _small_disk() -> Iterator[Path]:
    """A file system of 2 MB; skipped where this process may not mount one."""
    folder = Path(tempfile.mkdtemp())
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
        if not mounted:
            pytest.skip("this process may not mount a file system")
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
    finally:
        folder.rmdir()


def model_of_checkpoint_size(megabytes: float) -> AGPO:
    """A trained model whose checkpoint has about this size: most of it is networks and optimisers."""
    width = int(np.sqrt(megabytes * 1e6 / 4 / 3 / 5))
    return small_model("Pendulum-v1", policy_kwargs={"net_arch": [width, width]}).learn(40)


def assert_full_disk_harms_nothing(directory: Path, make_room: Callable[[], None]) -> None:
    """A small checkpoint fits; a larger one does not, leaves the small one as it is, and is saved once there is room."""
    first = model_of_checkpoint_size(0.2).save_checkpoint(directory)
    larger = model_of_checkpoint_size(3.0)
    with pytest.raises(
        OSError, match=rf"{first.name}, is still whole; .*free space, or lower `keep` or the model's `buffer_size`"
    ):
        larger.save_checkpoint(directory)
    assert [path.name for path in directory.iterdir()] == [first.name]
    read_checkpoint(first)
    assert AGPO.resume(directory, "Pendulum-v1").num_timesteps == 40
    make_room()
    assert read_checkpoint(larger.save_checkpoint(directory)).arrays


def test_full_disk(_small_disk: Path) -> None:
    directory = _small_disk / "checkpoints"
    make_room = ["mount", "-o", "remount,size=50m", str(_small_disk)]
    assert_full_disk_harms_nothing(directory, lambda: subprocess.run(make_room, check=True) and None)


def test_limit_of_file_size(tmp_path: Path) -> None:
    """As a quota does, the system stops a file in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        assert_full_disk_harms_nothing(tmp_path / "checkpoints", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ---------------------------------------------------------------------- killed processes


def test_killed_processes_lose_at_most_one_interval(tmp_path: Path) -> None:
    """Two kills here, sixty in `make soak`."""
    kills = kill_again_and_again(tmp_path / "checkpoints", 2)
    assert kills.summary()["corrupt_checkpoints"] == 0
    assert kills.summary()["most_steps_lost"] <= kills.summary()["steps_between_checkpoints"]
    assert kills.equal and len(complete_checkpoints(tmp_path / "checkpoints")) == 1
