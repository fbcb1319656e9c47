"""Vectorised environments: stock MuJoCo tasks stepped in threads inside one process."""

from sb3_agpo.vec_env.mujoco_vec_env import MujocoVecEnv, make_mujoco_vec_env

__all__ = ["MujocoVecEnv", "make_mujoco_vec_env"]
