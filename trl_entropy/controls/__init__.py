"""The papers' controls as pure functions of per-token tensors. Imports torch and nothing else.

Shapes: `B` completions, `T` completion tokens; every tensor is `(B, T)` unless said otherwise. The clipping controls
carry no autograd graph: they decide how much gradient a token gets and are never differentiated themselves.
"""

from .ce_gppo import ce_gppo
from .compose import clip_controls
from .epo import EntropyHistory, epo, epo_beta
from .erc import ENTROPY_FLOOR, entropy_ratio, erc, inside_bounds
from .importance import bounded_old_logps, clipped_by_ppo, log_importance_weight
from .positive_nll import positive_nll
from .tokens import PolicyTokens, TokenMean, in_float32

__all__ = [
    "ENTROPY_FLOOR",
    "EntropyHistory",
    "PolicyTokens",
    "TokenMean",
    "bounded_old_logps",
    "ce_gppo",
    "clip_controls",
    "clipped_by_ppo",
    "entropy_ratio",
    "epo",
    "epo_beta",
    "erc",
    "in_float32",
    "inside_bounds",
    "log_importance_weight",
    "positive_nll",
]
