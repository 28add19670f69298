"""Gradients of `compute_loss` against the papers' formulas, to ten digits, through the real trainer.

The forward of TRL's class is replaced by one that returns float64 leaves for the log-probs and the entropies. What is
left is everything that turns them into a loss, and the gradient with respect to the leaves is compared with that of
`tests/reference.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.reference import Batch, Settings
from tests.stubbed import gradients, trainer_gradients, trainer_inputs

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LEVELS = ("token", "sequence")
ERC: dict[str, Any] = {"erc": (0.9, 1.3)}  # not symmetric in the logarithm, so that a ratio upside down shows
CE_GPPO: dict[str, Any] = {"alphas": (0.75, 1.1)}
NLL: dict[str, Any] = {"nll_coef": 0.1}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "ppo_clip": {},
    "erc": ERC,
    "ce_gppo": CE_GPPO,
    "nll": NLL,
    "erc+ce_gppo": ERC | CE_GPPO,
    "erc+nll": ERC | NLL,
    "ce_gppo+nll": CE_GPPO | NLL,
    "erc+ce_gppo+nll": ERC | CE_GPPO | NLL,
}
ALL = COMBINATIONS["erc+ce_gppo+nll"]
BASE = Settings(
    eps_lo=0.2,
    eps_hi=0.28,  # unlike eps_lo, so that a swap shows
    max_completion_length=7,
    accumulation=2,
    micro_batches_per_rollout=4,
    sapo_temperatures=(1.0, 1.125),  # exact in float32, in which TRL holds them
)
LENGTHS = (7, 6, 7, 5, 7, 4, 6, 7)


def random_batch(
    seed: int, *, lengths: tuple[int, ...] = LENGTHS, tools: bool = False, per_token_advantages: bool = False
) -> tuple[Batch, dict[str, Tensor]]:
    """A micro-batch of eight rows in float64, and the same as the trainer's inputs.

    The rows' mean log-ratios and the signs of their advantages cover the classes of CE-GPPO at sequence level, the
    tokens' own ratios do at token level. About half of the entropy ratios lie outside 0.9..1.3, and the first row has
    entropies around the floor of 1e-8. Masked positions have drifted far to the other side.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)

    size = len(lengths), max(LENGTHS)
    completion_mask = (torch.arange(size[1]) < torch.tensor(lengths).unsqueeze(1)).long()
    tool_mask = (uniform(0, 1, *size) < 0.7).long() if tools else torch.ones(size, dtype=torch.long)
    tool_mask[completion_mask == 0] = 1  # as TRL pads it
    mask = completion_mask * tool_mask

    row_drift = torch.tensor([0.05, -0.5, 0.5, 0.5, -0.5, -0.05, 0.35, -0.35], dtype=torch.float64)
    row_sign = torch.tensor([1, 1, 1, -1, -1, -1, 1, -1], dtype=torch.float64)
    noise = 0.35 * torch.randn(size, generator=g, dtype=torch.float64)
    noise = noise - (noise * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    log_ratio = torch.where(mask.bool(), row_drift.unsqueeze(1) + noise, -4 * row_drift.unsqueeze(1))
    lp = -uniform(0.05, 4.0, *size)

    # Entropies that float32 holds exactly: TRL takes its quantile in float32, and rounding must not decide a token.
    entropy = uniform(0.05, 2.5, *size).float().double()
    outside = torch.where(uniform(0, 1, *size) < 0.5, uniform(0.5, 0.89, *size), uniform(1.31, 2.0, *size))
    entropy_ratio = torch.where(uniform(0, 1, *size) < 0.5, uniform(0.91, 1.29, *size), outside)
    entropy_old = entropy / entropy_ratio
    entropy[0, :4] = torch.tensor([0.0, 0.0, 0.0, 2.0**-24], dtype=torch.float64)
    entropy_old[0, :4] = torch.tensor([0.0, 5e-9, 2e-8, 0.0], dtype=torch.float64)

    advantages = torch.randn(size, generator=g, dtype=torch.float64)
    if not per_token_advantages:
        advantages = row_sign * uniform(0.3, 1.5, 8)
    rewards = torch.tensor([1.0, 0.0, 2.5, 0.99, 0.5, 1.0, 1.0, 0.0], dtype=torch.float64)
    batch = Batch(
        lp=lp.requires_grad_(),
        entropy=entropy.requires_grad_(),
        mask=mask,
        advantages=advantages,
        num_items=171.0,
        lp_old=lp.detach() - log_ratio,
        entropy_old=entropy_old,
        lp_ref=lp.detach() + 0.3 * torch.randn(size, generator=g, dtype=torch.float64),
        rewards=rewards,
        num_correct_tokens=83.0,
    )
    return batch, trainer_inputs(batch, completion_mask, tool_mask if tools else None)


def check(trainer: Any, s: Settings, b: Batch, inputs: dict[str, Tensor]) -> None:
    expected = reference.loss(b, s)
    loss, found = trainer_gradients(trainer, b, inputs)
    for name, got, want in zip(("log-probs", "entropies"), found, gradients(expected, b), strict=True):
        scale = want.abs().max().item()
        close = torch.isclose(got, want, rtol=1e-10, atol=1e-13 * scale)
        assert close.all(), (
            f"gradients of the {name} at {(~close).nonzero().tolist()}: {got[~close]}, not {want[~close]}"
        )
    assert loss.isfinite()
    # ERC on a token's term and the dual clip drop a constant that the papers leave in the reported loss.
    if (s.erc is None or reference.gates_the_ratio(s)) and (s.alphas is None or s.dual_clip is None):
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-14)


