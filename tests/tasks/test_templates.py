r"""Where each family's instruction goes, with chat templates shaped like the families' own."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from trl_entropy.tasks.templates import INSTRUCTION, TEMPLATES, add_instruction, render, template_of

PROBLEM = [{"role": "user", "content": "1+1?"}]
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QWEN_MATH = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    r"Please reason step by step, and put your final answer within \\boxed{}."
    "<|im_end|>\n{% endif %}" + CHATML
)


class Echo:
    """A tokenizer whose ids are the characters, so that a rendered prompt can be read."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat_template: str | None) -> None:
        self.tokenizer, self.chat_template = tokenizer, chat_template

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **kwargs)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[str]]:
        return {"input_ids": [*(["<bos>"] if add_special_tokens else []), *text]}


@pytest.mark.parametrize("template", ["deepseek-r1-distill", "qwen3", "qwen2.5"])
def test_instruction_ends_the_users_message(template: str) -> None:
    assert add_instruction(PROBLEM, template) == [{"role": "user", "content": f"1+1?\n{INSTRUCTION}"}]
    assert PROBLEM == [{"role": "user", "content": "1+1?"}]


def test_qwen_math_has_it_in_the_system_message() -> None:
    expected = [{"role": "system", "content": INSTRUCTION}, *PROBLEM]
    assert add_instruction(PROBLEM, "qwen2.5-math") == expected
    assert add_instruction([{"role": "system", "content": "Be brief."}, *PROBLEM], "qwen2.5-math") == expected


@pytest.mark.parametrize("template", TEMPLATES)
def test_it_is_never_asked_for_twice(template: str) -> None:
    asked = [{"role": "user", "content": r"1+1? Box it: \boxed{}."}]
    assert add_instruction(asked, template) == asked
    assert add_instruction(add_instruction(PROBLEM, template), template) == add_instruction(PROBLEM, template)


def test_unknown_template_is_refused() -> None:
    with pytest.raises(ValueError, match=r"template='llama' is unknown\. Choose one of deepseek-r1-distill, qwen3"):
        add_instruction(PROBLEM, "llama")


@pytest.mark.parametrize(
    ("chat_template", "role"), [(R1, "user"), (CHATML, "user"), (None, "user"), (QWEN_MATH, "system")]
)
def test_template_is_told_by_the_chat_template(
    chat_template: str | None, role: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert TEMPLATES[template_of(Echo(tiny_tokenizer, chat_template))] == role


def test_rendered_prompts_of_the_families(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def text(chat_template: str, **kwargs: Any) -> str:
        tokenizer = Echo(tiny_tokenizer, chat_template)
        return "".join(render(tokenizer, add_instruction(PROBLEM, template_of(tokenizer)), kwargs))

    assert text(R1) == f"<|User|>1+1?\n{INSTRUCTION}<|Assistant|><think>\n"
    qwen = f"<|im_start|>user\n1+1?\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    assert text(CHATML) == qwen
    assert text(CHATML, enable_thinking=False) == f"{qwen}<think>\n\n</think>\n\n"
    maths = f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert text(QWEN_MATH) == maths


def test_text_and_tokenizers_without_a_chat_template(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = Echo(tiny_tokenizer, None)
    assert render(tokenizer, "1+1=") == ["<bos>", *"1+1="]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert render(tokenizer, messages) == ["<bos>", *"s\n\nu\n\n"]
