"""TRL's PPOTrainer with entropy control: `EntropyPPOTrainer` and its `EntropyPPOConfig`.

TRL 1.12 is the last release that has a PPOTrainer; on later ones the import says what to use instead.
"""

import trl

try:
    import trl.experimental.ppo
except ModuleNotFoundError as error:
    if error.name != "trl.experimental.ppo":
        raise
    raise ImportError(
        f"TRL {trl.__version__} has no PPOTrainer; TRL 1.12 is the last release that has it. Use "
        "trl_entropy.AsyPPOTrainer, actor-critic PPO on GRPOTrainer's rollouts, which trains on every supported TRL, "
        "or install trl==1.12.0."
    ) from error

from .config import EntropyPPOConfig
from .trainer import EntropyPPOTrainer

__all__ = ["EntropyPPOConfig", "EntropyPPOTrainer"]
