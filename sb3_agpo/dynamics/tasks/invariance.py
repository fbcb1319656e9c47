"""Which translations of a robot leave its world as it was, decided from the MuJoCo model alone."""

from __future__ import annotations

import mujoco
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_TOLERANCE = 1e-9  # of cosines between a direction and a plane's normal


def invariant_translations(model: mujoco.MjModel) -> tuple[int, ...]:
    """
    Translations of the root body that MuJoCo's dynamics do not notice, to rounding.

    The stock models have some, but a user's own XML file may hold stairs, walls or a second body. An index is returned
    only if all that a translation could change is ruled out:

    - one articulated body moves, with nothing that ties it to the world but its root joints;
    - the translation is a free joint's, or belongs to one of the slide joints the root body starts with, without spring,
      limit and actuator;
    - all it can collide with are infinite planes parallel to the translation.

    Gravity, wind and the medium are uniform in MuJoCo. What is unusual (equality constraints, spatial tendons, ...) gives
    no index rather than a wrong one. Callbacks are not looked at.

    :param model: the model
    :return: indices of tangent position coordinates, ascending
    """
    if not _stands_free(model):
        return ()
    normals = _obstacle_normals(model)
    if normals is None:
        return ()
    directions = _root_translations(model)
    parallel = (index for index, direction in directions.items() if np.all(np.abs(normals @ direction) < _TOLERANCE))
    return tuple(sorted(parallel))


def _stands_free(model: mujoco.MjModel) -> bool:
    """
    Whether exactly one articulated body moves and only its root joints can tie it to the world.

    :param model: the model
    :return: False also where it is not worth deciding
    """
    moves = model.body_weldid != 0
    one_tree = np.unique(model.body_rootid[moves]).size == 1
    ties = model.neq + model.nmocap + model.nflex + model.nplugin + getattr(model, "nplastic", 0)
    fixed_tendons = np.all(model.wrap_type == mujoco.mjtWrap.mjWRAP_JOINT)
    inside = (mujoco.mjtTrn.mjTRN_JOINT, mujoco.mjtTrn.mjTRN_JOINTINPARENT, mujoco.mjtTrn.mjTRN_TENDON)
    return bool(one_tree and ties == 0 and fixed_tendons and np.all(np.isin(model.actuator_trntype, inside)))


def _obstacle_normals(model: mujoco.MjModel) -> Array | None:
    """
    Normals of the static planes that something can collide with.

    :param model: the model
    :return: shape ``(number of planes, 3)``, in world coordinates; None if there are obstacles other than planes
    """
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    static = model.body_weldid[model.geom_bodyid] == 0
    # An explicit contact pair overrides the collision masks.
    collides = (model.geom_contype != 0) | (model.geom_conaffinity != 0) | (model.npair > 0)
    obstacles = static & collides
    if np.any(model.geom_type[obstacles] != mujoco.mjtGeom.mjGEOM_PLANE):
        return None
    return data.geom_xmat[obstacles].reshape(-1, 3, 3)[:, :, 2]


def _root_translations(model: mujoco.MjModel) -> dict[int, Array]:
    """
    Translations that the root body's first joints allow, unless something holds them.

    :param model: a model in which :func:`_stands_free` holds
    :return: direction in world coordinates, shape ``(3,)``, by index of the tangent position coordinate
    """
    root = model.body_rootid[model.body_weldid != 0][0]
    directions: dict[int, Array] = {}
    for joint in np.flatnonzero(model.jnt_bodyid == root):
        held = _is_held(model, joint)
        first = int(model.jnt_dofadr[joint])
        if model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_FREE and not held:
            return dict(zip(range(first, first + 3), np.eye(3), strict=True))
        if model.jnt_type[joint] != mujoco.mjtJoint.mjJNT_SLIDE:
            break  # a rotation turns the axes of the joints after it
        if not held:
            direction = np.empty(3)
            mujoco.mju_rotVecQuat(direction, model.jnt_axis[joint], model.body_quat[root])
            directions[first] = direction
    return directions


def _is_held(model: mujoco.MjModel, joint: np.int64) -> bool:
    """
    Whether a force may depend on a joint's position.

    :param model: a model in which :func:`_stands_free` holds
    :param joint: index of the joint
    :return: True if it has a spring, a limit, an actuator or a tendon
    """
    of_joints = model.actuator_trntype != mujoco.mjtTrn.mjTRN_TENDON
    driven = np.any(model.actuator_trnid[of_joints, 0] == joint)
    # MuJoCo 4 adds springs with polynomial stiffness.
    springs = np.append(model.jnt_stiffness[joint], getattr(model, "jnt_stiffnesspoly", np.zeros(model.njnt))[joint])
    return bool(np.any(springs) or model.jnt_limited[joint] or driven or joint in model.wrap_objid)
