"""The EPO recipes have the published settings and fit their environments; the study's page has its numbers."""

import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

from tests.test_recipes import parse, processes
from trl_entropy import AsyPPOConfig, EntropyGRPOConfig
from trl_entropy.recipes import recipe_names, recipes_dir
from trl_entropy.tasks import get_task

NAMES = [name for name in recipe_names() if re.match("epo-(grpo|ppo)-", name)]


@pytest.fixture(params=NAMES)
def recipe(request, tmp_path: Path, monkeypatch):
    """Name and parsed recipe, on as many processes as its header says."""
    for config in (EntropyGRPOConfig, AsyPPOConfig):
        monkeypatch.setattr(config, "world_size", property(lambda self: processes(request.param)))
    return request.param, *parse(request.param, tmp_path)[:3]


def test_they_are_there():
    models = ("scienceworld-qwen2.5-7b", "alfworld-qwen2.5-3b")
    assert set(NAMES) == {f"epo-{algorithm}-{model}" for algorithm in ("grpo", "ppo") for model in models}


def test_published_settings(recipe):
    """arXiv 2509.22576, and the command lines of its released code."""
    name, script, config, model = recipe
    science, ppo = "scienceworld" in name, "-ppo-" in name
    assert script.task == ("scienceworld" if science else "alfworld")
    assert model.model_name_or_path == f"Qwen/Qwen2.5-{'7B' if science else '3B'}-Instruct"
    assert (config.epo_coef, config.epo_gamma, config.epo_penalty) == (0.001, 3.0, 0.05 if science else 0.1)
    assert (config.epo_kappa_low, config.epo_kappa_high) == (0.0, 2.0)
    assert (config.epo_form, config.epo_schedule, config.epo_history) == ("hinge", "decay", "scalar")
    assert config.learning_rate == (3e-6 if science and ppo else 5e-6)
    assert config.lr_scheduler_type == "cosine_with_min_lr"
    assert config.lr_scheduler_kwargs == {"min_lr_rate": 0.2}
    assert (config.beta, config.max_completion_length) == (0.01, 512)
    assert isinstance(config, AsyPPOConfig) == ppo
    if ppo:
        assert (config.num_critics, config.gae_gamma, config.gae_lambda) == (1, 1.0, 1.0)
        assert (config.advantage_mask_fraction, config.entropy_filter_fraction) == (0.0, 0.0)


def test_schedule(recipe):
    """128 episodes a rollout in two optimizer steps; 125 or 150 rollouts, a tenth of them warm-up."""
    name, _, config, _ = recipe
    assert config.generation_batch_size == 128
    updates = config.steps_per_generation // config.gradient_accumulation_steps
    assert updates == 2
    assert config.max_steps == (125 if "scienceworld" in name else 150) * updates
    assert config.warmup_steps == config.max_steps // 10


def test_environment(recipe):
    _, script, config, _ = recipe
    arguments = script.environment_args
    assert set(arguments) <= set(inspect.signature(get_task(script.task).build_rollout).parameters)
    assert arguments["max_turns"] == (30 if script.task == "scienceworld" else 50)
    assert arguments["max_prompt_length"] == 2048
    longest = arguments["max_prompt_length"] + arguments["max_episode_tokens"] + config.max_completion_length
    assert config.vllm_max_model_length == longest


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("epo_oscillation", recipes_dir() / "study" / "epo_oscillation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_oscillation_by_hand(study):
    # ten steps that do not count, then changes of 1, -1 and 3: mean 1, squares 0, 4 and 4 over 2
    rollouts = [{"entropy": value} for value in [99.0] * 10 + [1.0, 2.0, 1.0, 4.0]]
    assert study.oscillation(rollouts) == pytest.approx(2.0)
    assert study.level(rollouts) == pytest.approx(2.0)


def test_interval_by_hand(study):
    # standard deviation of 1..5 is sqrt(2.5); 2.776 sqrt(2.5 / 5) = 1.963
    assert study.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.000 ± 1.963"


def test_decay_over_turns_by_hand(study):
    # turns of two, one and one tokens; and a single turn, which is the first
    mask = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0]]).bool()
    entropies = torch.arange(12.0).reshape(2, 6).requires_grad_()
    decayed = study.decay_over_turns(entropies, mask)
    assert torch.equal(decayed, entropies)
    decayed[mask].sum().backward()
    assert entropies.grad.tolist() == [[2, 2, 0, 1, 0, 0], [2, 2, 0, 0, 0, 0]]


def test_decaying_arm_of_single_turns_has_twice_the_bonus(study, make_trainer, tmp_path: Path):
    def weights(name: str, decaying: bool, **settings: float):
        trainer = make_trainer(tmp_path / name, trainer_class=study.RecordingTrainer, epo_penalty=0.5, **settings)
        trainer.decaying = decaying
        trainer.train()
        return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])

    decaying = weights("decaying", True, epo_coef=0.5, max_steps=5)
    assert torch.allclose(decaying, weights("twice", False, epo_coef=1.0, max_steps=5), atol=1e-6)
    assert not torch.allclose(decaying, weights("plain", False, epo_coef=0.5, max_steps=5), atol=1e-4)


def test_study_page_has_the_tables_of_its_results(study):
    results = json.loads(study.RESULTS.read_text(encoding="utf-8"))
    page = study.SECTION.read_text(encoding="utf-8")
    for setting in study.SETTINGS:
        runs = {arm: [results[f"{setting} / {arm} / {seed}"] for seed in study.SEEDS] for arm in study.ARMS}
        assert all(len(result["rollouts"]) == 60 for arm in runs.values() for result in arm)
        for minus in study.COMPARED.values():
            assert study.table(runs, minus) in page
    assert len(study.SEEDS) == 5
