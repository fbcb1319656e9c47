"""Making AGPO known to RL Baselines3 Zoo."""

from __future__ import annotations

ALGORITHM_NAME = "agpo"


def register() -> None:
    """
    Make AGPO known to the zoo of this process: ``--algo agpo``, its hyperparameters, its search space.

    Call it before the zoo parses its arguments. Calling it again changes nothing.

    :raises ImportError: if the zoo is not installed
    """
    try:
        import rl_zoo3.exp_manager
        import rl_zoo3.hyperparams_opt
        import rl_zoo3.train
    except ImportError as error:
        raise ImportError(
            f"RL Baselines3 Zoo cannot be imported ({error}); install it with: pip install 'sb3-agpo[zoo]'"
        ) from error
    from sb3_agpo.zoo.algorithm import ZooAGPO
    from sb3_agpo.zoo.manager import AGPOExperimentManager
    from sb3_agpo.zoo.search import convert_agpo_params, sample_agpo_params

    # The zoo's modules share these three dictionaries
    rl_zoo3.ALGOS[ALGORITHM_NAME] = ZooAGPO
    rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER[ALGORITHM_NAME] = sample_agpo_params
    rl_zoo3.hyperparams_opt.HYPERPARAMS_CONVERTER[ALGORITHM_NAME] = convert_agpo_params
    # `rl_zoo3.train` has a reference of its own to the class
    rl_zoo3.exp_manager.ExperimentManager = AGPOExperimentManager  # type: ignore[misc]
    rl_zoo3.train.ExperimentManager = AGPOExperimentManager  # type: ignore[misc]
