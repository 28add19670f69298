"""EntroPIC: a proportional-integral controller of the mean entropy (arXiv 2511.15248)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .checks import check_between, check_not_negative, check_positive
from .control import LINEAR_LOSSES, Context, Control, Mark, Metric, Metrics, MicroBatch, Rollout, TargetLoop
from .steering import INTEGRAL, EntropyLoop, constants, held_at_bound, loop_figure, loop_metrics
from .tokens import PolicyTokens, TokenMean


@dataclass
class EntroPICFields:
    """The fields of EntroPIC (arXiv 2511.15248).

    Args:
        entropic_target (`float`, *optional*):
            Mean entropy to hold, nats per token, above 0. Released code: 0.1 with rollouts sampled at temperature 0.6.
        entropic_kp (`float`, *optional*, defaults to `1.0`):
            Gain of the error, per nat, at least 0. Released code: 1.
        entropic_ki (`float`, *optional*, defaults to `0.01`):
            Gain of the sum of the errors of the rollouts before, per nat, at least 0. Released code: 0.01; 0 with
            `entropic_kp` above 0 is the paper's P controller.
        entropic_probability (`float`, *optional*, defaults to `0.95`):
            Tokens more probable than this are weighted, in [0, 1). Released code: 0.95.
    """

    entropic_target: float | None = field(
        default=None, metadata={"help": "EntroPIC: mean entropy to hold, nats per token. Published: 0.1."}
    )
    entropic_kp: float = field(default=1.0, metadata={"help": "EntroPIC: gain of the error. Published: 1."})
    entropic_ki: float = field(default=0.01, metadata={"help": "EntroPIC: gain of its sum. Published: 0.01."})
    entropic_probability: float = field(
        default=0.95, metadata={"help": "EntroPIC: tokens more probable than this are weighted. Published: 0.95."}
    )

    @property
    def entropic_enabled(self) -> bool:
        return self.entropic_target is not None


def check(config: Any) -> None:
    """Refuse values that EntroPIC cannot work with."""
    check_not_negative(config, "entropic_kp", "1")
    check_not_negative(config, "entropic_ki", "0.01")
    check_between(config, "entropic_probability", 0.0, 1.0, "0.95")
    if config.entropic_probability == 1.0:
        raise ValueError("entropic_probability=1.0 leaves no token to weight: set it below 1. Published: 0.95.")
    if config.entropic_target is None:
        return
    check_positive(config, "entropic_target", "0.1")
    if config.entropic_kp == 0.0 and config.entropic_ki == 0.0:
        raise ValueError(
            "entropic_kp=0 and entropic_ki=0: nothing would act on the entropy. Set one of them above 0; published: "
            "1 and 0.01."
        )


def entropic(
    tokens: PolicyTokens, *, actuator: float, probability: float
) -> tuple[PolicyTokens, dict[str, TokenMean]]:
    """Weight the probable tokens by the sign of their advantage (arXiv 2511.15248).

    With `a` the actuator of `steering.proportional_integral` on the error `mean H - target`, a token of probability
    `p` under the policy being trained has

        w = 1 + a sign(A)  if p > probability,  else 1

    and its policy loss is multiplied by `w`, which lies in [0, 2], without a gradient: exactly its advantage becomes
    `w A`. Entropy too high, `a > 0`: what is probable and good is reinforced, what is probable and bad hardly held
    back, the policy sharpens. Entropy too low, `a < 0`: the reverse.

    This is the loss as the paper's notation has it, with the weight inside PPO-clip. The text of the paper was not at
    hand: the formula is that of the released code, which differs from what is done here as follows. It adds
    `a mean(-r |A|)` beside the clipped loss, so that tokens that PPO-clip drops still move; it averages that term over
    the probable tokens alone, which multiplies its strength by `valid tokens / probable tokens`; each process has a
    controller of its own, stepped with every micro-batch; and the sum of the errors grows on while `a` is at its bound
    and is not in the checkpoint.

    Args:
        tokens: The micro-batch.
        actuator: `a`, in [-1, 1].
        probability: Of which a token is weighted, in [0, 1).

    Returns:
        The micro-batch with shaped `advantages`, and the metrics.
    """
    threshold = math.log(probability) if probability > 0.0 else -math.inf
    weight = torch.where(tokens.logps.detach() > threshold, 1.0 + actuator * tokens.advantages.sign(), 1.0)
    weighted = tokens.mask & (weight != 1.0)
    shaped = replace(tokens, advantages=weight * tokens.advantages)
    return shaped, {"entropic/weighted_fraction": TokenMean(weighted, tokens.mask)}


def on_rollout(rollout: Rollout, context: Context, loop: EntropyLoop) -> tuple[Mapping[str, Tensor], Metrics]:
    settings, entropy = context.settings, loop.measure(rollout, context)
    if entropy is not None:
        loop.step(entropy - settings.entropic_target, kp=settings.entropic_kp, ki=settings.entropic_ki)
    return {}, {}


def shape(
    batch: MicroBatch, tokens: PolicyTokens, context: Context, loop: EntropyLoop
) -> tuple[PolicyTokens, Metrics]:
    settings = context.settings
    shaped, metrics = entropic(tokens, actuator=loop.actuator, probability=settings.entropic_probability)
    trace = loop.trace("entropic", settings.entropic_target, tokens.mask)
    return shaped, metrics | trace | constants("entropic", {"integral": loop.integral}, tokens.mask)


ENTROPIC = Control(
    name="EntroPIC",
    prefix="entropic",
    summary="A proportional-integral controller holds the mean entropy at a target, from both sides: it weights "
    "the loss of probable tokens up or down by the sign of their advantage.",
    published="0.1 (rollouts at temperature 0.6), 1, 0.01, 0.95",
    paper="EntroPIC: Towards Stable Long-Term Training of LLMs via Entropy Stabilization with "
    "Proportional-Integral Control",
    arxiv="2511.15248",
    fields=("entropic_target", "entropic_kp", "entropic_ki", "entropic_probability"),
    check=check,
    loss_types=LINEAR_LOSSES,
    loss_reason="whose weights couple the tokens of a sequence",
    levels=("token",),
    level_reason="which mixes the weights of a sequence's tokens, and EntroPIC's are per token",
    steers_entropy=True,
    target_loop=TargetLoop("entropic", lambda target: {"entropic_target": target}),
    needs_old_entropies=True,
    needs_rollout_pass=True,
    state=lambda config: EntropyLoop(),
    on_rollout=on_rollout,
    shape=shape,
    metrics=(
        *loop_metrics(
            "`a`: probable tokens weigh `1 + a` where the advantage is positive, `1 - a` where it is negative",
            "-1 to 1",
            "above 0 while the entropy is too high, else below; at -1 or 1 for long, the target is out of reach",
        ),
        INTEGRAL,
        Metric("weighted_fraction", "share of tokens", "tokens whose weight is not 1", "steady"),
    ),
    marks=(
        Mark(
            "entropic_weighted",
            "I",
            "weighted by EntroPIC",
            "probable: weighted by EntroPIC to steer the entropy",
            ("#e6f4f1", "1px dashed", "#00695c"),
            "entropic/weighted_fraction",
        ),
    ),
    figures=(
        loop_figure(
            "entropic",
            "EntroPIC: entropy and its target",
            "actuator a",
            "Healthy: the entropy (line) comes to its target (dotted) and stays; an actuator that stays at -1 or 1 "
            "cannot hold it.",
        ),
    ),
    rules=(
        held_at_bound(
            "entropic",
            "EntroPIC",
            (-1.0, 1.0),
            "Try an entropic_target nearer to the policy's entropy, a smaller entropic_probability, by which more "
            "tokens are weighted, or a smaller learning_rate.",
        ),
    ),
    remedies=(
        ("entropy_collapse", "entropic_target at the entropy to be held"),
        ("entropy_explosion", "entropic_target at the entropy to be held"),
    ),
)
