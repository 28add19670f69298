"""Thin subclasses of TRL's trainers and configs; `contact` and `resume` are what touches TRL's internals."""

from .asyppo import AsyPPOTrainer
from .asyppo_config import AsyPPOConfig
from .config import EntropyGRPOConfig
from .grpo import EntropyGRPOTrainer

__all__ = ["AsyPPOConfig", "AsyPPOTrainer", "EntropyGRPOConfig", "EntropyGRPOTrainer"]
