"""Episodes of several turns with a text environment, as TRL's `rollout_func`.

One episode is one completion: the model's first turn, the observation that answers it, the second turn, and so on. The
tokens of observations are in the completion with `env_mask` 0, so no loss, entropy or metric of TRL or of the controls
sees them. An environment is anything with the methods of [`Environment`].
"""

import inspect
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trl_entropy.tasks.environments import Environment, EnvironmentPool, Step
from trl_entropy.tasks.episodes import Episode, EpisodeText, Prompt, episode_name

EPISODE_COLUMNS = ("episode_return", "success", "episode_turns")
"""What a rollout of episodes gives to the reward functions beside the dataset's columns."""


class MultiTurnRollout:
    """`rollout_func` for [`EntropyGRPOTrainer`] and `trl.GRPOTrainer` that plays episodes in an environment.

    A row's `prompt` names its episode: it is either text, the name itself, or chat messages whose last one has the
    name under the key `"episode"`. All completions of a prompt thus start in the same state. The model reads the first
    observation as its prompt (in a chat, after the last message's content), and each later one as text after its turn
    (in a chat, as a user message). A turn ends at the end-of-sequence token or after `max_completion_length` tokens.

    An episode ends when the environment says so, after `max_turns` turns, or when its completion has
    `max_episode_tokens` tokens; the environment never sees a turn that was cut for that last reason. An episode whose
    environment crashed is discarded: its reward is `None`, which TRL leaves out of the group's baseline, and all its
    tokens are masked.

    Beside what TRL needs, the output has for each row `episode_return` (float; `None` where discarded), `success`
    (bool; `None` where discarded) and `episode_turns` (int). They become arguments of the reward functions, such as
    [`episode_reward`].

    Use it as a context manager, or call `close()`; what is left open is closed when the program ends.

    Args:
        make_environment: Makes an environment; there is one for each row of a process's batch.
        max_turns: Turns of the model in an episode, at least 1.
        max_episode_tokens: Tokens of a completion, observations included, at least 1.
        max_prompt_length: Tokens of a prompt, at least 1; of a longer one the last are kept. `None` for no limit.
        num_workers: Environments stepped at the same time, at least 1.
        close: Called after the environments are closed, for what they share.

    Raises:
        ValueError: If one of the numbers is below 1.
    """

    def __init__(
        self,
        make_environment: Callable[[], Environment],
        *,
        max_turns: int,
        max_episode_tokens: int,
        max_prompt_length: int | None = None,
        num_workers: int = 1,
        close: Callable[[], None] | None = None,
    ) -> None:
        limits = {
            "max_turns": max_turns,
            "max_episode_tokens": max_episode_tokens,
            "max_prompt_length": 1 if max_prompt_length is None else max_prompt_length,
            "num_workers": num_workers,
        }
        for name, value in limits.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self.max_turns = max_turns
        self.max_episode_tokens = max_episode_tokens
        self.max_prompt_length = max_prompt_length
        self.pool = EnvironmentPool(make_environment, num_workers=num_workers, close=close)
        self._finalizer = weakref.finalize(self, self.pool.close)

    def __enter__(self) -> "MultiTurnRollout":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the environments. A later call of the rollout makes new ones."""
        self.pool.close()

    def __call__(self, prompts: list[Prompt], trainer: Any) -> dict[str, Any]:
        """Play one episode per prompt.

        Args:
            prompts: Of this process, each repeated once per completion.
            trainer: The `trl.GRPOTrainer` that generates.

        Returns:
            Lists with one entry per prompt under the keys `prompt_ids`, `completion_ids`, `logprobs` (`None` without
            vLLM), `env_mask`, `episode_return`, `success` and `episode_turns`.

        Raises:
            ValueError: If a prompt does not name its episode, or the turns cannot be told apart.
            RuntimeError: If an environment cannot be started.
        """
        text = EpisodeText(trainer, in_chat=not isinstance(prompts[0], str))
        observations = self.pool.reset([episode_name(prompt) for prompt in prompts])
        episodes = [
            Episode(slot, self._limited(text.prompt(prompt, observation)))
            for slot, (prompt, observation) in enumerate(zip(prompts, observations, strict=True))
        ]
        has_logprobs = False
        while num_prompts := _most_on_any_process(sum(not episode.done for episode in episodes), trainer):
            live = [episode for episode in episodes if not episode.done]
            turns, logprobs = _generate(live, num_prompts, trainer, filler=[text.eos_token_id])
            has_logprobs = has_logprobs or logprobs is not None
            self._play_turn(live, turns, logprobs, text)
        return {
            "prompt_ids": [episode.prompt_ids for episode in episodes],
            "completion_ids": [episode.completion_ids for episode in episodes],
            "logprobs": [episode.logprobs for episode in episodes] if has_logprobs else None,
            "env_mask": [episode.env_mask for episode in episodes],
            "episode_return": [episode.episode_return for episode in episodes],
            "success": [episode.success for episode in episodes],
            "episode_turns": [episode.num_turns for episode in episodes],
        }

    def _limited(self, prompt_ids: list[int]) -> list[int]:
        return prompt_ids if self.max_prompt_length is None else prompt_ids[-self.max_prompt_length :]

    def _play_turn(
        self,
        live: list[Episode],
        turns: list[list[int]],
        logprobs: list[list[float | None]] | None,
        text: EpisodeText,
    ) -> None:
        """Add one turn of the model to each live episode, and what the environment answers."""
        actions = {}
        for row, (episode, turn) in enumerate(zip(live, turns, strict=True)):
            room = self.max_episode_tokens - len(episode.completion_ids)
            episode.add(turn[:room], None if logprobs is None else logprobs[row][:room], from_model=True)
            episode.num_turns += 1
            episode.done = len(turn) > room
            if not episode.done:
                actions[episode.slot] = text.action(turn)
        steps = dict(zip(actions, self.pool.step(actions), strict=True))
        for episode in live:
            if episode.slot in steps:
                self._add_step(episode, steps[episode.slot], text)

    def _add_step(self, episode: Episode, step: Step | None, text: EpisodeText) -> None:
        if step is None:
            episode.discard()
            return
        assert episode.episode_return is not None
        episode.episode_return += step.reward
        episode.success = step.success
        ended = episode.completion_ids[-1] in text.eos_token_ids
        room = self.max_episode_tokens - len(episode.completion_ids)
        if step.done or episode.num_turns == self.max_turns:
            episode.done = True
            # TRL takes a completion without an end-of-sequence token for one that was cut
            answer = [] if ended else [text.eos_token_id][:room]
        else:
            answer = text.observation(step.observation, after_eos=ended)
            if len(answer) >= room:  # no token left for another turn
                episode.done, answer = True, []
        episode.add(answer, from_model=False)


def episode_reward(
    prompts: list[Any],
    completions: list[Any],
    episode_return: list[float | None] | None = None,
    success: list[bool | None] | None = None,
    episode_turns: list[int] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **columns: object,
) -> list[float | None]:
    """The episode's return, `None` where it was discarded; logs how the episodes of this process went.

    Logged: `episode/success_rate` and `episode/turns` (means over the episodes that count, NaN where none does) and
    `episode/discarded_fraction`.

    Raises:
        ValueError: If the completions are not episodes of [`MultiTurnRollout`].
    """
    if episode_return is None or success is None or episode_turns is None:
        raise ValueError("episode_reward needs episodes: give the trainer the task's rollout as rollout_func.")
    kept = [row for row, value in enumerate(episode_return) if value is not None]
    if log_metric is not None:
        # All of them always: TRL below 1.16 waits for ever where the processes log different names
        count = len(kept) or math.nan
        log_metric("episode/discarded_fraction", 1.0 - len(kept) / len(episode_return))
        log_metric("episode/success_rate", sum(bool(success[row]) for row in kept) / count)
        log_metric("episode/turns", sum(episode_turns[row] for row in kept) / count)
    return episode_return


def _most_on_any_process(num_live: int, trainer: Any) -> int:
    """The largest number of live episodes of a process: generation is collective, so all ask for that many turns."""
    if trainer.accelerator.num_processes == 1:
        return num_live
    counts = trainer.accelerator.gather(torch.tensor([num_live], device=trainer.accelerator.device))
    return int(counts.max())


def _generate(
    live: list[Episode], num_prompts: int, trainer: Any, filler: list[int]
) -> tuple[list[list[int]], list[list[float | None]] | None]:
    """One turn for each live episode and, with vLLM, its log-probs; fillers make the batch `num_prompts` long."""
    prompts = [episode.prompt_ids + episode.completion_ids for episode in live]
    prompts += [filler] * (num_prompts - len(live))
    generate = trainer._generate_single_turn
    if "num_generations" in inspect.signature(generate).parameters:
        turns, logprobs = generate(prompts, None, {}, num_generations=1)
    else:
        with _one_generation_per_prompt(trainer):
            turns, logprobs = generate(prompts, None, {})
    turns = [list(turn) for turn in turns[: len(live)]]
    return turns, None if logprobs is None else [list(row) for row in logprobs[: len(live)]]


@contextmanager
def _one_generation_per_prompt(trainer: Any) -> Iterator[None]:
    """Keep an older TRL from asking a vLLM server for every `num_generations`-th prompt only."""
    saved = {name: getattr(trainer, name) for name in ("num_generations", "num_generations_eval")}
    try:
        for name in saved:
            setattr(trainer, name, 1)
        yield
    finally:
        for name, value in saved.items():
            setattr(trainer, name, value)
