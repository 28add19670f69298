"""What the study varies and what it holds still, as `PREREGISTRATION.md` says."""

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

MODEL = "smollm2-135m"
SEEDS = (0, 1, 2, 3, 4)
MORE_SEEDS = (5, 6, 7, 8, 9)
"""Of the arms that a claim is decided on."""
TUNING_SEEDS = (100, 101)
"""Their runs choose the learning rates and are in no comparison."""
LEARNING_RATES = (5e-6, 1e-5, 2e-5)
MIDDLE_RATE = 1e-5
"""Where all arms are compared at the same one."""
RATE_STEP = 2.0
RATE_LIMITS = (1.25e-6, 8e-5)
"""The grid grows beyond a best rate at its edge by this factor, up to these."""
TASK, SECOND_TASK = "sums", "letters"
PASS_AT = (1, 2, 4, 8, 16, 32)

TRAINING: dict[str, Any] = {
    # 8 prompts x 8 completions a rollout, in 8 optimizer steps
    "per_device_train_batch_size": 8,
    "num_generations": 8,
    "steps_per_generation": 8,
    "max_steps": 192,
    "lr_scheduler_type": "constant",
    "loss_type": "dapo",
    "beta": 0.0,
    "epsilon": 0.2,
    "use_cpu": True,
    "bf16": True,  # autocast of float32 weights
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}

FLOAT32 = {"bf16": False}
REMEDY = {"cast_lm_head_to_fp32": True}
"""What `rounding.md` found to help ERC in bfloat16."""
ERC = {"erc_low": 0.95, "erc_high": 1.05}
CE_GPPO = {"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0}
TARGET_ENTROPY = 0.5
"""Nats; the policy that all arms start from has about four times that."""
PPO = {
    "num_critics": 1,
    "critic_learning_rate": 3e-4,
    "critic_per_device_train_batch_size": 16,
    "critic_warmup_rollouts": 2,
    "bootstrap_truncated": False,  # an answer that fills max_completion_length without a line break has failed
    "advantage_mask_fraction": 0.0,
    "entropy_filter_fraction": 0.0,
    "entropy_coef": 0.001,
}
CRITIC_ADAPTER: dict[str, Any] = {"task_type": "TOKEN_CLS", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}

BASE, BEST = "base", "best"
"""The model itself, measured as the others are, and the best combination, which is chosen among `ARMS`."""
ARMS: dict[str, dict[str, Any]] = {
    "ppo-clip": {},
    "erc": {**ERC, **REMEDY},
    "ce-gppo": CE_GPPO,
    "epo": {"epo_coef": 0.02, "epo_kappa_low": 0.8, "epo_kappa_high": 1.2, "epo_penalty": 0.1},
    "asyppo": {**PPO, "num_critics": 2, "advantage_mask_fraction": 0.2, "entropy_filter_fraction": 0.2},
    "clip-higher": {"epsilon_high": 0.28},
    "kl": {"beta": 0.1},
    "adaptive-entropy": {"use_adaptive_entropy": True, "entropy_target": TARGET_ENTROPY},
    "ppo-clip-float32": FLOAT32,
    "erc-float32": {**ERC, **FLOAT32},
    "erc-bf16": ERC,
    "ppo-critic": PPO,
    "erc-outward": {**ERC, **REMEDY, "erc_side": "outward"},
    "erc-target": {**ERC, **REMEDY, "erc_target_fraction": 0.2},
    "gppo": {"ce_gppo_alpha1": 1.0, "ce_gppo_alpha2": 1.0},
    "erc+ce-gppo": {**ERC, **REMEDY, **CE_GPPO},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "stare": {"stare_target_entropy": TARGET_ENTROPY},
    "dppo": {"dppo_divergence": "tv"},
    "kl-cov": {"kl_cov_coef": 1.0, "kl_cov_fraction": 0.02},
}
"""What each arm sets beside `TRAINING`."""
MAIN = ("ppo-clip", "erc", "ce-gppo", "epo", "asyppo", "clip-higher", "kl", "adaptive-entropy")
"""What is run first: the four papers' methods and what they are compared with. Also the arms of the second task."""
REST = tuple(arm for arm in ARMS if arm not in MAIN)
DECISIVE = (*MAIN, "ppo-clip-float32", "erc-float32", "erc-bf16", "ppo-critic")
"""The arms with ten seeds."""

Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One training run; its name is the key of its result."""

    task: str
    arm: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.arm}/{self.learning_rate:g}/{self.seed}"

    @staticmethod
    def parse(name: str) -> "Run":
        """The run of a name.

        Raises:
            ValueError: If it is not one.
        """
        try:
            task, arm, learning_rate, seed = name.split("/")
            run = Run(task, arm, float(learning_rate), int(seed))
        except ValueError:
            run = None
        if run is None or run.task not in (TASK, SECOND_TASK) or run.arm not in (BASE, *ARMS, BEST):
            raise ValueError(f"{name!r} is not task/arm/learning rate/seed with a task and an arm of arms.py.")
        return run


def base_run(task: str) -> Run:
    """The measurement of the model before any training."""
    return Run(task, BASE, 0.0, 0)


def failed(result: dict[str, Any]) -> bool:
    """Whether a run has ended with an error, which is then all that there is of it."""
    return "error" in result


def score(result: dict[str, Any]) -> float:
    """What a learning rate is chosen by: mean reward over the last half of a run's rollouts; a failed run is last."""
    if failed(result):
        return -math.inf
    rewards = result["reward"]
    return fmean(rewards[len(rewards) // 2 :])


def tuning_scores(task: str, arm: str, results: Results) -> dict[float, float]:
    """Mean `score` of each learning rate whose tuning runs are all there."""
    found: dict[float, list[float]] = {}
    for name, result in results.items():
        run = Run.parse(name)
        if (run.task, run.arm) == (task, arm) and run.seed in TUNING_SEEDS:
            found.setdefault(run.learning_rate, []).append(score(result))
    return {rate: fmean(scores) for rate, scores in found.items() if len(scores) == len(TUNING_SEEDS)}


def missing_rates(scores: dict[float, float]) -> list[float]:
    """The learning rates that tuning has to try next; none once the best one is inside the grid or at its limit."""
    if missing := [rate for rate in LEARNING_RATES if rate not in scores]:
        return missing
    best = best_rate(scores)
    beyond = best / RATE_STEP if best == min(scores) else best * RATE_STEP if best == max(scores) else None
    lowest, highest = RATE_LIMITS
    return [] if beyond is None or not lowest <= beyond <= highest else [beyond]


def best_rate(scores: dict[float, float]) -> float:
    """The learning rate with the highest score, the lower one of two."""
    return max(sorted(scores), key=lambda rate: scores[rate])


def tuned_rate(task: str, arm: str, results: Results) -> float | None:
    """The best learning rate, or `None` while tuning runs are missing."""
    scores = tuning_scores(task, arm, results)
    return None if missing_rates(scores) else best_rate(scores)
