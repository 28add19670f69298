"""Values and updates of the ensemble against plain PyTorch."""

import copy
import math

import pytest
import torch
from peft import LoraConfig

from trl_entropy.critics import CriticEnsemble, state_values
from trl_entropy.critics.batches import RowTable, mini_batches

ROWS = torch.arange(8)


def ensemble(critics, **overrides):
    return CriticEnsemble(critics, **{"learning_rate": 1e-2, "device": "cpu", "seed": 0, **overrides})


def train(group, rollout, critic_of_row, rows=ROWS, **overrides):
    given = {"epochs": 1, "batch_size": 8, **overrides}
    return group.train_on(**vars(rollout), critic_of_row=torch.as_tensor(critic_of_row), rows=rows, **given)


def weights(group):
    return [[value.detach().clone() for value in critic.parameters()] for critic in group.critics]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_values_are_each_critics_own(make_critic, small_critic, rollout):
    critics = [make_critic(0), make_critic(1), small_critic]
    group = ensemble(critics)
    found = group.state_values(rollout.input_ids, rollout.attention_mask, 6, batch_size=3)
    assert found.shape == (3, 8, 7)
    assert not found.requires_grad
    for critic, value in zip(critics, found, strict=True):
        expected = state_values(critic, rollout.input_ids, rollout.attention_mask, 6)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.01


