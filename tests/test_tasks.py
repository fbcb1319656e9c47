"""Task models against Gymnasium's own environments, bit for bit."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium.envs.mujoco
import mujoco
import numpy as np
import pytest
from gymnasium.envs.mujoco import MujocoEnv
from numpy.typing import NDArray

from sb3_agpo.dynamics.tangent import quaternion_exponential, quaternion_multiply
from sb3_agpo.dynamics.tasks import Outcome, Steps, TaskModel, find_task_model
from sb3_agpo.dynamics.tasks.base import euclidean_norm, scalar_square, sum_of_squares
from sb3_agpo.dynamics.tasks.invariance import invariant_translations

Array = NDArray[np.float64]
ASSETS = Path(gymnasium.envs.mujoco.__file__).parent / "assets"
SHOWN = {"exclude_current_positions_from_observation": False}

# module, class
TASKS = [
    ("ant_v4", "AntEnv"),
    ("ant_v5", "AntEnv"),
    ("half_cheetah_v4", "HalfCheetahEnv"),
    ("half_cheetah_v5", "HalfCheetahEnv"),
    ("hopper_v4", "HopperEnv"),
    ("hopper_v5", "HopperEnv"),
    ("humanoid_v4", "HumanoidEnv"),
    ("humanoid_v5", "HumanoidEnv"),
    ("humanoidstandup_v4", "HumanoidStandupEnv"),
    ("humanoidstandup_v5", "HumanoidStandupEnv"),
    ("inverted_double_pendulum_v4", "InvertedDoublePendulumEnv"),
    ("inverted_double_pendulum_v5", "InvertedDoublePendulumEnv"),
    ("inverted_pendulum_v4", "InvertedPendulumEnv"),
    ("inverted_pendulum_v5", "InvertedPendulumEnv"),
    ("pusher_v5", "PusherEnv"),
    ("reacher_v4", "ReacherEnv"),
    ("reacher_v5", "ReacherEnv"),
    ("swimmer_v4", "SwimmerEnv"),
    ("swimmer_v5", "SwimmerEnv"),
    ("walker2d_v4", "Walker2dEnv"),
    ("walker2d_v5", "Walker2dEnv"),
]

INVARIANT = {"half_cheetah": (0,), "hopper": (0,), "walker2d": (0,), "swimmer": (0, 1), "ant": (0, 1)}
INVARIANT |= {"humanoid": (0, 1), "humanoidstandup": (0, 1)}

LASTING = {"terminate_when_unhealthy": False}
ANT = {"ctrl_cost_weight": 0.3, "contact_cost_weight": 2e-2, "healthy_reward": 2, "healthy_z_range": (0.4, 0.8)}
HOPPER = {"forward_reward_weight": 2.5, "ctrl_cost_weight": 0.3, "healthy_reward": 0.7, "healthy_state_range": (-4.0, 4.0)}
WALKER = {"forward_reward_weight": 3, "ctrl_cost_weight": 0.2, "healthy_reward": 0.3, "healthy_angle_range": (-0.3, 0.1)}
HUMANOID = {"forward_reward_weight": 0.7, "ctrl_cost_weight": 0.3, "healthy_reward": 3, "healthy_z_range": (1.1, 1.5)}
HIDDEN = {"include_cinert_in_observation": False, "include_qfrc_actuator_in_observation": False}
ONLY_CVEL = {**HIDDEN, "include_cfrc_ext_in_observation": False}

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("ant_v4", {**ANT, **SHOWN, "use_contact_forces": True, "contact_force_range": (-0.2, 3.0)}),
    ("ant_v4", LASTING),
    ("ant_v5", {**ANT, **SHOWN, **LASTING, "main_body": "aux_2", "contact_force_range": (-9.0, 30.0), "frame_skip": 3}),
    ("ant_v5", {"include_cfrc_ext_in_observation": False, "main_body": 4, "forward_reward_weight": 0.3}),
    ("half_cheetah_v4", {**SHOWN, "forward_reward_weight": 0.3, "ctrl_cost_weight": 0.7}),
    ("half_cheetah_v5", {**SHOWN, "forward_reward_weight": np.float64(0.3), "ctrl_cost_weight": np.float64(0.7)}),
    ("hopper_v4", {**HOPPER, **SHOWN}),
    ("hopper_v4", LASTING),
    ("hopper_v5", {**HOPPER, **SHOWN, "healthy_z_range": (1.1, 1.3), "frame_skip": 2}),
    ("hopper_v5", {**LASTING, "healthy_angle_range": (-0.05, 0.1)}),
    ("humanoid_v4", {**HUMANOID, **SHOWN}),
    ("humanoid_v4", LASTING),
    ("humanoid_v5", {**HUMANOID, **SHOWN, **HIDDEN, "contact_cost_weight": 1e-3, "contact_cost_range": (0.5, 40.0)}),
    ("humanoid_v5", {**ONLY_CVEL, **LASTING, "frame_skip": 2}),
    ("humanoid_v5", {"include_cvel_in_observation": False}),
    ("humanoidstandup_v5", {**SHOWN, **HIDDEN, "impact_cost_weight": 1e-4, "impact_cost_range": (1.0, 6.0)}),
    ("humanoidstandup_v5", {**ONLY_CVEL, "ctrl_cost_weight": 0.9, "uph_cost_weight": 5}),
    ("inverted_double_pendulum_v5", {"healthy_reward": 7.3, "frame_skip": 2, "reset_noise_scale": 0.3}),
    ("inverted_pendulum_v5", {"frame_skip": 4, "reset_noise_scale": 0.1}),
    ("pusher_v5", {"reward_near_weight": 0.7, "reward_dist_weight": 1.3, "reward_control_weight": 0.37}),
    ("reacher_v5", {"reward_dist_weight": 1.3, "reward_control_weight": 0.37}),
    ("swimmer_v4", {**SHOWN, "forward_reward_weight": 0.7, "ctrl_cost_weight": 0.3}),
    ("swimmer_v5", {**SHOWN, "forward_reward_weight": 0.7, "ctrl_cost_weight": 0.3, "frame_skip": 2}),
    ("walker2d_v4", {**WALKER, **SHOWN}),
    ("walker2d_v4", LASTING),
    ("walker2d_v5", {**WALKER, **SHOWN, "healthy_z_range": (1.0, 1.22)}),
    ("walker2d_v5", {**LASTING, "xml_file": "walker2d.xml", "frame_skip": 5}),
]


def make(module: str, options: dict[str, Any] | None = None) -> MujocoEnv:
    """
    Build an environment without wrappers (and without the registry's warning on old versions).

    :param module: module in ``gymnasium.envs.mujoco``
    :param options: constructor options
    :return: the environment
    """
    return getattr(import_module(f"gymnasium.envs.mujoco.{module}"), dict(TASKS)[module])(**(options or {}))


def model_of(env: MujocoEnv) -> TaskModel:
    """
    The task model of a stock environment.

    :param env: the environment
    :return: its model
    """
    task = find_task_model(env)
    assert task is not None
    return task


class Record(NamedTuple):
    """What happened in a number of consecutive steps of a real environment."""

    steps: Steps
    outcome: Outcome
    warmstart: Array  # (n, nv) of the constraint solver before the step
    first: NDArray[np.bool_]  # (n,) whether the step is the first after a reset


def record(env: MujocoEnv, task: TaskModel, n_steps: int, dtype: Any = np.float32, scale: float = 1.0) -> Record:
    """
    Step an environment with random actions; every other episode goes on after it terminated.

    :param env: the environment
    :param task: its model, which reads
    :param n_steps: number of steps
    :param dtype: dtype of the actions
    :param scale: factor on the actions, beyond 1 for actions out of bounds
    :return: the steps
    """
    env.action_space.seed(1)
    env.reset(seed=1)
    rows = []
    n_episodes = length = 0
    for _ in range(n_steps):
        action = (scale * env.action_space.sample()).astype(dtype)
        before = (env.data.qpos.copy(), env.data.qvel.copy(), task.read(env.data))
        warmstart = env.data.qacc_warmstart.copy()
        outcome = env.step(action)[:3]
        after = (env.data.qpos.copy(), env.data.qvel.copy(), task.read(env.data))
        rows.append((*before, action, *after, *outcome, warmstart, length == 0))
        length += 1
        if length >= 120 or (outcome[2] and n_episodes % 2 == 0):
            env.reset()
            n_episodes, length = n_episodes + 1, 0
    columns = [np.stack(column) for column in zip(*rows, strict=True)]
    return Record(Steps(*columns[:7]), Outcome(*columns[7:10]), *columns[10:])


def take(fields: Any, rows: Any) -> Any:
    """
    Select rows of a batch.

    :param fields: a named tuple of arrays
    :param rows: index into the first axis
    :return: the same named tuple
    """
    return type(fields)(*(field[rows] for field in fields))


def assert_same_bits(actual: NDArray[Any], expected: NDArray[Any]) -> None:
    """
    Compare two arrays of float64, signs of zero included.

    :param actual: any shape
    :param expected: the same shape
    """
    assert actual.dtype == np.float64
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.signbit(actual), np.signbit(expected))


def assert_same_outcome(actual: Outcome, expected: Outcome) -> None:
    """
    Compare what a model and Gymnasium say, bit for bit.

    :param actual: the model's
    :param expected: Gymnasium's
    """
    assert_same_bits(actual.obs, expected.obs)
    assert_same_bits(actual.reward, expected.reward)
    assert actual.terminated.dtype == np.bool_
    np.testing.assert_array_equal(actual.terminated, expected.terminated)


@pytest.mark.parametrize("module", dict(TASKS))
def test_outcome_equals_gymnasium(module: str) -> None:
    env = make(module)
    task = model_of(env)
    n_steps = 800 if module.startswith("humanoid") else 1500
    recorded = record(env, task, n_steps)
    assert recorded.steps.actions.dtype == np.float32
    assert_same_outcome(task.outcome(recorded.steps), recorded.outcome)
    if not module.startswith(("half_cheetah", "humanoidstandup", "pusher", "reacher", "swimmer")):
        assert 0 < recorded.outcome.terminated.sum() < n_steps
    # A row does not depend on its neighbours, nor on the memory layout.
    for rows in (slice(7, 8), slice(1, None, 3)):
        assert_same_outcome(task.outcome(take(recorded.steps, rows)), take(recorded.outcome, rows))
    transposed = Steps(*(np.asfortranarray(field) for field in recorded.steps))
    assert_same_outcome(task.outcome(transposed), recorded.outcome)


@pytest.mark.parametrize(("module", "options"), VARIANTS)
def test_options_are_honoured(module: str, options: dict[str, Any]) -> None:
    env = make(module, options)
    task = model_of(env)
    recorded = record(env, task, 400, scale=1.5)
    assert_same_outcome(task.outcome(recorded.steps), recorded.outcome)
    assert recorded.outcome.terminated.any() <= options.get("terminate_when_unhealthy", True)
    if SHOWN.items() <= options.items():
        assert task.invariant == ()


@pytest.mark.parametrize("name", ["hopper", "walker2d", "ant", "humanoid"])
@pytest.mark.parametrize("version", ["v4", "v5"])
@pytest.mark.parametrize("offsets", [(0.0, 1.0), (-1.0, 0.0), (-1.0, 1.0)])
def test_edges_of_health(name: str, version: str, offsets: tuple[float, float]) -> None:
    env = make(f"{name}_{version}")
    env.reset(seed=0)
    height = env.data.qpos[1 if name in ("hopper", "walker2d") else 2]
    env._healthy_z_range = tuple(height + offset for offset in offsets)  # type: ignore[attr-defined]
    task = model_of(env)
    state = (env.data.qpos[None], env.data.qvel[None], np.zeros((1, task.n_readings)))
    steps = Steps(*state, np.zeros((1, env.model.nu)), *state)
    assert task.outcome(steps).terminated[0] == (not env.is_healthy)  # type: ignore[attr-defined]
    if name == "ant":
        assert task.outcome(steps._replace(next_qvel=np.full_like(state[1], np.nan))).terminated[0]


@pytest.mark.parametrize("module", dict(TASKS))
def test_float64_actions(module: str) -> None:
    env = make(module)
    task = model_of(env)
    recorded = record(env, task, 100, np.float64, 0.7)
    assert_same_outcome(task.outcome(recorded.steps), recorded.outcome)
    # ... which matters: a float32 sum is another number, unless the task does not ask or asks ``data.ctrl``.
    single = task.outcome(recorded.steps._replace(actions=recorded.steps.actions.astype(np.float32)))
    np.testing.assert_allclose(single.reward, recorded.outcome.reward, rtol=1e-5, atol=1e-5)
    if not module.startswith(("inverted", "humanoid")):
        assert np.any(single.reward != recorded.outcome.reward)


@pytest.mark.parametrize("module", dict(TASKS))
def test_readings(module: str) -> None:
    env = make(module)
    task = model_of(env)
    without = ("inverted_pendulum", "swimmer", "hopper", "walker2d", "half_cheetah")
    assert (task.n_readings == 0) == module.startswith(without)
    recorded = record(env, task, 60)
    data = mujoco.MjData(env.model)
    for row in np.flatnonzero(recorded.first | (np.arange(60) == 30)):
        steps, expected = (take(batch, [row]) for batch in (recorded.steps, recorded.outcome))
        private = fresh_step(env, task, data, steps.qpos[0], steps.qvel[0], steps.actions[0], recorded.warmstart[row])
        assert_same_bits(private.next_qpos, steps.next_qpos)
        assert_same_bits(private.next_readings, steps.next_readings)
        outcome = task.outcome(private)
        assert_same_bits(outcome.obs, expected.obs)
        # Later in an episode the readings before a step are what its predecessor left behind, not those of the state.
        if recorded.first[row]:
            assert_same_outcome(outcome, expected)


def fresh_step(
    env: MujocoEnv, task: TaskModel, data: mujoco.MjData, qpos: Array, qvel: Array, action: NDArray[Any], warmstart: Array
) -> Steps:
    """
    Take one step from a given state, on private data.

    :param env: the environment, not changed
    :param task: its model
    :param data: private data
    :param qpos: shape ``(nq,)``
    :param qvel: shape ``(nv,)``
    :param action: shape ``(nu,)``
    :param warmstart: of the constraint solver, shape ``(nv,)``
    :return: the step, as a batch of one
    """
    mujoco.mj_resetData(env.model, data)
    data.qpos[:], data.qvel[:], data.ctrl[:], data.qacc_warmstart[:] = qpos, qvel, action, warmstart
    task.refresh(data)
    readings = task.read(data)
    mujoco.mj_step(env.model, data, nstep=env.frame_skip)
    mujoco.mj_rnePostConstraint(env.model, data)
    step = Steps(qpos, qvel, readings, action, data.qpos.copy(), data.qvel.copy(), task.read(data))
    return Steps(*(field[None] for field in step))


@pytest.mark.parametrize("module", dict(TASKS))
def test_invariance(module: str) -> None:
    env = make(module)
    task = model_of(env)
    assert task.invariant == INVARIANT.get(module[: -len("_v5")], ())
    recorded = record(env, task, 150)
    data = mujoco.MjData(env.model)
    for row in range(0, 150, 15):
        qpos, qvel, action = recorded.steps.qpos[row], recorded.steps.qvel[row], recorded.steps.actions[row]
        base = fresh_step(env, task, data, qpos, qvel, action, recorded.warmstart[row])
        expected = task.outcome(base)
        for index in task.invariant:
            shift = np.zeros(env.model.nq)
            shift[index] = 1.7
            moved = fresh_step(env, task, data, qpos + shift, qvel, action, recorded.warmstart[row])
            np.testing.assert_allclose(moved.next_qpos - shift, base.next_qpos, rtol=1e-8, atol=1e-8)
            np.testing.assert_allclose(moved.next_qvel, base.next_qvel, rtol=1e-6, atol=1e-6)
            outcome = task.outcome(moved)
            np.testing.assert_allclose(outcome.obs, expected.obs, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(outcome.reward, expected.reward, rtol=1e-6, atol=1e-6)
            np.testing.assert_array_equal(outcome.terminated, expected.terminated)
            assert not task.observation_jacobian(qpos[None], qvel[None])[:, :, index].any()


OBSTACLE = '<geom type="box" pos="9 0 0.1" size="1 1 0.1"/>'
GHOST = '<geom type="box" size="1 1 1" contype="0" conaffinity="0"/>'
SLOPE = '<geom type="plane" euler="0 20 0" pos="0 0 -9" size="1 1 1"/>'
BALL = '<body pos="5 0 5"><freejoint/><geom size="0.1"/></body>'


@pytest.mark.parametrize(
    ("asset", "change", "expected"),
    [
        ("ant.xml", ("", ""), (0, 1)),
        ("ant.xml", ("<worldbody>", f"<worldbody>{OBSTACLE}"), ()),
        ("ant.xml", ("<worldbody>", f"<worldbody>{GHOST}"), (0, 1)),
        ("ant.xml", ("<worldbody>", f"<worldbody>{SLOPE}"), (1,)),
        ("ant.xml", ("</worldbody>", f"{BALL}</worldbody>"), ()),
        ("ant.xml", ("</worldbody>", '</worldbody><equality><connect body1="torso" anchor="0 0 0"/></equality>'), ()),
        ("ant.xml", ("</actuator>", '<adhesion body="torso" ctrlrange="0 1"/></actuator>'), ()),
        ("hopper.xml", ("</actuator>", '<motor joint="rootx"/></actuator>'), ()),
        ("hopper.xml", ("", ""), (0,)),
        ("hopper.xml", ('pos="0 0 -1.25" stiffness="0"', 'pos="0 0 -1.25" stiffness="1"'), ()),
        ("swimmer.xml", ("", ""), (0, 1)),
        ("swimmer.xml", ('name="slider1"', 'name="slider1" limited="true" range="-1 1"'), (1,)),
        ("reacher.xml", ("", ""), ()),
        ("inverted_pendulum.xml", ("", ""), ()),
    ],
)
def test_invariance_needs_an_even_world(asset: str, change: tuple[str, str], expected: tuple[int, ...]) -> None:
    text = (ASSETS / asset).read_text()
    assert change[0] in text
    model = mujoco.MjModel.from_xml_string(text.replace(*change, 1))
    assert invariant_translations(model) == expected


@pytest.mark.parametrize(("module", "options"), [*((module, {}) for module in dict(TASKS)), *VARIANTS])
def test_observation_jacobian(module: str, options: dict[str, Any]) -> None:
    env = make(module, options)
    task = model_of(env)
    recorded = record(env, task, 40)
    rows = np.arange(0, 40, 8)
    steps = take(recorded.steps, rows)
    # Some velocities beyond the clip of those tasks that clip.
    steps.next_qvel[:3] *= 20.0
    nv, step = env.model.nv, 1e-6
    jacobian = task.observation_jacobian(steps.next_qpos, steps.next_qvel)
    assert jacobian.shape == (len(rows), recorded.outcome.obs.shape[1], 2 * nv + env.model.na)
    for column in range(2 * nv):
        ahead, behind = (task.outcome(moved_end(env, steps, column, sign * step)).obs for sign in (1.0, -1.0))
        np.testing.assert_allclose(jacobian[:, :, column], (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-7)
    assert not jacobian[:, :, 2 * nv :].any()


def moved_end(env: MujocoEnv, steps: Steps, column: int, distance: float) -> Steps:
    """
    Move the states after the steps along one tangent coordinate, and leave the readings as they are.

    :param env: the environment
    :param steps: the steps
    :param column: index of the tangent coordinate
    :param distance: how far to move
    :return: the same steps with another end
    """
    qpos, qvel = steps.next_qpos.copy(), steps.next_qvel.copy()
    if column >= env.model.nv:
        qvel[:, column - env.model.nv] += distance
    else:
        direction = np.zeros(env.model.nv)
        direction[column] = 1.0
        for row in qpos:
            mujoco.mj_integratePos(env.model, row, direction, distance)
    return steps._replace(next_qpos=qpos, next_qvel=qvel)


def test_jacobian_at_a_quaternion_of_another_length() -> None:
    env = make("ant_v5")
    env.reset(seed=0)
    qpos, qvel = env.data.qpos.copy(), env.data.qvel.copy()
    assert abs(np.linalg.norm(qpos[3:7]) - 1.0) > 1e-3
    jacobian = model_of(env).observation_jacobian(qpos[None], qvel[None])[0]
    for axis in np.eye(3):
        ahead, behind = (quaternion_multiply(qpos[3:7], quaternion_exponential(sign * 1e-6 * axis)) for sign in (1, -1))
        np.testing.assert_allclose(jacobian[1:5, 3:6] @ axis, (ahead - behind) / 2e-6, atol=1e-9)


def test_jacobian_of_ball_joints_and_actuator_states(tmp_path: Path) -> None:
    text = (ASSETS / "ant.xml").read_text()
    text = text.replace("</worldbody>", '<body pos="3 3 3"><joint type="ball"/><geom size="0.1"/></body></worldbody>')
    text = text.replace("</actuator>", '<general joint="hip_1" dyntype="integrator"/></actuator>')
    (tmp_path / "ant.xml").write_text(text)
    env = make("ant_v5", {"xml_file": str(tmp_path / "ant.xml"), "include_cfrc_ext_in_observation": False})
    task, model = model_of(env), env.model
    assert model.na == 1 and task.invariant == ()
    recorded = record(env, task, 10)
    assert_same_outcome(task.outcome(recorded.steps), recorded.outcome)
    jacobian = task.observation_jacobian(recorded.steps.next_qpos, recorded.steps.next_qvel)
    assert jacobian.shape == (10, model.nq + model.nv - 2, 2 * model.nv + 1)
    for column in range(model.nv):
        ahead, behind = (task.outcome(moved_end(env, recorded.steps, column, sign * 1e-6)).obs for sign in (1.0, -1.0))
        np.testing.assert_allclose(jacobian[:, :, column], (ahead - behind) / 2e-6, atol=1e-8)


@pytest.mark.parametrize("module", dict(TASKS))
def test_only_exact_classes_have_a_model(module: str) -> None:
    env_class = getattr(import_module(f"gymnasium.envs.mujoco.{module}"), dict(TASKS)[module])
    subclass = type(env_class.__name__, (env_class,), {"__module__": __name__})
    assert find_task_model(env_class()) is not None
    assert find_task_model(subclass()) is None


def test_equal_environments_have_equal_models() -> None:
    for module in dict(TASKS):
        first, second = ({k: v for k, v in vars(model_of(make(module))).items() if k != "model"} for _ in range(2))
        assert repr(first) == repr(second)


@pytest.mark.parametrize("length", [1, 3, 6, 7, 8, 9, 17, 84, 127, 128, 129, 130, 600])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_equal_numpy_row_by_row(length: int, dtype: Any) -> None:
    rows = np.random.default_rng(length).standard_normal((200, length)).astype(dtype)
    sums = sum_of_squares(rows)
    assert sums.dtype == dtype
    np.testing.assert_array_equal(sums, [np.sum(np.square(row)) for row in rows])
    np.testing.assert_array_equal(sum_of_squares(np.asfortranarray(rows)), sums)
    if length % 6 == 0:
        np.testing.assert_array_equal(sums, [np.sum(np.square(row.reshape(-1, 6))) for row in rows])


def test_norms_and_squares_equal_numpy_row_by_row() -> None:
    vectors = np.random.default_rng(0).standard_normal((20_000, 3))
    np.testing.assert_array_equal(euclidean_norm(vectors), [np.linalg.norm(vector) for vector in vectors])
    np.testing.assert_array_equal(euclidean_norm(vectors[::2, ::-1]), [np.linalg.norm(v) for v in vectors[::2, ::-1].copy()])
    np.testing.assert_array_equal(scalar_square(vectors[:, 0]), [value**2 for value in vectors[:, 0]])
