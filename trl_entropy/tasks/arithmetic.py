"""Two-digit addition, with a character-level policy small enough to train from nothing in a minute on two CPU cores.

Problems are `a+b=` with `a` and `b` in 10..99. Both orders of a pair are in the same split: no held-out problem was
trained on the other way round.
"""

import random
from itertools import combinations_with_replacement
from typing import Any

import torch
from datasets import Dataset

from trl_entropy.tasks import Task
from trl_entropy.tasks.tiny_policy import encode, make_model, make_tokenizer, save_policy, warm_up

CHARACTERS = "0123456789+-*/=?abcdefghijklmnopqrstuvwxyz"
SPLIT_SEED = 0
NUM_TEST_PAIRS = 512

WARM_UP_ACCURACY = 0.25
PROBE_PROBLEMS = 512


def load(split: str, size: int | None = None) -> Dataset:
    """Problems of a split, always the same ones in the same (shuffled) order.

    Args:
        split: `"train"` (about 7,100 problems) or `"test"` (about 1,000 held-out ones).
        size: Number of problems to return, from the first; `None` for all.

    Returns:
        Columns `prompt` (such as `"47+85="`) and `answer` (such as `"132"`).

    Raises:
        ValueError: If the split is unknown, or `size` is not in 1..number of problems.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is unknown. Choose 'train' or 'test'.")
    shuffler = random.Random(SPLIT_SEED)
    pairs = list(combinations_with_replacement(range(10, 100), 2))
    shuffler.shuffle(pairs)
    pairs = pairs[:NUM_TEST_PAIRS] if split == "test" else pairs[NUM_TEST_PAIRS:]
    problems = sorted({problem for a, b in pairs for problem in ((a, b), (b, a))})
    shuffler.shuffle(problems)
    if size is not None and not 1 <= size <= len(problems):
        raise ValueError(f"size={size} is out of range. Set it to 1..{len(problems)} or leave it out.")
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in problems[:size]]
    return Dataset.from_list(rows)


def exact_answer_reward(completions: list[Any], answer: list[str], **columns: object) -> list[float | None]:
    """1 if the completion, text or chat, is the answer, character for character, else 0: spaces and signs count."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [float(text == expected) for text, expected in zip(texts, answer, strict=True)]


def build_policy(output_dir: str, seed: int) -> str:
    """Make a Qwen2 policy of 0.6M parameters, right about a quarter of the time, and save it with its tokenizer.

    Supervised training on the train split stops once the mean probability of the exact answer (the expected reward of
    sampling at temperature 1) reaches `WARM_UP_ACCURACY` on the first `PROBE_PROBLEMS` train problems.

    Args:
        output_dir: Folder to write; made if it is not there.
        seed: Seeds the weights and the order of the batches. The caller's random state is left as it was.

    Returns:
        `output_dir`, which `AutoModelForCausalLM` and `AutoTokenizer` load.

    Raises:
        RuntimeError: If the accuracy is not reached; see `warm_up`.
    """
    tokenizer = make_tokenizer(CHARACTERS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(tokenizer, hidden_size=128, num_layers=4, max_length=64)
        problems = load("train")
        demonstrations = encode(tokenizer, problems["prompt"], problems["answer"])
        warm_up(model, *demonstrations, until=WARM_UP_ACCURACY, probe=PROBE_PROBLEMS, name="accuracy")
    return save_policy(model, tokenizer, output_dir)


TASK = Task(name="arithmetic", load=load, reward_funcs=(exact_answer_reward,), build_policy=build_policy)
