"""A corridor between keys and doors: the built-in multi-turn task, with a policy that trains in a minute on a CPU.

The name of an episode, such as `"vxw.oopopoop"`, is three locks and the corridor's cells. Every turn is one letter:

| turn | the model reads | right action |
|---|---|---|
| 1 to 3 | `k`: a rack of keys (the first time in the prompt, after the three locks) | the key of that lock |
| one per cell | `o`: open floor, or `p`: a pit | `f`: walk, or `j`: jump |
| one per door | `d`: a door | `u`: unlock |

A wrong action in the corridor or at a door costs a turn and nothing else. A wrong key is taken without a word, and its
door answers `x` for ever: the first three turns decide how the last ones go, and only the last one says so. The reward
is 1 for passing the third door within the turns allowed, else 0. With all turns right that is turn 14 of 20.
"""

import random
from collections.abc import Iterator
from itertools import product

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from trl_entropy.tasks import Task
from trl_entropy.tasks.environments import Step
from trl_entropy.tasks.multi_turn import MultiTurnRollout, episode_reward
from trl_entropy.tasks.tiny_policy import make_model, make_tokenizer, save_policy, warm_up

KEY_OF = {"v": "c", "w": "a", "x": "e", "y": "b", "z": "d"}
NUM_LOCKS = 3
NUM_CELLS = 8
ACTION_IN = {"o": "f", "p": "j", "d": "u", "x": "u"}
CHARACTERS = ".abcdefjkopuvwxyz"

MAX_TURNS = 20
SPLIT_SEED = 0
NUM_TEST_LOCKS = 25
PATTERNS_PER_LOCKS = 16

WARM_UP_SUCCESS = 0.25
PROBE_EPISODES = 256


def load(split: str, size: int | None = None) -> Dataset:
    """Episodes of a split, always the same ones in the same (shuffled) order.

    Args:
        split: `"train"` (1,600 episodes with 100 triples of locks) or `"test"` (400 with the other 25 triples).
        size: Number of episodes to return, from the first; `None` for all.

    Returns:
        Column `prompt`: the name of the episode.

    Raises:
        ValueError: If the split is unknown, or `size` is not in 1..number of episodes.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is unknown. Choose 'train' or 'test'.")
    shuffler = random.Random(SPLIT_SEED)
    locks = ["".join(triple) for triple in product(KEY_OF, repeat=NUM_LOCKS)]
    shuffler.shuffle(locks)
    locks = locks[:NUM_TEST_LOCKS] if split == "test" else locks[NUM_TEST_LOCKS:]
    patterns = ["".join(cells) for cells in product("op", repeat=NUM_CELLS)]
    names = [f"{triple}.{cells}" for triple in locks for cells in shuffler.sample(patterns, PATTERNS_PER_LOCKS)]
    shuffler.shuffle(names)
    if size is not None and not 1 <= size <= len(names):
        raise ValueError(f"size={size} is out of range. Set it to 1..{len(names)} or leave it out.")
    return Dataset.from_dict({"prompt": names[:size]})


class Corridor:
    """The environment; see the module's docstring. An action is its first letter, the rest is ignored."""

    def reset(self, episode: str) -> str:
        self._locks, _, self._cells = episode.partition(".")
        locks, cells = set(self._locks), set(self._cells)
        if len(self._locks) != NUM_LOCKS or locks - KEY_OF.keys() or not cells or cells - {"o", "p"}:
            raise ValueError(f"The episode {episode!r} is not of the form 'vxw.oopopoop': see `load`.")
        self._keys = ""
        self._places = list(self._cells) + ["d"] * NUM_LOCKS
        return f"{self._locks}.k"

    def step(self, action: str) -> Step:
        letter = action[:1]
        if len(self._keys) < NUM_LOCKS:
            self._keys += letter or "."
        elif letter == ACTION_IN[self._places[0]] and not self._is_locked():
            self._places.pop(0)
        elif letter == ACTION_IN[self._places[0]]:
            self._places[0] = "x"
        if not self._places:
            return Step("", reward=1.0, done=True, success=True)
        return Step(self._places[0] if len(self._keys) == NUM_LOCKS else "k")

    def close(self) -> None:
        pass

    def _is_locked(self) -> bool:
        door = NUM_LOCKS - len(self._places)
        return door >= 0 and self._keys[door] != KEY_OF[self._locks[door]]


def build_rollout(max_turns: int = MAX_TURNS) -> MultiTurnRollout:
    """The trainer's `rollout_func`. Set `max_completion_length=1`: a turn is one letter.

    Args:
        max_turns: Turns of an episode; the shortest way takes `NUM_LOCKS + NUM_CELLS + NUM_LOCKS` = 14.
    """
    return MultiTurnRollout(Corridor, max_turns=max_turns, max_episode_tokens=2 * max_turns)


def demonstration(episode: str) -> Iterator[tuple[str, str]]:
    """The shortest successful episode: what the model reads and the right action, turn by turn."""
    environment = Corridor()
    observation, done = environment.reset(episode), False
    keys = iter(KEY_OF[lock] for lock in episode[:NUM_LOCKS])
    while not done:
        action = next(keys) if observation[-1] == "k" else ACTION_IN[observation]
        yield observation, action
        step = environment.step(action)
        observation, done = step.observation, step.done


def build_policy(output_dir: str, seed: int) -> str:
    """Make a Qwen2 policy of 0.1M parameters that passes the doors about a quarter of the time, with its tokenizer.

    Supervised training on demonstrations of the train split stops once the mean probability of all the right actions,
    each after the right ones before, reaches `WARM_UP_SUCCESS` on the first `PROBE_EPISODES` train episodes. Letters
    of wrong keys and spare turns make the success rate of sampling at temperature 1 a little higher.

    Args:
        output_dir: Folder to write; made if it is not there.
        seed: Seeds the weights and the order of the batches. The caller's random state is left as it was.

    Returns:
        `output_dir`, which `AutoModelForCausalLM` and `AutoTokenizer` load.

    Raises:
        RuntimeError: If the success rate is not reached; see `warm_up`.
    """
    tokenizer = make_tokenizer(CHARACTERS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(tokenizer, hidden_size=64, num_layers=2, max_length=64)
        warm_up(
            model, *demonstrations(tokenizer, "train"), until=WARM_UP_SUCCESS, probe=PROBE_EPISODES, name="success"
        )
    return save_policy(model, tokenizer, output_dir)


def demonstrations(tokenizer: PreTrainedTokenizerFast, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels, `(N, T)` each, of demonstrations of a split; labels are -100 except at actions."""
    return _encode(tokenizer, [list(demonstration(name)) for name in load(split)["prompt"]])


def _encode(
    tokenizer: PreTrainedTokenizerFast, episodes: list[list[tuple[str, str]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, (N, T) each, of demonstrations; labels are -100 except at the actions."""
    texts = ["".join(observation + action for observation, action in turns) for turns in episodes]
    input_ids = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").input_ids
    labels = torch.full_like(input_ids, -100)
    for row, turns in enumerate(episodes):
        end = 0
        for observation, action in turns:
            end += len(observation) + len(action)
            labels[row, end - 1] = input_ids[row, end - 1]
    return input_ids, labels


TASK = Task(
    name="corridor", load=load, reward_funcs=(episode_reward,), build_policy=build_policy, build_rollout=build_rollout
)
