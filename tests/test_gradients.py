"""The inspection of an environment's derivatives: its measures on cases with known answers, and its command line."""

from __future__ import annotations

import itertools
import re
import sys
import warnings
from io import StringIO
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib.image
import numpy as np
import pytest
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.wrappers import TimeLimit
from rich.console import Console
from small_models import small_model

from sb3_agpo.dynamics.interface import Array
from sb3_agpo.dynamics.mujoco import FiniteDifferences, MujocoDynamics
from sb3_agpo.dynamics.recorder import ProviderReport, find_recorder
from sb3_agpo.gradients import measures
from sb3_agpo.gradients.__main__ import main
from sb3_agpo.gradients.environment import Policy, make_environment, make_policy
from sb3_agpo.gradients.experiments import measure_predictions, reward_parts
from sb3_agpo.gradients.inspection import Inspection, Sizes, inspect_environment, steps_as_code, suggested, verdict
from sb3_agpo.gradients.measures import Jacobians, Prediction
from sb3_agpo.gradients.recording import BASE, FINER, SCALES, Recording, record, scaled
from sb3_agpo.gradients.report import print_inspection, print_without_derivatives

CUSTOM = '''
import numpy as np
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv

class CalmHopper(HopperEnv):
    """A hopper that pays for speed of its joints."""

    def __init__(self, price=0.01):
        self.price = price
        super().__init__()

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        calm = -self.price * float(np.square(self.data.qvel[3:]).sum())
        return obs, reward + calm, terminated, truncated, {**info, "reward_calm": calm}
'''


def jacobians(A: Any, B: Any, r_x: Any = None, r_a: Any = None, valid: Any = None) -> Jacobians:
    """Derivatives of a few steps, zero where nothing is given."""
    A, B = np.asarray(A, dtype=float), np.asarray(B, dtype=float)
    T, ndx, nu = B.shape
    rewards = [np.zeros((T, n)) if value is None else np.asarray(value, float) for value, n in ((r_x, ndx), (r_a, nu))]
    return Jacobians(A, B, *rewards, np.ones(T, dtype=bool) if valid is None else np.array(valid))


def record_steps(env: gym.Env[Any, Any], n_steps: int, n_moments: int = 5, seed: int = 0) -> Recording:
    """Record random actions."""
    env.action_space.seed(seed)
    recording = record(
        env, lambda _: env.action_space.sample(), FiniteDifferences(), n_steps=n_steps, n_moments=n_moments, seed=seed
    )
    assert isinstance(recording, Recording)
    return recording


# ---------------------------------------------------------------------- measures


def test_roughness_of_known_cases() -> None:
    """0 for equal derivatives, 1 for opposite ones, in between what the norms say; shares by the coordinate that differs."""
    A, B = np.zeros((3, 2, 2)), np.zeros((3, 2, 1))
    A[:, 0, 0], B[:, 1, 0] = 3.0, 4.0
    other_A, other_B = A.copy(), B.copy()
    other_A[1], other_B[1] = -A[1], -B[1]
    other_B[2, 1, 0] = 0.0  # the action's column is gone
    result = measures.roughness(jacobians(A, B), jacobians(other_A, other_B))
    assert result.by_step == pytest.approx([0.0, 1.0, 4.0 / (5.0 + 3.0)])
    # Step 1 gives (6^2, 8^2) / 10^2 to coordinates 0 and 2, step 2 gives 4^2 / 8^2 to coordinate 2
    assert result.by_coordinate == pytest.approx(np.array([0.36, 0.0, 0.64 + 0.25]) / 1.25)
    assert result.worst[1:].tolist() == [2, 2]


def test_invalid_steps_have_no_roughness() -> None:
    A, B = np.ones((2, 1, 1)), np.ones((2, 1, 1))
    result = measures.roughness(jacobians(A, B, valid=[True, False]), jacobians(2 * A, B))
    assert np.isfinite(result.by_step).tolist() == [True, False]


def test_windows_do_not_cross_resets() -> None:
    ends = np.array([False, False, True, False, False, False])
    assert measures.windows(ends, 1).tolist() == [0, 1, 2, 3, 4, 5]
    assert measures.windows(ends, 3).tolist() == [0, 3]
    assert measures.windows(ends, 7).tolist() == []


