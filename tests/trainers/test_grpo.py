"""The trainer as a whole: nothing changes when nothing is on, one forward pass, metrics, model card, resume."""

import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from trl_entropy import EntropyGRPOConfig, EntropyGRPOTrainer
from trl_entropy.trainers.rollout_contact import RolloutContact

ALL_CONTROLS = {
    "erc_low": 0.95,
    "erc_high": 1.05,
    "ce_gppo_alpha1": 0.75,
    "ce_gppo_alpha2": 1.0,
    "epo_coef": 0.1,
    "positive_nll_coef": 0.1,
}


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def trained(trainer):
    """Train right after construction, which seeds the random numbers of the run."""
    trainer.train()
    return trainer


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("config_class", [EntropyGRPOConfig, GRPOConfig])
def test_no_control_is_bit_for_bit_trl(make_trainer, tmp_path, config_class, num_iterations):
    settings = {"max_steps": 5, "num_iterations": num_iterations}
    ours = trained(make_trainer(tmp_path / "ours", config_class=config_class, **settings))
    trls = make_trainer(tmp_path / "trl", trainer_class=GRPOTrainer, config_class=GRPOConfig, **settings)
    start = weights(trls)
    trained(trls)
    assert_same_weights(weights(ours), weights(trls))
    assert any(not torch.equal(start[name], value) for name, value in weights(trls).items())


def test_a_control_changes_the_training(make_trainer, tmp_path):
    # the counterpart of the test above: its settings are off-policy enough for a control to act
    plain = trained(make_trainer(tmp_path / "plain", max_steps=5))
    controlled = trained(make_trainer(tmp_path / "erc", max_steps=5, erc_low=0.95, erc_high=1.05))
    assert any(not torch.equal(value, weights(controlled)[name]) for name, value in weights(plain).items())


def count_forwards(trainer, monkeypatch):
    calls = []
    model_forward = trainer.model.forward

    def forward(*args, **kwargs):
        # generation passes a cache, the passes that score completions do not
        if kwargs.get("past_key_values") is None:
            calls.append(torch.is_grad_enabled())
        return model_forward(*args, **kwargs)

    monkeypatch.setattr(trainer.model, "forward", forward)
    trainer.train()
    return calls


def test_controls_need_no_forward_pass_of_their_own(make_trainer, tmp_path, monkeypatch):
    plain = count_forwards(make_trainer(tmp_path / "plain"), monkeypatch)
    monkeypatch.setattr(EntropyGRPOTrainer, "rows_to_repeat", lambda self, num_rows: None)
    controlled = count_forwards(make_trainer(tmp_path / "all", **ALL_CONTROLS), monkeypatch)
    assert controlled == plain
    assert plain.count(True) == 4