def test_the_random_batches_reach_every_branch() -> None:
    """Without this, a comparison could pass because no token was clipped."""
    for seed in range(3):
        b, _ = random_batch(seed)
        for level in LEVELS:
            s = replace(BASE, level=level, **ALL)
            counts: dict[tuple[str, bool], int] = {}
            for i, t in reference.valid_tokens(b):
                r, a = reference.ratio(b, s, i, t).item(), reference.advantage(b, i, t)
                region = "low" if r < 1 - s.eps_lo else "high" if r > 1 + s.eps_hi else "inside"
                key = (f"{region}, {'A > 0' if a > 0 else 'A < 0'}", reference.keeps_gradient(b, s, i, t))
                counts[key] = counts.get(key, 0) + 1
            assert len(counts) == 12, counts
            clipped = [sum(counts[key, kept] for kept in (True, False)) for key in ("low, A < 0", "high, A > 0")]
            assert min(clipped) >= 8, clipped  # of 49 tokens


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("controls", COMBINATIONS)
def test_controls(build: Callable[..., Any], controls: str, level: str, loss_type: str, beta: float) -> None:
    # Refused with the bias correction of the KL term: CE-GPPO, and ERC on the ratio of a sequence.
    refused = "ce_gppo" in controls or ("erc" in controls and level == "sequence")
    s = replace(
        BASE,
        level=level,
        loss_type=loss_type,
        beta=beta,
        kl_times_ratio=beta > 0 and not refused,
        **COMBINATIONS[controls],
    )
    trainer = build(s)
    for seed in range(2):
        check(trainer, s, *random_batch(seed))


