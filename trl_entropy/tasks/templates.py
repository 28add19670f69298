r"""How a mathematics problem is put to a model of each family: where the instruction to box the answer goes.

A tokenizer's chat template does the family's own formatting: role markers, and for DeepSeek-R1-Distill the opening
`<think>` of the reply. What is left to us is the sentence that all these families ask for on their model cards, which
makes the final answer findable, and which message carries it:

- DeepSeek-R1-Distill: no system prompt, the sentence at the end of the user's message.
- Qwen3: at the end of the user's message. `enable_thinking=False` is an argument of its chat template.
- Qwen2.5: at the end of the user's message.
- Qwen2.5-Math: in the system message, where its chat template puts it by default.
"""

from typing import Any

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
TEMPLATES = {"deepseek-r1-distill": "user", "qwen3": "user", "qwen2.5": "user", "qwen2.5-math": "system"}
"""Model families, and the role of the message that carries the instruction."""

Messages = list[dict[str, str]]


def add_instruction(messages: Messages, template: str) -> Messages:
    r"""The messages with the instruction where the family of `template` expects it.

    Messages that already speak of `\boxed` are returned as they are, so that it is never asked for twice.

    Args:
        messages: Chat messages, each with a `role` and a `content`, the last one the user's.
        template: A name of `TEMPLATES`.

    Raises:
        ValueError: If the template is unknown.
    """
    check_template(template)
    if any(r"\boxed" in message["content"] for message in messages):
        return messages
    if TEMPLATES[template] == "user":
        return [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']}\n{INSTRUCTION}"}]
    return [{"role": "system", "content": INSTRUCTION}, *(m for m in messages if m["role"] != "system")]


def check_template(template: str) -> None:
    """Refuse a name that `TEMPLATES` lacks.

    Raises:
        ValueError: If the template is unknown.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template={template!r} is unknown. Choose one of {', '.join(TEMPLATES)}.")


def template_of(tokenizer: Any) -> str:
    r"""The name in `TEMPLATES` that fits a tokenizer: `"qwen2.5-math"` if its chat template itself asks for `\boxed`.

    All others take the instruction from the user, so which of those names is returned makes no difference.
    """
    return "qwen2.5-math" if r"\boxed" in str(tokenizer.chat_template or "") else "deepseek-r1-distill"


def render(tokenizer: Any, prompt: str | Messages, chat_template_kwargs: dict[str, Any] | None = None) -> list[int]:
    """Token ids of a prompt, as TRL's trainers make them.

    Text is encoded as it is. Messages go through the chat template, up to the opening of the reply; without a chat
    template, their contents become paragraphs.

    Args:
        tokenizer: The model's.
        prompt: Text, or chat messages.
        chat_template_kwargs: Arguments of the chat template, such as `{"enable_thinking": False}`.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if tokenizer.chat_template is None:
        return tokenizer("".join(f"{message['content']}\n\n" for message in prompt))["input_ids"]
    text = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=False, **(chat_template_kwargs or {})
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]
