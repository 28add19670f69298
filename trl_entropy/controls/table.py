"""Every control of the package."""

from .asyppo import ASYPPO
from .ce_gppo import CE_GPPO
from .control import Control
from .entropic import ENTROPIC
from .epo import EPO
from .erc import ERC
from .par import PAR
from .positive_nll import POSITIVE_NLL

CONTROLS: tuple[Control, ...] = (
    CE_GPPO,
    PAR,
    ENTROPIC,
    ERC,
    ASYPPO,
    EPO,
    POSITIVE_NLL,
)
"""In the order in which they act on a token, each on what the one before left."""
