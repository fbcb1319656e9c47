"""Whatever the constructor accepts it trains with; whatever it does not, it refuses by name."""

import inspect
import math
from copy import deepcopy
from typing import Any

import gymnasium as gym
import torch as th
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from small_models import SMALL, flat_state
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.utils import LinearSchedule

from sb3_agpo import AGPO
from sb3_agpo.agpo.arguments import CHECKS

#: right for some arguments and wrong for others
VALUES = [
    *(None, True, -1, 0, 1, 2, 7, -0.5, 0.0, 1e-3, 0.5, 1.0, 2.5, 1e9, math.nan, math.inf, -math.inf),
    *(
        "auto",
        "auto_0.5",
        "auto_x",
        "q",
        "analytic",
        "x",
        "",
        [],
        {},
        (),
        [8],
        (1, "step"),
        (2, "episode"),
        (0, "step"),
        (1, 1),
    ),
    *(
        {"net_arch": []},
        {"net_arch": [4]},
        {"n_critics": 1},
        {"net_arch": ["x"]},
        object(),
        print,
        dict,
        LinearSchedule(1.0, 0.0, 1.0),
    ),
    NormalActionNoise([0.0], [0.1]),
]
#: attributes and files are of no interest, and a gate must be able to weigh
OTHERS = {"self", "policy", "env", "_init_setup_model", "device", "tensorboard_log", "verbose", "gate", "replay_buffer_class"}
NAMES = sorted(set(inspect.signature(AGPO.__init__).parameters) - OTHERS)

arguments = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(VALUES), min_size=1, max_size=3)


def test_every_argument_has_a_check() -> None:
    flags = {"optimize_memory_usage", "use_sde", "use_sde_at_warmup"}  # anything is true or false
    assert set(NAMES) - flags <= set(CHECKS)
    assert set(CHECKS) <= set(NAMES) | OTHERS


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(arguments)
@example({"train_freq": (2, "episode"), "gradient_steps": -1, "learning_starts": 0})
@example({"buffer_size": 1, "horizon": 7, "rollout_size": 1})
@example({"learning_rate": 1e9, "gamma": 1.0, "tau": 1})
@example({"learning_rate": print})
def test_accepted_or_refused(chosen: dict[str, Any]) -> None:
    try:
        model = AGPO(
            "MlpPolicy", gym.make("InvertedPendulum-v5"), **{**SMALL, "policy_kwargs": {"net_arch": [4]}, **deepcopy(chosen)}
        )
    except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
        event("refused")
        inner = [key for value in chosen.values() if isinstance(value, dict) for key in value]
        assert any(name in str(error) for name in [*chosen, *inner]), f"{chosen}: {error}"
        return
    event("accepted")
    model.learn(45)
    assert all(bool(th.isfinite(value).all()) for value in flat_state(model) if isinstance(value, th.Tensor))
