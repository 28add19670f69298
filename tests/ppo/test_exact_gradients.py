"""Gradients of `compute_loss` with respect to the logits, in float64, against the papers' formulas token by token."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.reference import Batch, Settings
from tests.trainers.test_epo import EPO, PAST, PAST_TURNS, K, direct_loss

pytest.importorskip("trl.experimental.ppo", reason="trl.experimental.ppo is in TRL 1.12 alone")

PROMPT, VOCABULARY, TEMPERATURE, CLIP = 2, 9, 0.9, 0.2
LENGTHS = torch.tensor([7, 6, 7, 3, 0, 7])
ERC = {"erc_low": 0.9, "erc_high": 1.3}  # not symmetric in the logarithm, so that a ratio upside down shows
CE_GPPO = {"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.1}
BONUS = {"entropy_coef": 0.3}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "ppo_clip": {},
    "erc": ERC,
    "erc_floor": ERC | {"erc_entropy_floor": 0.5},
    "ce_gppo": CE_GPPO,
    "erc+ce_gppo": ERC | CE_GPPO,
    "bonus": BONUS,
    "epo": EPO,
    "all": ERC | CE_GPPO | BONUS | EPO,
}


def micro_batch(seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Leaves for the logits and the values of all positions, and rows of a rollout whose policy has drifted."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows, tokens = len(LENGTHS), int(LENGTHS.max())
    logits = 1.5 * normal(rows, PROMPT + tokens, VOCABULARY)
    responses = torch.randint(VOCABULARY, (rows, tokens), generator=g)
    lp, entropy = logprobs_and_entropies(logits, responses)
    padding = torch.arange(tokens) >= LENGTHS.unsqueeze(1)
    inputs = {
        "query_responses": torch.cat([torch.full((rows, PROMPT), 5), responses], 1),
        "responses": responses,
        "logprobs": (lp - 0.35 * normal(rows, tokens)).masked_fill(padding, 1.0),
        "old_entropies": entropy * (0.3 * normal(rows, tokens)).exp(),
        "advantages": normal(rows, tokens).masked_fill(padding, 0.0),
        "state_values": normal(rows, tokens),
        "returns": normal(rows, tokens),
        "padding_mask": padding,
        "padding_mask_p1": torch.arange(tokens) >= LENGTHS.unsqueeze(1) + 1,
        "advantage_masked": torch.rand(rows, tokens, generator=g) < 0.3,
        "entropy_filtered": torch.rand(rows, tokens, generator=g) < 0.3,
        "value_std": normal(rows, tokens),
    }
    return logits.requires_grad_(), normal(rows, PROMPT + tokens).requires_grad_(), inputs


def logprobs_and_entropies(logits: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
    """Of the response's tokens, from the logits one position before, at the sampling temperature."""
    every = (logits[:, PROMPT - 1 : -1] / (TEMPERATURE + 1e-7)).log_softmax(-1)
    return every.gather(-1, responses.unsqueeze(-1)).squeeze(-1), -(every.exp() * every).sum(-1)


def squared_errors(values: Tensor, inputs: dict[str, Tensor], clip: float) -> Tensor:
    """TRL's value loss, position by position."""
    terms = []
    for i, length in enumerate(LENGTHS.tolist()):
        for t in range(min(length + 1, inputs["state_values"].shape[1])):
            value, old, target = (
                values[i, PROMPT - 1 + t],
                inputs["state_values"][i, t].item(),
                inputs["returns"][i, t],
            )
            near = value.clamp(old - clip, old + clip)
            terms.append(torch.maximum((value - target) ** 2, (near - target) ** 2))
    return 0.5 * sum(terms) / len(terms)


def expected_loss(logits: Tensor, values: Tensor, inputs: dict[str, Tensor], controls: dict, masks: bool) -> Tensor:
    lp, entropy = logprobs_and_entropies(logits, inputs["responses"])
    mask, advantages, bonus = (~inputs["padding_mask"]).long(), inputs["advantages"], entropy
    if masks:
        advantages = advantages * (~inputs["advantage_masked"])
        bonus = torch.where(inputs["entropy_filtered"], entropy.detach(), entropy)
    settings = Settings(
        loss_type="bnpo",
        eps_lo=CLIP,
        eps_hi=CLIP,
        erc=(controls["erc_low"], controls["erc_high"]) if "erc_low" in controls else None,
        erc_floor=controls.get("erc_entropy_floor", 1e-8),
        alphas=(controls["ce_gppo_alpha1"], controls["ce_gppo_alpha2"]) if "ce_gppo_alpha1" in controls else None,
        entropy_coef=controls.get("entropy_coef", 0.0),
    )
    batch = Batch(
        lp, bonus, mask, advantages, mask.sum(), lp_old=inputs["logprobs"], entropy_old=inputs["old_entropies"]
    )
    loss = reference.loss(batch, settings)
    if "epo_coef" in controls:
        loss = loss + direct_loss(entropy, mask, "hinge", "decay", "scalar")
        # the indicator's penalty has no gradient: what is taken back and given anew is the gradient of the bonus
        for sign, entropies in ((-1, entropy), (1, bonus)):
            loss = loss + sign * direct_loss(entropies, mask, "indicator", "decay", "scalar")
    return loss if masks else loss + 0.1 * squared_errors(values, inputs, clip=0.2)


def check(trainer: Any, monkeypatch: pytest.MonkeyPatch, controls: dict, masks: bool = False) -> None:
    logits, values, inputs = micro_batch()
    output = SimpleNamespace(logits=logits.clone())
    monkeypatch.setattr("trl_entropy.ppo.loop.forward", lambda *_: (output, values.clone().unsqueeze(-1)))
    trainer.state.global_step = len(PAST)
    if "epo" in trainer.active.states:
        trainer.active.states["epo"].load_state_dict({"steps": PAST, "turn_steps": PAST_TURNS, "running": None})
    loss = trainer.compute_loss(trainer.model, inputs)
    found = torch.autograd.grad(loss, (logits, values), allow_unused=True, materialize_grads=True)
    expected = expected_loss(logits, values, inputs, controls, masks)
    wanted = torch.autograd.grad(expected, (logits, values), allow_unused=True, materialize_grads=True)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    if not {"erc_low"} & controls.keys():  # ERC drops a constant that the paper leaves in the reported loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_gradient_is_the_papers(make_ppo, monkeypatch, name) -> None:
    trainer = make_ppo(**COMBINATIONS[name], total_episodes=8 * K, temperature=TEMPERATURE, cliprange=CLIP)
    check(trainer, monkeypatch, COMBINATIONS[name])


def test_critics_mask_the_advantages_and_the_entropy_bonus(make_ppo, monkeypatch, tiny_model_path) -> None:
    controls = COMBINATIONS["all"]
    settings = {"total_episodes": 8 * K, "temperature": TEMPERATURE, "cliprange": CLIP}
    trainer = make_ppo(**controls, **settings, critics=tiny_model_path)
    check(trainer, monkeypatch, controls, masks=True)


def test_every_case_of_the_formulas_occurs() -> None:
    logits, _, inputs = micro_batch()
    lp, entropy = logprobs_and_entropies(logits, inputs["responses"])
    valid, positive = ~inputs["padding_mask"], inputs["advantages"] > 0
    ratio, rho = (lp - inputs["logprobs"]).exp(), entropy / inputs["old_entropies"]
    for case in (positive & (ratio > 1 + CLIP), ~positive & (ratio < 1 - CLIP), rho < 0.9, rho > 1.3):
        assert 3 <= (case & valid).sum() < valid.sum() - 3
