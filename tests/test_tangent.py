"""Batched tangent-space arithmetic against MuJoCo's own functions, which take one position at a time."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from sb3_agpo.dynamics.tangent import (
    PositionTangent,
    quaternion_exponential,
    quaternion_logarithm,
    quaternion_multiply,
)

Array = NDArray[np.float64]

JOINTS = {
    "free": "<freejoint/>",
    "ball": '<joint type="ball"/>',
    "hinge": '<joint type="hinge" axis="0 1 0"/>',
    "slide": '<joint type="slide" axis="1 0 0"/>',
}


def model_with(*kinds: str) -> mujoco.MjModel:
    """
    A model with one body per joint, in the given order.

    :param kinds: kinds of joints
    :return: the model
    """
    bodies = "".join(f'<body pos="0 0 {i}">{JOINTS[kind]}<geom size="0.1"/></body>' for i, kind in enumerate(kinds))
    return mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{bodies}</worldbody></mujoco>")


MODELS = [
    model_with("hinge", "slide", "hinge"),
    model_with("free"),
    model_with("ball"),
    model_with("slide", "ball", "hinge", "free", "ball", "slide"),
    model_with("free", "free", "ball"),
]
angles = st.floats(-7.0, 7.0)
models = st.sampled_from(MODELS)


def random_positions(model: mujoco.MjModel, seed: int, n: int) -> Array:
    """
    Positions with unit quaternions.

    :param model: the model
    :param seed: of the random numbers
    :param n: how many
    :return: shape ``(n, nq)``
    """
    qpos = np.random.default_rng(seed).standard_normal((n, model.nq))
    for row in qpos:
        mujoco.mj_normalizeQuat(model, row)
    return qpos


def mujoco_integrate(model: mujoco.MjModel, qpos: Array, tangent: Array) -> Array:
    """
    ``mj_integratePos``, row by row.

    :param model: the model
    :param qpos: shape ``(n, nq)``
    :param tangent: shape ``(n, nv)``
    :return: shape ``(n, nq)``
    """
    moved = qpos.copy()
    for row, step in zip(moved, tangent, strict=True):
        mujoco.mj_integratePos(model, row, step, 1.0)
    return moved


def mujoco_difference(model: mujoco.MjModel, start: Array, end: Array) -> Array:
    """
    ``mj_differentiatePos``, row by row.

    :param model: the model
    :param start: shape ``(n, nq)``
    :param end: shape ``(n, nq)``
    :return: shape ``(n, nv)``
    """
    tangent = np.empty((len(start), model.nv))
    for row, first, second in zip(tangent, start, end, strict=True):
        mujoco.mj_differentiatePos(model, row, 1.0, first, second)
    return tangent


@settings(deadline=None, max_examples=150)
@given(models, st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([1e-9, 1e-4, 0.1, 1.0, 4.0]))
def test_integration_equals_mujoco(model: mujoco.MjModel, seed: int, n: int, scale: float) -> None:
    qpos = random_positions(model, seed, n)
    tangent = scale * np.random.default_rng([seed, 1]).standard_normal((n, model.nv))
    before = qpos.copy()
    moved = PositionTangent(model).integrate(qpos, tangent)
    np.testing.assert_allclose(moved, mujoco_integrate(model, qpos, tangent), rtol=0, atol=1e-14 * max(scale, 1.0))
    np.testing.assert_array_equal(qpos, before)


@settings(deadline=None, max_examples=150)
@given(models, st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_difference_equals_mujoco(model: mujoco.MjModel, seed: int, n: int) -> None:
    start, end = random_positions(model, seed, n), random_positions(model, seed + 1, n)
    tangent = PositionTangent(model).difference(start, end)
    np.testing.assert_allclose(tangent, mujoco_difference(model, start, end), rtol=1e-12, atol=1e-13)


@settings(deadline=None, max_examples=100)
@given(models, st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-12, 1e-6, 1e-3, 1.0]))
def test_round_trip(model: mujoco.MjModel, seed: int, scale: float) -> None:
    tangent_space = PositionTangent(model)
    qpos = random_positions(model, seed, 4)
    tangent = scale * np.clip(np.random.default_rng([seed, 1]).standard_normal((4, model.nv)), -1.7, 1.7)  # angles below pi
    back = tangent_space.difference(qpos, tangent_space.integrate(qpos, tangent))
    np.testing.assert_allclose(back, tangent, rtol=1e-9, atol=2e-15)
    end = random_positions(model, seed + 1, 4)
    arrived = tangent_space.integrate(qpos, tangent_space.difference(qpos, end))
    # A quaternion and its negative are the same rotation
    np.testing.assert_allclose(tangent_space.difference(arrived, end), 0.0, atol=1e-12)


@settings(deadline=None)
@given(arrays(np.float64, 3, elements=st.floats(-1.0, 1.0)), st.sampled_from([1e-300, 1e-16, 1e-10, 1e-5, 1e-2]))
def test_small_angles(axis: Array, angle: float) -> None:
    rotation = angle * axis
    quaternion = quaternion_exponential(rotation)
    np.testing.assert_allclose(np.linalg.norm(quaternion), 1.0, atol=1e-15)
    np.testing.assert_allclose(quaternion[1:], 0.5 * rotation, rtol=1e-4, atol=1e-320)
    np.testing.assert_allclose(quaternion_logarithm(quaternion), rotation, rtol=1e-12, atol=1e-320)


@settings(deadline=None)
@given(arrays(np.float64, 3, elements=st.floats(-1.0, 1.0)), st.floats(-1e-3, 1e-3), st.booleans())
def test_half_turns(axis: Array, excess: float, negated: bool) -> None:
    assume(np.linalg.norm(axis) > 1e-3)
    axis = axis / np.linalg.norm(axis)
    model = MODELS[2]
    end = quaternion_exponential((np.pi + excess) * axis) * (-1.0 if negated else 1.0)
    start = np.array([1.0, 0.0, 0.0, 0.0])
    rotation = PositionTangent(model).difference(start, end)
    np.testing.assert_allclose(rotation, mujoco_difference(model, start[None], end[None])[0], atol=1e-12)
    assert np.linalg.norm(rotation) <= np.pi + 1e-12  # the shorter way round
    np.testing.assert_allclose(np.abs(quaternion_exponential(rotation) @ end), 1.0, atol=1e-14)


def test_zero_and_full_turns() -> None:
    one = np.array([1.0, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(quaternion_exponential(np.zeros(3)), one)
    np.testing.assert_array_equal(quaternion_logarithm(one), np.zeros(3))
    np.testing.assert_array_equal(quaternion_logarithm(-one), np.zeros(3))
    np.testing.assert_allclose(quaternion_exponential(np.array([2 * np.pi, 0.0, 0.0])), -one, atol=1e-15)


def test_multiplication_equals_mujoco() -> None:
    left, right = np.random.default_rng(0).standard_normal((2, 7, 4))
    expected = np.empty_like(left)
    for row, first, second in zip(expected, left, right, strict=True):
        mujoco.mju_mulQuat(row, first, second)
    np.testing.assert_allclose(quaternion_multiply(left, right), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("model", MODELS)
def test_batches_equal_single_rows_and_broadcast(model: mujoco.MjModel) -> None:
    tangent_space = PositionTangent(model)
    qpos = random_positions(model, 0, 6).reshape(2, 3, model.nq)
    tangent = np.random.default_rng(1).standard_normal((3, model.nv))
    moved = tangent_space.integrate(qpos, tangent[None])
    back = tangent_space.difference(qpos[:, :1], moved)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(moved[i, j], tangent_space.integrate(qpos[i, j], tangent[j]))
        np.testing.assert_array_equal(back[i, j], tangent_space.difference(qpos[i, 0], moved[i, j]))


def test_length_of_a_quaternion_is_kept() -> None:
    # Gymnasium's reset noise leaves quaternions of another length than one, and what is observed is what it left
    qpos = np.array([0.0, 0.0, 0.0, 1.1, 0.0, 0.0, 0.0])
    moved = PositionTangent(MODELS[1]).integrate(qpos, np.full(6, 0.3))
    np.testing.assert_allclose(np.linalg.norm(moved[3:]), 1.1, rtol=1e-15)
    np.testing.assert_allclose(PositionTangent(MODELS[1]).difference(qpos, moved), 0.3, rtol=1e-13)