def test_growth_is_the_norm_of_the_product() -> None:
    random = np.random.default_rng(0)
    A, B = random.normal(size=(2, 3, 3)), np.zeros((2, 3, 1))
    assert measures.growth(jacobians(A, B), np.zeros(2, bool), 2) == pytest.approx(np.linalg.norm(A[1] @ A[0], 2))
    assert np.isnan(measures.growth(jacobians(A, B), np.array([True, False]), 2))


def test_gradient_of_a_window_equals_the_chain_rule() -> None:
    random = np.random.default_rng(1)
    A, B = random.normal(size=(3, 2, 2)), random.normal(size=(3, 2, 1))
    r_x, r_a = random.normal(size=(3, 2)), random.normal(size=(3, 1))
    expected = r_a[0] + r_x[1] @ B[0] + r_x[2] @ A[1] @ B[0]
    assert measures.reward_gradient(jacobians(A, B, r_x, r_a), 0, 3) == pytest.approx(expected)


def test_prediction_of_known_cases() -> None:
    """Perfect, no better than nothing, opposite, and nothing to explain."""
    deviations = np.array([[[0.1], [-0.2]]])
    changes = np.array([[0.2, -0.4]])
    assert measures.prediction(np.array([[2.0]]), deviations, changes) == pytest.approx((1.0, 1.0, 1, 1))
    assert measures.prediction(np.array([[0.0]]), deviations, changes) == pytest.approx((0.0, 0.5, 1, 1))
    assert measures.prediction(np.array([[-2.0]]), deviations, changes) == pytest.approx((-3.0, 0.0, 1, 1))
    nothing = measures.prediction(np.array([[1.0]]), deviations, np.zeros((1, 2)))
    assert (nothing.n_windows, nothing.n_moments) == (0, 1) and np.isnan(nothing.explained)


def test_another_step_is_suggested_only_if_it_is_better() -> None:
    def of(*explained: float) -> list[Prediction]:
        return [Prediction(value, 0.9, 10, 10) for value in explained]

    assert suggested(of(0.5, 0.5, 0.5), base=1) == 1
    assert suggested(of(0.51, 0.5, 0.5), base=1) == 1
    assert suggested(of(0.3, 0.5, 0.6), base=1) == 2
    assert suggested([Prediction(float("nan"), float("nan"), 0, 10)] * 3, base=1) == 1


def test_steps_as_code_make_the_same_options() -> None:
    options = scaled(FiniteDifferences(centred=True), 10.0)
    assert eval(steps_as_code(options)) == options
    assert steps_as_code(FiniteDifferences()) == "FiniteDifferences()"
    assert scaled(FiniteDifferences(action_step=0.5), 10.0).action_step == 1.0


# ---------------------------------------------------------------------- recording


def test_recorded_derivatives_are_those_of_the_engine() -> None:
    """At each difference step, and at the recorded states."""
    env = gym.make("HalfCheetah-v5")
    recording = record_steps(env, 7)
    assert recording.report.kind == "mujoco"
    for options, found in zip(recording.differences, recording.jacobians, strict=True):
        expected = MujocoDynamics(gym.make("HalfCheetah-v5").unwrapped, options)  # type: ignore[arg-type]
        d = expected.differentiate(recording.states, recording.actions)
        for name in ("A", "B", "r_x", "r_a"):  # the action's range is [-1, 1]
            assert np.array_equal(getattr(found, name), getattr(d, name)), (options, name)
    assert recording.differences[BASE] == FiniteDifferences()
    steps = [options.position_step for options in recording.differences]
    assert steps == pytest.approx([scale * FiniteDifferences().position_step for scale in SCALES])
    assert recording.neighbour is recording.jacobians[FINER]


class Randomised(HopperEnv):
    """Another hopper in each episode, which becomes heavier with each step, in wind that comes from a global generator."""

    def reset_model(self) -> Array:
        if not hasattr(self, "original_mass"):
            self.original_mass = self.model.body_mass.copy()
        self.model.body_mass[:] = self.original_mass * self.np_random.uniform(0.5, 2.0, self.original_mass.shape)
        return super().reset_model()

    def step(self, action: Any) -> Any:
        self.model.body_mass *= 1.1
        self.data.qvel[0] += 0.1 * np.random.standard_normal()
        return super().step(action)


