"""What the quickstart trains: its arms, and how a kind of policy is trained and measured."""

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig

ARMS: dict[str, dict[str, Any]] = {
    "ppo-clip": {},
    "erc": {"erc_low": 0.95, "erc_high": 1.05},
    "ce-gppo": {"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0},
    "ce-gppo+erc": {"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0, "erc_low": 0.95, "erc_high": 1.05},
    # two critics that start from the policy's weights, as the recipe asyppo-corridor has them
    "asyppo": {
        "num_critics": 2,
        "critic_learning_rate": 1e-3,
        "critic_warmup_rollouts": 2,
        "advantage_mask_fraction": 0.2,
        "entropy_filter_fraction": 0.2,
        "entropy_coef": 0.001,
    },
}
"""The arms: what each sets beside the recipe `quickstart`; the one that sets `num_critics` has AsyPPO's trainer."""

WITHOUT_ASYPPO = (
    "AsyPPO is left out: to judge a sum its critics would have to know it, and so small ones explain 1 to 3 % of the "
    "returns, where the exact values explain 46 %. With --arms ppo-clip,asyppo it is trained all the same."
)

ADAPTED_CRITICS = {
    "critic_learning_rate": 3e-4,
    "critic_per_device_train_batch_size": 16,
    # an answer that fills max_completion_length has failed
    "bootstrap_truncated": False,
}
"""What AsyPPO's critics need otherwise where they are adapters on a pretrained model."""


@dataclass(frozen=True)
class Setup:
    """How a kind of policy is trained and measured.

    Attributes:
        recipe: The recipe that all arms share.
        arms: What each sets beside the recipe.
        num_threads: A fixed number, because sums in another order round differently and results must not depend on the
            environment.
        without_asyppo: Why its arm is trained only where it is named; empty if it is trained by default.
        num_problems: Held-out problems to measure on; `None` for all.
        critic_adapter: Of AsyPPO's critics; `None` to train all their weights.
    """

    recipe: str
    arms: dict[str, dict[str, Any]]
    num_threads: int
    without_asyppo: str = ""
    num_problems: int | None = None
    critic_adapter: LoraConfig | None = None

    @property
    def default_arms(self) -> list[str]:
        return [name for name in self.arms if name != "asyppo" or not self.without_asyppo]


# One thread, because so small a network gains little from more, and loses much when they wait for each other on a busy
# machine.
SMALL = Setup("quickstart", ARMS, num_threads=1, without_asyppo=WITHOUT_ASYPPO)
PRETRAINED = Setup(
    "quickstart-smollm2-135m-lora",
    {**ARMS, "asyppo": {**ARMS["asyppo"], **ADAPTED_CRITICS}},
    num_threads=2,
    without_asyppo=(
        "AsyPPO is left out for its time, three times that of another arm. With --arms ppo-clip,asyppo it is trained: "
        "here its critics come to explain more than a third of the variance of the returns."
    ),
    num_problems=256,
    critic_adapter=LoraConfig(task_type="TOKEN_CLS", r=16, lora_alpha=32, target_modules="all-linear"),
)
