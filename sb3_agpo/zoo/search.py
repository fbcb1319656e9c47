"""Search space of AGPO's hyperparameters for the zoo's ``optimize``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rl_zoo3.hyperparams_opt import convert_offpolicy_params, sample_her_params

from sb3_agpo.agpo.arguments import GRADIENT_MODES
from sb3_agpo.agpo.gates import DisagreementGate, Gate, InverseVarianceGate, MagnitudeGate, VarianceSwitch
from sb3_agpo.agpo.policies import NORMALIZATIONS

if TYPE_CHECKING:
    import optuna

GATES = ("magnitude", "disagreement", "variance_switch", "inverse_variance")
HINDSIGHT = ("n_sampled_goal", "goal_selection_strategy")


def sample_agpo_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Draw hyperparameters of AGPO.

    Every one is drawn in every trial, also where others make it idle: the zoo's sampler models them jointly, which it can
    do only for those that all trials have.

    :param trial: where to draw from
    :param n_actions: number of action dimensions
    :param n_envs: number of training environments
    :param additional_args: whether hindsight experience replay is used, and its arguments
    :return: arguments of AGPO
    """
    sampled: dict[str, Any] = {
        # As the zoo draws them for SAC
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.0001, 0.03, log=True),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 6, 10),
        "train_freq": trial.suggest_int("train_freq", 1, 8),
        "tau": trial.suggest_float("tau", 0.001, 0.08, log=True),
        "net_arch": trial.suggest_categorical("net_arch", ["small", "medium", "big"]),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True),
        # AGPO's own
        "updates_per_step": trial.suggest_categorical("updates_per_step", [0.25, 0.5, 1.0, 2.0, 4.0]),
        "critic_learning_rate": trial.suggest_float("critic_learning_rate", 1e-4, 3e-3, log=True),
        "normalization": trial.suggest_categorical("normalization", NORMALIZATIONS),
        "policy_delay": trial.suggest_categorical("policy_delay", [0, 1, 2, 4, 8, 16, 64]),
        "gradient_mode": trial.suggest_categorical("gradient_mode", GRADIENT_MODES),
        "gate": trial.suggest_categorical("gate", GATES),
        "gate_tolerance": trial.suggest_float("gate_tolerance", 1.0, 100.0, log=True),
        "horizon": trial.suggest_int("horizon", 1, 16, log=True),
        "rollout_size_pow": trial.suggest_int("rollout_size_pow", 5, 9),
        "rollout_epochs": trial.suggest_int("rollout_epochs", 1, 8),
        "critic_grad_coef": trial.suggest_categorical("critic_grad_coef", [0.0, 0.1, 0.3, 1.0, 3.0, 10.0]),
    }
    trial.set_user_attr("gamma", 1 - sampled["one_minus_gamma"])
    trial.set_user_attr("batch_size", 2 ** sampled["batch_size_pow"])
    trial.set_user_attr("rollout_size", 2 ** sampled["rollout_size_pow"])
    if additional_args.get("using_her_replay_buffer"):
        sampled = sample_her_params(trial, sampled, additional_args["her_kwargs"])
    return convert_agpo_params(sampled)


def convert_agpo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Turn what a trial drew into arguments of AGPO; the zoo's ``--trial-id`` does so with a trial from storage.

    :param sampled_params: names and values as drawn
    :return: arguments of AGPO
    """
    hyperparams: dict[str, Any] = convert_offpolicy_params(sampled_params)  # the zoo's part: gamma, batch_size, net_arch
    hyperparams["gradient_steps"] = max(1, round(hyperparams["train_freq"] * hyperparams.pop("updates_per_step")))
    hyperparams["policy_kwargs"]["normalization"] = hyperparams.pop("normalization")
    hyperparams["rollout_size"] = 2 ** hyperparams.pop("rollout_size_pow")
    hyperparams["gate"] = _gate(hyperparams.pop("gate"), hyperparams.pop("gate_tolerance"))
    hindsight = {name: hyperparams.pop(name) for name in HINDSIGHT if name in hyperparams}
    if hindsight:
        hyperparams["replay_buffer_kwargs"] = {**hyperparams.get("replay_buffer_kwargs", {}), **hindsight}
    return hyperparams


def _gate(name: str, tolerance: float) -> Gate:
    """
    Build a gate.

    :param name: one of :data:`GATES`
    :param tolerance: its parameter, if it has one
    :return: the gate
    """
    if name == "magnitude":
        return MagnitudeGate(tolerance)
    if name == "disagreement":
        return DisagreementGate(tolerance)
    return VarianceSwitch(tolerance) if name == "variance_switch" else InverseVarianceGate()
