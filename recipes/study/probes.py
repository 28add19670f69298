"""TRL trainers that also measure every token they train on, and AsyPPO's ablations."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from trl_entropy import AsyPPOTrainer, EntropyGRPOTrainer
from trl_entropy.controls import Context, MicroBatch, PolicyTokens, Rollout
from trl_entropy.controls.asyppo import ASYPPO
from trl_entropy.controls.control import Metrics
from trl_entropy.controls.erc import ERC
from trl_entropy.critics import lowest_fraction
from trl_entropy.trainers.loss_call import LossCall, loss_mask

RATIO_BINS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
"""Edges of the bins of |log importance ratio|; PPO-clip's boundary of 0.2 is at 0.18 (above 1) and 0.22 (below)."""
ENTROPY_BINS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5)
"""Edges of the bins of the rollout policy's entropy, nats."""
SETS = ("all", "erc", "ppo")
"""All tokens; those outside ERC's (0.95, 1.05); those that PPO-clip at 0.2 drops. Counted whatever the arm clips."""


class TokenCounts:
    """Counts of `SETS` by importance ratio and by entropy, over every token of every optimizer step of a run."""

    def __init__(self) -> None:
        self.by_ratio = torch.zeros(len(SETS), len(RATIO_BINS) + 1, dtype=torch.int64)
        self.by_entropy = torch.zeros(len(SETS), len(ENTROPY_BINS) + 1, dtype=torch.int64)
        self.sum_entropy = torch.zeros(len(SETS), dtype=torch.float64)
        self.sum_ratio = torch.zeros(len(SETS), dtype=torch.float64)

    @torch.no_grad()
    def add(self, log_ratio: Tensor, advantages: Tensor, entropies: Tensor, old_entropies: Tensor) -> None:
        """Count valid tokens, `(N,)` each."""
        entropy_ratio = (entropies + 1e-8) / (old_entropies + 1e-8)
        outside = (entropy_ratio <= 0.95) | (entropy_ratio >= 1.05)
        ratio = log_ratio.exp()
        dropped = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
        size = log_ratio.abs()
        ratio_bin = torch.bucketize(size, torch.tensor(RATIO_BINS))
        entropy_bin = torch.bucketize(old_entropies, torch.tensor(ENTROPY_BINS))
        for index, chosen in enumerate((torch.ones_like(outside), outside, dropped)):
            self.by_ratio[index] += ratio_bin[chosen].bincount(minlength=len(RATIO_BINS) + 1)
            self.by_entropy[index] += entropy_bin[chosen].bincount(minlength=len(ENTROPY_BINS) + 1)
            self.sum_entropy[index] += old_entropies[chosen].sum()
            self.sum_ratio[index] += size[chosen].sum()

    def result(self) -> dict[str, Any]:
        """Counts, and sums of the entropies and of |log ratio|, of each set."""
        names = ("by_ratio", "by_entropy", "sum_entropy", "sum_ratio")
        return {name: dict(zip(SETS, _rounded(getattr(self, name)), strict=True)) for name in names}


def _rounded(counts: Tensor) -> list[Any]:
    return [round(value, 2) if isinstance(value, float) else value for value in counts.tolist()]


class EntropyProbe(TrainerCallback):
    """Mean entropy (nats) on the same tokens after every optimizer step: what changes is the policy alone.

    Args:
        input_ids: `(N, T)`.
        labels: -100 except at the tokens whose distribution counts, `(N, T)`.
    """

    def __init__(self, input_ids: Tensor, labels: Tensor) -> None:
        self._input_ids, self._mask = input_ids, labels[:, 1:] != -100
        self.entropies: list[float] = []

    @torch.no_grad()
    def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        logits = model(input_ids=self._input_ids).logits[:, :-1][self._mask]
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
        self.entropies.append(round(entropy.item(), 5))


def random_gate(batch: MicroBatch, tokens: PolicyTokens, context: Context, state: Any) -> tuple[PolicyTokens, Metrics]:
    """ERC on pairs of entropies that change places, so that as many ratios are outside the bounds."""
    mask = tokens.mask
    order = mask.nonzero()[torch.randperm(int(mask.sum()))].unbind(1)
    entropies, old_entropies = batch.entropies.detach().clone(), batch.old_entropies.clone()
    entropies[mask], old_entropies[mask] = batch.entropies.detach()[order], batch.old_entropies[order]
    return ERC.shape(replace(batch, entropies=entropies, old_entropies=old_entropies), tokens, context, state)


