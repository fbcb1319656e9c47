"""AGPO under SB3's own callbacks, and what callbacks can see."""

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from small_models import small_model
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_agpo import AGPO
from sb3_agpo.agpo import collection

TASKS = ("InvertedPendulum-v5", "Pendulum-v1")


class LocalsCallback(BaseCallback):
    """Reads what SB3's and RL Zoo's callbacks read, at every moment they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def _count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def _on_training_start(self) -> None:
        self._count("training_start")
        assert self.locals["total_timesteps"] > 0

    def _on_rollout_start(self) -> None:
        self._count("rollout_start")

    def _on_step(self) -> bool:
        self._count("step")
        n_envs = self.training_env.num_envs
        assert self.locals["new_obs"].shape == (n_envs, *self.model.observation_space.shape)  # type: ignore[misc]
        assert self.locals["rewards"].shape == self.locals["dones"].shape == (n_envs,)
        assert self.locals["actions"].shape == self.locals["buffer_actions"].shape == (n_envs, 1)
        assert len(self.locals["infos"]) == n_envs
        assert np.all(np.abs(self.locals["buffer_actions"]) <= 1.0)
        assert self.locals["replay_buffer"] is self.model.replay_buffer  # type: ignore[attr-defined]
        assert self.model.critic_target is self.model.policy.critic_target  # type: ignore[attr-defined]
        assert not self.model.policy.actor.training  # type: ignore[attr-defined]
        assert self.num_timesteps == self.model.num_timesteps
        return True

    def _on_rollout_end(self) -> None:
        self._count("rollout_end")

    def _on_training_end(self) -> None:
        self._count("training_end")


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("n_envs", [1, 2])
def test_locals(env_id: str, n_envs: int) -> None:
    callback = LocalsCallback()
    small_model(make_vec_env(env_id, n_envs), train_freq=3).learn(60, callback=callback)
    steps = 60 // n_envs
    rollouts = steps // 3
    assert callback.calls == {
        "training_start": 1,
        "rollout_start": rollouts,
        "step": steps,
        "rollout_end": rollouts,
        "training_end": 1,
    }


@pytest.mark.parametrize("env_id", TASKS)
def test_all_callbacks_together(env_id: str, tmp_path: Path) -> None:
    seen: list[int] = []
    evaluation = EvalCallback(
        make_vec_env(env_id, 1),
        callback_on_new_best=StopTrainingOnRewardThreshold(1e9),
        callback_after_eval=StopTrainingOnNoModelImprovement(10, min_evals=20),
        n_eval_episodes=1,
        eval_freq=40,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
        warn=False,
    )
    callbacks = CallbackList(
        [
            evaluation,
            EveryNTimesteps(30, CheckpointCallback(1, str(tmp_path / "every"))),
            CheckpointCallback(50, str(tmp_path / "checkpoints"), save_replay_buffer=True),
            LogEveryNTimesteps(40),
            ConvertCallback(lambda local, _: seen.append(local["self"].num_timesteps) or True),
        ]
    )
    model = small_model(env_id, seed=1).learn(100, callback=callbacks, progress_bar=False)
    assert seen == list(range(1, 101))
    assert evaluation.best_mean_reward > -np.inf
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "rl_model_50_steps.zip",
        "rl_model_100_steps.zip",
        "rl_model_replay_buffer_50_steps.pkl",
        "rl_model_replay_buffer_100_steps.pkl",
    }
    assert len(list((tmp_path / "every").iterdir())) == 3
    loaded = AGPO.load(tmp_path / "checkpoints" / "rl_model_50_steps.zip", env=model.get_env())
    loaded.load_replay_buffer(tmp_path / "checkpoints" / "rl_model_replay_buffer_50_steps.pkl")
    loaded.learn(20, reset_num_timesteps=False)
    AGPO.load(tmp_path / "best_model.zip").predict(model.observation_space.sample())


def test_checkpoint_with_vec_normalize(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("InvertedPendulum-v5", 2))
    callback = CheckpointCallback(20, str(tmp_path), save_replay_buffer=True, save_vecnormalize=True)
    small_model(env).learn(60, callback=callback)
    restored = VecNormalize.load(str(tmp_path / "rl_model_vecnormalize_40_steps.pkl"), make_vec_env("InvertedPendulum-v5", 2))
    loaded = AGPO.load(tmp_path / "rl_model_40_steps.zip", env=restored)
    loaded.load_replay_buffer(tmp_path / "rl_model_replay_buffer_40_steps.pkl")
    loaded.learn(40, reset_num_timesteps=False)
    assert loaded.num_timesteps == 80


def test_evaluation_of_a_normalized_environment() -> None:
    """Statistics go to the evaluation environment, see SB3's EvalCallback."""
    env, evaluation = (VecNormalize(make_vec_env("InvertedPendulum-v5", 1)) for _ in range(2))
    evaluation.training = False
    callback = EvalCallback(evaluation, n_eval_episodes=1, eval_freq=50, verbose=0, warn=False)
    small_model(env).learn(50, callback=callback)
    assert np.array_equal(env.obs_rms.mean, evaluation.obs_rms.mean)  # type: ignore[union-attr]


