"""Thin subclasses of TRL's trainers and configs; `contact` is the one module that touches TRL's internals."""

from .config import EntropyGRPOConfig
from .grpo import EntropyGRPOTrainer

__all__ = ["EntropyGRPOConfig", "EntropyGRPOTrainer"]
