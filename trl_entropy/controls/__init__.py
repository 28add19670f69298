"""The papers' controls as pure functions of per-token tensors. Imports torch and nothing else.

Shapes: `B` completions, `T` completion tokens; every tensor is `(B, T)` unless said otherwise. The clipping controls
carry no autograd graph: they decide how much gradient a token gets and are never differentiated themselves.
"""

from .ce_gppo import ce_gppo
from .clip_cov import clip_cov
from .compose import ActiveControls, clip_controls, controls_of, micro_batch, ratio_controls
from .control import Context, Control, MicroBatch, Rollout
from .covariance import covariance
from .dppo import binary_divergence, dppo
from .entropic import entropic
from .entropy_advantage import entropy_advantage
from .entropy_history import EntropyHistory
from .entropy_ratios import ENTROPY_FLOOR, entropy_ratio, inside_bounds
from .epo import epo, epo_beta
from .erc import erc
from .fipo import fipo
from .importance import bounded_old_logps, clipped_by_ppo, log_importance_weight
from .kl_cov import kl_cov
from .par import par
from .positive_nll import positive_nll
from .qae import qae
from .stare import stare_weights
from .steer import steer
from .table import CONTROLS
from .tokens import PolicyTokens, TokenMean, in_float32

__all__ = [
    "CONTROLS",
    "ENTROPY_FLOOR",
    "ActiveControls",
    "Context",
    "Control",
    "EntropyHistory",
    "MicroBatch",
    "PolicyTokens",
    "Rollout",
    "TokenMean",
    "binary_divergence",
    "bounded_old_logps",
    "ce_gppo",
    "clip_controls",
    "clip_cov",
    "clipped_by_ppo",
    "controls_of",
    "covariance",
    "dppo",
    "entropic",
    "entropy_advantage",
    "entropy_ratio",
    "epo",
    "epo_beta",
    "erc",
    "fipo",
    "in_float32",
    "inside_bounds",
    "kl_cov",
    "log_importance_weight",
    "micro_batch",
    "par",
    "positive_nll",
    "qae",
    "ratio_controls",
    "stare_weights",
    "steer",
]
