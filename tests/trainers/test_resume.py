"""A resumed run equals an uninterrupted one, and a save that was cut off does no harm."""

import copy
import glob
import os
import warnings

import pytest
from trl import GRPOConfig, GRPOTrainer

from tests.trainers.test_grpo import ALL_CONTROLS, assert_same_weights, logged, weights
from trl_entropy import EntropyGRPOTrainer
from trl_entropy.trainers.resume import last_complete_checkpoint


@pytest.mark.parametrize(
    "schedule",
    [
        {},  # the checkpoint falls in the middle of a rollout's four steps
        {"steps_per_generation": 3},  # between two rollouts
        {"steps_per_generation": 2, "num_iterations": 2, "gradient_accumulation_steps": 2},
        {"steps_per_generation": 1, "num_iterations": 2, "num_train_epochs": 2, "max_steps": -1, "save_steps": 5},
    ],
    ids=["inside-rollout", "between-rollouts", "accumulation", "second-epoch"],
)
@pytest.mark.parametrize("controls", [{}, ALL_CONTROLS], ids=["plain", "all"])
def test_resume_equals_an_uninterrupted_run(make_trainer, tmp_path, tiny_dataset, schedule, controls):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **controls, **schedule}
    if "num_train_epochs" in settings:
        settings["train_dataset"] = tiny_dataset.select(range(4))  # 4 steps an epoch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        whole = make_trainer(tmp_path / "run", **settings)
        whole.train()
        expected = weights(whole)
        resumed = make_trainer(tmp_path / "run", **copy.copy(settings))
    checkpoint = os.path.join(tmp_path, "run", f"checkpoint-{settings['save_steps']}")
    assert glob.glob(os.path.join(checkpoint, "*.safetensors"))
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == whole.state.global_step
    assert_same_weights(weights(resumed), expected)
    again = logged(resumed, "reward")
    assert again == logged(whole, "reward")


def test_a_checkpoint_of_plain_trl_can_be_resumed(make_trainer, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path / "run", trainer_class=GRPOTrainer, config_class=GRPOConfig, **settings).train()
    trainer = make_trainer(tmp_path / "run", **settings, **ALL_CONTROLS)
    with pytest.warns(UserWarning, match="generated anew"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert isinstance(trainer, EntropyGRPOTrainer)
    assert trainer.state.global_step == 6


def test_a_checkpoint_whose_saving_was_cut_off_is_passed_over(make_trainer, tmp_path, monkeypatch):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, **ALL_CONTROLS}
    assert last_complete_checkpoint(str(tmp_path / "run")) is None
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()

    killed = make_trainer(tmp_path / "run", **settings)
    save = GRPOTrainer._save_checkpoint

    def cut_off(self, model, trial):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        save(self, model, trial)

    monkeypatch.setattr(GRPOTrainer, "_save_checkpoint", cut_off)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    monkeypatch.undo()
    assert os.path.isdir(tmp_path / "run" / "checkpoint-4")
    assert last_complete_checkpoint(str(tmp_path / "run")) == str(tmp_path / "run" / "checkpoint-2")
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights(resumed), weights(whole))


def test_the_last_checkpoint_is_the_one_with_the_most_steps(tmp_path):
    for name, state in (("checkpoint-9", "{"), ("checkpoint-10", '{"global_step": 10}'), ("checkpoint-x", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9}')
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-9")
