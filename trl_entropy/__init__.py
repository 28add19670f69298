"""Entropy control for RL fine-tuning of language models: a plugin for Hugging Face TRL."""

from .telemetry.diagnosis import DiagnosisCallback
from .trainers import AsyPPOConfig, AsyPPOTrainer, EntropyGRPOConfig, EntropyGRPOTrainer

__version__ = "0.1.0"

__all__ = [
    "AsyPPOConfig",
    "AsyPPOTrainer",
    "DiagnosisCallback",
    "EntropyGRPOConfig",
    "EntropyGRPOTrainer",
    "__version__",
]