def away_gate(batch: MicroBatch, tokens: PolicyTokens, context: Context, state: Any) -> tuple[PolicyTokens, Metrics]:
    """ERC on those tokens alone whose gradient moves the importance ratio further from 1."""
    raw, entropies = batch.tokens, batch.entropies.detach()
    away = raw.advantages * (raw.logps - raw.old_logps) > 0
    return ERC.shape(
        replace(batch, old_entropies=torch.where(away, batch.old_entropies, entropies)), tokens, context, state
    )


def mask_by_entropy(rollout: Rollout, context: Context, state: Any) -> tuple[dict[str, Tensor], Metrics]:
    """AsyPPO's mask on as many tokens, but on those with the lowest entropy."""
    fraction = context.settings.advantage_mask_fraction
    return {"advantage_masked": lowest_fraction(rollout.old_entropies, rollout.mask, fraction, context.gather)}, {}


VARIANTS = {
    "random": replace(ERC, shape=random_gate),
    "away": replace(ERC, shape=away_gate),
    "entropy": replace(ASYPPO, on_rollout=mask_by_entropy, needs_rollout_pass=True),
}
"""What takes the place of the control with the same prefix."""


class MeasuringTrainer(EntropyGRPOTrainer):
    """Keeps entropy and reward of every rollout and counts tokens, without a change to the training.

    Args:
        gate: Which tokens ERC drops: its own, or those of one of `VARIANTS`.
        others: Of `EntropyGRPOTrainer`.
    """

    hooks_active = True
    reads_rollout = True
    wants_old_entropies = True

    def __init__(self, *args: Any, gate: str = "erc", **kwargs: Any) -> None:
        self.rollouts: dict[str, list[float]] = {"reward": [], "entropy": []}
        self.tokens = TokenCounts()
        super().__init__(*args, **kwargs)
        self.take_variant(gate)

    def take_variant(self, name: str) -> None:
        """Put one of `VARIANTS` in the place of the control that it varies; another name changes nothing."""
        if name in VARIANTS:
            variant = VARIANTS[name]
            assert variant.prefix in {one.prefix for one in self.active.controls}, name
            self.active.controls = tuple(
                variant if one.prefix == variant.prefix else one for one in self.active.controls
            )

    def on_rollout(self, output: dict[str, Any], rewards: Tensor) -> None:
        super().on_rollout(output, rewards)
        if self.mode == "eval":
            return
        self.rollouts["reward"].append(round(rewards.mean().item(), 5))
        # with one update a rollout there is no second forward pass before the loss
        if "old_entropies" in output:
            self.rollouts["entropy"].append(round(output["old_entropies"][loss_mask(output)].mean().item(), 5))

    def on_forward(self, call: LossCall) -> None:
        if self.mode == "train":
            self._count_tokens(call)
        super().on_forward(call)

    def _count_tokens(self, call: LossCall) -> None:
        mask, logps, entropies = call.mask, call.logps.detach(), call.entropies.detach()
        old_logps = call.inputs.get("old_per_token_logps")
        old_entropies = call.inputs.get("old_entropies")
        if old_logps is None or old_entropies is None:
            old_logps, old_entropies = logps, entropies
            self.rollouts["entropy"].append(round(entropies[mask].mean().item(), 5))
        advantages = call.inputs["advantages"]
        advantages = (advantages if advantages.dim() == 2 else advantages.unsqueeze(1)).expand_as(logps)
        self.tokens.add((logps - old_logps)[mask], advantages[mask], entropies[mask], old_entropies[mask])


class MeasuringAsyPPOTrainer(MeasuringTrainer, AsyPPOTrainer):
    """The same with critics, and with what AsyPPO is compared with.

    Args:
        shared_data: Every critic trains on all completions, not on its own share of them.
        mask_by: `"entropy"` masks the advantages of as many tokens, but those with the lowest entropy.
        others: Of `AsyPPOTrainer`.
    """

    def __init__(self, *args: Any, shared_data: bool = False, mask_by: str = "value_std", **kwargs: Any) -> None:
        self._shared_data = shared_data
        super().__init__(*args, **kwargs)
        self.take_variant(mask_by)

    def train_critics(self, ids: Tensor, attention: Tensor, mask: Tensor, targets: Tensor) -> dict[str, float]:
        if not self._shared_data:
            return super().train_critics(ids, attention, mask, targets)
        losses: dict[str, float] = {}
        for index in range(len(self.critics)):
            losses |= self.critics.train_on(
                *(ids, attention, mask, targets),
                critic_of_row=torch.full((len(ids),), index),
                rows=torch.arange(len(ids)),
                epochs=self.args.critic_num_epochs,
                batch_size=self.args.per_device_train_batch_size,
            )
        return losses
