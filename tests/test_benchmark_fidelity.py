"""The benchmark's ``fidelity`` command: its parts against plain computations, and small real measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.envs.mujoco import MujocoEnv
from small_models import small_model
from stable_baselines3 import PPO, SAC

from sb3_agpo import AGPO
from sb3_agpo.benchmark import fidelity_records
from sb3_agpo.benchmark.__main__ import main
from sb3_agpo.benchmark.fidelity_metrics import PolicyPullback, ReferenceQuality, agreement, cosine, reference_quality
from sb3_agpo.benchmark.fidelity_model import SavedModel, load_model
from sb3_agpo.benchmark.fidelity_rollouts import BatchSimulator, VisitedStates, discounted_returns, visit_states
from sb3_agpo.benchmark.fidelity_table import AS_SAVED, overview, split
from sb3_agpo.benchmark.fidelity_windows import (
    ANALYTIC,
    CORRECTED,
    CRITIC,
    GATES,
    Estimator,
    differentiate,
    estimate_all,
    make_recorder,
    play_windows,
)
from sb3_agpo.benchmark.records import Row
from sb3_agpo.benchmark.reference_gradient import (
    Perturbation,
    ReferenceGradient,
    perturbed_actions,
    reference_gradient,
    regress,
)

TASK = "Reacher-v5"
HORIZONS, WINDOWS = (1, 2), 2
TINY = [
    "--states", "5", "--spacing", "4", "--rollouts", "24", "--rollout-steps", "2", "--horizons", *map(str, HORIZONS),
    "--windows", str(WINDOWS), "--difference-steps", "default",
]  # fmt: skip


class Scene:
    """A task, a model that has learned nothing, and states that it visits."""

    def __init__(self, task: str, n_states: int = 8, model: Any = None) -> None:
        self.env = gym.make(task)
        assert isinstance(self.env.unwrapped, MujocoEnv)
        self.simulator = BatchSimulator(self.env.unwrapped)
        self.model = SavedModel.of(small_model(task) if model is None else model, "model.zip")
        self.visited = visit_states(self.env, self.simulator, self.model, n_states=n_states, spacing=3, seed=0)

    def estimate(self, task: str, *estimators: Estimator, windows: int = 1) -> list[np.ndarray[Any, Any]]:
        """Estimates, each averaged over windows."""
        recorders = {"default": make_recorder(task, "default", 1)}
        models = {"": self.model}
        found = estimate_all(self.simulator, models, self.visited, estimators, recorders, windows, 0)
        return [np.mean(found["", estimator].gradients, axis=0) for estimator in estimators]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with models: of AGPO after learning, with its buffer, of SAC, of another algorithm and of another task."""
    folder = tmp_path_factory.mktemp("models")
    model = small_model(TASK, horizon=2).learn(60)
    model.save(folder / "agpo.zip")
    model.save_replay_buffer(folder / "buffer.pkl")
    small: dict[str, Any] = {"buffer_size": 10, "policy_kwargs": {"net_arch": [8]}, "seed": 0}
    SAC("MlpPolicy", TASK, **small).save(folder / "sac.zip")
    PPO("MlpPolicy", TASK, n_steps=8, batch_size=8, policy_kwargs={"net_arch": [8]}).save(folder / "ppo.zip")
    SAC("MlpPolicy", "InvertedPendulum-v5", **small).save(folder / "pendulum.zip")
    (folder / "text.zip").write_text("no model")
    (folder / "other").mkdir()
    SAC("MlpPolicy", TASK, **small).save(folder / "other" / "sac.zip")
    return folder


# ---------------------------------------------------------------------- rollouts


