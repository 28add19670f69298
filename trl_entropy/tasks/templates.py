r"""How a mathematics problem is put to a model of each family: where the instruction to box the answer goes.

A tokenizer's chat template does the family's own formatting: role markers, and for DeepSeek-R1-Distill the opening
`<think>` of the reply. What is left to us is the sentence that all these families ask for on their model cards, which
makes the final answer findable, and which message carries it:

- DeepSeek-R1-Distill: no system prompt, the sentence at the end of the user's message.
- Qwen3: at the end of the user's message. `enable_thinking=False` is an argument of its chat template.
- Qwen2.5: at the end of the user's message.
- Qwen2.5-Math: in the system message, where its chat template puts it by default.
"""

from contextlib import suppress
from typing import Any, TypeAlias

from jinja2 import TemplateError
from trl.chat_template_utils import parse_response
from trl.data_utils import is_conversational

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
TEMPLATES = {"deepseek-r1-distill": "user", "qwen3": "user", "qwen2.5": "user", "qwen2.5-math": "system"}
"""Model families, and the role of the message that carries the instruction."""
SYSTEM_ROLES = ("system", "developer")
MAX_SHOWN = 200

Messages: TypeAlias = list[dict[str, Any]]


def add_instruction(messages: Messages, template: str) -> Messages:
    r"""The messages with the instruction where the family of `template` expects it.

    That is the last message of the user, whatever follows it (an opened turn of the assistant is the model's own
    words), or the system's. Where nobody speaks as the user, a message of its own after the system's. A system message
    that the data has is replaced by the instruction, but kept before it where it holds the whole problem.

    Messages in which the user or the system already speaks of `\boxed` are returned as they are, so that it is never
    asked for twice.

    Args:
        messages: Chat messages, each with a `role` and a `content`: text, or a list of parts.
        template: A name of `TEMPLATES`.

    Raises:
        ValueError: If the template is unknown.
    """
    check_template(template)
    askers = ("user", *SYSTEM_ROLES)
    if any(r"\boxed" in text_of(message) for message in messages if message["role"] in askers):
        return messages
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    systems = [index for index, message in enumerate(messages) if message["role"] in SYSTEM_ROLES]
    if TEMPLATES[template] == "system" and users:
        return [{"role": "system", "content": INSTRUCTION}, *(m for m in messages if m["role"] not in SYSTEM_ROLES)]
    if TEMPLATES[template] == "system" and systems:
        return _with_instruction(messages, systems[-1])
    if users:
        return _with_instruction(messages, users[-1])
    after = systems[-1] + 1 if systems else 0
    return [*messages[:after], {"role": "user", "content": INSTRUCTION}, *messages[after:]]


def text_of(message: dict[str, Any]) -> str:
    """The text of a message whose content is text, a list of parts, or `None`."""
    content = message["content"] or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


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
    """Token ids of a prompt: those that `trl.GRPOTrainer` gives to the model, by the same calls.

    Text is encoded as it is. Messages go through the chat template, up to the opening of a new reply: where the last
    message is the assistant's, TRL closes that turn and opens another.

    Args:
        tokenizer: The model's.
        prompt: Text, or chat messages.
        chat_template_kwargs: Arguments of the chat template, such as `{"enable_thinking": False}`.

    Raises:
        ValueError: If the prompt cannot be rendered or has no tokens; says what to change.
    """
    in_chat = check_prompt(tokenizer, prompt)
    try:
        ids = _token_ids(tokenizer, prompt, in_chat, chat_template_kwargs or {})
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(
            f"The prompt {shown(prompt)} cannot be rendered with chat_template_kwargs={chat_template_kwargs}: {error}"
            ". Correct the prompt or the arguments."
        ) from error
    if not ids:
        raise ValueError(f"The prompt {shown(prompt)} has no tokens. Take it out, or give it text.")
    return ids


def check_prompt(tokenizer: Any, prompt: Any) -> bool:
    """Whether a prompt is chat messages, for which the tokenizer needs a chat template.

    Raises:
        ValueError: If it is neither text nor chat messages, or there is no chat template.
    """
    in_chat = bool(prompt) and is_conversational({"prompt": prompt})
    if not in_chat and not isinstance(prompt, str):
        raise ValueError(
            f"{shown(prompt)} is not a prompt. Use text, or chat messages with a 'role' and a 'content' each."
        )
    if in_chat and not tokenizer.chat_template:
        raise ValueError(
            f"The prompts are chat messages, such as {shown(prompt)}, and the tokenizer of model "
            f"{tokenizer.name_or_path!r} has no chat template. Take a model that has one, or set "
            "`tokenizer.chat_template` and save the tokenizer in the model's folder with save_pretrained."
        )
    return in_chat


def shown(prompt: Any) -> str:
    """A prompt as an error message shows it."""
    text = repr(prompt)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def paragraphs(messages: Messages) -> str:
    """Messages as text, for an evaluation of a model without a chat template. Training needs one."""
    return "".join(f"{text_of(message)}\n\n" for message in messages)


def reply(tokenizer: Any, prompt_ids: list[int], completion_ids: list[int]) -> dict[str, Any]:
    """The assistant's message that `trl.GRPOTrainer` makes of a completion and hands to reward functions.

    A tokenizer that can parse responses splits thinking and tool calls off the content.
    """
    if any(getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema")):
        with suppress(AttributeError):  # transformers 4 has no parser, and the newest none for a `response_schema`
            return parse_response(tokenizer, completion_ids, prefix=prompt_ids)
    return {"role": "assistant", "content": tokenizer.decode(completion_ids, skip_special_tokens=True)}


def _with_instruction(messages: Messages, index: int) -> Messages:
    """The messages with the instruction at the end of one of them."""
    content = messages[index]["content"]
    longer = [*content, {"type": "text", "text": f"\n{INSTRUCTION}"}] if isinstance(content, list) else None
    message = {**messages[index], "content": longer or f"{content}\n{INSTRUCTION}"}
    return [*messages[:index], message, *messages[index + 1 :]]


def _token_ids(tokenizer: Any, prompt: Any, in_chat: bool, chat_template_kwargs: dict[str, Any]) -> list[int]:
    """As `GRPOTrainer._tokenize_prompts`, for one prompt without tools."""
    if not in_chat:
        return list(tokenizer(text=[prompt])["input_ids"][0])
    encoded = tokenizer.apply_chat_template(
        conversation=[prompt],
        tools=None,
        chat_template=None,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **chat_template_kwargs,
    )
    return list(encoded["input_ids"][0])
