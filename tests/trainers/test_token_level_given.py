"""How token rewards and advantages are given, what is refused, and trainers that read advantages their own way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from tests.conftest import parity_reward
from tests.trainers.subclasses import ColumnTrainer
from tests.trainers.test_grpo import assert_same_weights, trained, weights
from tests.trainers.test_token_level import by_hand, dense, numbers, rolled_out
from trl_entropy import EntropyGRPOConfig, entropy_controlled


def test_an_async_function_and_weights(make_trainer: Callable[..., Any]) -> None:
    async def graded(completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> dict[str, Any]:
        return dense("token_rewards")(completions, completion_ids)

    functions = [graded, parity_reward, dense("token_rewards")]
    trainer = make_trainer(reward_funcs=functions, reward_weights=[0.25, 1.0, 0.5])
    output = rolled_out(trainer)
    total = (0.75 * by_hand(output)).sum(1).mean().item()
    assert trainer._metrics["train"]["token_rewards"] == [pytest.approx(total, abs=1e-6)]
    assert trainer.reward_funcs == functions


def test_a_dict_of_rewards_alone_is_a_list_of_rewards(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    def in_a_dict(completions: list[str], **kwargs: Any) -> dict[str, Any]:
        return {"rewards": parity_reward(completions)}

    plain, given = (
        trained(make_trainer(tmp_path / name, reward_funcs=function, max_steps=2))
        for name, function in (("list", parity_reward), ("dict", in_a_dict))
    )
    assert_same_weights(weights(plain), weights(given))


def rollout(name: str, truncated: int = 0) -> Callable[..., Any]:
    """A rollout function whose episodes are two turns of the model with an answer between them.

    The first `truncated` of every four do not end.
    """

    def rolls(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        ends = [4 if i % 4 < truncated else 1 for i in range(len(prompts))]
        completions = [[2 + i % 4, 5, 6, 7, 3 + i % 3, end] for i, end in enumerate(ends)]
        return {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": completions,
            "logprobs": [[0.0] * 6 for _ in prompts],
            "env_mask": [[1, 1, 0, 0, 1, 1] for _ in prompts],
            name: [numbers(ids) for ids in completions],
        }

    return rolls


@pytest.mark.parametrize("name", ["token_rewards", "token_advantages"])
def test_a_rollout_function_s_field_and_the_answers_of_a_tool(make_trainer: Callable[..., Any], name: str) -> None:
    output = rolled_out(make_trainer(rollout_func=rollout(name)))
    written = torch.tensor([1, 1, 0, 0, 1, 1]).bool().expand(8, 6)
    values = torch.where(written, by_hand(output), 0.0)
    found = output["advantages"]
    assert bool((found[~written] == 0.0).all())
    if name == "token_advantages":
        assert torch.equal(found, values)
        return
    to_go = values.flip(1).cumsum(1).flip(1)
    # the tokens differ by what they are credited with alone
    torch.testing.assert_close((found - to_go)[:, 0], (found - to_go)[:, 4], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[:, 0] - found[:, 1], values[:, 0], rtol=0, atol=1e-6)


def test_a_truncated_completion_that_is_masked_is_in_its_group_s_mean(
    make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    """As its reward is in TRL's, though its own tokens do not count."""
    trainers = [
        make_trainer(tmp_path / name, rollout_func=rollout(name, truncated=1), mask_truncated_completions=True)
        for name in ("unknown_field", "token_rewards")
    ]
    plain, output = map(rolled_out, trainers)
    written = torch.tensor([1, 1, 0, 0, 1, 1]).bool().expand(8, 6)
    counted = output["completion_mask"].bool() & output["tool_mask"].bool()
    assert counted.any(1).tolist() == [False, True, True, True] * 2
    rewards = torch.where(written, torch.tensor([numbers(ids) for ids in output["completion_ids"].tolist()]), 0.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    baseline = to_go[:, 0].view(2, 4).mean(1).repeat_interleave(4)
    want = torch.where(counted, plain["advantages"].unsqueeze(1) + to_go - baseline.unsqueeze(1), 0.0)
    torch.testing.assert_close(output["advantages"], want, rtol=0, atol=1e-6)
    assert trainers[1]._metrics["train"]["token_rewards"] == [pytest.approx(rewards.sum(1).mean().item(), abs=1e-6)]
    settings = {"rollout_func": rollout("token_advantages", truncated=1), "mask_truncated_completions": True}
    given = rolled_out(make_trainer(tmp_path / "advantages", **settings))["advantages"]
    assert torch.equal(given, torch.where(counted, rewards, 0.0))


def test_a_rollout_function_may_give_a_tuple_of_lists(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    def rolls(prompts: list[str], trainer: Any) -> dict[str, Any]:
        output = rollout("token_rewards")(prompts, trainer)
        return output | {"token_rewards": tuple(output["token_rewards"])}

    listed, given = (
        rolled_out(make_trainer(tmp_path / name, rollout_func=function))
        for name, function in (("list", rollout("token_rewards")), ("tuple", rolls))
    )
    assert torch.equal(given["advantages"], listed["advantages"])


@pytest.mark.parametrize("kind", ["tensor", "bfloat16", "array"])
@pytest.mark.parametrize("source", ["reward", "rollout"])
@pytest.mark.parametrize("name", ["token_rewards", "token_advantages"])
def test_a_tensor_or_an_array_is_its_rows(
    make_trainer: Callable[..., Any], tmp_path: Path, name: str, source: str, kind: str
) -> None:
    """Wider than the completions, with what is no number behind them."""
    makes = {
        "tensor": torch.tensor,
        "bfloat16": lambda table: torch.tensor(table, dtype=torch.bfloat16, requires_grad=True),
        "array": np.array,
    }

    def as_table(rows: list[list[float]]) -> Any:
        return makes[kind]([[*row, *[float("nan")] * (9 - len(row))] for row in rows])

    def rolls(prompts: list[str], trainer: Any) -> dict[str, Any]:
        output = rollout(name)(prompts, trainer)
        return output | {name: as_table(output[name])}

    def graded(completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> dict[str, Any]:
        output = dense(name)(completions, completion_ids)
        return output | {name: as_table(output[name])}

    listed = {"rollout_func": rollout(name)} if source == "rollout" else {"reward_funcs": dense(name)}
    tabled: dict[str, Any] = {"rollout_func": rolls} if source == "rollout" else {"reward_funcs": graded}
    want, found = (
        rolled_out(make_trainer(tmp_path / folder, **given)) for folder, given in (("a", listed), ("b", tabled))
    )
    assert torch.equal(found["completion_ids"], want["completion_ids"])
    torch.testing.assert_close(found["advantages"], want["advantages"], rtol=0, atol=1e-6)
    assert want["advantages"].dim() == 2


# --- what is refused


def returning(**fields: Any) -> Callable[..., Any]:
    def graded(completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> dict[str, Any]:
        return {name: make(completion_ids) for name, make in fields.items()}

    return graded


def zeros(ids: list[list[int]]) -> list[Any]:
    return [[0.0] * len(one) for one in ids]


def whole(ids: list[list[int]]) -> list[float]:
    return [0.0] * len(ids)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rewards": whole, "token_rewards": lambda ids: [*zeros(ids)[:-1], [0.0] * 9]}, r"completion 7 has . tokens"),
        (
            {"rewards": whole, "token_rewards": lambda ids: zeros(ids)[:-1]},
            r"7 lists for 8 completions; give one each",
        ),
        (
            {"rewards": whole, "token_rewards": lambda ids: [[float("nan")] * len(ids[0]), *zeros(ids)[1:]]},
            r"token_rewards of graded: nan at token 0 of completion 0 is not finite",
        ),
        (
            {"rewards": whole, "token_advantages": lambda ids: [[float("inf")] * len(ids[0]), *zeros(ids)[1:]]},
            r"token_advantages of graded: inf at token 0 of completion 0 is not finite",
        ),
        (
            {"rewards": whole, "token_advantages": lambda ids: [None, *zeros(ids)[1:]]},
            r"tokens and none of its number",
        ),
        (
            {"rewards": whole, "token_rewards": lambda ids: torch.zeros(len(ids), 1)},
            r"completion 0 has . tokens and 1 of its numbers are given",
        ),
        (
            {"rewards": whole, "token_rewards": lambda ids: torch.zeros(len(ids))},
            r"token_rewards of graded has the shape \(8,\); give \(completions, tokens\), or a list per completion",
        ),
        ({"token_rewards": zeros}, r"graded returned a dict with 'token_rewards': it must have 'rewards'"),
        ({"rewards": whole, "per_token": zeros}, r"graded returned a dict with 'rewards', 'per_token'"),
        (
            {"rewards": whole, "token_rewards": zeros, "token_advantages": zeros},
            r"token_rewards of graded and token_ad",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(make_trainer: Callable[..., Any], fields: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rolled_out(make_trainer(reward_funcs=returning(**fields)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"qae_quantile": 0.4}, r"token_rewards of graded cannot be used with QAE, which sets the advantages"),
        ({"loss_type": "vespo"}, r"token_rewards of graded cannot be used with loss_type='vespo'.* Set loss_type to"),
    ],
)
def test_what_cannot_be_combined_is_refused(make_trainer: Callable[..., Any], settings: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rolled_out(make_trainer(reward_funcs=dense("token_rewards"), **settings))


class OwnTokensTrainer(GRPOTrainer):
    """Advantages of its own, per token, which its loss gives a new axis."""

    reads = True

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        return {**inputs, "advantages": inputs["advantages"].view(8, -1).expand_as(inputs["completion_ids"])}

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        length = inputs["completion_ids"].size(1)
        forward = self._get_per_token_logps_and_entropies
        logps, *_ = forward(model, ids, torch.ones_like(ids), length, compute_entropy=True)
        return -(logps.unsqueeze(2) * (inputs["advantages"].unsqueeze(2) if self.reads else 1.0)).mean()


def test_a_loss_that_never_reads_the_advantages_is_refused(make_trainer: Callable[..., Any]) -> None:
    settings = {"trainer_class": entropy_controlled(OwnTokensTrainer), "config_class": EntropyGRPOConfig}
    for given in ({"qae_quantile": 0.4}, {"reward_funcs": dense("token_rewards")}):
        trainer = make_trainer(**settings, **given)
        trainer.reads = False
        with pytest.raises(RuntimeError, match=r"OwnTokensTrainer\._compute_loss does not read advantages from its"):
            trainer.train()


def test_a_trainer_s_own_advantages_of_tokens_are_left_alone(make_trainer: Callable[..., Any]) -> None:
    settings = {"trainer_class": entropy_controlled(OwnTokensTrainer), "config_class": EntropyGRPOConfig}
    for given in ({}, {"positive_nll_coef": 0.1}):
        trained(make_trainer(**settings, **given, max_steps=1))


class OwnScoresTrainer(GRPOTrainer):
    """Calls the functions itself, scores twice with TRL, and adds a column with a weight of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reward_weights = torch.tensor([1.0, 0.5])

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        own = self.reward_funcs[0](completions, completion_ids=completion_ids_list)
        assert set(own) == {"rewards", "token_rewards"}
        for _ in range(2):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return torch.cat([rewards, torch.zeros_like(rewards)], dim=1)


def test_functions_are_the_trainer_s_own_in_its_override(make_trainer: Callable[..., Any]) -> None:
    settings = {"trainer_class": entropy_controlled(OwnScoresTrainer), "config_class": EntropyGRPOConfig}
    trainer = make_trainer(**settings, reward_funcs=dense("token_rewards"))
    total = by_hand(rolled_out(trainer)).sum(1).mean().item()
    assert trainer._metrics["train"]["token_rewards"] == [pytest.approx(total, abs=1e-6)]


class PlusTrainer(GRPOTrainer):
    """Adds to the advantages as if they were one per completion, as TRL's MiniLLM does."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        advantages = inputs["advantages"].unsqueeze(1) + 0.5 * inputs["completion_mask"]
        return super()._compute_loss(model, {**inputs, "advantages": advantages})


@pytest.mark.parametrize(
    ("base", "said"),
    [(ColumnTrainer, "as if they were one per completion"), (PlusTrainer, r"shape \(8, 8, \d\), and can read \(B,\)")],
)
def test_an_override_that_takes_them_for_one_per_completion_is_refused(
    make_trainer: Callable[..., Any], base: type, said: str
) -> None:
    trainer = make_trainer(
        trainer_class=entropy_controlled(base), config_class=EntropyGRPOConfig, reward_funcs=dense("token_rewards")
    )
    with pytest.raises(ValueError, match=said):
        trainer.train()
