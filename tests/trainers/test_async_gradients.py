"""Gradients of the asynchronous trainer in float64, on rows as TRL packs them, against the formulas token by token."""

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trl_entropy.controls import CONTROLS
from trl_entropy.telemetry.staleness import AGES
from trl_entropy.trainers.async_controls import REFUSED, SUPPORTED

from . import async_parts
from .async_reference import EPS, EPS_HIGH, LOSSES, Token, above, below, plain, weighted

async_parts.require("async_grpo")

VERSION, ACCUMULATION = 4, 2
CLIP = {"epsilon": EPS, "epsilon_high": EPS_HIGH}


class GivenOutputs(nn.Module):
    """A policy whose weights are the log-probs and the entropies at each position of the packed row."""

    is_gradient_checkpointing = False

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.positions = positions
        self.log_probs, self.entropy = (nn.Parameter(torch.empty(positions, dtype=torch.float64)) for _ in range(2))
        self.calls = 0

    def draw(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.rand, self.positions, generator=generator, dtype=torch.float64)
        self.log_probs.data, self.entropy.data = -0.2 - 3.0 * draw(), 0.2 + 2.0 * draw()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        self.calls += 1
        assert input_ids.shape == (1, self.positions)
        return SimpleNamespace(log_probs=self.log_probs[None] * 1.0, entropy=self.entropy[None] * 1.0)


def batch_of(trainer: Any) -> tuple[dict[str, Tensor], GivenOutputs, list[Token]]:
    """A packed micro-batch in float64 as the trainer's data loader gives it, a policy for it, and its tokens.

    The policy's weights of the versions up to `VERSION` are kept, as if they had been handed over.
    """
    trainer.model_version = trainer.synced = trainer.rollout_worker.version = VERSION
    inputs = next(iter(trainer.get_train_dataloader()))
    floats = {
        name: value.double() for name, value in inputs.items() if torch.is_tensor(value) and value.is_floating_point()
    }
    inputs |= floats
    samples = trainer.rollout_worker.taken[: int(inputs["segment_id"].max()) + 1]
    trainer.model = policy = GivenOutputs(inputs["input_ids"].shape[1])
    entropies = {}
    for version in range(1, VERSION + 1):
        policy.draw(version)
        entropies[version] = policy.entropy.tolist()
        if trainer._versions is not None:
            trainer._versions.keep(version, policy)
    trainer.current_gradient_accumulation_steps = ACCUMULATION
    trainer.state.max_steps = trainer.args.max_steps
    index = iter(inputs["token_index"][0].tolist())
    tokens = []
    for number, sample in enumerate(samples):
        for place in range(1, len(sample.input_ids)):
            if sample.completion_mask[place]:
                at = next(index)
                now = (policy.log_probs[at], policy.entropy[at], sample.old_log_probs[place].item())
                old_entropy, advantage = entropies[sample.model_version][at], float(np.float32(sample.advantage))
                tokens.append(Token(number, place, *now, old_entropy, advantage, sample.metrics["reward"]))
    assert next(index, None) is None
    return inputs, policy, tokens


def gradients(loss: Tensor, policy: GivenOutputs) -> tuple[Tensor, ...]:
    weights = (policy.log_probs, policy.entropy)
    return tuple(torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True, retain_graph=True))


