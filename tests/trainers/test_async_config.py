"""What asynchronous training cannot do is refused when the config is built, with field, value and reason."""

from collections.abc import Callable
from typing import Any

import pytest

from . import async_parts

REFUSED = async_parts.require("async_config").REFUSED


@pytest.mark.parametrize("prefix", sorted(REFUSED))
def test_what_it_cannot_do_is_refused(make_async: Callable[..., Any], prefix: str) -> None:
    fields = {
        "qae": {"qae_quantile": 0.4},
        "coefficient": {"target_entropy": 0.2, "target_entropy_by": "coefficient"},
        "asyppo": {"advantage_mask_fraction": 0.2},
    }[prefix]
    if prefix == "asyppo":  # which is a trainer of its own
        with pytest.raises(TypeError, match="advantage_mask_fraction"):
            make_async(**fields)
    else:
        with pytest.raises(ValueError, match=f"cannot be used in asynchronous training: {REFUSED[prefix]}"):
            make_async(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epo_coef": 0.1, "max_steps": -1}, "epo_schedule='decay'.*by max_steps alone, which is -1. Set max_steps"),
        ({"par_schedule": "stage", "max_steps": -1}, "par_schedule='stage'.*Set max_steps"),
        ({"par_schedule": "epoch", "max_steps": -1, "num_train_epochs": 2}, "par_schedule='epoch'.*Set max_steps"),
        ({"record_tokens": -1}, "record_tokens=-1 must be at least 0"),
        ({"erc_low": 0.9}, "erc_low=0.9 and erc_high=None"),
    ],
)
def test_nonsense_is_refused(make_async: Callable[..., Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_async(**fields)
