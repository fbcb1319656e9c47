"""Everything that is found out about an environment, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from sb3_agpo.dynamics.interface import Array
from sb3_agpo.dynamics.mujoco import FiniteDifferences
from sb3_agpo.dynamics.recorder import ProviderReport
from sb3_agpo.gradients.environment import Policy, default_of
from sb3_agpo.gradients.experiments import Cost, RewardPart, measure_cost, measure_predictions, reward_parts
from sb3_agpo.gradients.measures import Prediction, Roughness, growth, norms, roughness
from sb3_agpo.gradients.names import action_names, state_names
from sb3_agpo.gradients.recording import Recording, record

#: lengths of windows over which the growth of small changes is shown
GROWTH_HORIZONS = (1, 2, 4, 8, 16)
#: another difference step is suggested only if it explains that much more
WORTH_CHANGING = 0.02
#: shares of the changes that derivatives explain, above which they are called good or of some use
GOOD, SOME_USE = 0.7, 0.3
#: share of the changes, by size, whose direction must be right; else large ones are missed at a few moments
SEES_THE_LARGE = 0.7
UNSEEN = "At some moments, though, they miss the largest changes, such as falling: only the critic knows of those."


class Sizes(NamedTuple):
    """How much to measure."""

    steps: int = 250  # to play and differentiate
    moments: int = 40  # at which other actions are tried
    actions: int = 16  # to try at each
    noise: float = 0.1  # standard deviation of these actions, in units of the action in [-1, 1]


class Inspection(NamedTuple):
    """What was found out."""

    recording: Recording
    policy: str
    horizon: int
    noise: float
    states: list[str]  # names of the state's coordinates
    actions: list[str]  # names of the action's entries
    norm_A: Array  # (T,)
    norm_B: Array  # (T,)
    roughness: Roughness
    growth: dict[int, float]  # length of a window -> largest growth of a small change within it, median
    predictions: list[Prediction]  # for each of the difference options
    best: int  # index of the difference options to be suggested
    reward: list[RewardPart]
    cost: Cost

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Whether the derivatives of a step, as AGPO would make them, are usable, shape ``(T,)``."""
        return self.recording.jacobians[self.recording.base].valid

    @property
    def contacts_changed(self) -> NDArray[np.bool_]:
        """Whether other bodies touched in a step than in the one before, shape ``(T,)``; not in the first of an episode."""
        recording = self.recording
        return np.array(
            [
                step > 0 and not recording.ends[step - 1] and contacts != recording.contacts[step - 1]
                for step, contacts in enumerate(recording.contacts)
            ]
        )

    @property
    def coordinates(self) -> list[str]:
        """Names of all coordinates that are moved, of state and action."""
        return [*self.states, *self.actions]


def suggested(predictions: list[Prediction], base: int) -> int:
    """
    Choose the difference step whose derivatives predict best.

    :param predictions: with each of the difference options
    :param base: index of those that are used unless others are better
    :return: index of the choice
    """
    explained = np.nan_to_num([each.explained for each in predictions], nan=-np.inf)
    best = int(np.argmax(explained))
    return best if explained[best] > explained[base] + WORTH_CHANGING else base


def verdict(found: Inspection) -> str:
    """
    Say in a sentence or two whether AGPO can be expected to gain from the simulator here.

    :param found: what was found out
    :return: text
    """
    best = found.predictions[found.best]
    share = found.usable.mean()
    if share < 1.0 - default_of("max_invalid_fraction"):
        return (
            f"The derivatives of only {share:.0%} of the steps are usable, so that AGPO would stop with an error. Something "
            "that a step depends on may not be part of the simulator's state (a counter, a filter, random numbers), or "
            'the difference steps do not suit. AGPO learns here without derivatives: gradient_mode="q".'
        )
    if best.n_moments == 0:
        return (
            f"No recorded moment was followed by {found.horizon} steps of its episode with usable derivatives, so that "
            "nothing could be compared. Play more steps, look at a shorter horizon, or let a trained model act, whose "
            "episodes last longer."
        )
    if best.n_windows == 0:
        return (
            f"Other actions change no reward within {found.horizon} steps, so there is nothing that a derivative could say: "
            "expect no gain over an algorithm without derivatives, such as SAC. A shaping term in the reward would help."
        )
    share = f"explain {max(best.explained, 0.0):.0%} of what other actions change in the next {found.horizon} rewards"
    if best.explained >= GOOD:
        unseen = "" if best.direction >= SEES_THE_LARGE else f" {UNSEEN}"
        return f"The simulator's derivatives {share}: they are good here, and AGPO can use them.{unseen}"
    if best.explained >= SOME_USE:
        return f"The simulator's derivatives {share}: AGPO's gate will have to choose between them and the critic."
    return (
        f"The simulator's derivatives {share}: the task is rough, or its reward jumps. AGPO will learn from its critic for "
        "the most part; expect little gain over an algorithm without derivatives, such as SAC."
    )


def notes_on_steps(found: Inspection) -> list[str]:
    """
    Mark difference steps.

    :param found: what was found out
    :return: for each of them: which is in use, which is best; nothing where derivatives are exact
    """
    if found.recording.report.kind == "exact":
        return ["" for _ in found.predictions]
    marks = (("in use", found.recording.base), ("best", found.best))
    return [", ".join(note for note, marked in marks if marked == i) for i in range(len(found.predictions))]


def steps_as_code(differences: FiniteDifferences) -> str:
    """
    Write difference options such that they can be copied.

    :param differences: options
    :return: the call that makes them, without those that have their default value
    """
    changed = [f for f in fields(differences) if getattr(differences, f.name) != f.default]
    return f"FiniteDifferences({', '.join(f'{f.name}={getattr(differences, f.name)!r}' for f in changed)})"


def inspect_environment(
    env: gym.Env[Any, Any],
    policy: Policy,
    sizes: Sizes,
    seed: int = 0,
    progress: Callable[[str, int, int], object] = lambda *_: None,
) -> Inspection | ProviderReport:
    """
    Find everything out.

    :param env: environment as the agent sees it
    :param policy: who acts
    :param sizes: how much to measure
    :param seed: of everything random
    :param progress: called with what is done, how much more of it is done now, and how much there is
    :return: what was found out; the report alone where there are no derivatives
    """
    n_moments = min(sizes.moments, sizes.steps)
    recording = record(
        env,
        policy.act,
        policy.differences,
        n_steps=sizes.steps,
        n_moments=n_moments,
        seed=seed,
        progress=lambda done: progress("playing and differentiating", done, sizes.steps),
    )
    if isinstance(recording, ProviderReport):
        return recording
    predictions = measure_predictions(
        recording,
        horizon=policy.horizon,
        noise=sizes.noise,
        n_actions=sizes.actions,
        seed=seed,
        progress=lambda done: progress("trying other actions", done, n_moments),
    )
    reward = reward_parts(recording, lambda done: progress("taking the reward apart", done, n_moments))
    jacobians = recording.jacobians[recording.base]
    return Inspection(
        recording=recording,
        policy=policy.description,
        horizon=policy.horizon,
        noise=sizes.noise,
        states=state_names(env, jacobians.A.shape[1]),
        actions=action_names(env),
        norm_A=norms(jacobians.A),
        norm_B=norms(jacobians.B),
        roughness=roughness(jacobians, recording.neighbour),
        growth={horizon: growth(jacobians, recording.ends, horizon) for horizon in GROWTH_HORIZONS},
        predictions=predictions,
        best=suggested(predictions, recording.base),
        reward=reward,
        cost=measure_cost(recording),
    )
