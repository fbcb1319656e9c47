"""Adaptive Gradient Policy Optimisation for Stable-Baselines3."""

from sb3_agpo.__about__ import __version__
from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.agpo.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_agpo.dynamics.torch_tasks import register_environments

register_environments()

__all__ = ["AGPO", "CnnPolicy", "MlpPolicy", "MultiInputPolicy", "__version__"]
