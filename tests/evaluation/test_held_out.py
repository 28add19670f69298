"""What the quickstart measures of a policy in memory."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from trl_entropy.evaluation.held_out import Measure
from trl_entropy.tasks import Task

PROMPTS = ["1+1=", "23", "0-9-5=", "7"]
LENGTH = 6


@pytest.fixture
def seen() -> list[list[str]]:
    """The completions that were graded, call by call: sampled, then greedy."""
    return []


@pytest.fixture
def measure(tiny_tokenizer, seen) -> Measure:
    """Of two rewards of a half for every other problem."""

    def half(completions, solved, **columns):
        seen.append(completions)
        return [0.5 * one for one in solved]

    rows = Dataset.from_dict({"prompt": PROMPTS, "solved": [1, 0, 1, 0]})
    return Measure(Task("test", None, (half, half)), rows, tiny_tokenizer, seed=0, length=LENGTH)


def greedy(model, tokenizer, prompt) -> str:
    """The most likely completion, token by token."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = []
    while len(written) < LENGTH and tokenizer.eos_token_id not in written:
        written.append(
            model(input_ids=torch.cat([ids, torch.tensor([written], dtype=ids.dtype)], 1))
            .logits[0, -1]
            .argmax()
            .item()
        )
    return tokenizer.decode(written, skip_special_tokens=True)


def test_it_grades_the_models_own_completions(tiny_model, tiny_tokenizer, measure, seen):
    found = measure(tiny_model, "after")
    assert (found["accuracy_after"], found["greedy_accuracy_after"]) == (0.5, 0.5)
    assert len(seen) == 4
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]
    assert seen[3] == [greedy(tiny_model, tiny_tokenizer, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("lora", [False, True])
def test_the_models_own_generation_settings_are_not_used(tiny_model, measure, seen, lora):
    """TRL trains without them, and Qwen2.5's have a repetition penalty."""
    model = get_peft_model(tiny_model, LoraConfig(target_modules="all-linear")) if lora else tiny_model
    measure(model, "before")
    plain = seen[:]
    seen.clear()
    tiny_model.generation_config.repetition_penalty = 9.0
    own = tiny_model.generation_config
    measure(model, "before")
    assert seen == plain
    assert model.generation_config is own
    assert tiny_model.generation_config is own


def test_what_is_drawn_elsewhere_stays_as_it_is(tiny_model, measure):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    measure(tiny_model, "before")
    torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)