@pytest.mark.parametrize("name", ["HalfCheetah-v5", "sb3_agpo/TorchPendulum-v0", "Randomised"])
def test_moments_lead_to_the_recorded_rewards(name: str) -> None:
    """Going back to a moment and taking the recorded actions repeats the episode, also after the live one has moved on."""
    env = TimeLimit(Randomised(), 4) if name == "Randomised" else gym.make(name)
    recording = record_steps(env, 12, n_moments=3)
    assert [moment.step for moment in recording.moments] == [0, 4, 8]
    assert recording.ends.sum() == (3 if name == "Randomised" else 0)
    for moment in [*recording.moments, recording.moments[0]]:
        copy = recording.replay.restart(moment.saved)
        for step in range(moment.step, moment.step + 4):
            assert copy.step(recording.actions[step])[1] == recording.rewards[step]


def test_linear_task_is_smooth_and_predicted_to_second_order() -> None:
    """A linear simulator has no roughness; its quadratic reward is predicted up to the square of the noise."""
    recording = record_steps(gym.make("sb3_agpo/LinearQuadratic-v0"), 30)
    assert len(recording.jacobians) == 1
    result = measures.roughness(recording.jacobians[0], recording.neighbour)
    assert np.nanmax(result.by_step) < 1e-12
    (small,), (large,) = (
        measure_predictions(recording, horizon=3, noise=noise, n_actions=20, seed=0) for noise in (1e-3, 0.3)
    )
    assert small.explained > 0.999 and small.direction > 0.99
    assert large.explained < small.explained


def test_rough_where_the_wall_is() -> None:
    """Pushed towards the wall, roughness is zero in free flight and not where the puck enters it."""
    env = gym.make("sb3_agpo/PushAgainstWall-v0")
    push = env.action_space.high  # type: ignore[attr-defined]
    recording = record(env, lambda _: push, FiniteDifferences(), n_steps=60, n_moments=2, seed=0)
    assert isinstance(recording, Recording)
    rough = measures.roughness(recording.jacobians[0], recording.neighbour).by_step
    inside = recording.states[:, 0] > -0.02
    assert inside.any() and not inside.all()
    assert np.nanmax(rough[recording.states[:, 0] < -0.2]) < 1e-12
    assert np.nanmax(rough[inside]) > 0.05


def test_state_and_observation_without_effect() -> None:
    """The place along the track matters to nothing on HalfCheetah; contact forces of Ant are a memory of the step."""
    effects = record_steps(gym.make("HalfCheetah-v5"), 5).effects
    assert np.flatnonzero(~effects.state_matters).tolist() == [0]
    assert effects.observation_moves.all() and effects.observation_of_state.all()
    ant = record_steps(gym.make("Ant-v5"), 30).effects
    contact_forces = slice(27, None)
    assert not ant.observation_of_state[contact_forces].any()
    assert ant.observation_moves[contact_forces].any() and ant.observation_of_state[:27].all()


# ---------------------------------------------------------------------- a whole inspection


@pytest.fixture(scope="module")
def custom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's file with an environment of their own."""
    path = tmp_path_factory.mktemp("custom") / "calm_hopper.py"
    path.write_text(CUSTOM)
    return path


@pytest.fixture(scope="module")
def inspected(custom: Path) -> Inspection:
    """That environment, inspected."""
    env = make_environment(f"{custom}:CalmHopper", {"price": 0.5})
    policy = make_policy(env, None, None, seed=0)
    found = inspect_environment(env, policy, Sizes(steps=60, moments=8, actions=6))
    assert isinstance(found, Inspection)
    return found


def test_own_environment(inspected: Inspection) -> None:
    """Source and names."""
    assert inspected.recording.report.kind == "env_step"
    assert inspected.states[0] == "rootx position" and inspected.states[-1] == "foot_joint velocity"
    assert inspected.actions == ["thigh_joint action", "leg_joint action", "foot_joint action"]
    assert len(inspected.coordinates) == len(inspected.roughness.by_coordinate)
    assert inspected.norm_A == pytest.approx([np.linalg.norm(A, 2) for A in inspected.recording.jacobians[BASE].A])


