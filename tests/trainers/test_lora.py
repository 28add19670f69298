"""LoRA policies: what trains, what is saved, and whose the reference and the old entropies are."""

import json
import os
import sys

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, set_seed

from tests.trainers.test_grpo import ALL_CONTROLS, assert_same_weights, logged, weights
from trl_entropy.commands import train

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def lora():
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def lora_trainer(make_trainer, output_dir=None, **settings):
    """A learning rate at which a few steps leave the trust region, so that every control acts."""
    set_seed(0)  # TRL 1.12 makes LoRA's weights before it seeds
    defaults = {"peft_config": lora(), "learning_rate": 0.05, "epsilon": 0.1, **ALL_CONTROLS}
    return make_trainer(output_dir, **{**defaults, **settings})


@pytest.fixture
def base(tiny_model):
    """The tiny policy without an adapter."""
    return tiny_model.eval()


@pytest.fixture
def ids():
    return torch.arange(2, 18).reshape(2, 8)


def test_the_adapter_trains_and_the_base_stays(make_trainer, base):
    trainer = lora_trainer(make_trainer, max_steps=6)
    start = weights(trainer)
    trainer.train()
    end = weights(trainer)
    assert {name for name in end if not torch.equal(end[name], start[name])} == {n for n in end if "lora_" in n}
    for name, value in base.state_dict().items():
        module, _, leaf = name.rpartition(".")
        names = [f"base_model.model.{name}", f"base_model.model.{module}.base_layer.{leaf}"]
        (found,) = [end[key] for key in names if key in end]
        assert torch.equal(found, value), name
    for key in ("erc/clip_fraction", "ce_gppo/low_fraction", "epo/outside_fraction", "positive_nll/token_fraction"):
        assert max(logged(trainer, key)) > 0.0, key


def test_saved_adapter_reloads_and_merges(make_trainer, tmp_path, base, ids):
    trainer = lora_trainer(make_trainer)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert saved
    assert all("lora_" in name for name in saved)
    with torch.no_grad():
        trained = trainer.model.eval()(ids).logits
        assert (trained - base(ids).logits).abs().max() > 0.1
        reloaded = PeftModel.from_pretrained(base, tmp_path / "saved").eval()
        assert torch.equal(reloaded(ids).logits, trained)
        merged = reloaded.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, trained, **CLOSE)
        merged.save_pretrained(tmp_path / "merged")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        assert torch.equal(plain(ids).logits, merged(ids).logits)


@pytest.mark.parametrize("settings", [{}, {"beta": 0.05, "use_bias_correction_kl": False}], ids=["no-kl", "kl"])
def test_resume_equals_an_uninterrupted_run(make_trainer, tmp_path, settings):
    """3 + 3 steps, with the checkpoint in the middle of a rollout of four, end at the weights of 6."""
    settings = {**settings, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = lora_trainer(make_trainer, tmp_path / "run", **settings)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert {"adapter_model.safetensors", "rollout_rank0.pt"} <= set(os.listdir(checkpoint))
    resumed = lora_trainer(make_trainer, tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(weights(resumed), weights(whole))
    assert logged(resumed, "reward") == logged(whole, "reward")


def logps_and_entropies(model, output, temperature):
    """Of the completions' tokens, from the model's logits, float64 `(B, T)`."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    length = output["completion_ids"].shape[1]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1].double() / temperature
    logps = torch.log_softmax(logits, dim=-1)
    sampled = logps.gather(-1, output["completion_ids"].unsqueeze(-1)).squeeze(-1)
    return sampled, -(logps.exp() * logps).sum(-1)


def move_adapter(model, seed):
    """Put the trained adapter far from the base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B.default" in name:
                value.copy_(0.5 * torch.randn(value.shape, generator=generator))


@pytest.mark.parametrize("given", ["peft_config", "peft_model"])
def test_the_reference_is_the_start_and_the_old_entropies_are_the_policys(
    make_trainer, base, tiny_model_path, tmp_path, given
):
    """The start is the base under a `peft_config`, and the adapter that came with it under a `PeftModel`."""
    start, policy = base, {"peft_config": lora()}
    if given == "peft_model":
        model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
        policy = {"model": get_peft_model(model, lora())}
        move_adapter(policy["model"], seed=1)
        policy["model"].save_pretrained(tmp_path / "start")
        start = PeftModel.from_pretrained(base, tmp_path / "start").eval()
    trainer = make_trainer(erc_low=0.95, erc_high=1.05, beta=0.1, **policy)
    assert trainer.ref_model is None
    move_adapter(trainer.model, seed=2)
    trainer.model.train()
    output = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    valid = output["completion_mask"].bool()
    logps, entropies = logps_and_entropies(trainer.model, output, trainer.temperature)
    start_logps, start_entropies = logps_and_entropies(start, output, trainer.temperature)
    assert (entropies - start_entropies)[valid].abs().max() > 0.1
    torch.testing.assert_close(output["old_per_token_logps"].double()[valid], logps[valid], **CLOSE)
    torch.testing.assert_close(output["old_entropies"].double()[valid], entropies[valid], **CLOSE)
    torch.testing.assert_close(output["ref_per_token_logps"].double()[valid], start_logps[valid], **CLOSE)


def test_the_train_command_saves_reloads_and_resumes(tmp_path, monkeypatch, tiny_model_path, base, ids):
    """With the flags of `trl.ModelConfig`: 2 + 2 steps end at the adapter of 4."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no report, which would take most of the time
    rows = [{"prompt": f"{i}+{i}=", "solution": str(2 * i)} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "rewards.py").write_text(
        "def parity(completions, **kwargs):\n    return [float(len(text) % 2) for text in completions]\n"
    )
    recipe = {
        "model_name_or_path": tiny_model_path,
        "dataset_name": "rows.jsonl",
        "reward_funcs": ["rewards.parity"],
        **ALL_CONTROLS,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "steps_per_generation": 4,
        "max_completion_length": 6,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    flags = ["--config", "recipe.yaml", "--use_peft", "--lora_r", "4", "--lora_alpha", "8", "--lora_dropout", "0"]
    flags += ["--lora_target_modules", "all-linear"]
    train.main([*flags, "--output_dir", "whole"])
    train.main([*flags, "--output_dir", "halves", "--max_steps", "2"])
    train.main([*flags, "--output_dir", "halves", "--resume_from_checkpoint", "true"])
    whole, halves = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("whole", "halves"))
    assert_same_weights(whole, halves)
    assert all("lora_" in name for name in whole)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    assert model.peft_config["default"].r == 4
    with torch.no_grad():
        assert (model(ids).logits - base(ids).logits).abs().max() > 0.05
