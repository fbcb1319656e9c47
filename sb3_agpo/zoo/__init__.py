"""AGPO in RL Baselines3 Zoo: registration, hyperparameters and ``python -m sb3_agpo.zoo``."""

from pathlib import Path
from typing import Any

import yaml

from sb3_agpo.zoo.registration import ALGORITHM_NAME, register

#: the zoo's configuration file for AGPO
HYPERPARAMETER_FILE = Path(__file__).parent / "hyperparams" / f"{ALGORITHM_NAME}.yml"
#: environment id -> what the zoo reads there: ``n_timesteps``, ``policy`` and arguments of AGPO
hyperparameters: dict[str, dict[str, Any]] = yaml.safe_load(HYPERPARAMETER_FILE.read_text())

__all__ = ["ALGORITHM_NAME", "HYPERPARAMETER_FILE", "hyperparameters", "register"]
