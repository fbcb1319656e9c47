"""
Checks of the arguments of :class:`~sb3_agpo.agpo.agpo.AGPO`, made before anything is built, seeded or written.

An argument of the wrong type is a ``TypeError``, one out of range a ``ValueError``. The message names the argument, its
value and what to pass instead.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import TrainFreq

from sb3_agpo.dynamics.mujoco import FiniteDifferences

Check = Callable[[str, Any], None]

GRADIENT_MODES = ("adaptive", "analytic", "q")
EXPLORATION_NOISES = ("pink", "white")
#: largest seed that NumPy takes
LARGEST_SEED = 2**32 - 1


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """
    Check constructor arguments.

    :param arguments: by name; those without a check are left alone
    :raises TypeError: for a value of the wrong type
    :raises ValueError: for a value out of range
    """
    for name, check in CHECKS.items():
        if name in arguments:
            check(name, arguments[name])


def check_learn_arguments(total_timesteps: Any, callback: Any, log_interval: Any) -> None:
    """
    Check the arguments of ``learn``.

    :param total_timesteps: environment steps; not necessarily an integer, as users write ``1e6``
    :param callback: callback, function, list of callbacks, or None
    :param log_interval: episodes between two lines of the log, or None
    :raises TypeError: for a value of the wrong type
    :raises ValueError: for a value out of range
    """
    check_number("total_timesteps", total_timesteps, 0.0, math.inf, "pass a number of environment steps")
    if log_interval is not None:
        check_integer("log_interval", log_interval, 1, "pass a number of episodes, or None for no log")
    if isinstance(callback, list):
        wrong = next((item for item in callback if not isinstance(item, BaseCallback)), None)
        if wrong is not None:
            raise TypeError(f"`callback` has an entry {wrong!r}; pass a list of `BaseCallback` objects")
    elif callback is not None and not isinstance(callback, BaseCallback) and not callable(callback):
        raise TypeError(f"`callback` must be a `BaseCallback`, a list of them, a function or None, got {callback!r}")


def check_names(given: Iterable[str], constructor: Callable[..., None]) -> None:
    """
    Refuse a misspelt argument of ``load``, which SB3 would make an attribute that nobody reads.

    :param given: names of the arguments
    :param constructor: the constructor whose arguments they may be
    :raises TypeError: for a name that looks like an argument of the constructor and is none
    """
    known = inspect.signature(constructor).parameters
    for name in given:
        if name not in known and (meant := difflib.get_close_matches(name, known, n=1, cutoff=0.8)):
            raise TypeError(f"`{name}` is no argument of the constructor; did you mean `{meant[0]}`?")


# ---------------------------------------------------------------------- kinds of values


def check_integer(name: str, value: Any, least: int, otherwise: str, most: float = math.inf) -> None:
    """
    Check an integer.

    :param name: of the argument
    :param value: its value
    :param least: smallest value allowed
    :param otherwise: what to pass instead
    :param most: largest value allowed
    :raises TypeError: if it is no integer
    :raises ValueError: if it is out of range
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an integer, got {value!r}; {otherwise}")
    if not least <= value <= most:
        allowed = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}; {otherwise}")


