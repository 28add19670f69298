"""The study's two tasks and the small models that start on them, made here and kept in a folder."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2ForCausalLM

from trl_entropy.tasks import arithmetic, corridor, reasoning_gym
from trl_entropy.tasks.multi_turn import MultiTurnRollout, episode_reward
from trl_entropy.tasks.tiny_policy import encode, make_model, make_tokenizer, repeat_probability, save_policy, warm_up

WARM_UP = {"policy": 0.25, "small": 0.05}
"""Probability of the right answer, or of all right actions, at which the supervised warm-up stops."""
PROBE = 512
WORDS = {"min_word_len": 3, "max_word_len": 7}
Demonstrations = Callable[[PreTrainedTokenizerFast, str], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StudyTask:
    """What to train on.

    Attributes:
        load: Split `"train"` or `"test"`.
        reward: TRL's reward function.
        characters: The vocabulary.
        sizes: Channels and blocks of `"policy"` and of `"small"`.
        demonstrations: Input ids and labels of right answers, from a tokenizer and the split.
        build_rollout: Makes the `rollout_func` of a multi-turn task; without it, a row has its only right `answer`.
    """

    load: Callable[[str], Dataset]
    reward: Callable[..., list[float | None]]
    characters: str
    sizes: dict[str, tuple[int, int]]
    demonstrations: Demonstrations
    build_rollout: Callable[[], MultiTurnRollout] | None = None


@lru_cache
def spelling(split: str) -> Dataset:
    """reasoning-gym's `spell_backward`: words of 3 to 7 letters, the question's constant preamble left out."""
    rows = reasoning_gym.load(
        split, name="spell_backward", size=6000, test_size=1000, config=WORDS, answer_format="plain"
    )
    words = rows.map(lambda row: {"word": row["prompt"].rsplit(" ", 1)[1]})
    words = words.filter(lambda row: set(row["word"]) <= set(arithmetic.CHARACTERS))
    return words.map(lambda row: {"prompt": row["word"] + "=", "answer": row["word"][::-1]}, remove_columns=["word"])


def _answers(load: Callable[[str], Dataset]) -> Demonstrations:
    return lambda tokenizer, split: encode(tokenizer, load(split)["prompt"], load(split)["answer"])


STUDY_TASKS = {
    "arithmetic": StudyTask(
        arithmetic.load,
        arithmetic.exact_answer_reward,
        arithmetic.CHARACTERS,
        {"policy": (128, 4), "small": (64, 2)},
        _answers(arithmetic.load),
    ),
    "spell_backward": StudyTask(
        spelling,
        reasoning_gym.full_score_reward,
        arithmetic.CHARACTERS,
        {"policy": (128, 4), "small": (64, 2)},
        _answers(spelling),
    ),
    "corridor": StudyTask(
        corridor.load,
        episode_reward,
        corridor.CHARACTERS,
        {"policy": (64, 2), "small": (32, 2)},
        corridor.demonstrations,
        corridor.build_rollout,
    ),
}


def start(task: str, size: str, seed: int, folder: Path) -> str:
    """Path of a model after its supervised warm-up, made if it is not there.

    Args:
        task: Of `STUDY_TASKS`.
        size: `"policy"` or `"small"`.
        seed: Of the weights and the batches.
        folder: Where these models are kept; several processes may use it.
    """
    path = folder / f"{task}-{size}-{seed}"
    if not path.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _build(STUDY_TASKS[task], size, seed, scratch)
            try:
                os.rename(scratch, path)
            except OSError:  # another process was faster
                assert path.is_dir()
            os.makedirs(scratch, exist_ok=True)
    return str(path)


def _build(task: StudyTask, size: str, seed: int, folder: str) -> None:
    tokenizer = make_tokenizer(task.characters)
    hidden_size, num_layers = task.sizes[size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(tokenizer, hidden_size=hidden_size, num_layers=num_layers, max_length=64)
        warm_up(model, *task.demonstrations(tokenizer, "train"), until=WARM_UP[size], probe=PROBE, name="accuracy")
    save_policy(model, tokenizer, folder)


def answer_probabilities(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, problems: Dataset) -> Tensor:
    """Probability that sampling at temperature 1 gives the right answer, of each problem, `(N,)`."""
    return repeat_probability(model, *encode(tokenizer, problems["prompt"], problems["answer"]))
