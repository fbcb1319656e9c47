"""Adaptive Gradient Policy Optimisation for Stable-Baselines3."""

from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.agpo.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["AGPO", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
