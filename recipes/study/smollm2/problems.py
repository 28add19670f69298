"""The two tasks: a question, shown after an example or two, whose one right answer is a few tokens and a line break.

A single sequence of tokens is right. So the probability that a policy samples it is read off one forward pass, and
with it pass@k for every k, without the noise of sampling.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from string import ascii_lowercase
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

LINE_BREAK = "Ċ"
"""SmolLM2's token for it. An answer ends there, as the examples' do."""
SPLIT_SEED = 0
TEST_PAIRS = 50
EVALUATED_AT_ONCE = 64


@dataclass(frozen=True)
class StudyTask:
    """What to train on.

    Attributes:
        things: What problems are made of, each with each, in both orders.
        problem: Prompt and answer of two of them.
        max_completion_length: Tokens of the longest answer and its line break.
    """

    things: Sequence[Any]
    problem: Callable[[Any, Any], tuple[str, str]]
    max_completion_length: int

    def load(self, split: str) -> Dataset:
        """Problems of `"train"` or `"test"`, always the same ones: columns `prompt` and `answer`.

        Both orders of two things are in the same split.
        """
        shuffler = random.Random(SPLIT_SEED)
        pairs = list(combinations(self.things, 2))
        shuffler.shuffle(pairs)
        pairs = pairs[:TEST_PAIRS] if split == "test" else pairs[TEST_PAIRS:]
        rows = [self.problem(*ordered) for pair in pairs for ordered in (pair, pair[::-1])]
        shuffler.shuffle(rows)
        return Dataset.from_list([{"prompt": prompt, "answer": answer} for prompt, answer in rows])


STUDY_TASKS = {
    "sums": StudyTask(range(1, 21), lambda a, b: (f"2+3=5\n{a}+{b}=", f"{a + b}"), 3),
    "letters": StudyTask(
        ascii_lowercase, lambda a, b: (f"b a: a b\nf h: f h\n{a} {b}:", f" {min(a, b)} {max(a, b)}"), 3
    ),
}


@cache
def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, for which a line break ends a completion."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = LINE_BREAK
    return tokenizer


def make_reward(tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[float | None]]:
    """TRL's reward function: 1 for the tokens of the answer and the line break, and nothing else."""

    def exact_answer(completion_ids: list[list[int]], answer: list[str], **columns: object) -> list[float | None]:
        right = ([*tokenizer.encode(text), tokenizer.eos_token_id] for text in answer)
        return [float(list(ids) == expected) for ids, expected in zip(completion_ids, right, strict=True)]

    return exact_answer


@torch.no_grad()
def answer_statistics(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, problems: Dataset
) -> tuple[list[float], float]:
    """Probability that sampling at temperature 1 gives the right answer, of each problem, in its order.

    With it the mean entropy (nats) over the tokens of the right answers: the same ones, whatever the policy samples.
    """
    probabilities, entropies = [], []
    for ids, attention, is_answer in _batches(tokenizer, problems):
        log_probs = model(input_ids=ids, attention_mask=attention).logits[:, :-1].float().log_softmax(-1)
        chosen = log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1).masked_fill(~is_answer[:, 1:], 0.0)
        # logits that are no numbers give no answer
        probabilities += chosen.double().sum(1).exp().nan_to_num(0.0).tolist()
        log_probs = log_probs[is_answer[:, 1:]]
        entropies.append(-(log_probs.exp() * log_probs).sum(-1))
    return probabilities, torch.cat(entropies).double().mean().item()


def _batches(tokenizer: PreTrainedTokenizerBase, problems: Dataset) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    prompts = [tokenizer.encode(text) for text in problems["prompt"]]
    answers = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in problems["answer"]]
    for start in range(0, len(prompts), EVALUATED_AT_ONCE):
        pairs = list(zip(prompts, answers, strict=True))[start : start + EVALUATED_AT_ONCE]
        length = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids = torch.zeros(len(pairs), length, dtype=torch.long)
        attention, is_answer = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(pairs):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            attention[row, :end], is_answer[row, len(prompt) : end] = 1, True
        yield ids, attention, is_answer


def pass_at(probabilities: list[float], k: int) -> float:
    """Expected share of problems that have a right answer among `k` samples."""
    return sum(1 - (1 - p) ** k for p in probabilities) / len(probabilities)
