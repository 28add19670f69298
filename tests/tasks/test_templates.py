r"""Where each family's instruction goes, and prompts rendered to the tokens that a trainer gives to its model."""

from typing import Any

import pytest
import transformers
from datasets import Dataset
from packaging.version import Version
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from trl_entropy import EntropyGRPOConfig, EntropyGRPOTrainer
from trl_entropy.tasks.templates import (
    INSTRUCTION,
    TEMPLATES,
    add_instruction,
    paragraphs,
    render,
    reply,
    template_of,
)

PROBLEM = [{"role": "user", "content": "1+1?"}]
OPENED = {"role": "assistant", "content": "Let me see:"}
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
USER_FAMILIES = ["deepseek-r1-distill", "qwen3", "qwen2.5"]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize("template", USER_FAMILIES)
def test_instruction_ends_the_users_message(template: str) -> None:
    assert add_instruction(PROBLEM, template) == [{"role": "user", "content": f"1+1?\n{INSTRUCTION}"}]
    assert PROBLEM == [{"role": "user", "content": "1+1?"}]


TOOL_USE = [
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "2"},
]


@pytest.mark.parametrize("after", [[OPENED], TOOL_USE, [*TOOL_USE, OPENED]])
@pytest.mark.parametrize("template", USER_FAMILIES)
def test_what_follows_the_user_is_not_touched(template: str, after: list[dict[str, Any]]) -> None:
    asked = user(f"1+1?\n{INSTRUCTION}")
    assert add_instruction([*PROBLEM, *after], template) == [asked, *after]
    earlier = [user("Hello"), {"role": "assistant", "content": "Hello!"}]
    assert add_instruction([*earlier, *PROBLEM, *after], template) == [*earlier, asked, *after]


@pytest.mark.parametrize("template", USER_FAMILIES)
def test_without_a_users_message_the_instruction_is_one(template: str) -> None:
    system = {"role": "system", "content": "1+1?"}
    assert add_instruction([system], template) == [system, user(INSTRUCTION)]
    assert add_instruction([system, OPENED], template) == [system, user(INSTRUCTION), OPENED]
    assert add_instruction([OPENED], template) == [user(INSTRUCTION), OPENED]


@pytest.mark.parametrize("template", USER_FAMILIES)
def test_a_message_of_parts_gets_one_more(template: str) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "1+1?"}]
    added = {"type": "text", "text": f"\n{INSTRUCTION}"}
    assert add_instruction([user(parts)], template) == [user([*parts, added])]
    asked = [user([{"type": "text", "text": r"Box it: \boxed{}."}])]
    assert add_instruction(asked, template) == asked


def test_qwen_math_has_it_in_the_system_message() -> None:
    expected = [{"role": "system", "content": INSTRUCTION}, *PROBLEM]
    assert add_instruction(PROBLEM, "qwen2.5-math") == expected
    assert add_instruction([{"role": "system", "content": "Be brief."}, *PROBLEM], "qwen2.5-math") == expected
    assert add_instruction([*PROBLEM, OPENED], "qwen2.5-math") == [*expected, OPENED]
    # where no user speaks, the system message has the problem
    alone = [{"role": "system", "content": "1+1?"}, OPENED]
    expected = [{"role": "system", "content": f"1+1?\n{INSTRUCTION}"}, OPENED]
    assert add_instruction(alone, "qwen2.5-math") == expected
    assert add_instruction([OPENED], "qwen2.5-math") == [user(INSTRUCTION), OPENED]


@pytest.mark.parametrize("template", TEMPLATES)
def test_it_is_never_asked_for_twice(template: str) -> None:
    asked = [{"role": "user", "content": r"1+1? Box it: \boxed{}."}]
    assert add_instruction(asked, template) == asked
    assert add_instruction(add_instruction(PROBLEM, template), template) == add_instruction(PROBLEM, template)
    # the model's own words ask for nothing
    boxes = [user("1+2?"), {"role": "assistant", "content": r"\boxed{3}"}]
    asked_again = add_instruction([*boxes, *PROBLEM], template)
    assert INSTRUCTION in asked_again[-1 if TEMPLATES[template] == "user" else 0]["content"]


def test_unknown_template_is_refused() -> None:
    with pytest.raises(ValueError, match=r"template='llama' is unknown\. Choose one of deepseek-r1-distill, qwen3"):
        add_instruction(PROBLEM, "llama")