def test_progress_bar() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm.rich calls itself experimental
        model = small_model("Pendulum-v1").learn(30, progress_bar=True)
        model.learn(30, callback=ProgressBarCallback())
    assert model.num_timesteps == 30


@pytest.mark.parametrize("n_envs", [1, 2])
def test_step_at_which_a_callback_stops_is_stored(n_envs: int) -> None:
    """It is the fall that matters, and what comes after it begins a new episode: nothing is dropped or made up."""
    env = make_vec_env("InvertedPendulum-v5", n_envs)
    model = small_model(env).learn(10_000, callback=StopTrainingOnMaxEpisodes(3))
    buffer, steps = model.replay_buffer, model.num_timesteps // n_envs
    assert buffer is not None and steps < 500
    assert buffer.size() == steps
    assert buffer.dones[steps - 1].any()
    assert model._episode_num == buffer.dones[:steps].sum() == len(model.ep_info_buffer or ())
    model.learn(20, reset_num_timesteps=False)
    assert buffer.size() > steps
    goes_on = buffer.dones[: buffer.size() - 1] == 0.0
    assert (buffer.next_observations[: buffer.size() - 1] == buffer.observations[1 : buffer.size()])[goes_on].all()


@pytest.mark.parametrize("env_id", TASKS)
def test_stopped_learning_goes_on(env_id: str) -> None:
    """SB3 stops between a step and its transition; no step's derivatives are mixed up after that."""

    def stop_at(n: int) -> Any:
        return lambda local, _: local["self"].num_timesteps < n

    model = small_model(env_id).learn(200, callback=stop_at(53))
    assert model.num_timesteps == 53
    for more in (61, 90, 117):
        model.learn(200, callback=stop_at(more), reset_num_timesteps=False)
        assert model.num_timesteps == more
    skipped = model._valid_history
    assert all(skipped)
    assert model.derivative_buffer.size > 0 or env_id == "Pendulum-v1"


def test_steps_behind_the_scenes_are_noticed() -> None:
    """A callback that steps the training environment: AGPO must not learn from derivatives of steps other than its own."""

    class StepBehindTheScenes(BaseCallback):
        def _on_rollout_start(self) -> None:
            if self.num_timesteps == 60:
                self.training_env.step(np.zeros((1, 1), dtype=np.float32))

        def _on_step(self) -> bool:
            return True

    model = small_model("InvertedPendulum-v5", train_freq=4).learn(100, callback=StepBehindTheScenes())
    # The batch of 16 steps under construction is lost, and none after it
    assert model._valid_history == [True] * 48 + [False] * 16 + [True] * 32


