"""EPO through the real trainer: gradients against the direct formula, the history, the schedule."""

import itertools
import math

import pytest
import torch

from tests.stubbed import stub_forward
from tests.tasks.test_multi_turn_training import multi_turn_trainer
from tests.trainers.test_grpo import assert_same_weights, weights

COEF, PENALTY, GAMMA, KAPPAS = 0.3, 0.4, 3.0, (0.7, 1.1)
EPO = {"epo_coef": COEF, "epo_penalty": PENALTY, "epo_gamma": GAMMA, "epo_kappa_low": 0.7, "epo_kappa_high": 1.1}
PAST = [0.9, 1.3]
PAST_TURNS = [[1.2, 0.6, 0.4], [0.8, 1.4]]
K, STEP = 7, 2  # the third RL step of seven
# three micro-batches' worth of trajectories with several turns each; row 3 has no model-written token
COMPLETION = torch.tensor([[1] * 8, [1] * 8, [1] * 6 + [0] * 2, [1] * 8, [1] * 3 + [0] * 5, [1] * 8])
TOOL = torch.tensor(
    [
        [1, 1, 0, 1, 0, 0, 1, 1],
        [1] * 8,
        [0, 1, 1, 0, 1, 0, 1, 1],
        [0] * 8,
        [1, 0, 1, 1, 1, 1, 1, 1],
        [1, 0, 1, 0, 1, 0, 1, 0],
    ]
)


def turns_of(row):
    """Lists of positions, one per maximal run of ones."""
    runs, previous = [], 0
    for position, flag in enumerate(row):
        if flag and not previous:
            runs.append([])
        if flag:
            runs[-1].append(position)
        previous = flag
    return runs


