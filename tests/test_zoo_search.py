"""RL Baselines3 Zoo: the search for AGPO's hyperparameters."""

import inspect
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from zoo_runs import ENVIRONMENT, QUICK, SMALL, zoo

from sb3_agpo import AGPO
from sb3_agpo.agpo.agpo import POLICY_DELAY_BESIDE_WINDOWS
from sb3_agpo.agpo.gates import DisagreementGate, InverseVarianceGate, MagnitudeGate, VarianceSwitch
from sb3_agpo.zoo.manager import AGPOExperimentManager
from sb3_agpo.zoo.registration import register
from sb3_agpo.zoo.search import convert_agpo_params, sample_agpo_params


@pytest.fixture
def quiet_optuna() -> Iterator[None]:
    """No line per trial on standard error."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(verbosity)


def test_a_search_resumes_and_its_best_trial_trains(tmp_path: Path, quiet_optuna: None) -> None:
    """A study in a journal file takes further trials, and any of them trains, the first one included."""
    journal = tmp_path / "study.log"
    study = [*QUICK, "-f", str(tmp_path), "--storage", str(journal), "--study-name", "agpo", "-n", "100"]
    search = [*study, "--no-optim-plots", "--n-evaluations", "1", "--eval-episodes", "1", "--pruner", "none"]
    zoo("optimize", *search, "--n-trials", "2", "--sampler", "random", "-params", *SMALL)
    zoo("optimize", *search, "--max-total-trials", "3", "--sampler", "random", "--seed", "2", "-params", *SMALL)
    backend = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    trials = optuna.load_study(study_name="agpo", storage=backend).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    best = max(trials, key=lambda trial: trial.value or 0.0)
    for run, trial in enumerate((trials[0], best), start=3):
        zoo("train", *study, "--trial-id", str(trial.number), "-params", "buffer_size:1000", "learning_starts:50")
        model = AGPO.load(tmp_path / "agpo" / f"{ENVIRONMENT}_{run}" / f"{ENVIRONMENT}.zip")
        assert model.tau == trial.params["tau"] and model.policy.normalization == trial.params["normalization"]
        assert model.gradient_mode == trial.params["gradient_mode"]


ADDITIONAL = {"using_her_replay_buffer": False, "her_kwargs": {}}


def test_sampled_hyperparameters_are_agpos_and_survive_storage() -> None:
    """AGPO takes whatever is drawn, and the converter restores it from what a study keeps."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    known = set(inspect.signature(AGPO).parameters)
    gates = set()
    for _ in range(50):
        trial = study.ask()
        sampled = sample_agpo_params(trial, 1, 1, ADDITIONAL)
        assert set(sampled) <= known
        assert set(sampled) >= {"gradient_mode", "horizon", "rollout_size", "gate", "critic_grad_coef", "policy_delay"}
        restored = convert_agpo_params(trial.params)
        gate, restored_gate = sampled.pop("gate"), restored.pop("gate")
        assert (type(restored_gate), vars(restored_gate)) == (type(gate), vars(gate))
        assert restored == sampled
        assert trial.user_attrs["rollout_size"] == sampled["rollout_size"] and sampled["gradient_steps"] >= 1
        gates.add(type(gate))
    assert gates == {MagnitudeGate, DisagreementGate, VarianceSwitch, InverseVarianceGate}


def test_the_pace_of_the_defaults_can_be_drawn() -> None:
    space = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    sample_agpo_params(space, 1, 1, ADDITIONAL)
    defaults = {name: parameter.default for name, parameter in inspect.signature(AGPO).parameters.items()}
    chosen = {**space.params, "train_freq": defaults["train_freq"], "updates_per_step": 2.0}
    chosen["policy_delay"] = POLICY_DELAY_BESIDE_WINDOWS
    assert POLICY_DELAY_BESIDE_WINDOWS in space.distributions["policy_delay"].choices  # type: ignore[attr-defined]
    sampled = sample_agpo_params(optuna.trial.FixedTrial(chosen), 1, 1, ADDITIONAL)
    assert sampled["gradient_steps"] == defaults["gradient_steps"]


def test_sampled_extremes_train() -> None:
    """The corners of the search space are valid arguments."""
    space = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    sample_agpo_params(space, 1, 1, ADDITIONAL)
    for corner in ("low", "high"):
        chosen = {
            name: getattr(distribution, corner, None) if hasattr(distribution, corner) else distribution.choices[0]
            for name, distribution in space.distributions.items()
        }
        sampled = sample_agpo_params(optuna.trial.FixedTrial({**chosen, "net_arch": "small"}), 1, 1, ADDITIONAL)
        AGPO("MlpPolicy", ENVIRONMENT, **sampled, buffer_size=1000, learning_starts=10).learn(40)


def test_search_with_hindsight() -> None:
    """The zoo's search space of hindsight replay comes on top, and is found again in storage."""
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    arguments = {"using_her_replay_buffer": True, "her_kwargs": {"copy_info_dict": True}}
    sampled = sample_agpo_params(trial, 1, 1, arguments)["replay_buffer_kwargs"]
    assert set(sampled) == {"copy_info_dict", "n_sampled_goal", "goal_selection_strategy"}
    restored = convert_agpo_params(trial.params)["replay_buffer_kwargs"]
    assert restored == {name: sampled[name] for name in ("n_sampled_goal", "goal_selection_strategy")}


@pytest.mark.parametrize("own", [{"copy_info_dict": True}, "dict(copy_info_dict=True)"])
def test_a_trial_with_hindsight_keeps_the_files_arguments(own: Any, tmp_path: Path, quiet_optuna: None) -> None:
    """The search drew two of the replay buffer's arguments, and left the others as they were."""
    register()
    journal = str(tmp_path / "study.log")
    backend = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(journal))
    trial = optuna.create_study(storage=backend, study_name="agpo").ask()
    sampled = sample_agpo_params(trial, 1, 1, {"using_her_replay_buffer": True, "her_kwargs": {"copy_info_dict": True}})
    (tmp_path / "own.yml").write_text(yaml.dump({"Pendulum-v1": {"n_timesteps": 100, "replay_buffer_kwargs": own}}))
    named = {"config": str(tmp_path / "own.yml"), "storage": journal, "study_name": "agpo", "trial_id": 0}
    manager = AGPOExperimentManager(Namespace(), "agpo", "Pendulum-v1", str(tmp_path), **named)  # type: ignore[arg-type]
    hyperparams, _ = manager.read_hyperparameters()
    assert hyperparams["replay_buffer_kwargs"] == sampled["replay_buffer_kwargs"]
    assert hyperparams["tau"] == sampled["tau"] and hyperparams["n_timesteps"] == 100
