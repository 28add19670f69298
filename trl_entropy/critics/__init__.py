"""Value models, their ensemble, prompt-level shards and generalised advantages (AsyPPO, arXiv 2510.01656)."""

from ..controls.selection import highest_fraction, lowest_fraction
from .ensemble import CriticEnsemble
from .gae import Episodes, critic_targets, explained_variance, generalized_advantages, whiten
from .sharding import assign_shards
from .value_model import check_tokenizer, load_critic, state_values

__all__ = [
    "CriticEnsemble",
    "Episodes",
    "assign_shards",
    "check_tokenizer",
    "critic_targets",
    "explained_variance",
    "generalized_advantages",
    "highest_fraction",
    "load_critic",
    "lowest_fraction",
    "state_values",
    "whiten",
]
