"""The quickstart in seconds: two small steps an arm, and a policy that is not warmed up."""

from pathlib import Path

import pytest
import yaml

from trl_entropy.commands import quickstart
from trl_entropy.recipes import recipe_path
from trl_entropy.tasks import arithmetic


def digit_reward(completions: list[str], **columns: object) -> list[float | None]:
    """1 for a completion that begins with a digit, which a random policy does now and then."""
    return [float(completion[:1].isdigit()) for completion in completions]


def make_small(patch: pytest.MonkeyPatch, file: Path) -> None:
    """Have a recipe of two small steps, written to `file`, 64 held-out problems and `digit_reward`."""
    recipe = yaml.safe_load(recipe_path("quickstart").read_text(encoding="utf-8"))
    recipe |= {"per_device_train_batch_size": 16, "steps_per_generation": 2, "logging_steps": 1, "max_steps": 2}
    file.write_text(yaml.safe_dump(recipe))
    load = arithmetic.load
    task = arithmetic.Task(
        "arithmetic", lambda split, **task_args: load(split, 64, **task_args), (digit_reward,), arithmetic.build_policy
    )
    patch.setattr(quickstart, "recipe_path", lambda name: file)
    patch.setattr(arithmetic, "TASK", task)
    patch.setattr(arithmetic, "WARM_UP_ACCURACY", 0.0)
