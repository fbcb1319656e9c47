"""What one update costs, beside the same update of SB3's SAC with the same layer sizes and batch size."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from torch.optim import Optimizer

from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.benchmark.speed_timing import Case, Clock, Effort, Medians, Sample, compare, torch_threads

#: transitions of each update, fresh or replayed
BATCH_SIZE = 256
#: SB3's default
NET_ARCH = [256, 256]


class Learners(NamedTuple):
    """Both algorithms, with full buffers."""

    ours: AGPO
    reference: SAC


@lru_cache(maxsize=1)  # the rows of a task share them
def make_learners(task: str) -> Learners:
    """
    Build both algorithms and let them collect.

    :param task: id of an environment
    :return: the algorithms; ours has windows and stored derivatives
    """
    common: dict[str, Any] = {"policy_kwargs": {"net_arch": NET_ARCH}, "batch_size": BATCH_SIZE, "learning_starts": 0}
    common |= {"buffer_size": BATCH_SIZE, "seed": 0, "device": "cpu"}
    ours = AGPO("MlpPolicy", task, rollout_size=BATCH_SIZE, critic_grad_coef=1.0, **common)
    reference = SAC("MlpPolicy", task, **common)
    for model in (ours, reference):
        collect(model, BATCH_SIZE)
    return Learners(ours, reference)


def collect(model: OffPolicyAlgorithm, n_steps: int) -> None:
    """
    Fill the buffers of a model without training it.

    :param model: a new model
    :param n_steps: environment steps
    """
    _, callback = model._setup_learn(n_steps)
    assert model.env is not None and model.replay_buffer is not None
    frequency = TrainFreq(n_steps, TrainFrequencyUnit.STEP)
    model.collect_rollouts(model.env, callback, frequency, model.replay_buffer)


class SACParts(NamedTuple):
    """Seconds of one call of SAC's ``train``."""

    critic: float  # sampling, critic loss and step, target networks
    policy: float  # the policy's actions, temperature, policy loss and step


class SACStopwatch:
    """
    Times the parts of SB3's own ``SAC.train``, at the optimisers' steps that separate them.

    :param model: SAC with a learned temperature and a full replay buffer; its sampling and its optimisers are watched
        until :meth:`close`
    :param clock: to look at
    """

    def __init__(self, model: SAC, clock: Clock) -> None:
        assert model.ent_coef_optimizer is not None and model.replay_buffer is not None
        self._model, self._clock = model, clock
        self._times: dict[str, float] = {}
        optimizers: dict[str, Optimizer] = {"temperature": model.ent_coef_optimizer}
        optimizers |= {"critic": model.critic.optimizer, "policy": model.actor.optimizer}
        self._hooks = [
            optimizer.register_step_post_hook(lambda *_, name=name: self._mark(name))  # type: ignore[misc]
            for name, optimizer in optimizers.items()
        ]
        self._sample = model.replay_buffer.sample
        model.replay_buffer.sample = self._watched_sample  # type: ignore[method-assign]

    def _mark(self, name: str) -> None:
        self._times[name] = self._clock()

    def _watched_sample(self, *args: Any, **kwargs: Any) -> Any:
        self._mark("start")
        result = self._sample(*args, **kwargs)
        self._mark("sampling")
        return result

    def train(self) -> SACParts:
        """
        Make one update of everything.

        :return: seconds of its parts
        """
        self._model.train(1, BATCH_SIZE)
        self._mark("end")
        at = self._times
        critic = at["sampling"] - at["start"] + at["critic"] - at["temperature"] + at["end"] - at["policy"]
        return SACParts(critic, at["temperature"] - at["sampling"] + at["policy"] - at["critic"])

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._model.replay_buffer.sample = self._sample  # type: ignore[union-attr, method-assign]