def direct_loss(entropies, mask, form, schedule, history):
    """-lambda (L_H - beta_k L_smooth), as the paper writes it."""
    beta = {
        "decay": 1 + math.exp(-GAMMA * STEP / (K // 2)),
        "grow": 2 - math.exp(-GAMMA * STEP / (K // 2)),
        "constant": 1.0,
    }[schedule]
    scalar = sum(PAST) / len(PAST)
    per_turn = [(1.2 + 0.8) / 2, (0.6 + 1.4) / 2, 0.4]
    bonuses, penalties = [], []
    for row, flags in zip(entropies, mask.tolist(), strict=True):
        turns = turns_of(flags)
        if not turns:
            continue
        turn_bonus, turn_penalty = [], []
        for index, positions in enumerate(turns):
            reference = scalar if history == "scalar" else (per_turn[index] if index < len(per_turn) else None)
            terms = []
            for position in positions:
                h = row[position]
                if reference is None:
                    terms.append(0.0 * h)
                elif form == "hinge":
                    terms.append(
                        torch.clamp(KAPPAS[0] * reference - h, min=0) + torch.clamp(h - KAPPAS[1] * reference, min=0)
                    )
                else:
                    terms.append(0.0 * h + float(h < KAPPAS[0] * reference or h > KAPPAS[1] * reference))
            turn_bonus.append(sum(row[position] for position in positions) / len(positions))
            turn_penalty.append(sum(PENALTY * term for term in terms) / len(positions))
        bonuses.append(sum(turn_bonus) / len(turns))
        penalties.append(sum(turn_penalty) / len(turns))
    return -COEF * (sum(bonuses) / len(bonuses) - beta * sum(penalties) / len(penalties))


def epo_trainer(make_trainer, **config):
    trainer = make_trainer(**EPO, steps_per_generation=3, gradient_accumulation_steps=3, **config)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 3
    trainer.state.max_steps = K
    trainer._step = 3 * len(PAST)
    trainer.active.states["epo"].load_state_dict({"steps": PAST, "turn_steps": PAST_TURNS, "running": None})
    return trainer


def micro_batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    entropies = 2 * torch.rand(6, 8, generator=generator, dtype=torch.float64)
    logps = -torch.rand(6, 8, generator=generator, dtype=torch.float64)
    leaves = [(logps[i : i + 2].clone().requires_grad_(), entropies[i : i + 2].requires_grad_()) for i in (0, 2, 4)]
    inputs = [
        {
            "prompt_ids": torch.full((2, 1), 5),
            "prompt_mask": torch.ones(2, 1, dtype=torch.long),
            "completion_ids": torch.full((2, 8), 7),
            "completion_mask": COMPLETION[i : i + 2],
            "tool_mask": TOOL[i : i + 2],
            "advantages": torch.zeros(2, dtype=torch.float64),
            "num_items_in_batch": (COMPLETION * TOOL).sum(),
            "num_trajectories": torch.tensor(5),
        }
        for i in (0, 2, 4)
    ]
    return leaves, inputs


@pytest.mark.parametrize(
    ("form", "schedule", "history"),
    list(itertools.product(["hinge", "indicator"], ["decay", "grow", "constant"], ["scalar", "per_turn"])),
)
def test_gradient_over_an_accumulation_window_is_the_formulas(make_trainer, monkeypatch, form, schedule, history):
    stub_forward(monkeypatch)
    trainer = epo_trainer(make_trainer, epo_form=form, epo_schedule=schedule, epo_history=history)
    leaves, inputs = micro_batches()
    total = 0.0
    for trainer.leaves, batch in zip(leaves, inputs, strict=True):
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        total += loss.item()
    found = torch.cat([entropies.grad for _, entropies in leaves])

    entropies = torch.cat([entropies.detach() for _, entropies in leaves]).requires_grad_()
    expected = direct_loss(entropies, COMPLETION * TOOL, form, schedule, history)
    expected.backward()
    assert total == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(found, entropies.grad, rtol=1e-12, atol=1e-15)
    assert (entropies.grad[3] == 0).all()
    assert all((logps.grad == 0).all() for logps, _ in leaves)


def test_indicator_has_the_gradient_of_the_entropy_bonus_alone(make_trainer, monkeypatch):
    stub_forward(monkeypatch)
    gradients = []
    for past in (PAST, []):
        trainer = epo_trainer(make_trainer, epo_form="indicator")
        trainer.active.states["epo"].load_state_dict({"steps": past, "turn_steps": PAST_TURNS, "running": None})
        (trainer.leaves, *_), (batch, *_) = micro_batches()
        trainer.compute_loss(trainer.model, batch).backward()
        gradients.append(trainer.leaves[1].grad)
    assert torch.equal(*gradients)


def test_it_adds_to_what_the_clipping_controls_leave(make_trainer, monkeypatch):
    stub_forward(monkeypatch)
    clips = {"erc_low": 0.95, "erc_high": 1.05, "ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0}
    gradients = {}
    for name, config in {"both": clips, "epo": {}, "clips": {**clips, "epo_coef": 0.0}}.items():
        trainer = make_trainer(**{**EPO, "steps_per_generation": 6, "gradient_accumulation_steps": 3, **config})
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 3
        trainer.state.max_steps = K
        trainer._step = trainer.args.steps_per_generation * len(PAST)
        if name != "clips":
            trainer.active.states["epo"].load_state_dict({"steps": PAST, "turn_steps": PAST_TURNS, "running": None})
        (leaf, *_), (batch, *_) = micro_batches()
        advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
        old = {"old_per_token_logps": leaf[0].detach() + 0.3 * torch.randn_like(leaf[0]).sign()}
        old["old_entropies"] = leaf[1].detach() * torch.tensor([1.2, 1.0] * 4, dtype=torch.float64)
        if name == "epo":
            advantages, old = advantages * 0, {}
        trainer.leaves = leaf
        torch.manual_seed(1)
        trainer.compute_loss(trainer.model, batch | old | {"advantages": advantages}).backward()
        gradients[name] = leaf
    torch.testing.assert_close(gradients["both"][1].grad, gradients["epo"][1].grad, rtol=1e-12, atol=0)
    assert gradients["clips"][0].grad.abs().sum() > 0


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("off_policy", [True, False])
def test_history_in_training_is_the_rollouts_mean_entropy(make_trainer, tiny_dataset, monkeypatch, off_policy):
    schedule = {"steps_per_generation": 2, "num_iterations": 2} if off_policy else {"steps_per_generation": 1}
    trainer = make_trainer(
        epo_coef=0.05,
        **schedule,
        max_steps=8,
        eval_dataset=tiny_dataset.select(range(2)),
        eval_strategy="steps",
        eval_steps=2,
    )
    rollouts = []
    real = type(trainer).on_rollout

    def spy(self, output, rewards):
        real(self, output, rewards)
        if self.mode == "train":
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
            mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
            with torch.no_grad():
                logits = self.model(input_ids=ids, attention_mask=mask).logits
            logps = torch.log_softmax(logits[:, -output["completion_ids"].shape[1] - 1 : -1].double(), -1)
            entropies = -(logps.exp() * logps).sum(-1)
            rollouts.append(entropies[output["completion_mask"].bool()].mean().item())

    monkeypatch.setattr(type(trainer), "on_rollout", spy)
    trainer.train()
    num_steps = 2 if off_policy else 8
    assert len(rollouts) == num_steps
    # the last step is still running; evaluation in between left no trace
    assert trainer.active.states["epo"].steps == pytest.approx(rollouts[:-1], rel=1e-5)
    beta = [1 + math.exp(-3 * k / (num_steps // 2)) for k in range(num_steps)]
    assert logged(trainer, "epo/beta") == pytest.approx([b for b in beta for _ in range(8 // num_steps)], rel=1e-6)
    low = logged(trainer, "epo/corridor_low")
    assert low[0] == pytest.approx(0.8 * rollouts[0], rel=1e-5)
    assert len(low) == 8 - 8 // num_steps
    assert logged(trainer, "epo/history")[-1] == pytest.approx(sum(rollouts[:-1]) / len(rollouts[:-1]), rel=1e-5)
    assert len(logged(trainer, "eval_epo/beta")) == 4


def test_total_steps_also_come_from_epochs(make_trainer, tiny_dataset):
    # 16 prompts, 4 per rollout of two steps, two epochs: 16 optimizer steps, 8 RL steps, k_mid = 4
    trainer = make_trainer(epo_coef=0.05, steps_per_generation=2, max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 16
    assert logged(trainer, "epo/beta")[-1] == pytest.approx(1 + math.exp(-3 * 7 / 4), rel=1e-6)


@pytest.mark.parametrize("history", ["scalar", "per_turn"])
def test_resumed_training_on_episodes_has_the_same_history_and_weights(make_trainer, tmp_path, history):
    """A checkpoint in the middle of the second of three rollouts: one finished RL step, and one that runs."""
    settings = {"epo_coef": 0.5, "epo_history": history, "output_dir": tmp_path / "run"}
    settings |= {"steps_per_generation": 4, "max_steps": 10, "save_strategy": "steps", "save_steps": 6}
    whole = multi_turn_trainer(make_trainer, **settings)
    whole.train()
    resumed = multi_turn_trainer(make_trainer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert [len(turns) for turns in whole.active.states["epo"].turn_steps] == [2, 2]
    assert resumed.active.states["epo"].steps == whole.active.states["epo"].steps
    assert resumed.active.states["epo"].turn_steps == whole.active.states["epo"].turn_steps
    for key in ("epo/beta", "epo/corridor_low", "epo/penalty", "entropy/turn_2"):
        assert len(logged(whole, key)) >= 6
        assert logged(resumed, key) == logged(whole, key), key
    assert_same_weights(weights(resumed), weights(whole))


def test_gradient_reaches_the_policy(make_trainer):
    trainer = make_trainer(epo_coef=1.0, reward_funcs=lambda completions, **_: [0.0] * len(completions), max_steps=1)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    assert not trainer._entropy_bonus_enabled
