"""The clipping controls, one after the other."""

from dataclasses import replace

from torch import Tensor

from .ce_gppo import ce_gppo
from .erc import ENTROPY_FLOOR, erc
from .importance import bounded_old_logps, clipped_by_ppo, log_importance_weight, ratio_of
from .tokens import PolicyTokens, TokenMean


def clip_controls(
    tokens: PolicyTokens,
    entropies: Tensor,
    old_entropies: Tensor | None,
    *,
    level: str,
    eps_low: float,
    eps_high: float,
    ce_gppo_alphas: tuple[float, float] | None = None,
    erc_bounds: tuple[float, float] | None = None,
    erc_entropy_floor: float = ENTROPY_FLOOR,
    delta: float | None = None,
    constant_ratio: bool = False,
) -> tuple[PolicyTokens, dict[str, TokenMean]]:
    """Run those that are on in their order; the first reads the raw ratio, each later one what the one before left.

    Args:
        tokens: The micro-batch.
        entropies: Of the policy being trained, nats, `(B, T)`.
        old_entropies: Of the rollout policy, nats, `(B, T)`; `None` where ERC is off.
        level: `"token"` or `"sequence"` (TRL's `importance_sampling_level`).
        eps_low: The clip range is `[1 - eps_low, 1 + eps_high]`.
        eps_high: See `eps_low`.
        ce_gppo_alphas: `(alpha1, alpha2)` of `ce_gppo`; `None` for off.
        erc_bounds: `(low, high)` of `erc`; `None` for off.
        erc_entropy_floor: Its floor, nats.
        delta: Dual clip, see `ce_gppo`.
        constant_ratio: Whether the loss takes the importance ratio as a constant weight (CISPO), so that each token's
            gradient is that of its own term at sequence level too.

    Returns:
        The micro-batch with shaped `advantages` and `old_logps`, `frozen` tokens where ERC clips at sequence level,
        and the metrics.

    Raises:
        KeyError: If ERC is on and `old_entropies` is `None`.
    """
    log_weight = log_importance_weight(tokens.logps, tokens.old_logps, tokens.mask, level)
    low, high = clipped_by_ppo(ratio_of(log_weight), tokens.advantages, eps_low, eps_high)
    metrics = {
        "ppo_clip/low_fraction": TokenMean(low, tokens.mask),
        "ppo_clip/high_fraction": TokenMean(high, tokens.mask),
    }
    tokens = replace(tokens, old_logps=bounded_old_logps(tokens.old_logps, log_weight))
    if ce_gppo_alphas is not None:
        alpha1, alpha2 = ce_gppo_alphas
        tokens, added = ce_gppo(
            tokens, log_weight, alpha1=alpha1, alpha2=alpha2, eps_low=eps_low, eps_high=eps_high, delta=delta
        )
        metrics |= added
    if erc_bounds is not None:
        if old_entropies is None:
            raise KeyError(
                "ERC needs the rollout's entropies: the micro-batch has `old_per_token_logps` and no "
                "`old_entropies`. Let the trainer make the rollout, or add them."
            )
        tokens, added = erc(
            tokens,
            entropies,
            old_entropies,
            low=erc_bounds[0],
            high=erc_bounds[1],
            floor=erc_entropy_floor,
            sequence_ratio=level == "sequence" and not constant_ratio,
        )
        metrics |= added
    return tokens, metrics
