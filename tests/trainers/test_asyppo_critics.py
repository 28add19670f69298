"""The critics that AsyPPO is given, and what a checkpoint keeps of them."""

import os

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen2Config,
    Qwen2ForTokenClassification,
)

from tests.trainers.conftest import BONUS
from tests.trainers.test_grpo import ALL_CONTROLS, assert_same_weights, logged, weights
from trl_entropy import AsyPPOConfig, AsyPPOTrainer, EntropyGRPOConfig, EntropyGRPOTrainer


@pytest.mark.parametrize("controls", [{}, ALL_CONTROLS], ids=["alone", "with-all-controls"])
def test_resume_is_exact_critics_included(make_asyppo, tmp_path, controls):
    settings = {**controls, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "steps_per_generation": 2}
    settings["critic_warmup_rollouts"] = 1
    whole = make_asyppo(tmp_path / "run", **settings)
    whole.train()
    resumed = make_asyppo(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same_weights(weights(resumed), weights(whole))
    for first, second in zip(resumed.critics.critics, whole.critics.critics, strict=True):
        assert_same_weights(first.state_dict(), second.state_dict())
    assert logged(resumed, "asyppo/critic_0/loss") == logged(whole, "asyppo/critic_0/loss")


def test_critics_in_a_checkpoint_load_plainly(make_asyppo, tmp_path):
    trainer = make_asyppo(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    for index, critic in enumerate(trainer.critics.critics):
        folder = os.path.join(tmp_path, "run", "checkpoint-2", "critics", f"critic_{index}")
        assert os.path.exists(os.path.join(folder, "model.safetensors"))
        loaded = AutoModelForTokenClassification.from_pretrained(folder)
        assert_same_weights(loaded.state_dict(), critic.state_dict())
    card = (tmp_path / "run" / "README.md").read_text()
    assert "num_critics=2" in card
    assert "2510.01656" in card
    trainer.save_model()
    assert os.path.isdir(os.path.join(trainer.args.output_dir, "critics", "critic_1"))


def test_a_checkpoint_without_critics_is_refused(make_trainer, make_asyppo, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path / "run", **settings).train()
    with pytest.raises(FileNotFoundError, match="has no critics/"):
        make_asyppo(tmp_path / "run", **settings).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def small_critic(tiny_model, hidden):
    config = Qwen2Config(**{**tiny_model.config.to_dict(), "hidden_size": hidden})
    config.num_labels = 1  # transformers 4 takes the number of labels from their names first
    return Qwen2ForTokenClassification(config)


def test_critics_may_be_modules_of_different_sizes(make_asyppo, tiny_model):
    critics = [small_critic(tiny_model, 16), small_critic(tiny_model, 32)]
    trainer = make_asyppo(critics=critics, max_steps=2)
    trainer.train()
    assert [critic.config.hidden_size for critic in trainer.critics.critics] == [16, 32]


def test_one_module_serves_for_all_critics_as_copies(make_asyppo, tiny_model):
    trainer = make_asyppo(critics=small_critic(tiny_model, 16))
    first, second = trainer.critics.critics
    assert first is not second
    assert first.score.weight.data_ptr() != second.score.weight.data_ptr()


@pytest.mark.parametrize(
    ("critics", "message"),
    [(None, "critics is missing"), (["a"], "critics lists 1 and num_critics=2"), (["a"] * 3, "critics lists 3")],
)
def test_wrong_critics_are_refused_before_a_model_is_loaded(tmp_path, critics, message):
    args = AsyPPOConfig(str(tmp_path), **BONUS, use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match=message):
        AsyPPOTrainer("no/such-model", args=args, critics=critics)


def test_another_config_is_refused(tmp_path):
    args = EntropyGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(TypeError, match="args=EntropyGRPOConfig must be an AsyPPOConfig"):
        AsyPPOTrainer("no/such-model", args=args, critics="none")


def test_its_configuration_is_refused_where_there_are_no_critics(tmp_path):
    """Its losses would have no advantages of critics to mask."""
    args = AsyPPOConfig(str(tmp_path), **BONUS, use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="AsyPPO cannot be used with EntropyGRPOTrainer, which has no critics"):
        EntropyGRPOTrainer("no/such-model", lambda **_: [], args)


def test_resumed_under_another_schedule_the_critics_go_on(make_asyppo, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "critic_warmup_rollouts": 1, **ALL_CONTROLS}
    make_asyppo(tmp_path / "run", **settings).train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    resumed = make_asyppo(tmp_path / "run", **settings | {"steps_per_generation": 2, "num_generations": 2})
    with pytest.warns(
        UserWarning, match=r"steps_per_generation=4 \(now 2\), num_generations=4 \(now 2\).*generated anew"
    ):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 6
    steps = [
        optimizer._adamw.state[next(iter(optimizer._copies.values()))]["step"]
        for optimizer in resumed.critics._optimizers
    ]
    saved = torch.load(checkpoint / "critics" / "state_0.pt", weights_only=True)["steps"]
    assert min(steps) > max(saved.values()) > 0


def test_warm_up_is_not_repeated_where_the_rollout_is_lost(make_asyppo, tmp_path, monkeypatch):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "critic_warmup_rollouts": 2}
    make_asyppo(tmp_path / "run", **settings).train()
    (tmp_path / "run" / "checkpoint-3" / "rollout_rank0.pt").unlink()
    resumed = make_asyppo(tmp_path / "run", **settings)
    monkeypatch.setattr(resumed, "_warmup_prompts", lambda rows: pytest.fail("another warm-up"))
    with pytest.warns(UserWarning, match="is missing: the rollout that was in use is generated anew"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))


def test_the_value_model_of_trls_ppo_serves_as_critic(make_asyppo, tiny_model_path, tmp_path, tiny_tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    model.save_pretrained(tmp_path / "value")
    tiny_tokenizer.save_pretrained(tmp_path / "value")
    for critics in (model, str(tmp_path / "value")):
        trainer = make_asyppo(critics=critics, max_steps=1)
        trainer.train()
        assert {type(critic) for critic in trainer.critics.critics} == {Qwen2ForTokenClassification}
