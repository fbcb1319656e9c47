"""Derivatives of stock tasks: against MuJoCo's own, against slow differences of ``env.step``, and what they must not do."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import tomllib
import warnings
from pathlib import Path
from typing import Any

import gymnasium.envs.mujoco
import mujoco
import numpy as np
import pytest
from dynamics_reference import (
    STOCK,
    assert_agree,
    assert_same_bits,
    count_new_threads,
    everything_of,
    play,
    running_threads,
    slow_derivatives,
    stock,
)
from gymnasium import spaces
from gymnasium.envs.mujoco import MujocoEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sb3_agpo.dynamics.interface import DifferentiableDynamics, TransitionDerivatives, concatenate
from sb3_agpo.dynamics.mujoco import FiniteDifferences, MujocoDynamics, Perturbations, discard_invalid
from sb3_agpo.dynamics.stepping import DataStepper, RolloutStepper
from sb3_agpo.dynamics.tangent import PositionTangent

Array = NDArray[np.float64]
ONE = FiniteDifferences(threads=1)


def collect(
    env: MujocoEnv, dynamics: MujocoDynamics, n: int, stride: int = 1
) -> tuple[Array, NDArray[np.float32], list[tuple[Any, ...]]]:
    """
    Play on with random actions.

    :param env: the environment
    :param dynamics: reads its states
    :param n: number of steps to tell about
    :param stride: steps for each of them
    :return: state before each step, action, and the physics state after it with what ``step`` returned
    """
    states, actions, results = [], [], []
    for _ in range(n):
        play_on(env, stride - 1)
        states.append(dynamics.get_state())
        actions.append(env.action_space.sample())
        result = env.step(actions[-1].copy())
        results.append((dynamics.get_state()[: dynamics.physics_size], *result[:3]))
        if result[2]:
            env.reset()
    return np.stack(states), np.stack(actions), results


def play_on(env: MujocoEnv, n_steps: int) -> None:
    """
    Step on with random actions, from a reset on when an episode ends.

    :param env: the environment
    :param n_steps: number of steps
    """
    for _ in range(n_steps):
        if env.step(env.action_space.sample())[2]:
            env.reset()


# ---------------------------------------------------------------------- against others


@pytest.mark.parametrize("task", STOCK)
@pytest.mark.parametrize("centred", [False, True])
def test_derivatives_equal_slow_differences(task: str, centred: bool) -> None:
    live, differences = play(stock(task), 60, scale=0.7), FiniteDifferences(threads=1, centred=centred)
    reference = play(stock(task), 1, seed=9)
    dynamics = MujocoDynamics(live, differences)
    action = live.action_space.sample()
    action[0], action[-1] = live.action_space.high[0], live.action_space.low[-1]
    actual = dynamics.differentiate(dynamics.get_state()[None], action[None])
    # Centred differences of large rotations: difference of two logarithms against logarithm of the difference
    assert_agree(actual, slow_derivatives(reference, live, action, differences), tolerance=1e-4 if centred else 1e-8)


@pytest.mark.parametrize("task", ["half_cheetah", "pusher"])
@pytest.mark.parametrize("centred", [False, True])
def test_state_derivatives_equal_mujocos_own(task: str, centred: bool) -> None:
    live = play(stock(task, frame_skip=1), 200)
    size, model = 1e-6, live.model
    assert model.opt.integrator == mujoco.mjtIntegrator.mjINT_EULER
    dynamics = MujocoDynamics(live, FiniteDifferences(size, size, size, size, centred=centred, threads=1))
    for _ in range(3):
        action = live.action_space.sample().astype(np.float64)
        action[0], action[-1] = live.action_space.high[0], live.action_space.low[-1]
        A, B = np.zeros((2 * model.nv, 2 * model.nv)), np.zeros((2 * model.nv, model.nu))
        data = copy.copy(live.data)
        data.ctrl[:] = action
        mujoco.mjd_transitionFD(model, data, size, centred, A, B, None, None)
        actual = dynamics.differentiate(dynamics.get_state()[None], action[None])
        np.testing.assert_allclose(actual.A[0], A, rtol=0, atol=1e-7)
        np.testing.assert_allclose(actual.B[0], B, rtol=0, atol=1e-8)
        play_on(live, 5)


def test_activations_are_part_of_the_state(tmp_path: Path) -> None:
    text = (Path(gymnasium.envs.mujoco.__file__).parent / "assets" / "ant.xml").read_text()
    text = text.replace("</worldbody>", '<body pos="3 3 3"><joint type="ball"/><geom size="0.1"/></body></worldbody>')
    text = text.replace("</actuator>", '<general joint="hip_1" dyntype="integrator" ctrlrange="-1 1"/></actuator>')
    (tmp_path / "ant.xml").write_text(text)
    options = {"xml_file": str(tmp_path / "ant.xml"), "terminate_when_unhealthy": False}
    live, reference = play(stock("ant", **options), 10), play(stock("ant", **options), 1)
    dynamics = MujocoDynamics(live, ONE)
    assert live.model.na == 1 and dynamics.tangent_size == 2 * live.model.nv + 1
    action = live.action_space.sample()
    actual = dynamics.differentiate(dynamics.get_state()[None], action[None])
    assert_agree(actual, slow_derivatives(reference, live, action, ONE), tolerance=1e-8)
    assert actual.A[0, -1, -1] == pytest.approx(1.0) and actual.A[0, :, -1].any()


@pytest.mark.parametrize("integrator", ["Euler", "implicitfast"])
@pytest.mark.parametrize("task", ["ant", "humanoid"])
def test_forward_rewards_add_up_to_the_whole_way(task: str, integrator: str, tmp_path: Path) -> None:
    """Although MuJoCo leaves the positions at the beginning of the last physics step, unless it integrates by Runge-Kutta."""
    text = (Path(gymnasium.envs.mujoco.__file__).parent / "assets" / f"{task}.xml").read_text()
    (tmp_path / "other.xml").write_text(text.replace('integrator="RK4"', f'integrator="{integrator}"'))
    env = play(stock(task, xml_file=str(tmp_path / "other.xml"), ctrl_cost_weight=0.0, contact_cost_weight=0.0), 3)
    steps = dict.fromkeys(("position_step", "velocity_step", "action_step"), 1e-6)
    dynamics = MujocoDynamics(env, FiniteDifferences(**steps, centred=True, max_derivative=1e9))
    states, actions, results = collect(env, dynamics, 1)
    d = dynamics.differentiate(states, actions)
    assert d.reward[0] == results[0][2]
    env.set_state(d.next_state[0, 1 : 1 + env.model.nq], d.next_state[0, 1 + env.model.nq :][: env.model.nv])
    jacobian = np.empty((3, env.model.nv))
    if task == "ant":
        mujoco.mj_jacBody(env.model, env.data, jacobian, None, 1)
    else:
        mujoco.mj_jacSubtreeCom(env.model, env.data, jacobian, 0)
    velocity = jacobian[0] @ d.B[0, : env.model.nv] / env.dt
    np.testing.assert_allclose(d.r_a[0], env._forward_reward_weight * velocity, atol=1e-4 * np.abs(velocity).max())


def test_invariant_columns_equal_slow_differences() -> None:
    for task, fixed in (("ant", (0, 1)), ("hopper", (0,)), ("swimmer", (0, 1))):
        live = play(stock(task), 20, scale=0.5)
        dynamics = MujocoDynamics(live, ONE)
        assert dynamics.perturbations.fixed == fixed
        assert dynamics.perturbations.n_rows == 1 + dynamics.tangent_size + live.model.nu - len(fixed)
        action = live.action_space.sample()
        actual = dynamics.differentiate(dynamics.get_state()[None], action[None])
        expected = slow_derivatives(play(stock(task), 1), live, action, ONE)
        np.testing.assert_allclose(actual.A[0][:, fixed], expected.A[:, fixed], atol=1e-7)
        assert not actual.O_x[0][:, fixed].any() and not actual.r_x[0][list(fixed)].any()
        np.testing.assert_allclose(expected.O_x[:, fixed], 0.0, atol=1e-7)
        np.testing.assert_allclose(expected.r_x[list(fixed)], 0.0, atol=1e-7)


def test_observation_derivatives_follow_from_the_state_where_they_can() -> None:
    live = play(stock("ant"), 30)
    dynamics = MujocoDynamics(live, FiniteDifferences(1e-6, 1e-6, 1e-6, 1e-6, threads=1))
    states, actions, _ = collect(live, dynamics, 4)
    d = dynamics.differentiate(states, actions)
    of_state = d.next_C.any(axis=2)
    assert of_state.any() and not of_state.all()
    np.testing.assert_allclose((d.next_C @ d.A)[of_state], d.O_x[of_state], atol=1e-3)
    np.testing.assert_allclose((d.next_C @ d.B)[of_state], d.O_a[of_state], atol=1e-3)


# ---------------------------------------------------------------------- the unperturbed row


@pytest.mark.parametrize("task", STOCK)
def test_values_equal_the_live_step_bit_for_bit(task: str) -> None:
    live = play(stock(task), 3)
    dynamics = MujocoDynamics(live, ONE)
    n = 12 if task.startswith("humanoid") else 40
    states, actions, results = collect(live, dynamics, n, stride=5)
    assert actions.dtype == np.float32
    d = dynamics.differentiate(states, actions)
    next_states, obs, rewards, terminated = (np.array(values) for values in zip(*results, strict=True))
    for actual, expected in ((d.next_obs, obs), (d.reward, rewards)):
        assert actual.dtype == np.float64
        np.testing.assert_array_equal(actual, expected)
        np.testing.assert_array_equal(np.signbit(actual), np.signbit(expected))
    ended = terminated.astype(bool)
    np.testing.assert_array_equal(d.terminated, ended)
    np.testing.assert_array_equal(d.next_state[~ended], next_states[~ended])  # where the state was not reset since
    assert d.valid.mean() > 0.9


def test_derivatives_do_not_depend_on_the_dtype_of_actions() -> None:
    live = play(stock("hopper"), 10)
    dynamics = MujocoDynamics(live, ONE)
    states, actions, _ = collect(live, dynamics, 3)
    single, double = dynamics.differentiate(states, actions), dynamics.differentiate(states, actions.astype(np.float64))
    np.testing.assert_allclose(single.reward, double.reward, atol=1e-6)
    assert_same_bits(single._replace(reward=double.reward), double)


# ---------------------------------------------------------------------- what must not matter


@pytest.mark.parametrize("task", ["hopper", "humanoid", "reacher"])
def test_threads_and_batches_never_change_a_bit(task: str) -> None:
    live = play(stock(task), 10)
    dynamics = [MujocoDynamics(live, FiniteDifferences(threads=threads)) for threads in (1, 2, 3)]
    states, actions, _ = collect(live, dynamics[0], 4)
    expected = dynamics[0].differentiate(states, actions)
    for other in dynamics[1:]:
        assert_same_bits(other.differentiate(states, actions), expected)
        other.close()
    one_by_one = [dynamics[0].differentiate(states[[i]], actions[[i]]) for i in range(4)]
    assert_same_bits(concatenate(one_by_one), expected)
    backwards = dynamics[0].differentiate(states[::-1], np.asfortranarray(actions[::-1]))
    assert_same_bits(backwards.take(slice(None, None, -1)), expected)


@pytest.mark.parametrize("task", STOCK)
@pytest.mark.parametrize("centred", [False, True])
def test_derivatives_by_the_action_alone_are_the_same_bits(task: str, centred: bool) -> None:
    live = play(stock(task), 10)
    dynamics = MujocoDynamics(live, FiniteDifferences(threads=1, centred=centred))
    states, actions, _ = collect(live, dynamics, 5)
    expected = dynamics.differentiate(states, actions)
    calls = dynamics.simulator_calls
    by_state = np.array([False, True, False, False, True])
    actual = dynamics.differentiate(states, actions, by_state)
    rows = dynamics.perturbations.n_rows, dynamics.action_perturbations.n_rows
    assert rows[1] == 1 + dynamics.perturbations.nu * (1 + centred) < rows[0]
    assert dynamics.simulator_calls - calls == 2 * rows[0] + 3 * rows[1]
    assert_same_bits(actual.take(by_state), expected.take(by_state))
    without = expected._replace(**{name: np.zeros_like(getattr(expected, name)) for name in ("A", "O_x", "r_x")})
    assert_same_bits(actual.take(~by_state), without.take(~by_state))
    assert_same_bits(dynamics.differentiate(states, actions, np.ones(5, dtype=bool)), expected)
    assert_same_bits(dynamics.differentiate(states, actions, np.zeros(5, dtype=bool)), without)


@pytest.mark.parametrize("task,ndx,nu", [("reacher", 8, 2), ("hopper", 12, 3)])
def test_no_rows(task: str, ndx: int, nu: int) -> None:
    dynamics = MujocoDynamics(play(stock(task), 1), ONE)
    d = dynamics.differentiate(np.empty((0, dynamics.state_size)), np.empty((0, nu)))
    assert d.A.shape == (0, ndx, ndx) and d.valid.shape == (0,)


@pytest.mark.parametrize("task", ["half_cheetah", "ant"])
def test_the_live_environment_is_only_read(task: str) -> None:
    live, twin = play(stock(task), 15), play(stock(task), 15)
    before = everything_of(live)
    dynamics = MujocoDynamics(live, FiniteDifferences(threads=2))
    state = dynamics.get_state()
    action = live.action_space.sample()
    given = action.copy()
    states = np.stack([state, state])
    dynamics.differentiate(states, np.stack([action, action]))
    twin.action_space.sample()
    assert everything_of(live) == everything_of(twin)
    assert before != everything_of(live)  # the action space's generator has moved on, as the twin's
    np.testing.assert_array_equal(states, np.stack([state, state]))
    np.testing.assert_array_equal(action, given)
    for _ in range(5):
        first, second = live.step(action), twin.step(action)
        np.testing.assert_array_equal(first[0], second[0])
        dynamics.differentiate(dynamics.get_state()[None], action[None])
        assert everything_of(live) == everything_of(twin)
    dynamics.close()


def test_rows_are_stepped_with_a_private_model() -> None:
    live = play(stock("hopper"), 1)
    flags = live.model.opt.disableflags
    dynamics = MujocoDynamics(live, ONE)
    assert dynamics.model is not live.model and live.model.opt.disableflags == flags
    assert dynamics.model.opt.disableflags & mujoco.mjtDisableBit.mjDSBL_AUTORESET


# ---------------------------------------------------------------------- limits


def test_actions_are_moved_inwards_at_their_limits() -> None:
    live = play(stock("half_cheetah"), 5)
    space, nu = live.action_space, live.model.nu
    tangent = PositionTangent(live.model)
    physics = np.zeros((3, 1 + live.model.nq + live.model.nv))
    actions = np.stack([space.high, space.low, np.zeros(nu)]).astype(np.float64)
    forward = Perturbations(tangent, 0, space, FiniteDifferences(action_step=0.1))
    _, rows, distance = forward.perturb(physics, actions)
    assert np.all((rows >= space.low) & (rows <= space.high))
    np.testing.assert_allclose(distance[:, -nu:], np.array([[-0.1], [0.1], [0.1]]) * np.ones(nu))
    centred = Perturbations(tangent, 0, space, FiniteDifferences(action_step=0.1, centred=True))
    _, rows, distance = centred.perturb(physics, actions)
    assert np.all((rows >= space.low) & (rows <= space.high))
    np.testing.assert_allclose(distance[:, -nu:], np.array([[0.1], [0.1], [0.2]]) * np.ones(nu))
    np.testing.assert_array_equal(distance[:, : forward.ndx], 2 * forward.perturb(physics, actions)[2][:, : forward.ndx])


@settings(deadline=None, max_examples=60)
@given(st.floats(-1.0, 1.0), st.floats(1e-6, 1.0), st.booleans(), st.sampled_from([(-1.0, 1.0), (-0.4, 0.4), (2.0, 9.0)]))
def test_actions_stay_in_bounds(place: float, step: float, centred: bool, bounds: tuple[float, float]) -> None:
    space = spaces.Box(*np.array(bounds, np.float32), (1,), np.float32)
    model = mujoco.MjModel.from_xml_string(
        '<mujoco><worldbody><body><joint type="slide"/><geom size="1"/></body></worldbody></mujoco>'
    )
    scheme = Perturbations(PositionTangent(model), 0, space, FiniteDifferences(action_step=step, centred=centred))
    low, high = float(space.low[0]), float(space.high[0])
    action = np.clip(low + 0.5 * (place + 1.0) * (high - low), low, high)
    _, rows, distance = scheme.perturb(np.zeros((1, 3)), np.array([[action]]))
    assert low <= rows.min() and rows.max() <= high
    half = 0.5 * step * (high - low)
    assert half * 0.99 <= np.abs(distance[0, -1]) <= 2.01 * half
    between = rows[0, 3] - (rows[0, 6] if centred else rows[0, 0])  # rows: base, position, velocity, action, ...
    assert between == distance[0, -1] != 0.0


def test_actions_out_of_bounds_are_moved_no_further_out() -> None:
    live = play(stock("half_cheetah"), 5)
    scheme = MujocoDynamics(live, ONE).perturbations
    _, rows, distance = scheme.perturb(np.zeros((1, 19)), np.full((1, 6), 1.5))
    assert rows.max() == 1.5
    np.testing.assert_allclose(distance[0, -6:], -0.01)


def test_an_action_without_range_has_no_derivative() -> None:
    model = mujoco.MjModel.from_xml_string(
        '<mujoco><worldbody><body><joint type="slide"/><geom size="1"/></body></worldbody></mujoco>'
    )
    space = spaces.Box(np.array([0.0, -1.0]), np.array([0.0, 1.0]), dtype=np.float64)
    scheme = Perturbations(PositionTangent(model), 0, space, ONE)
    assert scheme.n_rows == 4
    _, _, distance = scheme.perturb(np.zeros((1, 3)), np.zeros((1, 2)))
    B = scheme.quotient(np.ones((1, 3, 1)), distance)[1]
    assert B[0, 0, 0] == 0.0 and np.isfinite(B[0, 0, 1])


def test_the_end_of_an_episode_is_no_slope_of_the_reward() -> None:
    live = play(stock("hopper", healthy_z_range=(2.0, np.inf)), 1)
    dynamics = MujocoDynamics(live, ONE)

    def differentiate(height: float) -> TransitionDerivatives:
        live.set_state(np.array([0.0, height, 0.0, 0.0, 0.0, 0.0]), np.zeros(6))
        return dynamics.differentiate(dynamics.get_state()[None], np.zeros((1, 3)))

    fall = differentiate(2.5).next_state[0, 2] - 2.5
    for height, ends in ((2.0005, False), (1.9995, True)):
        d = differentiate(height - fall)  # in the air
        assert d.valid[0] and d.terminated[0] == ends
        assert np.abs(d.r_x).max() < 2.0  # the bonus of 1 lost or won over a step of 1e-3 would be 1000


# ---------------------------------------------------------------------- what cannot be trusted


@pytest.mark.parametrize("task", ["half_cheetah", "humanoid"])
def test_divergence_is_marked_and_leaves_neighbours_alone(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    live = play(stock(task), 10)
    dynamics = MujocoDynamics(live, ONE)
    states, actions, _ = collect(live, dynamics, 6)
    expected = dynamics.differentiate(states, actions)
    assert expected.valid.all()
    velocities = slice(1 + live.model.nq, 1 + live.model.nq + live.model.nv)
    wild = states.copy()
    wild[1, velocities], wild[2, velocities], wild[4, velocities] = 1e9, np.nan, 1e30
    stepped, step = [], mujoco.mj_step
    with warnings.catch_warnings(), monkeypatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr(mujoco, "mj_step", lambda *arguments: (stepped.append(arguments), step(*arguments)))
        d = dynamics.differentiate(wild, actions)
    # One row with NaN may take 0.1 s: where rows are stepped one by one, each wild transition is left after the first
    assert len(stepped) == (3 * dynamics.perturbations.n_rows + 3 if isinstance(dynamics._stepper, DataStepper) else 0)
    np.testing.assert_array_equal(d.valid, [True, False, False, True, False, True])
    for field in (d.A, d.B, d.C, d.next_C, d.O_x, d.O_a, d.r_x, d.r_a):
        assert not field[[1, 2, 4]].any()
    assert_same_bits(d.take(np.array([0, 3, 5])), expected.take(np.array([0, 3, 5])))
    assert_same_bits(dynamics.differentiate(states, actions), expected)  # nothing of it stays in the private data


def test_exploding_derivatives_are_marked() -> None:
    live = play(stock("half_cheetah"), 10)
    states, actions, _ = collect(live, MujocoDynamics(live, ONE), 3)
    bound = 0.5 * np.abs(MujocoDynamics(live, ONE).differentiate(states, actions).A[0]).max()
    d = MujocoDynamics(live, FiniteDifferences(threads=1, max_derivative=bound)).differentiate(states, actions)
    assert not d.valid[0] and not d.A[0].any() and np.isfinite(d.next_obs[0]).all()


@pytest.mark.parametrize("name", TransitionDerivatives._fields)
def test_every_field_is_checked(name: str) -> None:
    if name in ("terminated", "valid"):
        return
    live = play(stock("reacher"), 2)
    dynamics = MujocoDynamics(live, ONE)
    states, actions, _ = collect(live, dynamics, 2)
    for value in (np.nan, np.inf) if name not in ("A", "B", "next_state") else (np.nan, np.inf, -2e10):
        d = dynamics.differentiate(states, actions)
        getattr(d, name)[1, ...] = value
        checked = discard_invalid(d, 1e5)
        np.testing.assert_array_equal(checked.valid, [True, False])
        assert d.valid.all() and checked.A[0].any() and not checked.A[1].any() and not checked.r_a[1].any()


# ---------------------------------------------------------------------- use


@pytest.mark.parametrize(
    "options",
    [{name: value} for name in ("position_step", "velocity_step", "activation_step", "action_step", "max_derivative")
     for value in (0.0, -1.0, np.nan, np.inf, "1", None, True)]
    + [{"threads": value} for value in (0, -2, 1.5, True, "2")]
    + [{"action_step": 1.5}, {"centred": "yes"}],
)  # fmt: skip
def test_senseless_options_are_refused(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError) as refusal:
        FiniteDifferences(**options)
    text = str(refusal.value)
    assert f"`{name}`" in text and repr(value) in text
    assert "try" in text or "must be True" in text


def test_sensible_options_are_accepted() -> None:
    FiniteDifferences(np.float32(1e-3), np.float64(1), 1, 1.0, True, np.int64(2))
    assert FiniteDifferences().n_threads >= 1 and FiniteDifferences(threads=3).n_threads == 3


def test_wrong_shapes_are_refused() -> None:
    dynamics = MujocoDynamics(play(stock("reacher"), 1), ONE)
    states, actions = np.zeros((2, dynamics.state_size)), np.zeros((2, 2))
    for wrong in (states[0], states[:, 1:], states[None]):
        with pytest.raises(ValueError, match=r"`states` must have the shape \(n, 16\)"):
            dynamics.differentiate(wrong, actions)
    for wrong in (actions[:1], actions[:, :1], actions[0]):
        with pytest.raises(ValueError, match=r"`actions` must have the shape \(2, 2\)"):
            dynamics.differentiate(states, wrong)


def test_only_stock_tasks() -> None:
    subclass = type("Mine", (type(stock("hopper")),), {})
    with pytest.raises(TypeError, match="Mine is no stock Gymnasium MuJoCo task"):
        MujocoDynamics(subclass())


def test_the_interface_is_met() -> None:
    assert isinstance(MujocoDynamics(stock("reacher"), ONE), DifferentiableDynamics)
    d = TransitionDerivatives(*(np.arange(4.0).reshape(4, 1) for _ in TransitionDerivatives._fields))
    assert_same_bits(concatenate([d.take(slice(0, 1)), d.take(np.array([1, 2, 3]))]), d)


@pytest.mark.parametrize("task", ["hopper", "reacher"])
def test_threads_start_late_and_stop(task: str) -> None:
    live = play(stock(task), 3)
    before = running_threads()
    dynamics = MujocoDynamics(live, FiniteDifferences(threads=3))
    assert running_threads() <= before
    arguments = dynamics.get_state()[None], live.action_space.sample()[None]
    expected = dynamics.differentiate(*arguments)
    assert 0 < count_new_threads(before, most=3) <= 3
    dynamics.close()
    assert count_new_threads(before, most=0) == 0
    assert_same_bits(dynamics.differentiate(*arguments), expected)  # starts them again
    assert 0 < count_new_threads(before, most=3) <= 3
    del dynamics
    assert count_new_threads(before, most=0) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("task", ["hopper", "reacher"])
def test_threads_start_anew_in_a_forked_process(task: str) -> None:
    live = play(stock(task), 3)
    dynamics = MujocoDynamics(live, FiniteDifferences(threads=2))
    arguments = dynamics.get_state()[None], live.action_space.sample()[None]
    expected = dynamics.differentiate(*arguments)
    for first in (dynamics.close, lambda: None):
        child = os.fork()
        if child == 0:  # which must not come back into pytest
            signal.alarm(240)  # ends it if it waits for ever
            first()
            again = [dynamics.differentiate(*arguments) for _ in range(2)]
            dynamics.close()
            os._exit(0 if all(np.array_equal(a, b) for d in again for a, b in zip(d, expected, strict=True)) else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert_same_bits(dynamics.differentiate(*arguments), expected)


@pytest.mark.parametrize("task", ["hopper", "reacher"])
def test_engines_can_be_copied_and_pickled(task: str) -> None:
    live = play(stock(task), 3)
    dynamics = MujocoDynamics(live, FiniteDifferences(threads=2))
    arguments = dynamics.get_state()[None], live.action_space.sample()[None]
    expected = dynamics.differentiate(*arguments)
    for twin in (copy.deepcopy(dynamics), pickle.loads(pickle.dumps(dynamics._stepper))):
        stepper = twin if isinstance(twin, (RolloutStepper, DataStepper)) else twin._stepper
        assert stepper._data == []
    twin = copy.deepcopy(dynamics)
    assert twin.env is not live
    assert_same_bits(twin.differentiate(*arguments), expected)


def test_the_oldest_mujoco_that_is_allowed_has_what_is_used() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    (requirement,) = (d for d in tomllib.loads(text)["project"]["dependencies"] if d.startswith("mujoco"))
    assert [int(number) for number in requirement.removeprefix("mujoco>=").split(".")] >= [3, 5]  # mj_copyData


def test_simulator_calls_are_counted() -> None:
    dynamics = MujocoDynamics(play(stock("reacher"), 1), ONE)
    dynamics.differentiate(np.stack([dynamics.get_state()] * 3), np.zeros((3, 2)))
    assert dynamics.simulator_calls == 3 * (1 + 8 + 2)


def test_signatures_tell_environments_apart() -> None:
    def signature(task: str, change: Any = None, **options: Any) -> bytes:
        env = stock(task, **options)
        if change is not None:
            change(env)
        return MujocoDynamics(env, ONE).signature()

    assert signature("hopper") == signature("hopper") != signature("walker2d")
    assert signature("hopper") != signature("hopper", ctrl_cost_weight=0.3)
    assert signature("hopper") != signature("hopper", frame_skip=2)
    assert signature("hopper") != signature("hopper", lambda env: env.model.body_mass.__imul__(2.0))
    assert signature("hopper") != signature("hopper", lambda env: setattr(env, "action_space", spaces.Box(-0.5, 0.5, (3,))))
