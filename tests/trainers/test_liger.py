"""Liger's kernels beside the controls, on the releases of TRL where they leave the loss alone."""

import pytest
import torch
import transformers.trainer
from trl import GRPOTrainer

from tests.trainers.test_grpo import ALL_CONTROLS, logged, weights

pytestmark = pytest.mark.skipif(
    hasattr(GRPOTrainer, "compute_liger_loss"), reason="Liger computes the loss on TRL 1.12 and 1.13"
)


def test_controls_act_as_without_it(make_trainer, monkeypatch):
    """Without the kernels themselves, which need a GPU: what TRL does when it is told that they are on."""
    swapped = []
    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", lambda model, config: swapped.append(model))
    monkeypatch.setattr("trl.trainer.grpo_trainer.is_liger_kernel_available", lambda: True, raising=False)
    found = []
    for use_liger_kernel in (False, True):
        trainer = make_trainer(
            **ALL_CONTROLS, record_tokens=8, steps_per_generation=2, use_liger_kernel=use_liger_kernel
        )
        trainer.train()
        found.append((weights(trainer), logged(trainer, "erc/clip_fraction"), logged(trainer, "epo/penalty")))
    assert swapped
    (plain, *metrics), (with_liger, *metrics_with_liger) = found
    assert max(metrics[0]) > 0
    for expected, values in zip(metrics, metrics_with_liger, strict=True):
        assert values == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for name, value in plain.items():
        torch.testing.assert_close(with_liger[name], value, rtol=1e-3, atol=1e-4)
