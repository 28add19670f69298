"""A resumed run equals an uninterrupted one, and a save that was cut off does no harm."""

import copy
import glob
import math
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState
from trl import GRPOConfig, GRPOTrainer

from tests.trainers.test_grpo import ALL_CONTROLS, assert_same_weights, logged, weights
from trl_entropy import EntropyGRPOTrainer, entropy_controlled
from trl_entropy.trainers.resume import ExactResume, last_complete_checkpoint


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


@pytest.mark.parametrize("folder", [str, Path])
@pytest.mark.parametrize("max_steps", [3, 2])
def test_resumed_from_its_end_a_run_takes_no_more_steps(make_trainer, tmp_path, max_steps, folder):
    """As a job that is started again after it has finished. transformers would take a fourth step."""
    settings = {"save_strategy": "steps", "save_steps": 3, **ALL_CONTROLS}
    whole = make_trainer(tmp_path / "run", max_steps=3, **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "run", max_steps=max_steps, **settings)
    resumed.train(resume_from_checkpoint=folder(tmp_path / "run" / "checkpoint-3"))
    assert resumed.state.global_step == 3
    assert_same_weights(weights(resumed), weights(whole))
    again = make_trainer(tmp_path / "run", max_steps=4, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


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


SAVED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}  # in the middle of a rollout of four steps


