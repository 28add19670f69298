"""The methods on SmolLM2-135M with 512 completions a rollout, on the schedule of the recipe of the quickstart."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback

from trl_entropy.commands import quickstart_setups as quickstart
from trl_entropy.commands.train import TrainingPlan, open_trainer, prepare
from trl_entropy.evaluation.estimates import estimate, pass_at_k
from trl_entropy.recipes import recipe_path
from trl_entropy.tasks import arithmetic, tiny_policy

RECIPE = quickstart.PRETRAINED.recipe
ROLLOUT = {"per_device_train_batch_size": 64, "num_generations": 8, "steps_per_generation": 8, "max_steps": 320}
"""64 prompts x 8 completions in 8 optimizer steps, 40 times."""
ERC = quickstart.ARMS["erc"]
_ASYPPO = {"critics": "policy", "critic_lora_r": 16, **quickstart.PRETRAINED.arms["asyppo"]}
ARMS: dict[str, dict[str, Any]] = {
    "ppo-clip": {},
    "erc": ERC,
    "ce-gppo": quickstart.ARMS["ce-gppo"],
    "ce-gppo+erc": quickstart.ARMS["ce-gppo+erc"],
    "clip-higher": {"epsilon_high": 0.28},
    "epo": {"epo_coef": 0.02},
    "stare": {"stare_target_entropy": 0.3, "stare_variant": "C2", "stare_adaptive_step": 0.01},
    "erc, bf16 autocast": {**ERC, "bf16": True},
    "erc, target share": {**ERC, "erc_target_fraction": 0.2},
    "dppo": {"dppo_divergence": "tv"},
    "asyppo": _ASYPPO,
}
"""What each sets beside the recipe; the published values where a paper has some."""
SAMPLES, KS = 32, (1, 8, 32)
PROBLEMS, AT_ONCE = 128, 16


def prepare_arm(name: str, seed: int, folder: Path, dry_run: bool) -> tuple[TrainingPlan, dict[str, Any]]:
    """The checked plan of an arm, and what it sets beside the recipe.

    In a dry run a policy of random weights learns to begin its answers with an odd character.
    """
    settings = {**ROLLOUT, **ARMS[name], "seed": seed, "record_tokens": 0, "disable_tqdm": True}
    if dry_run:
        settings |= {"per_device_train_batch_size": 8, "max_steps": 16, "model_name_or_path": tiny(folder)}
        settings |= {"task": "arithmetic", "task_args": "{}", "use_cpu": True, "use_peft": False}
        settings |= {"reward_funcs": "tests.conftest.parity_reward", "learning_rate": 1e-2}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return prepare(["--config", str(recipe_path(RECIPE)), *words, "--output_dir", str(folder / "run")]), settings


def train_arm(name: str, seed: int, dry_run: bool) -> dict[str, Any]:
    """Train an arm, and sample the held-out problems.

    Returns:
        `log` with step, reward, entropy and what the controls did of every rollout; `held_out` with pass@k, each with
        its 95 % interval over problems; `recipe`, and the `settings` beside it.
    """
    with tempfile.TemporaryDirectory() as folder:
        plan, settings = prepare_arm(name, seed, Path(folder), dry_run)
        problems = plan.task.load("test", **(plan.script.task_args or {}))
        problems = problems.select(range(4 if dry_run else PROBLEMS))
        with open_trainer(plan) as trainer:
            for printer in (ProgressCallback, PrinterCallback):
                trainer.remove_callback(printer)
            trainer.train()
            log = [{k: v for k, v in entry.items() if _is_told(k)} for entry in trainer.state.log_history]
            found = held_out(trainer, plan, problems)
    return {"recipe": RECIPE, "settings": settings, "log": log[:-1], "held_out": found}


def tiny(folder: Path) -> str:
    """A policy for the task `arithmetic`, with random weights."""
    tokenizer = tiny_policy.make_tokenizer(arithmetic.CHARACTERS)
    torch.manual_seed(0)
    model = tiny_policy.make_model(tokenizer, hidden_size=32, num_layers=2, max_length=64)
    tiny_policy.save_policy(model, tokenizer, str(folder / "policy"))
    return str(folder / "policy")


def _is_told(key: str) -> bool:
    control = "/" in key and not key.startswith(("completions/", "profiling/", "rewards/"))
    return control or key in ("step", "reward", "entropy", "grad_norm", "completions/mean_length")


@torch.no_grad()
def held_out(trainer: Any, plan: TrainingPlan, problems: Any) -> dict[str, Any]:
    """Share of the problems that at least one of `k` samples at temperature 1 solves, and its 95 % interval."""
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model).eval(), trainer.processing_class
    samples = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": SAMPLES}
    correct: list[int] = []
    torch.manual_seed(plan.config.seed)
    for start in range(0, len(problems), AT_ONCE):
        rows = problems.select(range(start, min(start + AT_ONCE, len(problems))))
        columns = {key: [v for v in rows[key] for _ in range(SAMPLES)] for key in rows.column_names}
        encoded = tokenizer(list(rows["prompt"]), return_tensors="pt", padding=True, padding_side="left")
        with trainer.accelerator.autocast() if plan.config.bf16 else contextlib.nullcontext():
            ids = model.generate(
                **encoded.to(model.device), max_new_tokens=plan.config.max_completion_length, **samples
            )
        texts = tokenizer.batch_decode(ids[:, encoded.input_ids.shape[1] :], skip_special_tokens=True)
        rewards = plan.reward_funcs[0](completions=texts, **{"prompts": columns.pop("prompt"), **columns})
        correct += [sum(r >= 1.0 for r in rewards[i : i + SAMPLES]) for i in range(0, len(rewards), SAMPLES)]
    passed = {k: estimate([pass_at_k(SAMPLES, count, k) for count in correct]) for k in KS}
    return {f"pass@{k}": [e.value, e.low, e.high] for k, e in passed.items()}
