"""What the PPO loop builds on in the PPOTrainer of TRL 1.12, beyond the names that it imports."""

from operator import attrgetter
from typing import Any

from ..trainers.contact_table import OLDEST, missing_methods, refuse

PPO_METHODS: dict[str, tuple[str, ...]] = {
    "_get_output_dir": ("trial",),
    "_save_checkpoint": ("model", "trial"),
    "compute_loss": ("model", "inputs"),
    "create_model_card": (),
    "generate_completions": ("sampling",),
    "log": ("logs",),
    "null_ref_context": (),
    "save_model": ("output_dir", "_internal_call"),
    "train": (),
}
"""Methods that are overridden or called, and those of their arguments that must be there."""
PPO_ATTRIBUTES = (
    "accelerator",
    "args.batch_size",
    "args.local_batch_size",
    "args.local_mini_batch_size",
    "args.num_total_batches",
    "callback_handler",
    "control",
    "dataloader",
    "is_deepspeed_enabled",
    "is_fsdp_enabled",
    "lr_scheduler",
    "model",
    "optimizer",
    "policy_model",
    "processing_class",
    "ref_model",
    "reward_model",
    "state.episode",
    "stop_token_id",
    "train_dataset_len",
)
"""Attributes of a trainer, and of its settings and state."""


def check_ppo_type(trainer: Any) -> None:
    """Check the methods of TRL's PPOTrainer.

    Raises:
        ImportError: Names what is missing, the versions found and the one supported.
    """
    refuse(missing_methods(trainer, PPO_METHODS), newest=OLDEST)


def check_ppo_trainer(trainer: Any) -> None:
    """Check a trainer's attributes.

    Raises:
        ImportError: As `check_ppo_type`.
    """
    refuse([f"trainer.{name}" for name in PPO_ATTRIBUTES if not _has(trainer, name)], newest=OLDEST)


def _has(owner: Any, path: str) -> bool:
    try:
        attrgetter(path)(owner)
    except AttributeError:
        return False
    return True
