"""Episodes in tokens: the completion that grows turn by turn, and the texts that become its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Prompt: TypeAlias = str | list[dict[str, Any]]


@dataclass
class Episode:
    """One row of the rollout while it is played.

    Attributes:
        slot: Its environment's place in the pool.
        prompt_ids: Tokens that the model reads before its first turn.
        completion_ids: Tokens of all turns and observations so far.
        env_mask: For each of them, 1 where the model wrote it, 0 where it is of an observation.
        logprobs: For each of them, its log-prob in nats; 0.0 where it is of an observation.
        num_turns: Turns that the model has had.
        episode_return: Sum of the rewards so far; `None` where the episode is discarded.
        success: Whether the task is solved; `None` where the episode is discarded.
        done: Whether it has ended.
    """

    slot: int
    prompt_ids: list[int]
    completion_ids: list[int] = field(default_factory=list)
    env_mask: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    num_turns: int = 0
    episode_return: float | None = 0.0
    success: bool | None = False
    done: bool = False

    def add(self, ids: Sequence[int], logprobs: Sequence[float | None] | None = None, *, from_model: bool) -> None:
        """Append tokens of one turn or observation; without `logprobs`, theirs are 0.0."""
        self.completion_ids += ids
        self.env_mask += [int(from_model)] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs

    def discard(self) -> None:
        """End the episode so that neither its reward nor its tokens count."""
        self.env_mask = [0] * len(self.env_mask)
        self.episode_return = self.success = None
        self.done = True


class EpisodeText:
    """Between text and tokens: with the tokenizer's chat template for chat prompts, plainly for text prompts.

    Args:
        trainer: The `trl.GRPOTrainer` whose tokenizer and chat template are used.
        in_chat: Whether the prompts are chat messages.
    """

    def __init__(self, trainer: Any, *, in_chat: bool) -> None:
        self._tokenizer = trainer._tokenizer
        self._template = {"chat_template": trainer.chat_template, **trainer.chat_template_kwargs}
        self._in_chat = in_chat
        self.eos_token_id: int = self._tokenizer.eos_token_id
        # TRL 1.12 ends a turn at the tokenizer's token only
        self.eos_token_ids: set[int] = {self.eos_token_id, *getattr(trainer, "eos_token_ids", ())}

    def prompt(self, prompt: Prompt, observation: str) -> list[int]:
        """Tokens that the model reads before its first turn."""
        if isinstance(prompt, str):
            return list(self._tokenizer(observation)["input_ids"])
        last = {"role": prompt[-1]["role"], "content": "\n\n".join(filter(None, (prompt[-1]["content"], observation)))}
        return self._chat([*prompt[:-1], last], add_generation_prompt=True)

    def observation(self, observation: str, *, after_eos: bool) -> list[int]:
        """Tokens between the model's turn and its next; `after_eos` says whether the turn ended as it should.

        Raises:
            ValueError: If the turns cannot be told apart.
        """
        if not self._in_chat:
            ids = list(self._tokenizer(observation, add_special_tokens=False)["input_ids"])
            if not ids:
                raise ValueError(
                    f"The observation {observation!r} has no tokens, so the turns before and after it would be one. "
                    "Let the environment answer with text that the tokenizer knows."
                )
            return ids
        turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
        before = self._chat(turn)
        ids = self._chat([*turn, {"role": "user", "content": observation}], add_generation_prompt=True)
        # The template may write a line break after the end of a turn, which belongs to what follows
        ends = [position for position, token in enumerate(before, 1) if token in self.eos_token_ids]
        end = ends[-1] if ends else len(before)
        if ids[:end] != before[:end]:
            raise ValueError(
                "The chat template writes a turn differently once another follows, so turns cannot be appended token "
                "by token. Set the tokenizer's chat_template to one that leaves earlier turns alone, and save it with "
                "save_pretrained in the folder that model_name_or_path names."
            )
        return ids[end:] if after_eos else ids[end - len(ends[-1:]) :]

    def action(self, turn: list[int]) -> str:
        """What the model wrote in a turn, without special tokens."""
        return self._tokenizer.decode(turn, skip_special_tokens=True)

    def _chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> list[int]:
        return list(
            self._tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=False,
                **self._template,
            )
        )


def episode_name(prompt: Prompt) -> str:
    """The name of the episode: a text prompt itself, or the key `"episode"` of the last chat message.

    Raises:
        ValueError: If there is none.
    """
    name = prompt if isinstance(prompt, str) else prompt[-1].get("episode")
    if not isinstance(name, str):
        raise ValueError(
            f"The prompt {prompt!r} does not name its episode. Give its last message the key 'episode', or make the "
            "prompt the name itself."
        )
    return name
