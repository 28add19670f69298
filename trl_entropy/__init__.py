"""Entropy control for RL fine-tuning of language models: a plugin for Hugging Face TRL."""

from importlib import import_module
from typing import Any

from .telemetry.diagnosis import DiagnosisCallback
from .trainers import (
    AsyPPOConfig,
    AsyPPOTrainer,
    EntropyGRPOConfig,
    EntropyGRPOTrainer,
    EntropyRLOOConfig,
    EntropyRLOOTrainer,
    entropy_controlled,
)

__version__ = "0.1.0"

__all__ = [
    "AsyPPOConfig",
    "AsyPPOTrainer",
    "DiagnosisCallback",
    "EntropyGRPOConfig",
    "EntropyGRPOTrainer",
    "EntropyRLOOConfig",
    "EntropyRLOOTrainer",
    "__version__",
    "entropy_controlled",
]


def __getattr__(name: str) -> Any:
    """The asynchronous trainer, which not every TRL has, and whose import loads vLLM where that is installed.

    For both reasons `from trl_entropy import *` leaves it out.
    """
    if name in ("EntropyAsyncGRPOConfig", "EntropyAsyncGRPOTrainer"):
        return getattr(import_module("trl_entropy.trainers.async_grpo"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