def test_old_entropies_are_those_of_the_rollout_policy(make_trainer):
    trainer = make_trainer(erc_low=0.95, erc_high=1.05)
    rows = [trainer.train_dataset[i // 4] for i in range(8)]
    trainer.model.train()
    output = trainer._generate_and_score_completions(rows)
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits
    length = output["completion_ids"].shape[1]
    logps = torch.log_softmax(logits[:, -length - 1 : -1].double() / trainer.temperature, dim=-1)
    expected = -(logps.exp() * logps).sum(-1)
    valid = output["completion_mask"].bool()
    assert not output["old_entropies"].requires_grad
    torch.testing.assert_close(output["old_entropies"].double()[valid], expected[valid], rtol=1e-4, atol=1e-5)


def test_a_reference_model_is_not_taken_for_the_rollout_policy(make_trainer):
    trainer = make_trainer(erc_low=0.95, erc_high=1.05, beta=0.1)
    with torch.no_grad():
        for parameter in trainer.ref_model.parameters():
            parameter.zero_()
    trainer.model.train()
    output = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    uniform = math.log(trainer.model.config.vocab_size)
    assert (output["old_entropies"] < uniform - 0.1).any()


def test_drift_of_trl_fails_loudly(make_trainer, monkeypatch):
    trainer = make_trainer(erc_low=0.95, erc_high=1.05)
    trainer.model.train()
    original = GRPOTrainer._get_per_token_logps_and_entropies

    def copied(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    generate = GRPOTrainer._generate_and_score_completions

    def generate_with_copied_logps(self, inputs):
        output = generate(self, inputs)
        output["old_per_token_logps"] = output["old_per_token_logps"].clone()
        return output

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", generate_with_copied_logps)
    with pytest.raises(RuntimeError, match="old_per_token_logps"):
        trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs: torch.zeros(()))
    with pytest.raises(RuntimeError, match="_get_per_token_logps_and_entropies"):
        trainer.compute_loss(trainer.model, {"completion_mask": torch.ones(2, 3)})


def test_missing_rollout_tensors_are_named(make_trainer):
    trainer = make_trainer(**ALL_CONTROLS)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    for key in ("old_entropies", "num_trajectories", "num_correct_tokens"):
        with pytest.raises(ValueError, match=key):
            trainer.compute_loss(trainer.model, {name: value for name, value in batch.items() if name != key})


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_metrics_are_logged_in_training_and_evaluation(make_trainer, tiny_dataset):
    trainer = make_trainer(
        **ALL_CONTROLS, eval_dataset=tiny_dataset.select(range(4)), eval_strategy="steps", eval_steps=4, max_steps=8
    )
    trainer.train()
    first_step = trainer.state.log_history[0]
    # the first step after a rollout is on-policy
    for key in ("ppo_clip/low_fraction", "ppo_clip/high_fraction", "erc/clip_fraction", "ce_gppo/high_fraction"):
        assert first_step[key] == 0.0
    for key in ("erc/clip_fraction", "erc/entropy_kept", "erc/entropy_clipped", "positive_nll/token_fraction"):
        assert len(logged(trainer, key)) >= 1, key
        assert all(math.isfinite(value) for value in logged(trainer, key))
    for entry in trainer.state.log_history:
        if "erc/clip_fraction" in entry:
            both = entry["erc/low_fraction"] + entry["erc/high_fraction"]
            assert entry["erc/clip_fraction"] == pytest.approx(both, abs=1e-6)
            assert entry["ce_gppo/low_fraction"] == entry["ppo_clip/low_fraction"]
    assert max(logged(trainer, "erc/clip_fraction")) > 0.0
    # the policy is the one that made the evaluation's rollout
    assert logged(trainer, "eval_erc/clip_fraction") == [0.0, 0.0]
    assert "erc/entropy_clipped" not in first_step


def test_metrics_are_token_means_over_the_logging_window(make_trainer, monkeypatch):
    trainer = make_trainer(erc_low=0.95, erc_high=1.05, logging_steps=4, max_steps=4)
    clipped, counted = [], []
    erc_module = sys.modules["trl_entropy.controls.erc"]  # the package has a function of this name
    real = erc_module.erc

    def spy(tokens, entropies, old_entropies, **bounds):
        ratio = (entropies + 1e-8) / (old_entropies + 1e-8)
        clipped.append((((ratio <= 0.95) | (ratio >= 1.05)) & tokens.mask).sum().item())
        counted.append(tokens.mask.sum().item())
        return real(tokens, entropies, old_entropies, **bounds)

    monkeypatch.setattr(erc_module, "erc", spy)
    trainer.train()
    assert len(counted) == 4
    assert logged(trainer, "erc/clip_fraction") == [pytest.approx(sum(clipped) / sum(counted), rel=1e-6)]


def test_model_card_names_methods_settings_and_papers(make_trainer, tmp_path):
    trainer = make_trainer(**ALL_CONTROLS)
    os.makedirs(trainer.args.output_dir, exist_ok=True)
    trainer.create_model_card(model_name="tiny")
    card = Path(trainer.args.output_dir, "README.md").read_text()
    for text in ("erc_low=0.95", "ce_gppo_alpha1=0.75", "epo_coef=0.1", "positive_nll_coef=0.1"):
        assert text in card
    for paper in ("2512.05591", "2509.20712", "2509.22576", "2508.07629"):
        assert paper in card
    assert "4 optimizer steps per rollout" in card
    plain = make_trainer(tmp_path / "plain")
    os.makedirs(plain.args.output_dir, exist_ok=True)
    plain.create_model_card(model_name="tiny")
    assert "2512.05591" not in Path(plain.args.output_dir, "README.md").read_text()


def test_a_window_at_an_epochs_end_has_fewer_micro_batches(make_trainer):
    trainer = make_trainer(epo_coef=0.1, gradient_accumulation_steps=4, steps_per_generation=4)
    trainer.model.train()
    for micro_batches, share in ((4, 40.0), (1, 10.0)):
        trainer.current_gradient_accumulation_steps = micro_batches
        assert trainer._per_window({"n": torch.tensor(40)}, "n", "x") == share


def test_each_process_reads_its_own_rewards():
    accelerator = SimpleNamespace(process_index=1)
    trainer = SimpleNamespace(
        _rewards_per_func=torch.arange(8.0).unsqueeze(1), reward_weights=torch.ones(1), accelerator=accelerator
    )
    assert RolloutContact._local_rewards(trainer, 4).tolist() == [4.0, 5.0, 6.0, 7.0]


def test_evaluation_has_groups_of_its_own_size(make_trainer):
    trainer = make_trainer(qae_quantile=0.4, num_generations_eval=2, per_device_eval_batch_size=2)
    assert math.isfinite(trainer.evaluate(trainer.train_dataset.select(range(3)))["eval_loss"])