@pytest.mark.parametrize("prefix", [None, *LOSSES])
@pytest.mark.parametrize("seed", [0, 2])  # the second begins with a prompt of one token
def test_gradients_are_the_formulas(make_async: Callable[..., Any], prefix: str | None, seed: int) -> None:
    fields, formula = LOSSES[prefix] if prefix else ({"record_tokens": 8}, weighted(plain))
    worker = async_parts.MadeRollouts(seed, group_size=12)
    fields = {**CLIP, "gradient_accumulation_steps": ACCUMULATION, "max_steps": 4 // ACCUMULATION, **fields}
    trainer = make_async(per_device_train_batch_size=12, rollout_worker=worker, **fields)
    inputs, policy, tokens = batch_of(trainer)
    if prefix is None:
        trainer._recorder = None
    given = copy.deepcopy(inputs)
    assert len({t.sample for t in tokens}) == 12
    assert len(tokens) > len(set(given["token_index"][0].tolist())), "nothing is shared"
    for _ in range(2 if prefix == "epo" else 1):
        calls, loss = policy.calls, trainer.compute_loss(policy, inputs)
    ages = {VERSION - sample.model_version for sample in worker.taken[:12]} if prefix == "erc" else set()
    assert policy.calls - calls == 1 + len(ages - {0})
    torch.testing.assert_close(inputs, given, rtol=0, atol=0)
    expected = formula(tokens) / ACCUMULATION
    for found, wanted in zip(gradients(loss, policy), gradients(expected, policy), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6 if prefix == "entropic" else 1e-9, atol=1e-13)
    if prefix is not None:
        other = gradients(weighted(plain)(tokens) / ACCUMULATION, policy)
        assert not all(torch.allclose(*pair) for pair in zip(gradients(loss, policy), other, strict=True))


def behaviour_gap(inputs: dict[str, Tensor], samples: list[Any]) -> float:
    """Mean distance of the recorded log-probs from those of the samples' versions, but for the current one."""
    policy, gaps = GivenOutputs(inputs["input_ids"].shape[1]), []
    columns = [inputs[name][0] for name in ("token_index", "segment_id", "old_log_probs")]
    for at, number, old in zip(*columns, strict=True):
        if (version := samples[number].model_version) != VERSION:
            policy.draw(version)
            gaps.append(abs((policy.log_probs[at] - old).item()))
    return sum(gaps) / len(gaps)


def test_the_current_version_needs_a_pass_only_where_an_update_lies_between(make_async: Callable[..., Any]) -> None:
    worker = async_parts.MadeRollouts(0, group_size=12)
    trainer = make_async(per_device_train_batch_size=12, rollout_worker=worker, erc_low=0.8, erc_high=1.3, **CLIP)
    inputs, policy, tokens = batch_of(trainer)
    versions = {sample.model_version for sample in worker.taken[:12]}
    assert VERSION in versions

    def passes() -> int:
        before = policy.calls
        trainer.compute_loss(policy, inputs)
        return policy.calls - before

    assert passes() == 1 + len(versions) - 1
    metrics = trainer.control_metrics()
    assert metrics["staleness/behaviour_gap"] == pytest.approx(behaviour_gap(inputs, worker.taken))
    shares = [metrics[f"staleness/tokens_{age}"] * metrics.get(f"staleness/clipped_{age}", 0.0) for age in AGES]
    assert sum(shares) == pytest.approx(sum(below(t) or above(t) for t in tokens) / len(tokens))
    assert any(map(below, tokens))
    assert any(map(above, tokens))
    trainer.state.global_step = 1
    assert passes() == 1 + len(versions)
    trainer.on_sync()
    assert passes() == 1 + len(versions) - 1


def test_the_record_has_each_token_as_its_author_wrote_it(
    make_async: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = async_parts.MadeRollouts(0, group_size=6)  # two prompts
    worker.letters = range(3)
    fields = {"erc_low": 0.8, "erc_high": 1.3, "record_tokens": 8, **CLIP}
    trainer = make_async(per_device_train_batch_size=12, rollout_worker=worker, **fields)
    inputs, policy, tokens = batch_of(trainer)
    recorded: list[Any] = []
    monkeypatch.setattr(trainer._recorder, "add", recorded.append)
    trainer.compute_loss(policy, inputs)
    (batch,) = recorded
    first = {t.sample: t.place for t in reversed(tokens)}
    assert int(batch.mask.sum()) == len(tokens)
    for t in tokens:
        at = t.sample, t.place - first[t.sample]
        columns = [batch.inputs[name][at] for name in ("old_per_token_logps", "old_entropies", "advantages")]
        found = [*columns, batch.logps[at], batch.entropies[at]]
        expected = [t.old, t.old_entropy, t.a, t.lp.item(), t.entropy.item()]
        assert [one.item() for one in found] == pytest.approx(expected, rel=1e-6)
        assert int(batch.inputs["completion_ids"][at]) == int(worker.taken[t.sample].input_ids[t.place])
    assert len(set(first.values())) > 1
    assert {0, 1, 2} == {token for sample, start in first.items() for token in worker.taken[sample].input_ids[:start]}
    for sample, start in first.items():
        prompt = batch.inputs["prompt_ids"][sample][batch.inputs["prompt_mask"][sample]]
        assert prompt.tolist() == worker.taken[sample].input_ids[:start].tolist()


def test_what_is_known_when_samples_are_packed_waits_for_no_device(
    make_async: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which versions wrote the tokens, and whether a sample has a reward: no tensor of the micro-batch is read."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("a tensor is read, for which the host waits")

    trainer = make_async(rollout_worker=async_parts.MadeRollouts(1), erc_low=0.8, erc_high=1.3, positive_nll_coef=0.1)
    inputs, policy, _ = batch_of(trainer)
    shape, shaped = trainer._shape, []

    def watched(*given: Any) -> Any:
        with monkeypatch.context() as patch:
            for name in ("tolist", "item", "__bool__", "__int__", "__float__"):
                patch.setattr(Tensor, name, refuse)
            shaped.append(shape(*given))
        return shaped[-1]

    monkeypatch.setattr(trainer, "_shape", watched)
    calls = policy.calls
    trainer.compute_loss(policy, inputs)
    assert policy.calls > calls + 1, "no earlier version was needed"
    assert shaped


def test_every_control_of_the_table_is_tested_or_refused() -> None:
    every = {control.prefix for control in CONTROLS}
    supported, refused = SUPPORTED, REFUSED.keys()
    assert LOSSES.keys() == supported
    assert supported | refused == every
    assert not supported & refused
