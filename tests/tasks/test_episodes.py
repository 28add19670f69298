"""Episodes in tokens: what the chat template writes, and prompts and observations that are refused."""

import pytest

from tests.tasks.countdown import CHAT, Countdown, rollout, stub_trainer
from trl_entropy.tasks.environments import Step
from trl_entropy.tasks.multi_turn import MultiTurnRollout


def chat_prompt(episode):
    return [{"role": "system", "content": "ab"}, {"role": "user", "content": "go", "episode": episode}]


def test_chat_is_what_the_template_writes(tiny_tokenizer):
    trainer = stub_trainer(tiny_tokenizer, [["ab<eos>"], ["c"], ["d<eos>"]], chat_template=CHAT)
    output = rollout(max_episode_tokens=99)([chat_prompt("3")], trainer)
    # the second turn was cut before its end-of-sequence token, which the template then writes
    messages = [
        chat_prompt("3")[0],
        {"role": "user", "content": "go\n\n3="},
        {"role": "assistant", "content": "ab"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    whole = tiny_tokenizer.apply_chat_template(messages, chat_template=CHAT, return_dict=False)
    assert output["prompt_ids"][0] + output["completion_ids"][0] == whole[:-1]  # but for the last space
    written = [token for token, flag in zip(output["completion_ids"][0], output["env_mask"][0], strict=True) if flag]
    assert tiny_tokenizer.decode(written) == "ab<eos>cd<eos>"


def test_template_that_rewrites_earlier_turns_is_refused(tiny_tokenizer):
    template = CHAT.replace("{{ m.role[0]", "{{ ('l' if loop.last else 'm') + m.role[0]")
    with pytest.raises(ValueError, match=r"once another follows, .* Set the tokenizer's chat_template to one that"):
        rollout()([chat_prompt("2")], stub_trainer(tiny_tokenizer, [["a<eos>"]], chat_template=template))


def test_answer_without_tokens_is_refused(tiny_tokenizer):
    class Silent(Countdown):
        def step(self, action):
            return Step("")

    play = MultiTurnRollout(Silent, max_turns=5, max_episode_tokens=20)
    with pytest.raises(ValueError, match="has no tokens"):
        play(["1"], stub_trainer(tiny_tokenizer, [["a"]]))


def test_prompt_without_episode_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="does not name its episode"):
        rollout()([[{"role": "user", "content": "go"}]], stub_trainer(tiny_tokenizer, []))