def measure_critic(case: Case, effort: Effort) -> Medians:
    """
    A critic update without gradient matching, target networks included.

    :param case: task and threads
    :param effort: how long
    :return: milliseconds per update
    """
    return _measure(case, effort, lambda model: _update_critic(model, 0.0), "critic")


def measure_matching(case: Case, effort: Effort) -> Medians:
    """
    A critic update with gradient matching, target networks included.

    :param case: task and threads
    :param effort: how long
    :return: milliseconds per update
    """
    return _measure(case, effort, lambda model: _update_critic(model, 1.0), "critic")


def measure_policy(case: Case, effort: Effort) -> Medians:
    """
    A policy and temperature update on replayed states; ours draws a batch of its own for it.

    :param case: task and threads
    :param effort: how long
    :return: milliseconds per update
    """
    return _measure(case, effort, lambda model: model._update_policy_from_replay(BATCH_SIZE), "policy")


def measure_windows(case: Case, effort: Effort) -> Medians:
    """
    A policy and temperature update on fresh windows, beside SAC's on as many replayed states.

    :param case: task and threads
    :param effort: how long
    :return: milliseconds per update
    """
    return _measure(case, effort, lambda model: model._update_policy_from_windows(model.rollout_buffer.windows()), "policy")


def measure_products(case: Case, effort: Effort) -> Medians:
    """
    The matrix products of a critic update and nothing else, by the routine that PyTorch takes by default.

    :param case: task and threads
    :param effort: how long
    :return: milliseconds per update
    """
    pairs = factors(make_learners(case.task).ours)

    def multiply(_: AGPO) -> None:
        for left, right in pairs:
            th.matmul(left, right)

    return _measure(case, effort, multiply, "critic")


def factors(model: AGPO) -> list[tuple[th.Tensor, th.Tensor]]:
    """
    Matrices that are multiplied in a critic update.

    :param model: for the sizes of its networks
    :return: pairs of factors; those of several critics are multiplied in a batch
    """
    assert model.action_space.shape is not None and model.observation_space.shape is not None
    n_observations, n_actions = model.observation_space.shape[0], model.action_space.shape[0]
    n_critics = model.critic.n_critics
    actor = pairwise([n_observations, *NET_ARCH, 2 * n_actions])
    pairs = [(th.ones(BATCH_SIZE, width_in), th.ones(width_in, width_out)) for width_in, width_out in actor]
    for depth, (width_in, width_out) in enumerate(pairwise([n_observations + n_actions, *NET_ARCH, 1])):
        inputs, outputs = (th.ones(n_critics, BATCH_SIZE, width) for width in (width_in, width_out))
        weights = th.ones(n_critics, width_in, width_out)
        pairs += [(inputs, weights)] * 2  # target critics and critics
        pairs.append((inputs.mT, outputs))  # gradient of the weights
        if depth > 0:
            pairs.append((outputs, weights.mT))  # gradient of the inputs
    return pairs


def _update_critic(model: AGPO, matching: float) -> None:
    model.critic_grad_coef = matching
    for batch in model._sample_for_critic(1, BATCH_SIZE):
        model._update_critic(batch)
    model._update_target()


def _measure(case: Case, effort: Effort, update: Callable[[AGPO], object], part: str) -> Medians:
    """An update of ours beside a part of SAC's."""
    ours, reference = make_learners(case.task)
    clock = effort.clock(case.threads)
    ours.policy.set_training_mode(True)
    stopwatch = SACStopwatch(reference, clock)
    with torch_threads(case.threads):
        medians = compare(_updating(ours, update, clock), lambda: getattr(stopwatch.train(), part), effort)
    stopwatch.close()
    return Medians(*(1e3 * seconds for seconds in medians))


def _updating(model: AGPO, update: Callable[[AGPO], object], clock: Clock) -> Sample:
    """Seconds of an update; what it tells is thrown away, as there is no log."""

    def sample() -> float:
        start = clock()
        update(model)
        seconds = clock() - start
        model._statistics.clear()
        return seconds

    return sample
