"""CE-GPPO's weights as the actuator of an entropy target: a loop of this package, in no paper."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .checks import check_not_negative, check_positive
from .control import PPO_CLIP_LOSSES, Context, Control, Metric, Metrics, MicroBatch, Rollout, TargetLoop
from .importance import clipped_by_ppo, ratio_of
from .steering import INTEGRAL, EntropyLoop, constants, held_at_bound, loop_figure, loop_metrics
from .tokens import PolicyTokens


@dataclass
class CEGPPOLoopFields:
    """The fields of the loop on CE-GPPO's weights; nothing of it is published.

    Args:
        ce_gppo_loop_target (`float`, *optional*):
            Mean entropy to hold by CE-GPPO's weights, nats per token, above 0. Needs `ce_gppo_alpha1` and
            `ce_gppo_alpha2`, which are the weights at the target. `target_entropy` with `target_entropy_by="ce_gppo"`
            sets it.
        ce_gppo_loop_kp (`float`, *optional*, defaults to `1.0`):
            Gain of the error, per nat, at least 0.
        ce_gppo_loop_ki (`float`, *optional*, defaults to `0.01`):
            Gain of the sum of the errors of the rollouts before, per nat, at least 0.
    """

    ce_gppo_loop_target: float | None = field(
        default=None, metadata={"help": "Mean entropy to hold by CE-GPPO's weights, nats per token."}
    )
    ce_gppo_loop_kp: float = field(default=1.0, metadata={"help": "Loop on CE-GPPO's weights: gain of the error."})
    ce_gppo_loop_ki: float = field(default=0.01, metadata={"help": "Loop on CE-GPPO's weights: gain of its sum."})

    @property
    def ce_gppo_loop_enabled(self) -> bool:
        return self.ce_gppo_loop_target is not None


def check(config: Any) -> None:
    """Refuse values that the loop cannot work with."""
    check_not_negative(config, "ce_gppo_loop_kp", "nothing; default: 1")
    check_not_negative(config, "ce_gppo_loop_ki", "nothing; default: 0.01")
    if config.ce_gppo_loop_target is None:
        return
    check_positive(config, "ce_gppo_loop_target", "nothing; near the entropy to be held")
    if config.ce_gppo_loop_kp == 0.0 and config.ce_gppo_loop_ki == 0.0:
        raise ValueError(
            "ce_gppo_loop_kp=0 and ce_gppo_loop_ki=0: nothing would act on the entropy. Set one of them above 0; "
            "defaults: 1 and 0.01."
        )
    if not config.ce_gppo_alpha1 and not config.ce_gppo_alpha2:
        raise ValueError(
            f"ce_gppo_loop_target={config.ce_gppo_loop_target} moves CE-GPPO's weights, and ce_gppo_alpha1="
            f"{config.ce_gppo_alpha1}, ce_gppo_alpha2={config.ce_gppo_alpha2}. Set them to the weights at the target, "
            "not both 0; published: 0.75 and 1."
        )


def steered_alphas(alpha1: float, alpha2: float, actuator: float) -> tuple[float, float]:
    """CE-GPPO's weights as the loop sets them: `alpha1 (1 + a)`, `alpha2 (1 - a)`.

    By CE-GPPO (arXiv 2509.20712) the tokens below the trust region with a negative advantage lower the entropy, those
    above it with a positive one raise it. Entropy too high, `a > 0`: more of the first, less of the second. At the
    bounds of `a` one weight is twice its own and the other 0.

    Args:
        alpha1: Weight below the trust region, at least 0.
        alpha2: Weight above it, at least 0.
        actuator: `a`, in [-1, 1].
    """
    return alpha1 * (1.0 + actuator), alpha2 * (1.0 - actuator)


def on_rollout(rollout: Rollout, context: Context, loop: EntropyLoop) -> tuple[Mapping[str, Tensor], Metrics]:
    settings, entropy = context.settings, loop.measure(rollout, context)
    if entropy is not None:
        error = entropy - settings.ce_gppo_loop_target
        loop.step(error, kp=settings.ce_gppo_loop_kp, ki=settings.ce_gppo_loop_ki)
    return {}, {}


def shape(
    batch: MicroBatch, tokens: PolicyTokens, context: Context, loop: EntropyLoop
) -> tuple[PolicyTokens, Metrics]:
    """Scale what CE-GPPO has just made of the tokens outside the trust region; it leaves the sign of an advantage."""
    settings, ratio = context.settings, ratio_of(batch.log_weight)
    low, high = clipped_by_ppo(ratio, tokens.advantages, context.eps_low, context.eps_high)
    below, above = steered_alphas(1.0, 1.0, loop.actuator)
    advantages = torch.where(high, above * tokens.advantages, tokens.advantages)
    advantages = torch.where(low, below * tokens.advantages, advantages)
    alpha1, alpha2 = steered_alphas(settings.ce_gppo_alpha1, settings.ce_gppo_alpha2, loop.actuator)
    values = {"integral": loop.integral, "alpha1": alpha1, "alpha2": alpha2}
    return replace(tokens, advantages=advantages), {
        **loop.trace("ce_gppo_loop", settings.ce_gppo_loop_target, tokens.mask),
        **constants("ce_gppo_loop", values, tokens.mask),
    }


CE_GPPO_LOOP = Control(
    name="CE-GPPO to a target",
    prefix="ce_gppo_loop",
    summary="CE-GPPO's weights hold the mean entropy: `alpha1 (1 + a)`, `alpha2 (1 - a)`, with EntroPIC's "
    "controller `a`.",
    published="in no paper",
    paper="CE-GPPO: Coordinating Entropy via Gradient-Preserving Clipping Policy Optimization in Reinforcement "
    "Learning",
    arxiv="2509.20712",
    fields=("ce_gppo_loop_target", "ce_gppo_loop_kp", "ce_gppo_loop_ki"),
    check=check,
    acts_on_policy=False,
    loss_types=PPO_CLIP_LOSSES,
    loss_reason="which has no PPO clip to give gradients back from",
    steers_entropy=True,
    target_loop=TargetLoop("ce_gppo", lambda target: {"ce_gppo_loop_target": target}),
    needs_old_entropies=True,
    needs_rollout_pass=True,
    state=lambda config: EntropyLoop(),
    on_rollout=on_rollout,
    shape=shape,
    metrics=(
        *loop_metrics(
            "`a`: CE-GPPO's weights are `alpha1 (1 + a)` and `alpha2 (1 - a)`",
            "-1 to 1",
            "above 0 while the entropy is too high, else below; at -1 or 1 for long, the target is out of reach",
        ),
        INTEGRAL,
        Metric("alpha1", "-", "weight below the trust region, for this rollout", "0 to twice `ce_gppo_alpha1`"),
        Metric("alpha2", "-", "weight above the trust region, for this rollout", "0 to twice `ce_gppo_alpha2`"),
    ),
    figures=(
        loop_figure(
            "ce_gppo_loop",
            "CE-GPPO's weights: entropy and its target",
            "actuator a",
            "Healthy: the entropy (line) comes to its target (dotted) and stays; an actuator that stays at -1 or 1 "
            "cannot hold it: too few tokens leave the trust region.",
        ),
    ),
    rules=(
        held_at_bound(
            "ce_gppo_loop",
            "The loop on CE-GPPO's weights",
            (-1.0, 1.0),
            "Try larger ce_gppo_alpha1 and ce_gppo_alpha2, a smaller epsilon, by which more tokens are re-weighted, "
            "or EntroPIC (target_entropy_by='entropic'), which acts on more of them.",
        ),
    ),
)