@pytest.mark.parametrize("event", ["_on_step", "_on_rollout_start", "_on_rollout_end"])
def test_the_environment_changes_while_it_is_trained_in(event: str) -> None:
    """The way of the documentation: derivatives go on with the new options, and none is of the old ones."""

    class Anneal(BaseCallback):
        def _on_step(self) -> bool:
            return True

    def change(callback: BaseCallback) -> bool:
        if callback.num_timesteps in (40, 100):
            env = callback.training_env
            env.env_method("set_wrapper_attr", "_ctrl_cost_weight", callback.num_timesteps / 10)
            callback.model.set_env(env, force_reset=False)
            changed_at.append(callback.num_timesteps)
        return True

    changed_at: list[int] = []
    windows: list[float] = []
    setattr(Anneal, event, change)
    model = small_model("HalfCheetah-v5", train_freq=4, rollout_size=16, learning_starts=0)
    update = model._update_policy_from_windows
    model._update_policy_from_windows = lambda w: (windows.append(w.valid.float().mean().item()), update(w))[1]  # type: ignore
    model.learn(200, callback=Anneal())
    assert changed_at[0] == 40 and changed_at[-1] == 100
    assert model._valid_history and all(model._valid_history)
    assert len(windows) >= 9 * model.rollout_epochs and set(windows) == {1.0}
    model.set_env(model.get_env(), force_reset=False)  # between two calls of `learn`
    assert model.dynamics is not None and not model._valid_history
    model.learn(40, reset_num_timesteps=False)
    assert model._valid_history and all(model._valid_history)


def test_too_many_invalid_derivatives_are_forgotten_once_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to do; who does it must not get the same error again."""
    monkeypatch.setattr(collection, "INVALID_WINDOW", 100)
    env = gym.make("InvertedPendulum-v5")
    model = small_model(env).learn(96)
    env.unwrapped.model.opt.gravity[2] = -5.0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="of the last 100 simulator derivatives"):
        model.learn(200, reset_num_timesteps=False)
    model.set_env(model.get_env(), force_reset=False)
    model.learn(200, reset_num_timesteps=False)
    assert len(model._valid_history) == 100 and all(model._valid_history)


def test_rewards_that_a_callback_changes_have_other_derivatives() -> None:
    """An intrinsic reward, as users of SB3 add it: what is known is the derivative of another reward."""

    class Intrinsic(BaseCallback):
        def _on_step(self) -> bool:
            if 40 < self.num_timesteps <= 72:
                self.locals["rewards"] += 1.0
            return True

    model = small_model("InvertedPendulum-v5", train_freq=4).learn(112, callback=Intrinsic())
    assert model._valid_history == [True] * 40 + [False] * 32 + [True] * 40


def test_experience_before_training(tmp_path: Path) -> None:
    """Collected with ``gradient_steps=0``, also by another model: transitions without derivatives stand beside later ones."""
    model = small_model("InvertedPendulum-v5", gradient_steps=0).learn(100)
    model.save_replay_buffer(tmp_path / "buffer")
    other = small_model("InvertedPendulum-v5")
    other.load_replay_buffer(tmp_path / "buffer")
    model.gradient_steps = 1
    for trained in (model, other):
        trained.learn(100, reset_num_timesteps=False)
        assert trained.derivative_buffer.size > 0 and trained._n_updates > 0


@pytest.mark.parametrize("critic_grad_coef", [0.0, 1.0])
def test_one_step_behind_the_scenes_of_a_long_rollout(critic_grad_coef: float) -> None:
    """Batches with and without derivatives make windows together."""

    class StepOnce(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 100:
                self.training_env.step(np.zeros((1, 1), dtype=np.float32))
            return True

    options = {"train_freq": 200, "learning_starts": 0, "critic_grad_coef": critic_grad_coef}
    model = small_model("InvertedPendulum-v5", **options).learn(400, callback=StepOnce())
    assert model._n_updates > 0
    assert not all(model._valid_history)


def test_training_environment_for_evaluation_is_refused_in_the_end() -> None:
    """SB3 lets an evaluation reset and step the training environment; when it goes on like that AGPO says so."""

    class StepEachTime(BaseCallback):
        def _on_step(self) -> bool:
            self.training_env.step(np.zeros((1, 1), dtype=np.float32))
            return True

    with pytest.raises(ValueError, match="an evaluation needs one of its own"):
        small_model("InvertedPendulum-v5", gradient_steps=1, train_freq=50).learn(1100, callback=StepEachTime())
