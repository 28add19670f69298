"""The text environments that episodes are played in: what they must do, what they answer, and a pool of them."""

import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

logger = logging.getLogger(__name__)

RESET_ATTEMPTS = 3


@dataclass(frozen=True)
class Step:
    """What an environment answers to an action.

    Attributes:
        observation: What the model reads before its next turn; not shown where the episode is `done`.
        reward: Reward of this step. The episode's return is the sum over its steps.
        done: Whether the environment has ended the episode.
        success: Whether the task is solved.
    """

    observation: str
    reward: float = 0.0
    done: bool = False
    success: bool = False


class EnvironmentCrash(RuntimeError):
    """The simulator behind an environment died or hangs: the episode says nothing about the policy."""


class Environment(Protocol):
    """A text environment that plays one episode at a time.

    `reset` and `step` raise [`EnvironmentCrash`] when the simulator fails; the environment is then closed, and a new
    one takes its place. Any other exception is an error of the program and ends the training.
    """

    def reset(self, episode: str) -> str:
        """Start the episode of that name, for example `"boil/3"`, and return its first observation."""
        ...

    def step(self, action: str) -> Step:
        """Carry out what the model wrote in one turn, special tokens removed; any text must be accepted."""
        ...

    def close(self) -> None:
        """Free what the environment holds; a second call does nothing."""
        ...


class EnvironmentPool:
    """Environments that are made when first needed and used again for episode after episode.

    Args:
        make: Makes an environment.
        num_workers: Number of environments that are stepped at the same time, each in a thread.
        close: Called after the environments are closed, for what they share.
    """

    def __init__(
        self, make: Callable[[], Environment], *, num_workers: int = 1, close: Callable[[], None] | None = None
    ) -> None:
        self._make = make
        self._close = close
        self._num_workers = num_workers
        self._environments: dict[int, Environment] = {}

    def reset(self, episodes: Sequence[str]) -> list[str]:
        """Start each episode in the slot of its index; returns the first observations.

        A crash here costs nothing, as no turn has been played: it is tried again with a new environment.

        Raises:
            RuntimeError: If an episode's environment crashed `RESET_ATTEMPTS` times.
        """
        return self._map(self._reset, list(enumerate(episodes)))

    def step(self, actions: dict[int, str]) -> list[Step | None]:
        """Carry out one action for each slot; `None` where the environment crashed."""
        return self._map(self._step, list(actions.items()))

    def close(self) -> None:
        """Close every environment and what they share."""
        for slot in list(self._environments):
            self._drop(slot)
        if self._close is not None:
            self._close()

    def _map(self, function: Callable[[tuple[int, str]], Any], items: list[tuple[int, str]]) -> list[Any]:
        if self._num_workers == 1:
            return [function(item) for item in items]
        with ThreadPoolExecutor(self._num_workers) as executor:
            return list(executor.map(function, items))

    def _reset(self, item: tuple[int, str]) -> str:
        slot, episode = item
        for attempt in range(1, RESET_ATTEMPTS + 1):
            try:
                if slot not in self._environments:
                    self._environments[slot] = self._make()
                return self._environments[slot].reset(episode)
            except EnvironmentCrash as error:
                self._drop(slot)
                logger.warning("The environment crashed at the start of episode %r: %s", episode, error)
                if attempt == RESET_ATTEMPTS:
                    raise RuntimeError(
                        f"The environment of episode {episode!r} crashed {RESET_ATTEMPTS} times at its start "
                        f"({error}). Correct its installation, memory or timeout."
                    ) from error
        raise AssertionError("unreachable")

    def _step(self, item: tuple[int, str]) -> Step | None:
        slot, action = item
        try:
            return self._environments[slot].step(action)
        except EnvironmentCrash as error:
            self._drop(slot)
            logger.warning("An environment crashed, its episode is discarded: %s", error)
            return None

    def _drop(self, slot: int) -> None:
        environment = self._environments.pop(slot, None)
        if environment is not None:
            try:
                environment.close()
            except EnvironmentCrash as error:
                logger.debug("Closing a crashed environment: %s", error)


def tagged_action(turn: str) -> str:
    """The action in what the model wrote: the last text between `<action>` and `</action>`, else its last line."""
    if tagged := re.findall(r"<action>(.*?)</action>", turn, re.DOTALL):
        return " ".join(tagged[-1].split())
    return (turn.strip().splitlines() or [""])[-1].strip()
