"""The arithmetic task: its problems, its reward and the policy that it builds."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from trl_entropy.tasks import arithmetic, get_task, tiny_policy
from trl_entropy.tasks.arithmetic import exact_answer_reward, load
from trl_entropy.tasks.tiny_policy import make_model, make_tokenizer


def numbers(problem: str) -> tuple[int, int]:
    left, right = problem.removesuffix("=").split("+")
    return int(left), int(right)


def test_splits_are_all_problems_and_share_none_in_either_order() -> None:
    train, test = ([numbers(prompt) for prompt in load(split)["prompt"]] for split in ("train", "test"))
    assert sorted(train + test) == [(a, b) for a in range(10, 100) for b in range(10, 100)]
    assert not {tuple(sorted(pair)) for pair in train} & {tuple(sorted(pair)) for pair in test}
    assert 900 < len(test) < 1100


def test_answers_are_right() -> None:
    for row in load("test"):
        assert row["answer"] == str(sum(numbers(row["prompt"])))


def test_problems_are_the_same_every_time_and_size_takes_the_first() -> None:
    everything = load("train").to_list()
    assert load("train").to_list() == everything
    assert load("train", size=7).to_list() == everything[:7]


def test_problems_are_shuffled() -> None:
    assert load("test")["prompt"] != sorted(load("test")["prompt"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("validation",), "split='validation' is unknown. Choose 'train' or 'test'"),
        (("test", 0), r"size=0 is out of range. Set it to 1\.\.1016"),
        (("test", 9000), r"size=9000 is out of range"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(*arguments)


def test_right_answer_is_rewarded() -> None:
    assert exact_answer_reward(completions=["132", "99"], answer=["132", "98"], prompts=["47+85=", "49+49="]) == [1, 0]


@pytest.mark.parametrize(
    "completion",
    ["", " 132", "132 ", "132\n", "0132", "+132", "132.0", "13", "1320", "132=132", "132\x00", "\uff11\uff13\uff12"],
)
def test_anything_but_the_exact_answer_is_not_rewarded(completion: str) -> None:
    assert exact_answer_reward(completions=[completion], answer=["132"]) == [0.0]


def test_reward_refuses_a_list_of_another_length() -> None:
    with pytest.raises(ValueError, match="zip"):
        exact_answer_reward(completions=["1", "2"], answer=["1"])


@pytest.fixture
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the warm-up at once."""
    monkeypatch.setattr(arithmetic, "WARM_UP_ACCURACY", 0.0)


def test_saved_policy_is_the_tasks_and_loads_with_the_auto_classes(no_warm_up: None, tmp_path: Path) -> None:
    build_policy = get_task("arithmetic").build_policy
    assert build_policy is not None
    path = build_policy(str(tmp_path / "new" / "policy"), 0)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.config.model_type == "qwen2"
    assert 500_000 < model.num_parameters() < 700_000
    assert (tmp_path / "new" / "policy" / "model.safetensors").is_file()

    texts = [row["prompt"] + row["answer"] for row in load("test")] + [arithmetic.CHARACTERS]
    saved = PreTrainedTokenizerFast.from_pretrained(path)
    for loaded in (AutoTokenizer.from_pretrained(path), AutoProcessor.from_pretrained(path)):
        assert loaded(texts).input_ids == saved(texts).input_ids
        assert loaded.batch_decode(loaded(texts).input_ids) == texts
        assert (loaded.pad_token_id, loaded.eos_token_id, loaded.padding_side) == (0, 1, "left")
        assert loaded.unk_token_id not in loaded(arithmetic.CHARACTERS).input_ids
    assert model.generation_config.eos_token_id == saved.eos_token_id
    assert model.config.pad_token_id == saved.pad_token_id


def test_warm_up_reaches_its_accuracy_and_the_seed_fixes_the_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(arithmetic, "WARM_UP_ACCURACY", 0.0005)
    monkeypatch.setattr(tiny_policy, "WARM_UP_BATCH", 32)
    state = torch.get_rng_state()
    weights, accuracies = [], []
    for seed in (0, 0, 1):
        path = arithmetic.build_policy(str(tmp_path), seed)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        probed = load("train", arithmetic.PROBE_PROBLEMS)
        problems = tiny_policy.encode(tokenizer, probed["prompt"], probed["answer"])
        weights.append(model.lm_head.weight.detach().clone())
        accuracies.append(tiny_policy.repeat_probability(model, *problems).mean().item())
        torch.rand(3)
        torch.set_rng_state(state)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert all(0.0005 <= accuracy < 0.1 for accuracy in accuracies)


def test_policy_leaves_the_random_state_of_the_caller(no_warm_up: None, tmp_path: Path) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    arithmetic.build_policy(str(tmp_path), 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_warm_up_that_does_not_get_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tiny_policy, "WARM_UP_MAX_STEPS", 1)
    with pytest.raises(RuntimeError, match=r"WARM_UP_MAX_STEPS=1 steps, not 0\.25. Try another seed"):
        arithmetic.build_policy(str(tmp_path), 0)


def test_answer_probability_is_the_product_over_answer_and_end_token_by_token() -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(arithmetic.CHARACTERS)
    model = make_model(tokenizer, hidden_size=32, num_layers=1, max_length=16).eval()
    rows = [row for row in load("train", 200).to_list() if len(row["answer"]) == 2][:1] + load("train", 1).to_list()
    expected = []
    for row in rows:  # one token at a time, without padding
        ids, probability = tokenizer(row["prompt"]).input_ids, 1.0
        for token in [*tokenizer(row["answer"]).input_ids, tokenizer.eos_token_id]:
            probability *= model(torch.tensor([ids])).logits[0, -1].softmax(-1)[token].item()
            ids.append(token)
        expected.append(probability)
    problems = tiny_policy.encode(tokenizer, [row["prompt"] for row in rows], [row["answer"] for row in rows])
    assert tiny_policy.repeat_probability(model, *problems).tolist() == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0
