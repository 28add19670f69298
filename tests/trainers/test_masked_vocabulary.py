"""Entropies and gradients of a policy that some entries of the vocabulary are masked for."""

import math

import pytest
import torch
import trl.trainer.utils
from trl import GRPOTrainer

from tests.trainers.test_grpo import ALL_CONTROLS, logged
from trl_entropy.trainers.masked_vocabulary import finite_logits

MASKED = [5, 6, 7, 20]
READS_LOGITS = not hasattr(trl.trainer.utils, "add_fused_lm_head")
MASKS = [
    pytest.param("forward", marks=pytest.mark.skipif(not READS_LOGITS, reason="this TRL reads no logits")),
    "bias",
]


def masked(model, mask):
    """Mask entries as a model's own forward pass does, or by the bias of its head."""
    if mask == "bias":
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
        model.lm_head.bias.data[MASKED] = -torch.inf
        return model

    def hook(module, args, output):
        keep = torch.ones(output.logits.shape[-1], dtype=torch.bool)
        keep[MASKED] = False
        output.logits = output.logits.masked_fill(~keep, -torch.inf)

    model.register_forward_hook(hook)
    return model


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropies_and_their_gradients_are_those_of_the_distribution(make_trainer, tiny_model, mask, temperature):
    trainer = make_trainer(model=masked(tiny_model, mask), temperature=temperature, epo_coef=0.01)
    trainer._entropy_bonus_enabled = True
    ids = torch.arange(10, 20).reshape(2, 5)
    arguments = (trainer.model, ids, torch.ones_like(ids), 3)
    logps, entropies, *_ = trainer._get_per_token_logps_and_entropies(*arguments, compute_entropy=True)
    assert torch.equal(logps, GRPOTrainer._get_per_token_logps_and_entropies(trainer, *arguments)[0])

    kept = [token for token in range(tiny_model.config.vocab_size) if token not in MASKED]
    logits = trainer.model(ids).logits[:, 1:-1, kept].double() / temperature
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropies.double(), expected, rtol=1e-4, atol=1e-5)

    weights = [value for name, value in trainer.model.named_parameters() if name != "lm_head.bias"]
    (100 * entropies.sum()).backward()
    found = [value.grad for value in weights]
    for gradient, reference in zip(found, torch.autograd.grad(100 * expected.sum(), weights), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-3)
    if mask == "bias":
        assert (trainer.model.lm_head.bias.grad[MASKED] == 0).all()
        assert trainer.model.lm_head.bias.grad.isfinite().all()


@pytest.mark.parametrize("mask", MASKS)
def test_every_control_trains(make_trainer, tiny_model, mask):
    trainer = make_trainer(model=masked(tiny_model, mask), **ALL_CONTROLS, entropy_coef=0.01, steps_per_generation=2)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        known = before[name].isfinite()
        assert value[known].isfinite().all(), name
        assert torch.equal(value[~known], before[name][~known]), name
    for name in ("entropy", "erc/clip_fraction", "epo/history", "grad_norm", "loss"):
        assert logged(trainer, name), name
        assert all(map(math.isfinite, logged(trainer, name))), name
    assert min(logged(trainer, "erc/clip_fraction")) < 1


def test_the_model_is_left_as_it_was(tiny_model):
    model = masked(tiny_model, "bias")
    bias, names, hooks = model.lm_head.bias, list(model.state_dict()), len(model._forward_hooks)
    with finite_logits(torch.nn.DataParallel(model), 1.0):
        assert model.lm_head.bias.isfinite().all()
    assert model.lm_head.bias is bias
    assert list(model.state_dict()) == names
    assert len(model._forward_hooks) == hooks
    assert bias[MASKED].isneginf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 20.0])
def test_a_replaced_logit_has_probability_0_in_every_dtype(tiny_model, dtype, temperature):
    bias = torch.nn.Parameter(torch.tensor([1.0, -torch.inf, 2.0], dtype=dtype))
    tiny_model.lm_head.bias = bias
    with finite_logits(tiny_model, temperature):
        found = tiny_model.lm_head.bias
        assert found.isfinite().all()
        assert found[[0, 2]].tolist() == [1.0, 2.0]
        assert (found.float() / temperature).softmax(-1)[1] == 0
