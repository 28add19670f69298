"""Character-level Qwen2 policies small enough to be trained from nothing on a CPU."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")


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


def save_policy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, output_dir: str) -> str:
    """Write both into `output_dir`, which is made if it is not there and returned."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output_dir)
    model.save_pretrained(output_dir)
    return output_dir
