"""Everything the study varies and everything it holds still. Changed values make other runs, with other names."""

from dataclasses import dataclass
from itertools import product
from typing import Any

SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100
"""Its runs choose the learning rates and are in no table."""
LEARNING_RATES = {
    "arithmetic": (3e-5, 6e-5, 1.2e-4),
    "spell_backward": (3e-5, 6e-5, 1.2e-4),
    "corridor": (3e-4, 6e-4, 1.2e-3),
}
COMMON_LEARNING_RATE = 6e-5
"""Where arms are compared at the same one."""
DEGREE = 8
"""Optimizer steps per rollout (the off-policy degree), as both Klear papers have it."""

TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 64,  # a rollout has 64 x degree completions
    "num_generations": 8,
    "max_steps": 128,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "loss_type": "dapo",
    "beta": 0.0,
    "epsilon": 0.2,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
TASKS: dict[str, dict[str, Any]] = {
    "arithmetic": {"max_completion_length": 4},
    "spell_backward": {"max_completion_length": 8},
    # a turn is one letter, an episode up to 20 turns
    "corridor": {
        "max_completion_length": 1,
        "per_device_train_batch_size": 32,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "num_generations_eval": 1,
        "per_device_eval_batch_size": 100,
    },
}

DAPO = {"epsilon_high": 0.28}
GSPO = {"importance_sampling_level": "sequence", "epsilon": 0.05}  # the mean over a sequence varies less than a token
ERC = {"erc_low": 0.95, "erc_high": 1.05}
GPPO = {"ce_gppo_alpha1": 1.0, "ce_gppo_alpha2": 1.0}
CE_GPPO = {"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0}
PPO = {
    "critics": "small",
    "num_critics": 1,
    "critic_learning_rate": 1e-3,
    "critic_warmup_rollouts": 2,
    "bootstrap_truncated": True,
    "advantage_mask_fraction": 0.0,
    "entropy_filter_fraction": 0.0,
    "entropy_coef": 0.001,
}
ASYPPO = {**PPO, "num_critics": 2, "advantage_mask_fraction": 0.2, "entropy_filter_fraction": 0.2}
EPO = {"epo_coef": 0.02, "epo_penalty": 2.0}
OWN_SETTINGS = ("critics", "shared_data", "mask_by", "gate")
"""Not of a trainer's configuration: what the critics start from, and the ablations (see `probes.py`)."""

ARMS: dict[str, dict[str, Any]] = {
    "ppo-clip": {},
    "dapo": DAPO,
    "erc": {**DAPO, **ERC},
    "erc-random": {**DAPO, **ERC, "gate": "random"},
    "erc-away": {**DAPO, **ERC, "gate": "away"},
    "erc-wide": {**DAPO, "erc_low": 0.8, "erc_high": 1.25},
    "kl": {**DAPO, "beta": 0.1},
    "bonus": {**DAPO, "entropy_coef": 0.01},
    "ce-gppo": CE_GPPO,
    "gppo": GPPO,
    "ce-gppo-0-1": {"ce_gppo_alpha1": 0.0, "ce_gppo_alpha2": 1.0},
    "ppo-small": PPO,
    "ppo-symmetric": {**PPO, "critics": "policy"},
    "asyppo": ASYPPO,
    "asyppo-shared-data": {**ASYPPO, "shared_data": True},
    "asyppo-entropy-mask": {**ASYPPO, "mask_by": "entropy"},
    "gspo": GSPO,
    "erc+gspo": {**GSPO, **ERC},
    "erc+gppo": {**GPPO, **ERC},
    "erc+ce-gppo": {**CE_GPPO, **ERC},
    "ce-gppo+epo": {**CE_GPPO, **EPO},
    "asyppo+ce-gppo": {**ASYPPO, **CE_GPPO},
    "asyppo+erc": {**ASYPPO, **ERC},
    "epo": EPO,
    "asyppo+epo": {**ASYPPO, **EPO, "entropy_coef": 0.0},
}
"""What each arm sets beside `TRAINING`."""

ABLATIONS = ("erc-random", "erc-away", "erc-wide")
EPO_ARMS = ("epo", "ce-gppo+epo", "asyppo+epo")
CRITIC_ARMS = tuple(name for name, settings in ARMS.items() if "critics" in settings and name not in EPO_ARMS)
POLICY_ARMS = tuple(name for name in ARMS if name not in (*CRITIC_ARMS, *EPO_ARMS, *ABLATIONS))
TUNED = {
    "arithmetic": (*POLICY_ARMS, "ppo-small", "ppo-symmetric", "asyppo"),
    "spell_backward": POLICY_ARMS,
    "corridor": ("ppo-clip", "dapo", "erc", "erc-away", "ce-gppo", *EPO_ARMS, *CRITIC_ARMS),
}
"""The arms of each task, tuned alike and then trained with every seed. Critics are on the task whose values can be
learnt from so few rollouts, and some of them on one where they cannot, as a control; EPO is for turns."""

COMMON_TASK = "arithmetic"
DEGREES = (4, 8, 16)
DEGREE_ARMS = ("ppo-clip", "dapo", "erc", "ce-gppo-0-1", "ce-gppo", "gppo", "kl", "bonus")
STEEP_LEARNING_RATE, STEEP_DEGREE = 4e-4, 16
"""Where PPO-clip comes apart: for the arms of the degrees, and for the ablations, which have this degree alone."""
ON_POLICY_ARMS = ("ppo-clip", "erc")
"""At degree 1 nothing can be clipped: these must be one and the same run."""
ALPHAS = (0.0, 0.5, 1.0)
ALPHAS_DEGREE = 16
ALPHA_ARMS = {pair: f"ce-gppo({pair[0]:g},{pair[1]:g})" for pair in product(ALPHAS, ALPHAS)}
ALPHA_ARMS |= {(0.0, 0.0): "ppo-clip", (0.0, 1.0): "ce-gppo-0-1", (1.0, 1.0): "gppo"}
"""CE-GPPO with every pair of `alpha1` and `alpha2`; three of them are arms already."""
ALL_ARMS = {
    name: {"ce_gppo_alpha1": alpha1, "ce_gppo_alpha2": alpha2} for (alpha1, alpha2), name in ALPHA_ARMS.items()
} | ARMS


@dataclass(frozen=True)
class Run:
    """One training run; its name is the key of its result."""

    task: str
    arm: str
    degree: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.arm}/{self.degree}/{self.learning_rate:g}/{self.seed}"

    @staticmethod
    def parse(name: str) -> "Run":
        """The run of a name.

        Raises:
            ValueError: If it is not one.
        """
        parts = name.split("/")
        if len(parts) != 5 or parts[0] not in TASKS or parts[1] not in ALL_ARMS:
            raise ValueError(
                f"{name!r} is not task/arm/degree/learning rate/seed with a task and an arm of settings.py."
            )
        return Run(parts[0], parts[1], int(parts[2]), float(parts[3]), int(parts[4]))


def tuning_runs(task: str, arm: str) -> list[Run]:
    """One run per learning rate."""
    return [Run(task, arm, DEGREE, learning_rate, TUNING_SEED) for learning_rate in LEARNING_RATES[task]]


def with_seeds(task: str, arm: str, degree: int, learning_rate: float) -> list[Run]:
    """The runs of a cell of the tables."""
    return [Run(task, arm, degree, learning_rate, seed) for seed in SEEDS]


def common_runs(arm: str) -> list[Run]:
    """An arm's runs that are not tuned: off-policy degrees, the steep setting, the grid of CE-GPPO's weights."""
    degrees = [1] if arm in ON_POLICY_ARMS else []
    degrees += DEGREES if arm in DEGREE_ARMS else [STEEP_DEGREE] if arm in ABLATIONS else []
    degrees += [ALPHAS_DEGREE] if arm in ALPHA_ARMS.values() else []
    cells = [(degree, COMMON_LEARNING_RATE) for degree in degrees]
    cells += [(STEEP_DEGREE, STEEP_LEARNING_RATE)] if arm in (*DEGREE_ARMS, *ABLATIONS) else []
    return [run for cell in cells for run in with_seeds(COMMON_TASK, arm, *cell)]
