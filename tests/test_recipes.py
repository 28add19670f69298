"""Every shipped recipe parses into a config, and does the schedule that its header promises."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import ModelConfig

from trl_entropy import AsyPPOConfig, EntropyGRPOConfig
from trl_entropy.commands import train
from trl_entropy.pretrained import INSTALL, SMOLLM2
from trl_entropy.recipes import recipe_names, recipe_path, recipes_dir
from trl_entropy.tasks import get_task
from trl_entropy.tasks.rewards import load_reward_func

RECIPES = [name for name in recipe_names() if "/" not in name]  # the others say how to launch
KLEAR = [name for name in RECIPES if re.match("(erc|ce-gppo)-r1-distill-qwen-", name)]
PRETRAINED = [name for name in RECIPES if SMOLLM2 in name]
ASYPPO = [name for name in RECIPES if name.startswith("asyppo-")]
SETTINGS = {name: yaml.safe_load(recipe_path(name).read_text(encoding="utf-8")) for name in RECIPES}
COLOCATED = [name for name in RECIPES if SETTINGS[name].get("vllm_mode") == "colocate"]
BILLIONS = {
    "DeepSeek-R1-Distill-Qwen-1.5B": 1.78,
    "DeepSeek-R1-Distill-Qwen-7B": 7.62,
    "Qwen2.5-3B-Instruct": 3.09,
    "Qwen2.5-7B-Instruct": 7.62,
    "Qwen3-4B-Base": 4.02,
    "Qwen3-8B-Base": 8.19,
    "Qwen3-14B-Base": 14.77,
}
"""Parameters, as the models' pages have them."""


def header(name: str) -> str:
    lines = recipe_path(name).read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines[: lines.index("")])


def processes(name: str) -> int:
    """The number of processes in the header's command."""
    found = re.search(r"--num_processes (\d+)", header(name))
    assert found is not None, f"{name}: the header's command has no --num_processes"
    return int(found.group(1))


def parse(name: str, output_dir: Path) -> tuple[Any, ...]:
    """The recipe, parsed on a machine without a GPU."""
    return train.parse(["--config", str(recipe_path(name)), "--output_dir", str(output_dir), "--use_cpu", "true"])


def test_the_recipes_are_there() -> None:
    assert {f"{m}-r1-distill-qwen-{s}" for m in ("erc", "ce-gppo") for s in ("1.5b", "7b")} <= set(KLEAR)
    assert {f"{m}-r1-distill-qwen-{s}-lora" for m in ("erc", "ce-gppo") for s in ("1.5b", "7b")} <= set(KLEAR)
    assert "quickstart" in recipe_names()
    assert recipe_path(KLEAR[0]) == recipes_dir() / f"{KLEAR[0]}.yaml"


def test_unknown_recipe_lists_those_that_exist() -> None:
    with pytest.raises(FileNotFoundError, match=r"no recipe 'nope'.*erc-r1-distill-qwen-1\.5b"):
        recipe_path("nope")


@pytest.mark.parametrize("name", RECIPES)
def test_header_says_how_to_run_it(name: str) -> None:
    assert re.search(rf"trl[-_]entropy.*recipes/{re.escape(name)}\.yaml|trl-entropy {name}", header(name), re.DOTALL)