def test_parts_of_the_reward(inspected: Inspection) -> None:
    """Each part depends on what it is made of: control costs on the action alone, the bonus for standing on nothing."""
    parts = {part.name: part for part in inspected.reward}
    assert set(parts) == {"reward_forward", "reward_ctrl", "reward_survive", "reward_calm"}
    assert (parts["reward_ctrl"].by_action, parts["reward_ctrl"].by_state) == (1.0, 0.0)
    assert (parts["reward_survive"].by_action, parts["reward_survive"].by_state) == (0.0, 0.0)
    assert (parts["reward_calm"].by_action, parts["reward_calm"].by_state) == (1.0, 1.0)
    assert parts["reward_calm"].mean < 0.0


def test_contacts(inspected: Inspection) -> None:
    """The hopper's foot touches the floor, and its first steps are in the air."""
    contacts = inspected.recording.contacts
    assert contacts[0] == frozenset() and frozenset({("foot", "world")}) in contacts
    changed = inspected.contacts_changed
    landing = contacts.index(frozenset({("foot", "world")}))
    assert changed[landing] and not changed[:landing].any()
    after_reset = np.flatnonzero(inspected.recording.ends[:-1]) + 1
    assert len(after_reset) and not changed[after_reset].any()


def test_smooth_task_is_called_good_and_a_sparse_one_is_not(inspected: Inspection) -> None:
    assert "good here" in verdict(inspected)
    nothing = inspected._replace(predictions=[Prediction(float("nan"), float("nan"), 0, 10)] * len(SCALES))
    assert "nothing that a derivative could say" in verdict(nothing)
    untried = inspected._replace(predictions=[Prediction(float("nan"), float("nan"), 0, 0)] * len(SCALES))
    assert "nothing could be compared" in verdict(untried) and "shorter horizon" in verdict(untried)
    poor = inspected._replace(predictions=[Prediction(-2.0, 0.5, 8, 8)] * len(SCALES))
    assert "rough" in verdict(poor) and "0%" in verdict(poor)
    misses = inspected._replace(predictions=[Prediction(0.9, 0.5, 8, 8)] * len(SCALES))
    assert "miss the largest changes" in verdict(misses)


CLOCK = itertools.count(1)  # no copy of an environment has its own


class Clocked(HopperEnv):
    """A hopper whose reward depends on how many steps this process has made."""

    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        return obs, float(reward) + next(CLOCK), *rest