def check_number(
    name: str, value: Any, low: float, high: float, otherwise: str, open_low: bool = False, finite: bool = True
) -> None:
    """
    Check a number.

    :param name: of the argument
    :param value: its value
    :param low: smallest value allowed
    :param high: largest value allowed
    :param otherwise: what to pass instead
    :param open_low: whether ``low`` itself is not allowed
    :param finite: whether infinity is not allowed
    :raises TypeError: if it is no number
    :raises ValueError: if it is out of range or not a number
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"`{name}` must be a number, got {value!r}; {otherwise}")
    inside = low < value <= high if open_low else low <= value <= high  # False for NaN
    if not inside or (finite and not math.isfinite(value)):
        allowed = f"{'greater than' if open_low else 'at least'} {low:g}"
        if high < math.inf:
            allowed += f" and at most {high:g}"
        raise ValueError(f"`{name}` must be {'finite and ' if finite else ''}{allowed}, got {value!r}; {otherwise}")


def _integer(least: int, otherwise: str, most: float = math.inf) -> Check:
    return lambda name, value: check_integer(name, value, least, otherwise, most)


def _number(low: float, high: float, otherwise: str, open_low: bool = False, finite: bool = True) -> Check:
    return lambda name, value: check_number(name, value, low, high, otherwise, open_low, finite)


def _optional(check: Check) -> Check:
    def check_if_given(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return check_if_given


def _instance(kind: type | tuple[type, ...], otherwise: str) -> Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, kind):
            raise TypeError(f"`{name}` must be {otherwise}, got {value!r}")

    return check


# ---------------------------------------------------------------------- arguments with rules of their own


def _schedule(name: str, value: Any) -> None:
    advice = "pass a rate such as 1e-3, or a schedule of the remaining progress"
    if callable(value):
        try:
            rate = float(value(1.0))
        except Exception as error:  # it is the caller's, and may raise anything
            raise TypeError(f"`{name}` is {value!r}, which fails at the remaining progress 1.0: {error}; {advice}") from error
        check_number(f"{name}(1.0)", rate, 0.0, math.inf, advice)
    else:
        check_number(name, value, 0.0, math.inf, advice)


def _train_freq(name: str, value: Any) -> None:
    if isinstance(value, TrainFreq):
        value = (value.frequency, value.unit.value)
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f'`{name}` must be a number of steps or a pair such as (1, "episode"), got {value!r}')
        value, unit = value
        if unit not in ("step", "episode"):
            raise ValueError(f'the unit of `{name}` must be "step" or "episode", got {unit!r}')
    try:
        check_integer(name, value, 1, 'pass a number of steps, or a pair such as (1, "episode")')
    except TypeError as error:  # SB3's kind of error for this argument, of any type
        raise ValueError(str(error)) from None


def _ent_coef(name: str, value: Any) -> None:
    advice = 'pass "auto", a start such as "auto_0.1", or a fixed value of at least 0'
    value = _number_of_text(value)
    if not isinstance(value, str):
        check_number(name, value, 0.0, math.inf, advice)
        return
    kind, underscore, start = value.partition("_")
    try:
        fits = kind == "auto" and (not underscore or 0.0 < float(start) < math.inf)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f'`{name}` is {value!r}, which is neither a number nor "auto" with a positive start; {advice}')


def _number_of_text(value: Any) -> Any:
    """The number that a text says, as SAC takes it; anything else as it is."""
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def _target_entropy(name: str, value: Any) -> None:
    if value != "auto":
        check_number(name, _number_of_text(value), -math.inf, math.inf, 'pass "auto" or a number such as -3.0')


def _gradient_mode(name: str, value: Any) -> None:
    if value not in GRADIENT_MODES:
        raise ValueError(f"`{name}` must be one of {GRADIENT_MODES}, got {value!r}")


def _exploration_noise(name: str, value: Any) -> None:
    if value not in EXPLORATION_NOISES:
        raise ValueError(f"`{name}` must be one of {EXPLORATION_NOISES}, got {value!r}")


def _gate(name: str, value: Any) -> None:
    if isinstance(value, type):
        raise TypeError(f"`{name}` must be an instance, got the class {value.__name__}; pass `{value.__name__}()`")
    if not callable(value):
        raise TypeError(f"`{name}` must be a `Gate` or a callable (analytic, critic, step) -> weights, got {value!r}")


def _replay_buffer_class(name: str, value: Any) -> None:
    if not (isinstance(value, type) and issubclass(value, ReplayBuffer)):
        raise TypeError(f"`{name}` must be a subclass of `ReplayBuffer`, or None for the one that fits, got {value!r}")


def _policy_kwargs(name: str, value: Any) -> None:
    _instance(Mapping, "a dictionary of arguments of the policy, such as dict(net_arch=[64, 64])")(name, value)
    if "n_critics" in value:
        check_integer(f"{name}['n_critics']", value["n_critics"], 1, "SAC has 2")
    layers, advice = value.get("net_arch"), "pass the widths of the hidden layers, such as [64, 64]"
    for widths in layers.values() if isinstance(layers, Mapping) else [layers if layers is not None else []]:
        if not isinstance(widths, (list, tuple)):
            raise TypeError(f"`{name}['net_arch']` must be a list, or a dictionary of lists, got {layers!r}; {advice}")
        for width in widths:
            check_integer(f"{name}['net_arch']", width, 1, advice)


_OFF = "0 turns it off"
#: argument -> its check
CHECKS: dict[str, Check] = {
    "learning_rate": _schedule,
    "critic_learning_rate": _optional(_schedule),
    "ent_coef_learning_rate": _optional(_schedule),
    "buffer_size": _integer(1, "pass a number of transitions, such as 1_000_000"),
    "learning_starts": _integer(0, "pass a number of steps"),
    "batch_size": _integer(1, "pass a number of transitions, such as 256"),
    "tau": _number(0.0, 1.0, "usual values are 0.005 to 0.05"),
    "gamma": _number(0.0, 1.0, "usual values are 0.95 to 0.999"),
    "train_freq": _train_freq,
    "gradient_steps": _integer(-1, "pass a number of updates, or -1 for one per transition collected"),
    "action_noise": _optional(_instance(ActionNoise, "an `ActionNoise` such as `NormalActionNoise(...)`, or None")),
    "replay_buffer_class": _optional(_replay_buffer_class),
    "replay_buffer_kwargs": _optional(_instance(Mapping, "a dictionary of arguments of the replay buffer, or None")),
    "n_steps": _optional(_integer(1, "1 is the usual one-step return, None lets AGPO choose")),
    "trace_distance": _number(0.0, math.inf, "infinity never ends a return early", open_low=True, finite=False),
    "ent_coef": _ent_coef,
    "target_update_interval": _integer(1, "1 updates the targets after every update of the critics"),
    "target_entropy": _target_entropy,
    "gradient_mode": _gradient_mode,
    "horizon": _integer(1, "usual values are 1 to 16"),
    "rollout_size": _integer(1, "usual values are 32 to 512"),
    "rollout_epochs": _integer(0, _OFF),
    "correction_updates": _integer(0, _OFF),
    "gate": _optional(_gate),
    "exploration_noise": _exploration_noise,
    "critic_grad_coef": _number(0.0, math.inf, _OFF),
    "critic_grad_batch_size": _integer(1, "usual values are 16 to 256"),
    "policy_delay": _optional(_integer(0, _OFF)),
    "max_grad_norm": _number(0.0, math.inf, "infinity turns clipping off", open_low=True, finite=False),
    "policy_tau": _optional(_number(0.0, 1.0, "1 turns averaging off", open_low=True)),
    "derivative_memory": _number(1e-6, math.inf, "pass gigabytes, such as 0.5"),
    "finite_differences": _optional(_instance(FiniteDifferences, "a `FiniteDifferences(...)`, or None for its defaults")),
    "max_invalid_fraction": _number(0.0, 1.0, "1 never stops training"),
    "sde_sample_freq": _integer(-1, "pass a number of steps, or -1 for once per rollout"),
    "stats_window_size": _integer(1, "pass a number of episodes, such as 100"),
    "policy_kwargs": _optional(_policy_kwargs),
    "seed": _optional(_integer(0, "pass None for no seed", most=LARGEST_SEED)),
}
