"""Thin subclasses of TRL's trainers and configs; `contact` and `resume` are what touches TRL's internals."""

from . import contact_table as contact_table  # first: it looks for the names that the others import

# isort: split
from .asyppo import AsyPPOTrainer
from .asyppo_config import AsyPPOConfig
from .config import EntropyGRPOConfig
from .controlled import entropy_controlled
from .grpo import EntropyControlMixin, EntropyGRPOTrainer
from .rloo import EntropyRLOOConfig, EntropyRLOOTrainer

__all__ = [
    "AsyPPOConfig",
    "AsyPPOTrainer",
    "EntropyControlMixin",
    "EntropyGRPOConfig",
    "EntropyGRPOTrainer",
    "EntropyRLOOConfig",
    "EntropyRLOOTrainer",
    "entropy_controlled",
]
