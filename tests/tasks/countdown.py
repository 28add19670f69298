"""An environment that counts down, and what the rollout needs to play in it without a model."""

from types import SimpleNamespace

import torch

from trl_entropy.tasks.environments import EnvironmentCrash, Step
from trl_entropy.tasks.multi_turn import MultiTurnRollout

CHAT = (
    "{% for m in messages %}{{ m.role[0] + '-' + m.content }}{{ '<eos>' if m.role == 'assistant' else '' }} "
    "{% endfor %}{{ 'a-' if add_generation_prompt else '' }}"
)


class Countdown:
    """Episode `"3"` needs three turns; `"k"` crashes. Answers with the action's last letter, or `"o"`."""

    made: list["Countdown"]

    def __init__(self):
        self.actions, self.closed = [], False
        Countdown.made.append(self)

    def reset(self, episode):
        self.left = int(episode)
        self.actions.clear()
        return f"{episode}="

    def step(self, action):
        assert not self.closed
        self.actions.append(action)
        if "k" in action:
            raise EnvironmentCrash("the simulator died")
        self.left -= 1
        return Step(action[-1:] or "o", reward=0.25, done=self.left == 0, success=self.left == 0)

    def close(self):
        self.closed = True


def stub_trainer(tokenizer, turns, *, logprobs=False, chat_template=None, processes=1, other_ranks=()):
    """What the rollout needs of a trainer; `turns` are the batches of texts it generates, turn by turn."""
    batches, others = iter(turns), iter(other_ranks)
    calls = []

    def generate(prompt_ids, images, multimodal_fields, num_generations):
        assert num_generations == 1
        calls.append([tokenizer.decode(ids) for ids in prompt_ids])
        ids = [tokenizer(text)["input_ids"] for text in next(batches)]
        assert len(ids) == len(prompt_ids)
        return ids, [[-0.1 * (i + 1) for i in range(len(turn))] for turn in ids] if logprobs else None

    def gather(count):
        return torch.cat([count, torch.tensor([next(others, 0)])])

    return SimpleNamespace(
        _tokenizer=tokenizer,
        _generate_single_turn=generate,
        chat_template=chat_template,
        chat_template_kwargs={},
        accelerator=SimpleNamespace(num_processes=processes, device=torch.device("cpu"), gather=gather),
        calls=calls,
    )


def rollout(**limits):
    return MultiTurnRollout(Countdown, **{"max_turns": 5, "max_episode_tokens": 20, **limits})


def decoded(tokenizer, output):
    return [tokenizer.decode(ids) for ids in output["completion_ids"]]