@pytest.mark.parametrize("alphas", [(1.0, 1.0), (0.5, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (2.0, 0.3)])
@pytest.mark.parametrize("level", LEVELS)
def test_ce_gppo_alphas(build: Callable[..., Any], level: str, alphas: tuple[float, float]) -> None:
    s = replace(BASE, level=level, alphas=alphas)
    check(build(s), s, *random_batch(0))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_ce_gppo_with_both_alphas_zero_is_ppo_clip(build: Callable[..., Any], level: str, loss_type: str) -> None:
    b, inputs = random_batch(3)
    s = replace(BASE, level=level, loss_type=loss_type)
    _, plain = trainer_gradients(build(s), b, inputs)
    _, zeros = trainer_gradients(build(replace(s, alphas=(0.0, 0.0))), b, inputs)
    torch.testing.assert_close(zeros, plain, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("controls", COMBINATIONS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "extra",
    [
        {"dual_clip": 1.5},
        {"top_entropy_fraction": 0.5},
        {"entropy_coef": 0.01},
        {"entropy_coef": 0.01, "top_entropy_fraction": 0.5},
        {"off_policy_threshold": 0.4},
        {"training": False},
        {"dual_clip": 1.5, "entropy_coef": 0.01, "top_entropy_fraction": 0.7, "off_policy_threshold": 0.4},
    ],
    ids=["delta", "top_entropy", "bonus", "bonus+top_entropy", "off_policy_mask", "eval", "all"],
)
def test_trl_options(build: Callable[..., Any], extra: dict[str, Any], level: str, controls: str) -> None:
    s = replace(BASE, level=level, **COMBINATIONS[controls] | extra)
    trainer = build(s)
    for per_token in (False, True):
        check(trainer, s, *random_batch(1, per_token_advantages=per_token))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("per_token", [False, True], ids=["group_advantages", "token_advantages"])
@pytest.mark.parametrize(
    "lengths", [LENGTHS, (7, 0, 7, 1, 7, 0, 1, 7), (0,) * 8], ids=["ragged", "masked_rows", "all_masked"]
)
def test_masks_and_advantage_shapes(
    build: Callable[..., Any], lengths: tuple[int, ...], per_token: bool, level: str, loss_type: str
) -> None:
    """Tool masks, rows masked by `mask_truncated_completions`, one-token rows; a critic's (B, T) advantages."""
    s = replace(BASE, level=level, loss_type=loss_type, entropy_coef=0.01, **ALL)
    trainer = build(s)
    for tools in (False, True):
        check(trainer, s, *random_batch(4, lengths=lengths, tools=tools, per_token_advantages=per_token))


@pytest.mark.parametrize("loss_type", ["cispo", "sapo"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("controls", ["ppo_clip", "erc", "nll", "erc+nll"])
def test_erc_without_ppo_clipping(build: Callable[..., Any], controls: str, level: str, loss_type: str) -> None:
    # For CISPO, TRL reads `epsilon_high` as the bound on the ratio itself.
    bound = 1.3 if loss_type == "cispo" else 0.28
    s = replace(BASE, level=level, loss_type=loss_type, eps_hi=bound, **COMBINATIONS[controls])
    trainer = build(s)
    check(trainer, s, *random_batch(0))
    check(trainer, s, *random_batch(1, tools=True, per_token_advantages=True))


@pytest.mark.parametrize(
    ("level", "loss_type", "kl_times_ratio"),
    [
        ("token", "dapo", False),
        ("token", "dapo", True),
        ("sequence", "dapo", False),
        ("sequence", "cispo", False),
        ("sequence", "cispo", True),
    ],
)
def test_kl_is_left_alone_by_erc(build: Callable[..., Any], level: str, loss_type: str, kl_times_ratio: bool) -> None:
    s = replace(BASE, level=level, loss_type=loss_type, beta=0.5, kl_times_ratio=kl_times_ratio, **ERC)
    check(build(s), s, *random_batch(2))


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize(
    ("controls", "loss_type"),
    [("erc", "sapo"), *((controls, loss_type) for controls in ("erc", "erc+ce_gppo") for loss_type in LOSS_TYPES)],
)
def test_erc_at_sequence_level_is_gspo_token_with_its_gate(
    build: Callable[..., Any], controls: str, loss_type: str, beta: float
) -> None:
    """And without a KL term a clipped token gets exactly no gradient."""
    s = replace(BASE, level="sequence", loss_type=loss_type, beta=beta, **COMBINATIONS[controls])
    b, inputs = random_batch(3)
    _, (found, _) = trainer_gradients(build(s), b, inputs)
    expected, _ = gradients(reference.gspo_token_loss(b, s), b)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-16)
    gated = [(i, t) for i, t in reference.valid_tokens(b) if not reference.keeps_gradient(b, s, i, t)]
    assert len(gated) > 15
    rows, columns = torch.tensor(gated).T
    assert bool((found[rows, columns] == 0.0).all()) is (beta == 0.0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("controls", COMBINATIONS)
def test_on_policy_rollouts_have_no_old_log_probs(build: Callable[..., Any], controls: str, level: str) -> None:
    s = replace(BASE, level=level, **COMBINATIONS[controls])
    b, _ = random_batch(0)
    b = replace(b, lp_old=None, entropy_old=None)
    check(build(s), s, b, trainer_inputs(b, b.mask))


@pytest.mark.parametrize("engine_shape", ["token", "sequence"])
@pytest.mark.parametrize("threshold", [None, 0.4])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("controls", COMBINATIONS)
def test_inference_engine_correction(
    build: Callable[..., Any], controls: str, level: str, threshold: float | None, engine_shape: str
) -> None:
    """The ratio scales the policy term only; the off-policy mask prefers the engine's own log-probs."""
    s = replace(BASE, level=level, off_policy_threshold=threshold, **COMBINATIONS[controls])
    b, _ = random_batch(2)
    assert b.lp_old is not None
    g = torch.Generator().manual_seed(0)
    weights = 0.5 + torch.rand(b.mask.shape, generator=g, dtype=torch.float64)
    b = replace(
        b,
        engine_ratio=weights if engine_shape == "token" else weights[:, :1],
        lp_sampling=2 * b.lp.detach() - b.lp_old,  # drifts the other way, so the off-policy mask drops other rows
    )
    trainer = build(s)
    trainer.use_vllm = True
    check(trainer, s, b, trainer_inputs(b, b.mask))


@pytest.mark.parametrize("controls", ["ppo_clip", "erc", "erc+ce_gppo+nll"])
def test_adaptive_entropy_bonus(build: Callable[..., Any], controls: str) -> None:
    """The controller measures the policy's entropy, and applies its coefficient, whatever ERC gates."""
    s = replace(BASE, accumulation=1, **COMBINATIONS[controls])
    trainer = build(
        s,
        use_adaptive_entropy=True,
        entropy_coef=0.01,
        entropy_coef_delta=0.002,
        entropy_coef_max=0.1,
        entropy_target=5.0,
    )
    b, inputs = random_batch(0)
    check(trainer, s, b, inputs)  # nothing measured yet: no bonus
    assert trainer.entropy_coef == pytest.approx(0.012)
    assert trainer._last_world_entropy == pytest.approx(b.entropy[b.mask.bool()].mean().item())
    check(trainer, replace(s, entropy_coef=0.012), b, inputs)
    assert trainer.entropy_coef == pytest.approx(0.014)


def test_positive_nll_is_added_to_vespo(build: Callable[..., Any]) -> None:
    b, inputs = random_batch(0)
    s = replace(BASE, loss_type="vespo")
    _, (plain, _) = trainer_gradients(build(s), b, inputs)
    _, (added, _) = trainer_gradients(build(replace(s, nll_coef=0.3)), b, inputs)
    expected, _ = gradients(0.3 * reference.positive_nll(b, s), b)
    torch.testing.assert_close(added - plain, expected, rtol=1e-10, atol=1e-15)
