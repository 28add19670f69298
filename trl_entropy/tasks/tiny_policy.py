"""Character-level Qwen2 policies small enough to be trained from nothing on a CPU."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
WARM_UP_MAX_STEPS = 2000
WARM_UP_BATCH = 128
WARM_UP_LEARNING_RATE = 1e-3
PROBE_EVERY = 10


def make_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token a character; every character outside `characters` is `<unk>`.

    Args:
        characters: The vocabulary, without white space: `AutoTokenizer` makes a Qwen2 policy's tokenizer byte-level,
            which writes white space differently.
    """
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, num_layers: int, max_length: int
) -> Qwen2ForCausalLM:
    """A random float32 Qwen2 with heads of 16 channels.

    Args:
        tokenizer: From `make_tokenizer`.
        hidden_size: A multiple of 32.
        num_layers: Number of transformer blocks.
        max_length: Tokens of the longest sequence.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 16,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=max_length,
        initializer_range=hidden_size**-0.5,  # learns in half the steps that Qwen2's 0.02 needs
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def warm_up(
    model: Qwen2ForCausalLM, input_ids: Tensor, labels: Tensor, *, until: float, probe: int, name: str
) -> None:
    """Train on demonstrations until sampling repeats enough of them; draws rows from PyTorch's random numbers.

    Args:
        model: The policy.
        input_ids: Demonstrations, `(N, T)`.
        labels: The same, -100 except at the tokens that the policy writes, `(N, T)`.
        until: Mean `repeat_probability` of the first `probe` rows at which to stop.
        probe: Rows that the mean is taken over, at least 1.
        name: What that probability is to the task, such as `"accuracy"`.

    Raises:
        RuntimeError: If it is not reached in `WARM_UP_MAX_STEPS` steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_UP_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    bar_format = f"{{desc}}: {name} {{n:.2f}} of {{total:.2f}} |{{bar}}| {{elapsed}}{{postfix}}"
    found = 0.0
    with tqdm(total=until, desc="warm-up", bar_format=bar_format) as bar:
        for step in range(WARM_UP_MAX_STEPS):
            if step % PROBE_EVERY == 0:
                found = repeat_probability(model, input_ids[:probe], labels[:probe]).mean().item()
                bar.set_postfix(step=step)
                bar.update(max(0.0, min(found, until) - bar.n))
            if found >= until:
                return
            rows = torch.randint(len(input_ids), (WARM_UP_BATCH,))
            model(input_ids=input_ids[rows], labels=labels[rows]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    raise RuntimeError(
        f"The warm-up reached {name} {found:.2f} in WARM_UP_MAX_STEPS={WARM_UP_MAX_STEPS} steps, not {until}. Try "
        "another seed."
    )


def encode(tokenizer: PreTrainedTokenizerBase, prompts: list[str], answers: list[str]) -> tuple[Tensor, Tensor]:
    """Demonstrations for `warm_up`: input ids and labels, `(N, T)` each.

    Prompt, answer, end, padding; labels are -100 except at answer and end.

    Args:
        tokenizer: From `make_tokenizer`.
        prompts: One token a character.
        answers: One per prompt.
    """
    texts = [prompt + answer + tokenizer.eos_token for prompt, answer in zip(prompts, answers, strict=True)]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    prompt_lengths = torch.tensor([[len(prompt)] for prompt in prompts])
    is_prompt = torch.arange(encoded.input_ids.shape[1]) < prompt_lengths
    return encoded.input_ids, encoded.input_ids.masked_fill(is_prompt | (encoded.attention_mask == 0), -100)


@torch.no_grad()
def repeat_probability(model: Qwen2ForCausalLM, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Probability of each demonstration that sampling at temperature 1 repeats what is labelled in it, `(N,)`."""
    log_probs = model(input_ids=input_ids).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    token_log_probs = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return token_log_probs.masked_fill(targets == -100, 0.0).sum(1).exp()


def save_policy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, output_dir: str) -> str:
    """Write both into `output_dir`, which is made if it is not there and returned."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output_dir)
    model.save_pretrained(output_dir)
    return output_dir
