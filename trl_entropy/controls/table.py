"""Every control of the package."""

from .asyppo import ASYPPO
from .ce_gppo import CE_GPPO
from .ce_gppo_loop import CE_GPPO_LOOP
from .clip_cov import CLIP_COV
from .control import Control
from .dppo import DPPO
from .entropic import ENTROPIC
from .entropy_advantage import ENTROPY_ADVANTAGE
from .epo import EPO
from .erc import ERC
from .fipo import FIPO
from .kl_cov import KL_COV
from .par import PAR
from .positive_nll import POSITIVE_NLL
from .qae import QAE
from .stare import STARE
from .steer import STEER
from .target_entropy import COEFFICIENT

CONTROLS: tuple[Control, ...] = (
    QAE,
    ENTROPY_ADVANTAGE,
    DPPO,
    CE_GPPO,
    CE_GPPO_LOOP,
    PAR,
    ENTROPIC,
    STARE,
    STEER,
    FIPO,
    ERC,
    CLIP_COV,
    KL_COV,
    ASYPPO,
    EPO,
    POSITIVE_NLL,
    COEFFICIENT,
)
"""In the order in which they act on a token, each on what the one before left."""