@pytest.mark.parametrize(
    "changed",
    [
        {"steps_per_generation": 8},
        {"steps_per_generation": 2},
        {"num_iterations": 2},
        {"gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 4},
        {"num_generations": 2},
        {"max_completion_length": 4},
        {"temperature": 0.5},
        {"beta": 0.04},
        {"erc_low": 0.95, "erc_high": 1.05},
        {"epo_coef": 0.01},
        {"positive_nll_coef": 0.1},
        {"record_tokens": 8},
    ],
    ids=lambda changed: ",".join(changed),
)
def test_resumed_with_other_settings_of_a_rollout_it_is_made_anew(make_trainer, tmp_path, monkeypatch, changed):
    make_trainer(tmp_path / "run", **SAVED).train()
    resumed = make_trainer(tmp_path / "run", **SAVED | changed)
    rollouts = []
    generate = type(resumed)._generate_and_score_completions
    monkeypatch.setattr(
        type(resumed), "_generate_and_score_completions", lambda *a: rollouts.append(a[0]._step) or generate(*a)
    )
    first = next(iter(changed))
    name = {"erc_low": "erc", "epo_coef": "epo", "positive_nll_coef": "positive_nll", "record_tokens": "recording"}
    with pytest.warns(UserWarning, match=rf"{name.get(first, first)}.*generated anew"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    every = resumed.args.steps_per_generation * resumed.num_iterations
    accumulation = resumed.args.gradient_accumulation_steps
    # one at once, and then wherever the new schedule has one
    assert rollouts == [
        3 * accumulation,
        *(s for s in range(3 * accumulation + 1, 6 * accumulation) if s % every == 0),
    ]


@pytest.mark.parametrize("changed", [{"learning_rate": 1e-2}, {"max_steps": 7}, {"logging_steps": 2}])
def test_resumed_with_other_settings_of_the_update_the_rollout_is_kept(make_trainer, tmp_path, monkeypatch, changed):
    make_trainer(tmp_path / "run", **SAVED | {"steps_per_generation": 8}).train()
    resumed = make_trainer(tmp_path / "run", **SAVED | {"steps_per_generation": 8} | changed)
    monkeypatch.setattr(type(resumed), "_generate_and_score_completions", lambda *a: pytest.fail("a new rollout"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))


def test_between_two_rollouts_another_schedule_begins_without_a_warning(make_trainer, tmp_path):
    settings = SAVED | {"steps_per_generation": 3}
    make_trainer(tmp_path / "run", **settings).train()
    resumed = make_trainer(tmp_path / "run", **settings | {"steps_per_generation": 6})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*anew")
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.state.global_step == 6


def test_a_new_schedule_draws_the_prompts_of_its_own_epoch(make_trainer, tmp_path, tiny_dataset):
    """Eight steps an epoch before, two an epoch after: step 3 is in the first epoch, and then in the second."""
    settings = SAVED | {"num_train_epochs": 4, "max_steps": -1, "train_dataset": tiny_dataset.select(range(4))}
    make_trainer(tmp_path / "run", **settings, per_device_train_batch_size=4, steps_per_generation=2).train()
    changed = {"per_device_train_batch_size": 8, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
    whole = make_trainer(tmp_path / "other", **settings | changed | {"save_steps": 1000})
    prompts = {"whole": [], "resumed": []}
    for name, trainer in (
        ("whole", whole),
        ("resumed", make_trainer(tmp_path / "run", **settings | changed)),
    ):
        generate = trainer._generate_and_score_completions

        def spy(inputs, generate=generate, seen=prompts[name]):
            seen.append([row["prompt"] for row in inputs])
            return generate(inputs)

        trainer._generate_and_score_completions = spy
        resume = name == "resumed"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3") if resume else None)
    if trainer._train_batch_size != changed["per_device_train_batch_size"]:
        pytest.skip("transformers 4.56 goes on with the batch size of the checkpoint, whatever the configuration says")
    assert prompts["resumed"] == prompts["whole"][1:]


class ListedSampler(GRPOTrainer):
    """Draws the rows by a list of its own."""

    def _get_train_sampler(self, dataset=None):
        return list(super()._get_train_sampler(dataset))


def test_a_sampler_of_a_subclass_s_own_is_left_alone_in_the_second_epoch(make_trainer, tmp_path, tiny_dataset):
    settings = {"trainer_class": entropy_controlled(ListedSampler), "epo_coef": 0.1, "steps_per_generation": 1}
    settings |= SAVED | {"train_dataset": tiny_dataset.select(range(4)), "max_steps": 4}
    whole = make_trainer(tmp_path / "run", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same_weights(weights(resumed), weights(whole))


def test_the_position_is_the_checkpoints_where_the_state_is_read_later(make_trainer, tmp_path, tiny_dataset):
    """transformers 4 loads the optimizer, and with it the rollout, before it reads the state."""

    class ReadsStateLater(EntropyGRPOTrainer):
        def _load_optimizer_and_scheduler(self, checkpoint):
            state, self.state = self.state, TrainerState()
            super()._load_optimizer_and_scheduler(checkpoint)
            self.state = state

    settings = SAVED | {"train_dataset": tiny_dataset.select(range(4)), "steps_per_generation": 2, "max_steps": 6}
    whole = make_trainer(tmp_path / "run", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "run", trainer_class=ReadsStateLater, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same_weights(weights(resumed), weights(whole))


@pytest.mark.parametrize("damage", ["missing", "cut off", "empty", "other bytes", "another object"])
def test_a_damaged_rollout_is_made_anew(make_trainer, tmp_path, damage):
    make_trainer(tmp_path / "run", **SAVED, **ALL_CONTROLS).train()
    path = tmp_path / "run" / "checkpoint-3" / "rollout_rank0.pt"
    content = path.read_bytes()
    path.unlink()
    if damage == "another object":
        torch.save({"step": 3}, path)
    elif damage != "missing":
        path.write_bytes({"cut off": content[: len(content) // 2], "empty": b"", "other bytes": b"x" * 99}[damage])
    resumed = make_trainer(tmp_path / "run", **SAVED, **ALL_CONTROLS)
    with pytest.warns(UserWarning, match=r"rollout_rank0.pt (is missing|cannot be read).*generated anew"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.state.global_step == 6


@pytest.mark.parametrize(("steps", "rollouts", "finished"), [(2, (1, 2, 2), 2), (8, (0, 0, 0), 1)])
def test_the_schedule_of_epo_goes_by_the_position_under_the_new_schedule(
    make_trainer, tmp_path, steps, rollouts, finished
):
    """Of six steps, the last three: with two a rollout in the second and third of 3, with eight in the only one."""
    settings = SAVED | {"epo_coef": 0.01}
    make_trainer(tmp_path / "run", **settings).train()
    resumed = make_trainer(tmp_path / "run", **settings | {"steps_per_generation": steps})
    with pytest.warns(UserWarning, match="generated anew"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    # k_mid is 1 for 3 rollouts, and for 1
    assert logged(resumed, "epo/beta")[-3:] == pytest.approx([1 + math.exp(-3 * k) for k in rollouts], rel=1e-6)
    # the part of the old rollout that was trained on, and with two steps a rollout that of step 4
    assert len(resumed.active.states["epo"]) == finished


def test_a_checkpoint_of_a_release_with_fewer_controls_goes_on(make_trainer, tmp_path):
    """It does not know the newer controls, and has EPO's history under its former name."""
    settings = {**EPO_RUN, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = make_trainer(tmp_path / "run", **settings)
    whole.train()
    path = tmp_path / "run" / "checkpoint-3" / "rollout_rank0.pt"
    state = torch.load(path, weights_only=True)
    state["controls"] = {"entropy_history": state["controls"].pop("epo"), **state["controls"]}
    newer = [name for name in state["settings"] if name.endswith("_enabled") and state["settings"][name] == "False"]
    assert len(newer) > 3
    for name in newer:
        del state["settings"][name]
    torch.save(state, path)
    resumed = make_trainer(tmp_path / "run", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resumed.train(resume_from_checkpoint=str(path.parent))
    assert resumed.active.states["epo"].steps == whole.active.states["epo"].steps != []
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


EPO_RUN = {"epo_coef": 0.1, "steps_per_generation": 4, "learning_rate": 1e-2}


def test_position_after_a_smaller_step_at_an_epochs_end():
    """Three micro-batches an epoch, two a step: the third step is the first of the second epoch."""
    accelerator = SimpleNamespace(num_processes=1)
    args = SimpleNamespace(gradient_accumulation_steps=2, steps_per_generation=1)
    trainer = SimpleNamespace(_train_sampler=range(24), _train_batch_size=8, accelerator=accelerator, args=args)
    found = [ExactResume._position(trainer, steps) for steps in range(5)]
    assert found == [(0, 0), (0, 2), (1, 3), (1, 5), (2, 6)]