@pytest.mark.parametrize("task", ["Hopper-v5", "Reacher-v5", "Humanoid-v5"])
def test_batch_simulator_steps_as_the_environment_does(task: str) -> None:
    """The first step is the environment's, bit for bit, and further ones are up to the solver's rounding."""
    env = gym.make(task)
    env.reset(seed=1)
    env.action_space.seed(1)
    env.step(env.action_space.sample())
    assert isinstance(env.unwrapped, MujocoEnv)
    simulator = BatchSimulator(env.unwrapped)
    states = simulator.dynamics.get_state()[None].repeat(3, axis=0)
    for index in range(4):
        action = env.action_space.sample()
        states, outcome = simulator.step(states, action[None].repeat(3, axis=0))
        obs, reward, terminated, _, _ = env.step(action)
        tolerance = 0.0 if index == 0 else 1e-6
        np.testing.assert_allclose(outcome.obs, obs[None].repeat(3, axis=0), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(outcome.reward, float(reward), rtol=tolerance, atol=tolerance)
        assert (outcome.terminated == terminated).all()
    assert simulator.simulator_calls == 12


def plain_return(scene: Scene, action: Any, noise: Any) -> float:
    """One return by Gymnasium's own ``step``, from the last visited state on."""
    env, model, total, discount, log_prob = scene.env.unwrapped, scene.model, 0.0, 1.0, 0.0
    for step_noise in noise:
        obs, reward, terminated, _, _ = env.step(model.unscale(action))
        total += discount * (float(reward) - float(model.ent_coef) * log_prob)
        discount *= model.gamma
        if terminated:
            return total
        actions, log_probs = model.act(obs[None], step_noise[None])
        action, log_prob = actions[0], float(log_probs[0])
    seen = th.as_tensor(obs[None], dtype=th.float32)
    q_values = model.policy.critic_target.q_values(seen, th.as_tensor(action[None])).min().item()
    return total + discount * (q_values - float(model.ent_coef) * log_prob)


@pytest.mark.parametrize(("task", "pushes"), [("Reacher-v5", 0), ("InvertedPendulum-v5", 3)])
def test_returns(task: str, pushes: int) -> None:
    """Returns are those of a plain loop over ``env.step``, through the end of an episode too."""
    scene = Scene(task, n_states=1)
    env = scene.env.unwrapped
    assert isinstance(env, MujocoEnv)
    env.reset(seed=3)
    for _ in range(pushes):  # the pendulum is about to fall
        env.step(np.full(env.action_space.shape or (), 1.0, dtype=np.float32))
    state = scene.simulator.dynamics.get_state()
    qpos, qvel = env.data.qpos.copy(), env.data.qvel.copy()
    random = np.random.default_rng(0)
    actions = random.uniform(-1, 1, (5, len(scene.model.low))).astype(np.float32)
    noise = random.standard_normal((7, *actions.shape), dtype=np.float32)
    calls = []
    found = discounted_returns(scene.simulator, scene.model, state[None].repeat(5, 0), actions, noise, calls.append)
    expected = []
    for index in range(5):
        env.set_state(qpos, qvel)
        expected.append(plain_return(scene, actions[index], noise[:, index]))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert sum(calls) == 35
    if pushes:
        assert scene.simulator.simulator_calls < 35  # some fell, and were not stepped any more


def test_visited_states_belong_to_observations_and_actions() -> None:
    """What is kept of a visited state fits together, and a seed repeats it."""
    scene, again = Scene(TASK), Scene(TASK)
    for field, other in zip(scene.visited, again.visited, strict=True):
        np.testing.assert_array_equal(field, other)
    qpos = scene.visited.states[:, 1:5]  # after the time
    np.testing.assert_allclose(scene.visited.observations[:, :2], np.cos(qpos[:, :2]), atol=1e-6)
    actions, _ = scene.model.act(scene.visited.observations, scene.visited.noise)
    np.testing.assert_allclose(actions, scene.visited.actions, atol=1e-6)
    assert len(np.unique(scene.visited.states[:, 0])) > 4


# ---------------------------------------------------------------------- reference


def test_regression_is_exact_on_linear_returns() -> None:
    """Slopes of a linear function are found exactly, of pairs that are not finite nothing is used."""
    random = np.random.default_rng(0)
    slopes = random.normal(size=(3, 2))
    differences = random.normal(size=(3, 20, 2))
    changes = np.einsum("spi,si->sp", differences, slopes)
    changes[1, 4] = np.nan
    found, error = regress(differences, changes)
    np.testing.assert_allclose(found, slopes)
    np.testing.assert_allclose(error, 0.0, atol=1e-10)


def test_standard_error_is_the_spread_of_repetitions() -> None:
    """Standard errors say how much slopes vary from one set of rollouts to the next."""
    random = np.random.default_rng(0)
    differences = random.normal(size=(2000, 30, 2))
    found, error = regress(differences, differences[..., 0] + random.normal(size=(2000, 30)))
    np.testing.assert_allclose(found.mean(axis=0), [1.0, 0.0], atol=0.02)
    np.testing.assert_allclose(error.mean(axis=0), found.std(axis=0), rtol=0.1)


def test_perturbed_actions_stay_within_limits() -> None:
    """Both actions of a pair lie in [-1, 1], one on either side."""
    actions = np.array([[0.0, 1.0]], dtype=np.float32)
    directions = np.random.default_rng(0).standard_normal((1, 50, 2), dtype=np.float32)
    plus, minus = perturbed_actions(actions, 0.5, directions)
    assert np.abs([plus, minus]).max() <= 1.0
    np.testing.assert_allclose(plus[..., 0], -minus[..., 0])
    assert ((plus[..., 1] == 1.0) != (minus[..., 1] == 1.0)).all()


@pytest.mark.parametrize("task", ["Reacher-v5", "Swimmer-v5"])
@pytest.mark.parametrize("n_steps", [0, 1])
def test_reference_agrees_with_derivatives_on_a_smooth_task(task: str, n_steps: int) -> None:
    """Without contacts the brute-force gradient is the analytic one with as many steps before the critic takes over."""
    scene = Scene(task)
    perturbation = Perturbation(n_rollouts=200, n_steps=n_steps, sigma=0.05)
    reference = reference_gradient(scene.simulator, scene.model, scene.visited, perturbation, seed=0)
    (analytic,) = scene.estimate(task, Estimator(ANALYTIC, n_steps + 1, "default"), windows=16)
    assert cosine(*reference.halves) > 0.9
    assert cosine(analytic, reference.gradient) > 0.95
    assert np.linalg.norm(analytic) == pytest.approx(np.linalg.norm(reference.gradient), rel=0.1)


def test_reference_does_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state's rollouts are the same whichever states are stepped with it."""
    scene = Scene(TASK, n_states=3)
    perturbation = Perturbation(20, 2, 0.1)
    together = reference_gradient(scene.simulator, scene.model, scene.visited, perturbation, seed=0)
    monkeypatch.setattr("sb3_agpo.benchmark.reference_gradient.BATCH", 1)
    apart = reference_gradient(scene.simulator, scene.model, scene.visited, perturbation, seed=0)
    np.testing.assert_allclose(together.gradient, apart.gradient, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------- estimates


@pytest.mark.parametrize("algorithm", ["AGPO", "SAC"])
def test_critic_estimate_is_the_critics_gradient(algorithm: str) -> None:
    """The estimate without a simulator is dQ/da of the smaller critic, for AGPO's critics and for SB3's."""
    kwargs: dict[str, Any] = {"buffer_size": 10, "policy_kwargs": {"net_arch": [8]}, "seed": 0}
    model = small_model(TASK) if algorithm == "AGPO" else SAC("MlpPolicy", TASK, **kwargs)
    scene = Scene(TASK, model=model)
    (found,) = scene.estimate(TASK, Estimator(CRITIC))
    actions = th.as_tensor(scene.visited.actions).requires_grad_(True)
    q_values = th.cat(model.critic(th.as_tensor(scene.visited.observations), actions), dim=1).min(1).values
    (expected,) = th.autograd.grad(q_values.sum(), actions)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-7)


def with_correction() -> AGPO:
    """A model whose correction is not zero."""
    model = small_model(TASK, correction_updates=1)
    assert model.gradient_correction is not None
    model.gradient_correction.trust_sums.fill_(1.0)
    th.nn.init.normal_(model.gradient_correction.network[-1].weight)  # type: ignore[union-attr, arg-type]
    return model


def test_corrected_estimate_is_the_critics_gradient_and_what_it_lacks() -> None:
    model = with_correction()
    scene = Scene(TASK, model=model)
    critic, corrected = scene.estimate(TASK, Estimator(CRITIC), Estimator(CORRECTED))
    observations, actions = th.as_tensor(scene.visited.observations), th.as_tensor(scene.visited.actions)
    assert model.gradient_correction is not None
    lacking = model.gradient_correction(observations, actions).numpy()
    assert np.abs(lacking).max() > 0.0
    np.testing.assert_allclose(corrected, critic + lacking, rtol=1e-5, atol=1e-6)


def test_gates_lie_between_critic_and_simulator() -> None:
    """With a horizon of one step, a gated estimate is a mixture of the critic's and the analytic one."""
    scene = Scene(TASK)
    estimators = [Estimator(CRITIC), Estimator(ANALYTIC, 1, "default"), *(Estimator(gate, 1, "default") for gate in GATES)]
    critic, analytic, *gated = scene.estimate(TASK, *estimators)
    for estimate in gated:
        weight = (estimate - critic) / (analytic - critic)
        assert (weight > -1e-3).all() and (weight < 1.001).all()


def test_windows_are_trusted_and_restart_where_episodes_end() -> None:
    """Every step but ends is trusted; a fallen pendulum stands again in its window's next step."""
    task = "InvertedPendulum-v5"
    scene = Scene(task)
    fallen = scene.visited.states.copy()
    fallen[:, 1:5] = 0.0
    fallen[:4, 2] = 0.195  # the pole's angle; the episode ends beyond 0.2
    fallen[:4, 4] = 5.0  # its angular velocity
    observations = fallen[:, 1:5].astype(np.float32)
    actions, _ = scene.model.act(observations, scene.visited.noise)
    visited = VisitedStates(fallen, observations, scene.visited.noise, actions)
    steps = play_windows(scene.simulator, scene.model, visited, 3, np.random.default_rng(0))
    windows = differentiate(make_recorder(task, "1e-4", 1), *steps).windows
    assert th.equal(windows.valid, ~windows.terminated) and (windows.mask == 1).all()
    assert windows.terminated[0].tolist() == [True] * 4 + [False] * 4
    np.testing.assert_array_equal(windows.observations[1, :4].numpy(), observations[:4])
    np.testing.assert_array_equal(windows.observations[1, 4:].numpy(), windows.next_observations[0, 4:].numpy())
    assert th.isfinite(windows.noise).all()


# ---------------------------------------------------------------------- metrics


def test_agreement_tells_bias_from_variance() -> None:
    """Bias, variance and ratio of estimates whose true values are known."""
    random = np.random.default_rng(0)
    scene = Scene(TASK, n_states=400)
    pullback = PolicyPullback(scene.model, scene.visited)
    truth = random.normal(size=(400, 2))
    error = np.full_like(truth, 0.3)
    reference = ReferenceGradient(truth + random.normal(scale=0.3, size=truth.shape), error, (truth, truth))
    estimates = 1.5 * truth + random.normal(scale=0.7, size=(8, *truth.shape))
    one, averaged = (agreement(estimates, reference, pullback, n) for n in (1, 8))
    assert one.bias_squared == averaged.bias_squared == pytest.approx(0.25, abs=0.06)
    assert one.variance == pytest.approx(0.49, abs=0.06)
    assert averaged.variance == pytest.approx(one.variance / 8)
    assert one.action_cosine < averaged.action_cosine
    perfect = 1.5 / np.sqrt(1.5**2 + 0.7**2) / np.sqrt(1 + 0.3**2)
    assert one.action_cosine == pytest.approx(perfect, abs=0.03)
    assert 0.0 < one.action_cosine_error < 0.03
    critic = agreement(estimates[:1], reference, pullback, 0)
    assert critic.variance == 0.0 and np.isfinite(critic.bias_squared)
    assert np.isnan(agreement(estimates[:1], reference, pullback, 1).variance)


def test_pullback_is_the_gradient_of_the_policy() -> None:
    """Pulled back, an action gradient is what the policy's loss would send into the actor."""
    scene = Scene(TASK)
    gradient = np.random.default_rng(0).normal(size=scene.visited.actions.shape)
    found = PolicyPullback(scene.model, scene.visited)(gradient)
    actor = scene.model.policy.actor
    mean, log_std, _ = actor.get_action_dist_params(th.as_tensor(scene.visited.observations))
    actions = th.tanh(mean + log_std.exp() * th.as_tensor(scene.visited.noise))
    actions.backward(th.as_tensor(gradient, dtype=th.float32))
    expected = th.cat([parameter.grad.flatten() for parameter in actor.parameters() if parameter.grad is not None])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_quality_of_the_reference() -> None:
    """A reference without noise agrees with itself; with noise, a perfect estimate cannot reach a cosine of one."""
    scene = Scene(TASK)
    pullback = PolicyPullback(scene.model, scene.visited)
    truth = np.random.default_rng(0).normal(size=scene.visited.actions.shape)
    quality = reference_quality(ReferenceGradient(truth, np.zeros_like(truth), (truth, truth)), pullback)
    assert quality == pytest.approx((1.0, 1.0, 0.0))
    assert ReferenceQuality.attainable(1.0) == 1.0
    assert ReferenceQuality.attainable(-0.2) == 0.0
    assert ReferenceQuality.attainable(0.5) == pytest.approx(np.sqrt(2 / 3))


# ---------------------------------------------------------------------- command


def test_command(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows, table and figure of two models; a second run replaces its own rows and keeps the others."""
    output = Path("results/fidelity.csv")
    command = ["fidelity", "--env", TASK, "--models", str(files / "agpo.zip"), str(files / "sac.zip"), *TINY]
    assert main([*command, "--output", str(output)]) == 0
    rows = fidelity_records.read(output)
    per_model = 1 + 2 * len(HORIZONS) * (1 + len(GATES))
    assert [row["model"] for row in rows] == ["agpo.zip"] * per_model + ["sac.zip"] * per_model
    required = "env steps estimator action_cosine parameter_cosine norm_ratio split_half"
    assert list(rows[0])[:7] == required.split()
    assert (rows[0]["env"], rows[0]["steps"], rows[0]["algorithm"], rows[0]["estimator"]) == (TASK, "60", "AGPO", CRITIC)
    assert len({row["estimator"] for row in rows[:per_model]}) == per_model
    for row in rows:
        assert all(-1.0 <= float(row[name]) <= 1.0 for name in ("action_cosine", "parameter_cosine", "split_half"))
        assert all(np.isfinite(float(row[name])) for name in ("norm_ratio", "bias_squared", "variance", "standard_error"))
        assert 0.0 <= float(row["gate"]) <= 1.0 and float(row["valid"]) == 1.0
        assert float(row["seconds"]) > 0.0 and row["torch"] == th.__version__ and row["git_commit"]
        assert row["n_states"] == "5" and row["n_rollouts"] == "24"
    calls = {row["estimator"]: int(row["simulator_calls"]) for row in rows}
    differences = make_recorder(TASK, "default", 1).provider_report.rows_per_transition
    assert calls[CRITIC] == 0
    assert calls["analytic H=2 step=default windows=1"] == 5 * 2 * (1 + differences)
    assert calls["analytic H=2 step=default windows=2"] == 2 * calls["analytic H=2 step=default windows=1"]
    assert int(rows[0]["reference_simulator_calls"]) == 5 * 24 * 3
    text = capsys.readouterr().out
    assert output.with_suffix(".md").read_text().strip() == text.strip()
    assert text.startswith("### Overview") and text.count("### ") == 3
    assert text.count("| disagreement |") == 4 and f"{TASK}, AGPO after 60 steps (agpo.zip)" in text
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    again = ["fidelity", "--env", TASK, "--models", str(files / "agpo.zip"), *TINY, "--output", str(output)]
    assert main(again) == 0
    timed = ("seconds", "reference_seconds")
    stable = [[value for name, value in row.items() if name not in timed] for row in fidelity_records.read(output)]
    expected = [[value for name, value in row.items() if name not in timed] for row in rows]
    assert stable == expected[per_model:] + expected[:per_model]  # the same numbers from the same seed
    assert main([*again, "--seed", "1", "--gates", "--horizons", "1", "--windows", "1"]) == 0
    rows = fidelity_records.read(output)
    assert len(rows) == 2 * per_model + 2
    assert rows[-1]["variance"] == rows[-1]["bias_squared"] == ""  # one window tells them not apart


def estimate(model: str, method: str, horizon: int, windows: int, *cosines: float, step: str = "default") -> Row:
    """A row of the CSV file, of which only what an overview shows is filled."""
    text = dict.fromkeys(fidelity_records.COLUMNS, "") | {"split_half": "0.9", "parameter_split_half": "0.8"}
    text |= {"env": TASK, "algorithm": "AGPO", "steps": "50", "critics": AS_SAVED, "model": model, "method": method}
    text |= {"horizon": str(horizon), "windows": str(windows), "difference_step": step if windows else ""}
    return text | dict(zip(("action_cosine", "parameter_cosine"), map(str, cosines), strict=True))


def test_overview() -> None:
    """One line per model, one column per estimator by single windows; what was not measured is empty."""
    first = [estimate("a.zip", CRITIC, 0, 0, 0.1, 0.2), estimate("a.zip", ANALYTIC, 2, 1, 0.3, -0.4)]
    averaged = estimate("a.zip", ANALYTIC, 2, 6, 0.99, 0.99)
    second = [estimate("b.zip", CRITIC, 0, 0, 0.5, 0.6), estimate("b.zip", ANALYTIC, 2, 1, 0.7, 0.8, step="0.03")]
    lines = overview(split([*first, averaged, *second])).splitlines()
    name = f"{TASK}, AGPO after 50 steps"
    assert [line for line in lines if line.startswith("| ") and "---" not in line] == [
        "| model | reference | critic | analytic H=2 | analytic H=2, 0.03 |",
        f"| {name} (a.zip) | 0.90 | 0.10 | 0.30 | – |",
        f"| {name} (b.zip) | 0.90 | 0.50 | – | 0.70 |",
        "| model | reference | critic | analytic H=2 | analytic H=2, 0.03 |",
        f"| {name} (a.zip) | 0.80 | 0.20 | -0.40 | – |",
        f"| {name} (b.zip) | 0.80 | 0.60 | – | 0.80 |",
    ]
    assert overview(split(first)) == ""


def test_refit(files: Path) -> None:
    """Critics trained further, with and without matching, are compared on the same policy and reference."""
    output = Path("fidelity.csv")
    arguments = ["fidelity", "--env", TASK, "--models", str(files / "agpo.zip"), *TINY, "--gates", "--horizons", "1"]
    arguments += ["--refit", "5", "--replay-buffer", str(files / "buffer.pkl"), "--matching", "0", "2"]
    assert main([*arguments, "--output", str(output)]) == 0
    rows = [row for row in fidelity_records.read(output) if row["estimator"] == CRITIC]
    critics = ["as saved", "5 more updates, matching 0", "5 more updates, matching 2"]
    assert [row["critics"] for row in rows] == critics
    assert len({row["action_cosine"] for row in rows}) == 3 and len({row["split_half"] for row in rows}) == 1


def test_loaded_model_acts_as_the_saved_one(files: Path) -> None:
    """Networks and constants come from the file."""
    env = gym.make(TASK)
    loaded = load_model(files / "sac.zip", env)
    assert isinstance(loaded, SAC)
    model = SavedModel.of(loaded, "sac.zip")
    obs = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    actions, _ = model.act(obs, np.zeros((4, 2)))
    np.testing.assert_allclose(model.unscale(actions), loaded.predict(obs, deterministic=True)[0], rtol=1e-5, atol=1e-6)
    assert model.algorithm == "SAC" and model.gamma == 0.99 and float(model.ent_coef) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--env", "NoSuchTask-v0"], "--env: 'NoSuchTask-v0' cannot be made"),
        (["--env", "Pendulum-v1"], "--env: 'Pendulum-v1' is none of Gymnasium's own MuJoCo tasks"),
        (["--models", "missing.zip"], "there is no file missing.zip"),
        (["--models", "{files}/text.zip"], "text.zip is not a saved model"),
        (["--models", "{files}/ppo.zip"], "give a model of AGPO or SAC"),
        (["--models", "{files}/pendulum.zip"], "pendulum.zip has the observation_space"),
        (["--models", "{files}/sac.zip", "{files}/other/sac.zip"], "two files have the name sac.zip"),
        (["--states", "1"], "--states is 1; give a number of 2 or more"),
        (["--rollouts", "25"], "--rollouts is 25; rollouts come in pairs"),
        (["--rollouts", "10"], "--rollouts is 10, too few for the actions of Reacher-v5; give 12 or more"),
        (["--rollout-steps", "-1"], "--rollout-steps is -1"),
        (["--sigma", "nan"], "--sigma is nan; give a number above 0"),
        (["--horizons", "4", "0"], "--horizons has 0; give numbers of 1 or more"),
        (["--difference-steps", "small"], "--difference-steps: 'small' is no number"),
        (["--difference-steps", "2"], "--difference-steps: '2' is of no use: `action_step` must be at most 1.0"),
        (["--gates", "magic"], "--gates: there is no 'magic'; choose from magnitude"),
        (["--output", "results.txt"], "--output is results.txt; give the name of a file that ends in .csv"),
        (["--output", "{files}/wrong.csv"], "wrong.csv lacks the columns"),
        (["--refit", "5"], "--refit 5 needs one model and its --replay-buffer"),
        (["--replay-buffer", "{files}/buffer.pkl"], "is of no use without --refit"),
        (["--refit", "5", "--replay-buffer", "missing.pkl"], "there is no file missing.pkl"),
        (["--refit", "5", "--replay-buffer", "{files}/text.zip"], "text.zip is not a replay buffer"),
        (["--refit", "5", "--replay-buffer", "{files}/buffer.pkl", "--models", "{files}/sac.zip"], "is a model of SAC"),
        (["--matching", "-1"], "--matching has -1; give numbers of 0 or more"),
    ],
)
def test_bad_input(change: list[str], message: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever cannot work is said before anything is computed or written."""
    (files / "wrong.csv").write_text("a,b\n1,2\n")
    change = [text.replace("{files}", str(files)) for text in change]
    command = ["fidelity", "--env", TASK, "--models", str(files / "agpo.zip"), *TINY, "--output", "new/fidelity.csv"]
    assert main([*command, *change]) == 2
    assert message in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_command_with_a_correction(tmp_path: Path) -> None:
    """A model that corrects its critic's gradient has a row for that, too."""
    with_correction().save(tmp_path / "corrected.zip")
    output = tmp_path / "fidelity.csv"
    assert main(["fidelity", "--env", TASK, "--models", str(tmp_path / "corrected.zip"), *TINY, "--output", str(output)]) == 0
    rows = fidelity_records.read(output)
    assert [row["estimator"] for row in rows[:2]] == [CRITIC, CORRECTED]
    assert rows[1]["windows"] == "0" and rows[1]["simulator_calls"] == "0"
    assert rows[0]["action_cosine"] != rows[1]["action_cosine"]
    assert "| corrected |" in output.with_suffix(".md").read_text()


def test_columns_of_ones_own_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "fidelity.csv"
    columns = [*fidelity_records.COLUMNS, "remark"]
    path.write_text(",".join(columns) + "\n" + ",".join(["1"] * (len(columns) - 1) + ["mine"]) + "\n")
    fidelity_records.merge(path, [dict.fromkeys(fidelity_records.COLUMNS, "2")])
    first, second = fidelity_records.read(path)
    assert (first["remark"], second["remark"], second["env"]) == ("mine", "", "2")
    path.write_text(path.read_text() + "1,2\n")
    with pytest.raises(ValueError, match="more or fewer entries than columns"):
        fidelity_records.read(path)