def reference_updates(critic, rollout, rows, weight_decay, max_grad_norm, steps):
    """AdamW steps on the mean over valid tokens of (V - R)^2; the means of the losses and of the norms."""
    groups = [
        {"params": [value for value in critic.parameters() if value.dim() > 1], "weight_decay": weight_decay},
        {"params": [value for value in critic.parameters() if value.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer, mask, totals = torch.optim.AdamW(groups, lr=1e-2), rollout.mask[rows], torch.zeros(2)
    for _ in range(steps):
        predicted = state_values(critic, rollout.input_ids[rows], rollout.attention_mask[rows], 6)[:, :-1]
        loss = (predicted - rollout.targets[rows]).square()[mask].sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(critic.parameters(), max_grad_norm)
        optimizer.step()
        totals += torch.stack([loss.detach(), norm])
    return (totals / steps).tolist()


@pytest.mark.parametrize("max_grad_norm", [0.1, 100.0])
def test_updates_equal_plain_pytorch(make_critic, small_critic, rollout, max_grad_norm):
    critics = [make_critic(0), small_critic]
    expected = copy.deepcopy(critics)
    group = ensemble(critics, weight_decay=0.1, max_grad_norm=max_grad_norm)
    shards = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
    metrics = train(group, rollout, shards, epochs=3)
    for index, critic in enumerate(expected):
        rows = (shards == index).nonzero().flatten()
        loss, norm = reference_updates(critic, rollout, rows, 0.1, max_grad_norm, steps=3)
        assert metrics[f"critic_{index}/loss"] == pytest.approx(loss, rel=1e-4)
        assert metrics[f"critic_{index}/grad_norm"] == pytest.approx(norm, rel=1e-3)
        for found, wanted in zip(critics[index].parameters(), critic.parameters(), strict=True):
            # the order of the rows moves the last bits of the gradients; a step is 1e-2
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-4)


def test_no_clipping_without_a_norm(make_critic, rollout):
    """AdamW's first step does not depend on the scale of the gradient, the second one does."""
    results = []
    for limit in (0.0, 1e9):
        group = ensemble([make_critic()], max_grad_norm=limit)
        train(group, rollout, [0] * 8, epochs=3)
        results.append(weights(group)[0])
    assert same(*results)


def test_a_critic_learns_from_its_own_rows_only(make_critic, rollout):
    shards = [0, 1, 1, 0, 0, 1, 0, 1]
    results = []
    for offset in (0.0, 5.0):
        group = ensemble([make_critic(0), make_critic(1)])
        rollout.targets[torch.tensor(shards) == 1] += offset
        train(group, rollout, shards, epochs=2, batch_size=2)
        results.append(weights(group))
    assert same(results[0][0], results[1][0])
    assert not same(results[0][1], results[1][1])


def test_unscored_tokens_do_not_matter(make_critic, rollout):
    results = []
    for value in (0.0, math.nan):
        rollout.targets[~rollout.mask] = value
        group = ensemble([make_critic()])
        train(group, rollout, [0] * 8)
        results.append(weights(group)[0])
    assert same(*results)
    assert all(value.isfinite().all() for value in results[0])


@pytest.mark.parametrize("shards", [[0] * 4 + [1] * 4, [0] * 8])
def test_a_critic_without_tokens_or_rows_rests(make_critic, rollout, shards):
    rollout.mask[4:] = False
    group = ensemble([make_critic(0), make_critic(1)])
    before = weights(group)
    metrics = train(group, rollout, shards)
    assert set(metrics) == {"critic_0/loss", "critic_0/grad_norm"}
    assert not same(weights(group)[0], before[0])
    assert same(weights(group)[1], before[1])


def test_order_of_the_local_rows_does_not_matter(make_critic, rollout):
    order = torch.tensor([3, 0, 7, 2, 6, 1, 5, 4])
    results = []
    for rows in (ROWS, order):
        group = ensemble([make_critic()])
        moved = type(rollout)(**{name: value[rows] for name, value in vars(rollout).items()})
        train(group, moved, [0] * 8, rows, batch_size=2)
        results.append(weights(group)[0])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_mini_batches_cover_the_share():
    mask = torch.ones(10, 3, dtype=torch.bool)
    mask[4] = False
    table = RowTable.build(torch.arange(10), mask, 10)
    own, generator = torch.tensor([9, 1, 3, 5, 7]), torch.Generator().manual_seed(0)
    first = list(mini_batches(own, table, 2, generator))
    assert [batch.tokens for batch in first] == [6, 6, 3]
    assert [len(part) for batch in first for part in batch.parts] == [2, 2, 1]
    rows = [row for batch in first for part in batch.parts for row in part.tolist()]
    assert sorted(rows) == [1, 3, 5, 7, 9]
    again = [row for batch in mini_batches(own, table, 2, generator) for part in batch.parts for row in part.tolist()]
    assert sorted(again) == [1, 3, 5, 7, 9]
    assert again != rows
    assert list(mini_batches(torch.tensor([4]), table, 2, generator)) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [([0, 1, 2, 3, 4, 5, 6, 6], "each of the 8 completions on exactly one process"), ([0, 1, 2], "3 entries for 8")],
)
def test_rows_must_be_complete(make_critic, rollout, rows, message):
    with pytest.raises(ValueError, match=message):
        train(ensemble([make_critic()]), rollout, [0] * 8, torch.tensor(rows))


def test_assign_uses_its_own_generator(make_critic):
    torch.manual_seed(0)
    first = ensemble([make_critic(0), make_critic(1)], seed=5)
    torch.manual_seed(1)
    second = ensemble([make_critic(0), make_critic(1)], seed=5)
    drawn = [first.assign([4, 4, 4, 5]) for _ in range(3)]
    assert all(torch.equal(shards, second.assign([4, 4, 4, 5])) for shards in drawn)
    assert not torch.equal(drawn[0], drawn[1])
    assert len(first) == 2


def test_shared_weights_are_refused(make_critic):
    critic = make_critic()
    with pytest.raises(ValueError, match="Critics 0 and 1 share weights"):
        ensemble([critic, critic])
    with pytest.raises(ValueError, match="critics is empty"):
        ensemble([])


def test_bfloat16_weights_take_steps_below_their_resolution(make_critic, rollout):
    """Of 40 steps of 1e-5 none moves a bfloat16 weight of 0.5, whose neighbours are 2e-3 away; the copies add up."""
    critic = make_critic(dtype=torch.bfloat16)
    group = ensemble([critic], learning_rate=1e-5)
    before = group._optimizers[0].state_dict()["weights"]
    before = {name: value.clone() for name, value in before.items()}
    train(group, rollout, [0] * 8, epochs=40)
    assert {value.dtype for value in critic.parameters()} == {torch.bfloat16}
    after = group._optimizers[0].state_dict()
    assert {value.dtype for value in after["weights"].values()} == {torch.float32}
    assert {value.dtype for value in after["exp_avg"].values()} == {torch.float32}
    moved = (after["weights"]["score.weight"] - before["score.weight"]).abs()
    assert moved.max() > 2e-4
    for name, value in critic.named_parameters():
        assert torch.equal(value, after["weights"][name].bfloat16())
        assert value.grad is None


def test_bfloat16_learns_as_float32(make_critic, rollout):
    losses = []
    for dtype, autocast_dtype in [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)]:
        group = ensemble([make_critic(dtype=dtype)], autocast_dtype=autocast_dtype, learning_rate=3e-3)
        first = train(group, rollout, [0] * 8)["critic_0/loss"]
        train(group, rollout, [0] * 8, epochs=10)
        losses.append(train(group, rollout, [0] * 8)["critic_0/loss"])
        assert losses[-1] < 0.6 * first
    assert losses == pytest.approx([losses[0]] * 3, rel=0.15)


def test_adapter_leaves_the_backbone_alone(make_critic, rollout):
    critic = make_critic(peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: value.detach().clone() for name, value in critic.named_parameters()}
    group = ensemble([critic])
    first = train(group, rollout, [0] * 8)["critic_0/loss"]
    train(group, rollout, [0] * 8, epochs=50)
    assert train(group, rollout, [0] * 8)["critic_0/loss"] < 0.9 * first
    for name, value in critic.named_parameters():
        assert torch.equal(value, before[name]) != value.requires_grad