@pytest.mark.parametrize(
    ("chat_template", "role"), [(R1, "user"), (CHATML, "user"), (None, "user"), (QWEN_MATH, "system")]
)
def test_template_is_told_by_the_chat_template(
    chat_template: str | None, role: str, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    chat_tokenizer.chat_template = chat_template
    assert TEMPLATES[template_of(chat_tokenizer)] == role


def test_rendered_prompts_of_the_families(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    def text(chat_template: str, **kwargs: Any) -> str:
        chat_tokenizer.chat_template = chat_template
        messages = add_instruction(PROBLEM, template_of(chat_tokenizer))
        return chat_tokenizer.decode(render(chat_tokenizer, messages, kwargs))

    assert text(R1) == f"<|User|>1+1?\n{INSTRUCTION}<|Assistant|><think>\n"
    qwen = f"<|im_start|>user\n1+1?\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    assert text(CHATML) == qwen
    assert text(CHATML, enable_thinking=False) == f"{qwen}<think>\n\n</think>\n\n"
    maths = f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert text(QWEN_MATH) == maths


CHAT_PROMPTS: list[list[dict[str, Any]]] = [
    PROBLEM,
    [*PROBLEM, OPENED],
    [{"role": "system", "content": "Be brief."}, user("a"), {"role": "assistant", "content": "b"}, user("c\n\n d ")],
    [{"role": "system", "content": "1+1?"}],
    [*PROBLEM, *TOOL_USE],
    [user("<eos>is no end<pad>")],
    [user("")],
]
TEXT_PROMPTS = ["1+1=", " 1 + 1\n=", "<eos>", "x" * 40]
PARTS = [[user([{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}])], [user([])]]


@pytest.mark.parametrize(
    ("prompts", "chat_template_kwargs"),
    [
        (TEXT_PROMPTS, None),
        (CHAT_PROMPTS, None),
        (CHAT_PROMPTS, {"enable_thinking": False}),
        (PARTS, {"enable_thinking": False}),
        (CHAT_PROMPTS, {"tokenizer_kwargs": {"verbose": False}, "unused": [1]}),
    ],
)
def test_prompts_have_the_tokens_that_the_trainer_gives_to_its_model(
    prompts: list[Any],
    chat_template_kwargs: dict[str, Any] | None,
    chat_model_path: str,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[list[int]] = []

    def stop(self: Any, prompt_ids: list[list[int]], *arguments: Any, **options: Any) -> None:
        given.extend(prompt_ids)
        raise InterruptedError

    monkeypatch.setattr(EntropyGRPOTrainer, "_generate_single_turn", stop)
    sizes = {"per_device_train_batch_size": 2 * len(prompts), "num_generations": 2, "gradient_accumulation_steps": 1}
    config = EntropyGRPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", chat_template_kwargs=chat_template_kwargs, **sizes
    )
    rows = Dataset.from_dict({"prompt": prompts})
    trainer = EntropyGRPOTrainer(chat_model_path, lambda completions, **_: [0.0], config, rows)
    with pytest.raises(InterruptedError):
        trainer.train()
    rendered = [render(trainer.processing_class, prompt, chat_template_kwargs) for prompt in rows["prompt"]]
    assert sorted(map(list, given)) == sorted([*rendered, *rendered])
    assert len({len(ids) for ids in rendered}) > 1


def test_special_tokens_are_added_to_text_alone(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    chat_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 0)]
    )
    assert chat_tokenizer.decode(render(chat_tokenizer, "1+1=")) == "<pad>1+1="
    assert chat_tokenizer.decode(render(chat_tokenizer, PROBLEM)) == "<|user|>1+1?<eos><|assistant|>"


@pytest.mark.parametrize(
    ("prompt", "chat_template_kwargs", "message"),
    [
        ("", {}, r"The prompt '' has no tokens"),
        ([], {}, r"\[\] is not a prompt\. Use text, or chat messages"),
        (None, {}, "None is not a prompt"),
        (12, {}, "12 is not a prompt"),
        (["1+1"], {}, r"\['1\+1'\] is not a prompt"),
        (
            PROBLEM,
            {"add_generation_prompt": False},
            "chat_template_kwargs={'add_generation_prompt': False}: .*multiple",
        ),
        (PROBLEM, {"continue_final_message": True}, "continue_final_message and add_generation_prompt"),
        ([{"role": "user", "content": 12}], {}, r"cannot be rendered .*'int' object is not iterable"),
        ([user("refuse me" * 100)], {}, r"refuse m\w*\.\.\. cannot be rendered .*: not this one\. Correct the prompt"),
    ],
)
def test_what_cannot_be_rendered_is_refused(
    prompt: Any, chat_template_kwargs: dict[str, Any], message: str, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    refusal = "{% if 'refuse' in messages[0].content|string %}{{ raise_exception('not this one') }}{% endif %}"
    chat_tokenizer.chat_template = refusal + chat_tokenizer.chat_template
    with pytest.raises(ValueError, match=message):
        render(chat_tokenizer, prompt, chat_template_kwargs)


def test_messages_need_a_chat_template(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    chat_tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template\. Take a model that has one, or set `tokenizer\.chat"):
        render(chat_tokenizer, PROBLEM)
    assert chat_tokenizer.decode(render(chat_tokenizer, "1+1=")) == "1+1="
    messages = [{"role": "system", "content": "s"}, user([{"type": "text", "text": "u"}]), OPENED]
    assert paragraphs(messages) == "s\n\nu\n\nLet me see:\n\n"


def test_replies_are_parsed_where_the_tokenizer_can(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = chat_tokenizer("<think>so</think>2<eos>")["input_ids"]
    prompt = render(chat_tokenizer, PROBLEM)
    assert reply(chat_tokenizer, prompt, ids) == {"role": "assistant", "content": "<think>so</think>2"}
    thinking = {"open": "<think>", "close": "</think>", "content": "text"}
    chat_tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|assistant|>",
        "fields": {"reasoning_content": thinking, "content": {"close": "<eos>", "content": "text"}},
    }
    if Version(transformers.__version__) >= Version("5.13"):  # before, templates of responses are not read
        parsed = {"role": "assistant", "reasoning_content": "so", "content": "2"}
        assert reply(chat_tokenizer, prompt, ids) == parsed
    del chat_tokenizer.response_template
    chat_tokenizer.response_schema = {"type": "object"}  # which transformers 4 and 5.13 do not read
    assert reply(chat_tokenizer, prompt, ids)["content"]