@pytest.mark.parametrize("name", RECIPES)
def test_header_says_what_it_needs_and_what_to_expect(name: str) -> None:
    lines = header(name)
    assert re.search(r"^# Hardware:", lines, re.MULTILINE)
    assert re.search(r"^# (Aims for|To expect):", lines, re.MULTILINE)
    if "num_processes" in lines:
        assert re.search(r"^# Cost:.*(hours|minutes)", lines, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_becomes_a_config(name: str, tmp_path: Path) -> None:
    script, config, model, _ = parse(name, tmp_path)
    assert config.output_dir == str(tmp_path)
    task = get_task(script.task)
    assert model.model_name_or_path or task.build_policy
    assert [load_reward_func(reward) for reward in script.reward_funcs or []] or task.reward_funcs
    assert model.use_peft == ("-lora" in name)
    if model.use_peft:
        assert model.lora_dropout == 0.0


@pytest.mark.parametrize("name", KLEAR)
def test_klear_schedule(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 prompts x 8 completions a rollout, 8 optimizer steps of 16 x 8 completions, on the header's processes."""
    monkeypatch.setattr(EntropyGRPOConfig, "world_size", property(lambda self: processes(name)))
    _, config, _, _ = parse(name, tmp_path)
    assert config.generation_batch_size == 128 * config.num_generations == 1024
    assert config.steps_per_generation * config.num_iterations == 8 * config.gradient_accumulation_steps
    assert processes(name) * config.per_device_train_batch_size * config.gradient_accumulation_steps == 16 * 8


@pytest.mark.parametrize("name", KLEAR)
def test_klear_settings(name: str, tmp_path: Path) -> None:
    """The published settings, arXiv 2512.05591 and 2509.20712."""
    script, config, model, _ = parse(name, tmp_path)
    assert script.task == "maths"
    assert config.loss_type == "dapo"
    assert config.beta == 0.0
    assert config.delta == 10.0
    assert config.positive_nll_coef == 0.1
    assert config.temperature == 1.0
    context = (2048, 8192) if name.endswith("-24gb") else (4096, 16384)
    assert (script.max_prompt_length, config.max_completion_length) == context
    assert config.vllm_max_model_length == sum(context)
    assert (config.weight_decay, config.max_grad_norm, config.warmup_steps) == (0.1, 1.0, 10)
    assert config.learning_rate == (1e-5 if model.use_peft else 1e-6)
    assert config.lr_scheduler_type == "constant_with_warmup"
    assert str(model.model_name_or_path).lower().endswith("7b" if "7b" in name else "1.5b")
    # ERC's bounds are finer than bfloat16. LoRA's frozen weights have autocast's type: a mixture becomes float32
    precision = "float16" if name.startswith("erc") else "bfloat16"
    assert (config.fp16, config.bf16) == (precision == "float16", precision == "bfloat16")
    assert model.dtype == (precision if model.use_peft else ModelConfig("x").dtype)
    if name.startswith("erc"):
        assert config.erc_entropy_floor == 1e-8
        assert (config.erc_low, config.erc_high) == (0.95, 1.05)
        assert (config.epsilon, config.epsilon_high) == (0.2, 0.28)
        assert not config.ce_gppo_enabled
    else:
        assert (config.ce_gppo_alpha1, config.ce_gppo_alpha2) == (0.75 if "7b" in name else 0.5, 1.0)
        assert (config.epsilon, config.epsilon_high) == (0.2, 0.2)
        assert not config.erc_enabled


@pytest.mark.parametrize("name", ASYPPO)
def test_asyppo_recipes_select_its_trainer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two critics and both fractions 0.2, arXiv 2510.01656; 4 optimizer steps a rollout on the header's processes."""
    if name != "asyppo-corridor":
        monkeypatch.setattr(AsyPPOConfig, "world_size", property(lambda self: processes(name)))
    script, config, model, _ = parse(name, tmp_path)
    assert isinstance(config, AsyPPOConfig)
    assert script.critics
    assert (config.num_critics, config.critic_gae_lambda) == (2, 1.0)
    assert (config.advantage_mask_fraction, config.entropy_filter_fraction) == (0.2, 0.2)
    assert config.entropy_coef > 0
    if name != "asyppo-corridor":
        assert config.num_generations == 32
        assert config.generation_batch_size == 32 * 32
        assert config.steps_per_generation == 4 * config.gradient_accumulation_steps
        assert bool(script.critic_lora_r) == model.use_peft == name.endswith("-lora")


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretrained_model_in_float32_with_eight_updates_a_rollout(name: str, tmp_path: Path) -> None:
    script, config, model, _ = parse(name, tmp_path)
    assert (model.model_name_or_path, script.task) == (SMOLLM2, "reasoning_gym")
    assert (model.dtype, config.bf16, config.fp16) == ("float32", False, False)
    assert config.steps_per_generation * config.num_iterations // config.gradient_accumulation_steps == 8
    assert INSTALL in header(name)
    assert isinstance(config, AsyPPOConfig) == bool(script.critics) == ("asyppo" in name)
    controls = ("erc", config.erc_enabled), ("ce-gppo", config.ce_gppo_enabled), ("epo", config.epo_enabled)
    assert all(enabled == (control in name) for control, enabled in controls)


@pytest.mark.parametrize("name", COLOCATED)
def test_vllms_share_of_a_gpu_holds_its_weights(name: str) -> None:
    """By calculation, in bfloat16, beside 3 GiB of working space, on the smallest card of the header's size."""
    recipe, card = SETTINGS[name], 22.0 if name.endswith("24gb") else 79.0
    billions = BILLIONS[recipe["model_name_or_path"].partition("/")[2]]
    weights = 2e9 * billions / 2**30 / recipe.get("vllm_tensor_parallel_size", 1)
    assert weights + 3.0 < recipe["vllm_gpu_memory_utilization"] * card
    assert processes(name) % recipe.get("vllm_tensor_parallel_size", 1) == 0


def test_without_critics_the_trainer_is_not_asyppos(tmp_path: Path) -> None:
    _, config, _, _ = parse("quickstart", tmp_path)
    assert not isinstance(config, AsyPPOConfig)


@pytest.mark.slow
def test_critics_of_the_corridor_recipe_learn(tmp_path: Path) -> None:
    """What they explain, rollout by rollout, in a run of three after the two for the critics alone."""
    recipe = str(recipe_path("asyppo-corridor"))
    train.main(["--config", recipe, "--output_dir", str(tmp_path), "--max_steps", "24", "--disable_tqdm", "true"])
    state = json.loads((tmp_path / "trainer_state.json").read_text(encoding="utf-8"))
    explained = [entry["asyppo/explained_variance"] for entry in state["log_history"] if "loss" in entry]
    assert len(explained) == 3
    assert explained[-1] > 0.1
