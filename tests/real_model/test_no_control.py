"""With no control set, the pretrained model trains bit for bit as with TRL's own trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from tests.trainers.test_grpo import assert_same_weights, logged, weights

from .conftest import POLICIES, PRECISIONS

pytestmark = [pytest.mark.real_model, pytest.mark.usefixtures("quick_bfloat16")]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_no_control_is_bit_for_bit_trl(
    make_real_trainer: Callable[..., Any], tmp_path: Path, policy: str, precision: str
) -> None:
    """The third step is the first on a rollout of the policy that the first two have changed."""
    ours = make_real_trainer(policy, precision, tmp_path / "ours")
    start = weights(ours)
    ours.train()
    trls = make_real_trainer(policy, precision, tmp_path / "trl", trainer_class=GRPOTrainer, config_class=GRPOConfig)
    trls.train()
    assert_same_weights(weights(ours), weights(trls))
    assert any(not torch.equal(start[name], value) for name, value in weights(trls).items())
    for key in ("loss", "grad_norm", "entropy", "reward", "completions/mean_length"):
        assert logged(ours, key) == logged(trls, key), key
