"""With no control and one value model, `EntropyPPOTrainer` is TRL's PPOTrainer: same weights, same metrics."""

from typing import Any

import pytest
import torch
from transformers import set_seed

REASON = "trl.experimental.ppo is in TRL 1.12 alone"
ppo = pytest.importorskip("trl.experimental.ppo", reason=REASON)

TIMED = {"eps"}


def trained(trainer: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    set_seed(4)
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}, trainer.state.log_history


@pytest.mark.parametrize(
    ("fields", "own_config"),
    [
        ({}, True),
        ({}, False),
        ({"num_mini_batches": 2, "kl_estimator": "k3", "lam": 0.9, "gamma": 0.97}, True),
        ({"per_device_train_batch_size": 4, "whiten_rewards": True, "stop_token": None}, True),
    ],
)
def test_updates_equal_trls_bit_for_bit(make_ppo, fields, own_config) -> None:
    theirs = make_ppo(ppo.PPOTrainer, ppo.PPOConfig, **fields)
    start = {name: value.clone() for name, value in theirs.model.state_dict().items()}
    weights, logs = trained(theirs)
    own_weights, own_logs = trained(make_ppo(config_class=None if own_config else ppo.PPOConfig, **fields))
    assert weights.keys() == own_weights.keys()
    assert any(not torch.equal(start[name], weights[name]) for name in weights)
    for name, value in weights.items():
        assert torch.equal(value, own_weights[name]), name
    assert [log.keys() for log in logs] == [log.keys() for log in own_logs]
    if fields.get("num_mini_batches", 1) == 1:
        for log, own_log in zip(logs, own_logs, strict=True):
            differing = {name for name in log.keys() - TIMED if log[name] != own_log[name]}
            assert not differing, {name: (log[name], own_log[name]) for name in differing}
