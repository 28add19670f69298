"""ALFWorld (arXiv 2010.03768): household tasks in text, such as putting a clean mug into the coffee machine.

The splits are ALFWorld's own and those of EPO (arXiv 2509.22576): training on `train`, IID evaluation on `valid_seen`
(new tasks in rooms of the training), OOD evaluation on `valid_unseen` (new rooms). As in EPO's released code, every
observation lists the admissible actions, an episode has 50 turns, and there is a reward at the end only.

Needs the extra `alfworld` and its games: `alfworld-download` puts them into `$ALFWORLD_DATA`, by default
`~/.cache/alfworld`. The games run in child processes, so that a crash of the engine costs no more than its episodes.
"""

import itertools
import json
import os
import random
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_entropy.tasks import Task
from trl_entropy.tasks.environments import Step, tagged_action
from trl_entropy.tasks.multi_turn import MultiTurnRollout, episode_reward
from trl_entropy.tasks.simulators import ChildProcess, SimulatorPool

FOLDERS = {"train": "train", "dev": "valid_seen", "test": "valid_unseen"}
"""Splits by the names that they have in ALFWorld's data."""
GAME_FILE = "game.tw-pddl"
SERVER = Path(__file__).with_name("alfworld_server.py")
ORDER_SEED = 0

INSTRUCTIONS = """\
You are in a room of a house and carry out a household task. In every turn, think briefly about what you see and what \
to do next, then write one of the admissible actions between <action> and </action>."""


def data_dir() -> Path:
    """Folder of ALFWorld's games.

    Raises:
        FileNotFoundError: If they have not been downloaded.
    """
    root = Path(os.environ.get("ALFWORLD_DATA") or "~/.cache/alfworld").expanduser()
    folder = root / "json_2.1.1"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"ALFWorld's games are not in {root}. Run alfworld-download, or set ALFWORLD_DATA to where they are."
        )
    return folder


def load(split: str, size: int | None = None) -> Dataset:
    """Episodes of a split, always the same ones in the same (shuffled) order.

    Args:
        split: `"train"`, `"dev"` (IID evaluation) or `"test"` (OOD evaluation).
        size: Number of episodes to return, from the first; `None` for all that ALFWorld uses.

    Returns:
        Column `prompt`: chat messages, the last of which names the episode, the path of its game in `data_dir()`.

    Raises:
        ValueError: If the split is unknown, `size` is not in 1..number of episodes, or a game is a link to elsewhere.
        FileNotFoundError: If the games have not been downloaded.
    """
    if split not in FOLDERS:
        raise ValueError(f"split={split!r} is unknown. Choose one of {', '.join(FOLDERS)}.")
    root = data_dir()
    games = sorted((root / FOLDERS[split]).rglob(GAME_FILE))
    names = [game.relative_to(root).as_posix() for game in games]
    names = [name for name in names if _is_used(_game_file(name))]
    if not names:
        raise FileNotFoundError(f"There is no game in {root / FOLDERS[split]}. Run alfworld-download -f.")
    random.Random(ORDER_SEED).shuffle(names)
    if size is not None and not 1 <= size <= len(names):
        raise ValueError(f"size={size} is out of range. Set it to 1..{len(names)} or leave it out.")
    prompts = [[{"role": "user", "content": INSTRUCTIONS, "episode": name}] for name in names[:size]]
    return Dataset.from_dict({"prompt": prompts})


def _game_file(episode: str) -> Path:
    """The game of an episode. Its name may come from anybody's dataset, so it must not lead out of the folder.

    Raises:
        ValueError: If there is no such game.
    """
    root = data_dir()
    path = root / episode
    inside = path.resolve().is_relative_to(root.resolve())
    if not inside or path.name != GAME_FILE or not path.is_file():
        raise ValueError(
            f"The episode {episode!r} is not a game in {root}. Take the episodes of `load`; to have the games "
            "elsewhere, set ALFWORLD_DATA."
        )
    return path


def _is_used(game: Path) -> bool:
    """ALFWorld's own choice: no movable receptacles, nothing sliced, and a solution is known."""
    if "movable" in str(game.parent) or "Sliced" in str(game.parent):
        return False
    return bool(json.loads(game.read_text(encoding="utf-8")).get("solvable"))


class AlfWorld:
    """One game as an environment.

    Args:
        process: Plays it; runs `SERVER`.
        list_actions: Whether observations end with the admissible actions.
    """

    _numbers = itertools.count()

    def __init__(self, process: ChildProcess, list_actions: bool) -> None:
        self._process = process
        self._list_actions = list_actions
        self._game = next(self._numbers)

    def reset(self, episode: str) -> str:
        return self._observation(self._process.call({"game": self._game, "path": str(_game_file(episode))}))

    def step(self, action: str) -> Step:
        state = self._process.call({"game": self._game, "action": tagged_action(action).lower()})
        won = state["won"]
        return Step(self._observation(state), reward=float(won), done=state["done"] or won, success=won)

    def close(self) -> None:
        if self._process.alive:
            self._process.call({"game": self._game})

    def _observation(self, state: dict[str, Any]) -> str:
        if not self._list_actions:
            return state["observation"]
        return f"{state['observation']}\n\nAdmissible actions: {', '.join(state['actions'])}"


def build_rollout(
    max_turns: int = 50,
    max_episode_tokens: int = 16384,
    max_prompt_length: int = 2048,
    list_actions: bool = True,
    num_simulators: int = 4,
    timeout: float = 120.0,
) -> MultiTurnRollout:
    """The trainer's `rollout_func`. `max_completion_length` of the trainer is the limit of one turn.

    Args:
        max_turns: Turns of an episode; arXiv 2509.22576 has 50.
        max_episode_tokens: Tokens of all turns and observations of an episode.
        max_prompt_length: Tokens of the prompt; 2048 in arXiv 2509.22576.
        list_actions: Whether observations end with the admissible actions, as in the released code.
        num_simulators: Child processes, which step at the same time.
        timeout: Seconds after which a game counts as crashed.

    Raises:
        ImportError: If ALFWorld is not installed.
        FileNotFoundError: If its games have not been downloaded.
        ValueError: If a number is below 1.
    """
    if find_spec("alfworld") is None or find_spec("textworld") is None:
        raise ImportError("ALFWorld needs pip install 'trl_entropy[alfworld]', and then alfworld-download.")
    data_dir()
    simulators = SimulatorPool(lambda: ChildProcess([sys.executable, str(SERVER)], timeout), num_simulators)
    return MultiTurnRollout(
        lambda: AlfWorld(simulators.next(), list_actions),
        max_turns=max_turns,
        max_episode_tokens=max_episode_tokens,
        max_prompt_length=max_prompt_length,
        num_workers=num_simulators,
        close=simulators.close,
    )


TASK = Task(name="alfworld", load=load, reward_funcs=(episode_reward,), build_rollout=build_rollout)