def test_steps_without_usable_derivatives_say_nothing() -> None:
    """Such a task is not called rough, and does not end in means of nothing."""
    env = Clocked()
    policy = make_policy(env, None, None, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = inspect_environment(env, policy, Sizes(steps=12, moments=3, actions=4))
        assert isinstance(found, Inspection) and not found.usable.any()
        assert "AGPO would stop with an error" in verdict(found)
        console = Console(file=StringIO(), width=160)
        print_inspection(console, "clock", found)
        assert "nan" not in console.file.getvalue()  # type: ignore[attr-defined]
    assert {prediction.n_moments for prediction in found.predictions} == {0}


class Bracketed(HopperEnv):
    """Names that look like markup."""

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        info = {**info, "reward[angle]": float(obs[1]), "reward[/ctrl]": float(obs[2])}
        return obs, reward, terminated, truncated, info


def test_names_are_printed_as_they_are() -> None:
    env = Bracketed()
    found = inspect_environment(env, make_policy(env, None, None, seed=0), Sizes(steps=6, moments=2, actions=2))
    assert isinstance(found, Inspection)
    console = Console(file=StringIO(), width=160)
    print_inspection(console, "envs[v2]/x.py:Foo", found)
    print_without_derivatives(console, "envs[/v3]/x.py:Foo", ProviderReport("none", "the [wrapper] Other"))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(
        name in printed for name in ("[angle]", "[/ctrl]", "envs[v2]/x.py:Foo", "envs[/v3]/x.py:Foo", "the [wrapper] Other")
    )


def test_an_inspected_environment_trains_as_any_other() -> None:
    """The recorders are gone, one that was there is there again, and another inspection finds the same."""
    env = gym.make("Hopper-v5")
    policy = make_policy(env, None, None, seed=0)
    first, second = (inspect_environment(env, policy, Sizes(steps=6, moments=2, actions=2)) for _ in range(2))
    assert isinstance(first, Inspection) and isinstance(second, Inspection) and find_recorder(env) is None
    np.testing.assert_array_equal(first.recording.jacobians[0].valid, second.recording.jacobians[0].valid)
    options = FiniteDifferences(position_step=5e-4)
    model = small_model(env, learning_starts=8, finite_differences=options)
    recorder = find_recorder(model.env.envs[0])  # type: ignore[union-attr]
    assert recorder is not None and recorder.dynamics.perturbations.steps[0] == 5e-4  # type: ignore[union-attr]
    inspect_environment(env, policy, Sizes(steps=6, moments=2, actions=2))
    assert find_recorder(model.env.envs[0]) is recorder  # type: ignore[union-attr]
    model.learn(24)


class CountedSteps(HopperEnv):
    """A hopper whose reward counts steps: nothing that an action changes."""

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        obs, _, _, truncated, info = super().step(action)
        return obs, 1.0, False, truncated, info


def test_reward_that_nothing_changes() -> None:
    env = CountedSteps()
    found = inspect_environment(env, make_policy(env, None, None, seed=0), Sizes(steps=12, moments=3, actions=4))
    assert isinstance(found, Inspection)
    assert {prediction.n_windows for prediction in found.predictions} == {0}
    assert found.best == found.recording.base


class Guarded(HopperEnv):
    """A hopper whose copies fail at every second step, as others do at states that they find odd."""

    def __init__(self) -> None:
        super().__init__()
        self.original, self.n_steps = id(self), 0

    def reset_model(self) -> Array:
        self.n_steps = 0
        return super().reset_model()

    def step(self, action: Any) -> Any:
        self.n_steps += 1
        if id(self) != self.original and self.n_steps % 4 == 3:
            raise RuntimeError("odd")
        return super().step(action)


def test_moments_at_which_the_environment_fails_are_left_out() -> None:
    """The others count, and warnings tell how many there were."""
    env = TimeLimit(Guarded(), 8)
    policy = make_policy(env, None, None, seed=0)._replace(horizon=1)
    with pytest.warns(RuntimeWarning) as caught:
        found = inspect_environment(env, policy, Sizes(steps=16, moments=8, actions=4))
    assert isinstance(found, Inspection)
    told = [str(warning.message) for warning in caught if "moments are left out" in str(warning.message)]
    expected = "4 of 8 moments are left out, at which the environment's own code failed; the first with RuntimeError: odd"
    assert told == [expected]  # for the parts of the reward; where derivatives failed as well, no other actions are tried
    assert {prediction.n_moments for prediction in found.predictions} == {4}
    assert {part.name for part in found.reward} == {"reward_forward", "reward_ctrl", "reward_survive"}
    trusted = [own._replace(valid=np.ones_like(own.valid)) for own in found.recording.jacobians]
    recording = found.recording._replace(jacobians=tuple(trusted))
    with pytest.warns(RuntimeWarning, match=re.escape(expected)):
        (some, *_) = measure_predictions(recording, horizon=1, noise=0.1, n_actions=2, seed=0)
    assert some.n_moments == 4
    with pytest.warns(RuntimeWarning, match="4 of 4 moments are left out"):
        (nothing, *_) = measure_predictions(recording, horizon=5, noise=0.1, n_actions=2, seed=0)
    assert nothing.n_moments == 0 and np.isnan(nothing.explained)


def test_model_is_looked_at_with_its_own_options(tmp_path: Path) -> None:
    options = FiniteDifferences(position_step=2e-3)
    model = small_model("InvertedPendulum-v5", finite_differences=options, horizon=3)
    model.save(tmp_path / "model.zip")
    env = make_environment("InvertedPendulum-v5")
    policy = make_policy(env, tmp_path / "model.zip", None, seed=0)
    assert isinstance(policy, Policy) and (policy.differences, policy.horizon) == (options, 3)
    found = inspect_environment(env, policy, Sizes(steps=10, moments=3, actions=4))
    assert isinstance(found, Inspection) and found.recording.differences[BASE] == options
    # The policy's own actions, not random ones, which reach to 3
    assert env.action_space.high == 3.0  # type: ignore[attr-defined]
    assert len(np.unique(found.recording.actions)) == 10


def test_parts_of_an_environment_that_reports_none() -> None:
    assert reward_parts(record_steps(gym.make("sb3_agpo/TorchPendulum-v0"), 4, n_moments=1)) == []


# ---------------------------------------------------------------------- command line


def test_command(custom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that name what is there, a suggestion, a verdict and a picture that is not empty."""
    monkeypatch.setenv("COLUMNS", "160")
    picture = tmp_path / "calm.png"
    arguments = ["--set", "price=0.1", "--steps", "40", "--moments", "5", "--output", str(picture)]
    assert main([f"{custom}:CalmHopper", *arguments]) == 0
    output = capsys.readouterr().out
    for text in (
        "env_step: CalmHopper is a custom MujocoEnv",
        "reward_calm",
        "foot-world",
        "Suggested:",
        "In short:",
        str(picture),
    ):
        assert text in output
    assert re.search(r"position 0\.001, action 0\.01 +-?\d+% +\d+% +in use", output)
    image = matplotlib.image.imread(picture)
    assert min(image.shape[:2]) > 800 and image[..., :3].std() > 0.05


def test_without_derivatives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["Pendulum-v1", "--output", str(tmp_path / "none.png")]) == 0
    assert "PendulumEnv is no MuJoCo environment" in re.sub(r"\s+", " ", capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    env = gym.make("Pendulum-v1")
    assert isinstance(inspect_environment(env, make_policy(env, None, None, 0), Sizes(steps=5)), ProviderReport)


def test_class_in_a_module(custom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the current folder, as a user has it; and an id that importing a module registers."""
    monkeypatch.chdir(custom.parent)
    monkeypatch.syspath_prepend(str(custom.parent))
    assert type(make_environment("calm_hopper:CalmHopper")).__name__ == "CalmHopper"
    assert make_environment("sb3_agpo:sb3_agpo/LinearQuadratic-v0").spec is not None


def test_file_that_imports_its_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour_of_calm.py").write_text("from gymnasium.envs.mujoco.hopper_v5 import HopperEnv\n")
    path = tmp_path / "with_neighbour.py"
    path.write_text("from neighbour_of_calm import HopperEnv\n\nclass Mine(HopperEnv):\n    pass\n")
    assert type(make_environment(f"{path}:Mine")).__name__ == "Mine"


def test_environment_that_cannot_be_copied(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "locked.py"
    path.write_text(
        "import threading\nfrom sb3_agpo.dynamics.torch_tasks import LinearQuadraticEnv\n\n"
        "class Locked(LinearQuadraticEnv):\n"
        "    def __init__(self):\n        super().__init__()\n        self.lock = threading.Lock()\n"
    )
    assert main([f"{path}:Locked", "--steps", "5", "--output", str(tmp_path / "x.png")]) == 2
    assert "Locked cannot be copied" in capsys.readouterr().err


def test_file_without_the_class(custom: Path) -> None:
    with pytest.raises(ValueError, match=r"\(ImportError: the file .*calm_hopper.py has no `CalmHoper`\); give"):
        make_environment(f"{custom}:CalmHoper")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Nope-v3"], "'Nope-v3' cannot be made"),
        (["nope.py:Nope"], "there is no file nope.py"),
        (["Hopper-v5", "--set", "xml_file='./nope.xml'"], "OSError: File ./nope.xml does not exist"),
        (["nope:Nope"], "No module named 'nope'"),
        (["CartPole-v1"], "AGPO needs continuous actions"),
        (["collections:OrderedDict"], "no Gymnasium environment"),
        (["Hopper-v5", "--set", "wings=2"], "unexpected keyword argument 'wings'"),
        (["Hopper-v5", "--model", "nope.zip"], "there is no file nope.zip"),
        (["Hopper-v5", "--normalization", "nope.pkl"], "of no use without --model"),
        (["Hopper-v5", "--steps", "0"], "--steps is 0"),
        (["Hopper-v5", "--noise", "2"], "--noise is 2"),
        (["Hopper-v5", "--horizon", "9", "--steps", "5"], "play more steps"),
        (["Hopper-v5", "--output", "nope/x.png"], "there is no folder nope"),
        (["Hopper-v5", "--output", "x.pdf"], "give the name of a picture"),
        (["Hopper-v5", "--seed", "-1"], "--seed is -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot work is refused with what to change, and nothing is written."""
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not [path for path in Path.cwd().iterdir() if path.name != "MUJOCO_LOG.TXT"]
