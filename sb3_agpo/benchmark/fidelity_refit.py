"""Critics trained further on a saved replay buffer while the policy stays as it is, with and without gradient matching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
from tqdm import tqdm

from sb3_agpo.agpo.adaptive_gradient import temporal_difference_loss, temporal_difference_unit
from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.agpo.updates import critic_batches, gradient_matching_loss, temporal_difference_errors
from sb3_agpo.benchmark.fidelity_model import SavedModel, load_model


def load_with_buffer(path: Path, buffer: Path, env: gym.Env[Any, Any], matching: float) -> AGPO:
    """
    Load a model and its replay buffer. Both files are pickles: load only files that you trust.

    :param path: the model
    :param buffer: file that its ``save_replay_buffer`` wrote
    :param env: its task
    :param matching: weight of gradient matching that is wanted
    :return: the model
    :raises ValueError: if it is not AGPO's, or if there is no such buffer, or none with what is wanted
    """
    model = load_model(path, env)
    if not isinstance(model, AGPO):
        raise ValueError(f"--refit: {path} is a model of SAC; give one of AGPO")
    if not buffer.is_file():
        raise ValueError(f"--replay-buffer: there is no file {buffer}; give one that `AGPO.save_replay_buffer` wrote")
    try:
        model.load_replay_buffer(buffer)
    # Whatever a file that is no buffer makes of the unpickling
    except Exception as error:
        message = f"--replay-buffer: {buffer} is not a replay buffer ({error}); give one that `save_replay_buffer` wrote"
        raise ValueError(message) from error
    assert model.replay_buffer is not None
    if model.replay_buffer.size() == 0:
        raise ValueError(f"--replay-buffer: {buffer} is empty; give one that was saved after learning")
    if matching > 0.0 and model.derivative_buffer.size == 0:
        raise ValueError(
            f"--matching: {buffer} holds no derivatives; give 0, or the buffer of a model trained with `critic_grad_coef` > 0"
        )
    return model


def refit(model: AGPO, file: str, n_updates: int, matching: float) -> SavedModel:
    """
    Train the critics of a model with its own settings, but for the weight of gradient matching.

    :param model: model with its replay buffer, whose critics are changed
    :param file: name of its file
    :param n_updates: critic updates
    :param matching: weight of gradient matching; 0 for none
    :return: the model with the new critics
    """
    assert model.replay_buffer is not None
    ent_coef = SavedModel.of(model, file).ent_coef
    model.critic.requires_grad_(True)
    for _ in tqdm(range(n_updates), desc=f"refit, matching {matching:g}", unit="update", leave=False):
        data = model._sample_transitions(model.batch_size)
        (transitions,) = critic_batches(model.policy, data, model.gamma, ent_coef, model.batch_size)
        errors = temporal_difference_errors(model.policy, transitions)
        loss = temporal_difference_loss(errors)
        if matching > 0.0:
            batch = model.derivative_buffer.sample(model.critic_grad_batch_size)
            matching_loss = gradient_matching_loss(model.policy, batch, model.gamma, ent_coef)
            loss = loss + matching * temporal_difference_unit(errors) * matching_loss
        model.critic.optimizer.zero_grad()
        loss.backward()
        model.critic.optimizer.step()
        model.critic.update_statistics()
        model._update_target()
    return SavedModel.of(model, file)
