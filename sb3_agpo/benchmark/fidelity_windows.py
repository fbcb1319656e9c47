"""The estimates of dJ/da that the fidelity benchmark compares, each made by AGPO's own code on windows from given states."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from numpy.typing import NDArray

from sb3_agpo.agpo.adaptive_gradient import GateFunction
from sb3_agpo.agpo.gates import ConstantGate, DisagreementGate, InverseVarianceGate, MagnitudeGate, VarianceSwitch
from sb3_agpo.agpo.rollout_buffer import DifferentiableRolloutBuffer, RolloutWindows, Transition
from sb3_agpo.agpo.updates import window_update
from sb3_agpo.benchmark.fidelity_model import SavedModel
from sb3_agpo.benchmark.fidelity_rollouts import BatchSimulator, Progress, VisitedStates
from sb3_agpo.dynamics.mujoco import FiniteDifferences
from sb3_agpo.dynamics.recorder import StepRecords, TransitionRecorder, install_recorder

Array = NDArray[np.float64]

CRITIC, ANALYTIC = "critic", "analytic"
CORRECTED = "corrected"  # the critic's with what the model learned that it lacks, as in replayed policy updates
GATES: dict[str, GateFunction] = {
    "magnitude": MagnitudeGate(),
    "disagreement": DisagreementGate(),
    "variance": VarianceSwitch(),
    "inverse": InverseVarianceGate(),
}
#: difference step that stands for the defaults of :class:`~sb3_agpo.dynamics.mujoco.FiniteDifferences`
DEFAULT_STEP = "default"


class Estimator(NamedTuple):
    """A way to estimate dJ/da."""

    method: str  # CRITIC, CORRECTED, ANALYTIC or a key of GATES
    horizon: int = 0  # steps of the window; 0 for the critic, corrected or not, which needs none
    difference_step: str = ""  # of the finite differences, see `differences_of`; empty where there is no window

    @property
    def gate(self) -> GateFunction:
        """Weight of the analytic gradient."""
        if self.method in GATES:
            return GATES[self.method]
        return ConstantGate(1.0 if self.method == ANALYTIC else 0.0)


@dataclass
class Estimates:
    """What an estimator said, window by window."""

    gradients: list[Array] = field(default_factory=list)  # (S, nu) each
    weights: list[float] = field(default_factory=list)  # mean of the gate at the first step
    valid: list[float] = field(default_factory=list)  # share of the windows' steps whose derivatives are trusted
    simulator_calls: int = 0
    seconds: float = 0.0


class DifferentiatedWindows(NamedTuple):
    """One window from each state, and what it took."""

    windows: RolloutWindows
    seconds: float
    calls_per_step: int  # simulated environment steps for one step of a window, differences included


def differences_of(step: str, threads: int) -> FiniteDifferences:
    """
    Options of the finite differences.

    :param step: ``default``, or a number: one step for positions, velocities, activations and actions alike
    :param threads: threads to step with
    :return: the options
    :raises ValueError: if it is neither, or no size that makes sense
    """
    if step == DEFAULT_STEP:
        return FiniteDifferences(threads=threads)
    try:
        size = float(step)
    except ValueError:
        raise ValueError(f"--difference-steps: '{step}' is no number; give '{DEFAULT_STEP}' or a step such as 0.03") from None
    try:
        return FiniteDifferences(size, size, size, size, threads=threads)
    except ValueError as error:
        raise ValueError(f"--difference-steps: '{step}' is of no use: {error}") from error


def make_recorder(env_id: str, step: str, threads: int) -> TransitionRecorder:
    """
    What differentiates steps in AGPO, with a step size of its own.

    :param env_id: Gymnasium's name of the task
    :param step: see :func:`differences_of`
    :param threads: threads to step with
    :return: the recorder of a new environment
    """
    recorder = install_recorder(gym.make(env_id), differences_of(step, threads)).get_wrapper_attr("agpo_recorder")
    assert isinstance(recorder, TransitionRecorder)
    return recorder


def play_windows(
    simulator: BatchSimulator, model: SavedModel, visited: VisitedStates, horizon: int, random: np.random.Generator
) -> tuple[list[Transition], list[StepRecords]]:
    """
    Play one window from each state; the first action is the given one. Where an episode ends, it starts again from the same
    state, as an auto-reset would start it elsewhere.

    :param simulator: steps the task
    :param model: the policy
    :param visited: the states
    :param horizon: steps of a window
    :param random: for the policy's noise after the first step
    :return: the steps as AGPO's buffer takes them, and as its derivatives are made from
    """
    transitions, records = [], []
    states, observations, noise, actions = visited
    for _ in range(horizon):
        env_actions = model.unscale(actions)
        next_states, outcome = simulator.step(states, env_actions)
        next_observations = outcome.obs.astype(np.float32)
        over = outcome.terminated | ~np.isfinite(next_states).all(axis=1) | ~np.isfinite(outcome.obs).all(axis=1)
        transitions.append(
            Transition(observations, next_observations, actions, noise, outcome.reward.astype(np.float32), over, over)
        )
        records.append(StepRecords(states, env_actions, outcome.reward, outcome.obs))
        states = np.where(over[:, None], visited.states, next_states)
        observations = np.where(over[:, None], visited.observations, next_observations)
        noise = random.standard_normal(actions.shape, dtype=np.float32)
        actions, _ = model.act(observations, noise)
    return transitions, records


def differentiate(
    recorder: TransitionRecorder, transitions: Sequence[Transition], records: Sequence[StepRecords]
) -> DifferentiatedWindows:
    """
    Differentiate windows and put them into the form of AGPO's policy update.

    :param recorder: differentiates
    :param transitions: the steps of the windows
    :param records: the same steps for the recorder
    :return: the windows
    """
    start = time.perf_counter()
    horizon, n_states = len(records), len(records[0].rewards)
    buffer = DifferentiableRolloutBuffer(horizon * n_states, horizon, n_states)
    for transition, record in zip(transitions, records, strict=True):
        buffer.add(transition)
        derivatives = recorder.differentiate_records(record)
        # As AGPO has it: the critic alone knows what an end of the episode means
        buffer.add_derivatives(derivatives._replace(valid=derivatives.valid & ~buffer.pending_terminated()))
    rows = recorder.provider_report.rows_per_transition
    return DifferentiatedWindows(buffer.windows(), time.perf_counter() - start, n_states * (1 + rows))


def estimate_all(
    simulator: BatchSimulator,
    models: Mapping[str, SavedModel],
    visited: VisitedStates,
    estimators: Sequence[Estimator],
    recorders: Mapping[str, TransitionRecorder],
    n_windows: int,
    seed: int,
    progress: Progress = lambda _: None,
) -> dict[tuple[str, Estimator], Estimates]:
    """
    Make all estimates: one per state and window, from the same windows for all of them.

    :param simulator: steps the task
    :param models: name -> critics to compare; all with the same policy
    :param visited: the states
    :param estimators: what to compare
    :param recorders: difference step -> what differentiates with it
    :param n_windows: windows from each state, which differ in the policy's noise after the first action
    :param seed: of all random numbers
    :param progress: is told how many environment steps are done
    :return: (name of the critics, estimator) -> estimates
    """
    found: dict[tuple[str, Estimator], Estimates] = defaultdict(Estimates)
    horizon = max(estimator.horizon for estimator in estimators)
    model = next(iter(models.values()))
    for index in range(n_windows):
        random = np.random.default_rng([seed, 2, index])
        end_seed = int(random.integers(2**31))
        steps = play_windows(simulator, model, visited, max(1, horizon), random)
        for difference_step, recorder in recorders.items():
            made = differentiate(recorder, *steps)
            for estimator in _with_step(estimators, difference_step, index, next(iter(recorders))):
                for name, critics in models.items():
                    th.manual_seed(end_seed)  # for the actions at the window's end, the same for all estimators
                    _estimate(found[name, estimator], critics, estimator, made)
            progress(made.calls_per_step * len(made.windows.actions))
    return dict(found)


def _with_step(estimators: Sequence[Estimator], step: str, index: int, first: str) -> Iterator[Estimator]:
    """Those that use a difference step; those without window, which use none and never vary, with the first window alone."""
    for estimator in estimators:
        if estimator.difference_step == step or (estimator.horizon == 0 and index == 0 and step == first):
            yield estimator


def _estimate(into: Estimates, model: SavedModel, estimator: Estimator, made: DifferentiatedWindows) -> None:
    """Make one estimate at the windows' first steps, and add it to the others."""
    start = time.perf_counter()
    horizon = max(1, estimator.horizon)
    windows = RolloutWindows(*(values[:horizon] for values in made.windows))
    update = window_update(model.policy, windows, estimator.gate, model.gamma, model.ent_coef)
    gradient = update.gradient.g_a[0]
    if estimator.method == CORRECTED:
        assert model.correction is not None
        gradient = gradient + model.correction(windows.observations[0], windows.actions[0])
    into.seconds += time.perf_counter() - start
    into.gradients.append(gradient.double().numpy())
    into.weights.append(update.gradient.weight[0].mean().item())
    into.valid.append(windows.valid.double().mean().item())
    if estimator.horizon > 0:
        into.seconds += made.seconds * horizon / len(made.windows.actions)
        into.simulator_calls += made.calls_per_step * horizon
