"""Loading critics, and the states that their values belong to."""

import copy
import math

import peft
import pytest
import torch
import transformers
from peft import AutoPeftModelForTokenClassification, LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen2ForTokenClassification,
)
from transformers.integrations import deepspeed

from trl_entropy.critics import check_tokenizer, load_critic, state_values


def test_fresh_critic_has_the_policys_backbone_and_no_opinion(tiny_model, tiny_model_path, rollout):
    critic = load_critic(tiny_model_path)
    assert {value.dtype for value in critic.parameters()} == {torch.float32}
    policy = tiny_model.model.state_dict()
    assert all(torch.equal(value, policy[name]) for name, value in critic.model.state_dict().items())
    assert (state_values(critic, rollout.input_ids, rollout.attention_mask, 6) == 0).all()
    assert not critic.config.use_cache


def test_saved_head_is_kept(make_critic, rollout, tmp_path):
    critic = make_critic()
    critic.save_pretrained(tmp_path)
    before = state_values(critic, rollout.input_ids, rollout.attention_mask, 6)
    again = load_critic(str(tmp_path))
    assert torch.equal(state_values(again, rollout.input_ids, rollout.attention_mask, 6), before)
    assert before.abs().max() > 0.01


def test_pickled_weights_are_loaded_only_if_asked_for(make_critic, tmp_path):
    critic = make_critic()
    critic.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(critic.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"The critic '.*' has no weights as safetensors.*save_pretr") as refused:
        load_critic(str(tmp_path))
    assert "\n" not in str(refused.value)
    again = load_critic(str(tmp_path), use_safetensors=False)
    assert all(torch.equal(value, critic.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_value_belongs_to_a_state(make_critic, rollout):
    """`values[:, t]` is read off the token before completion token t, and does not see that token."""
    critic, ids = make_critic().eval(), rollout.input_ids
    attention = torch.ones_like(ids)
    found = state_values(critic, ids, attention, 6)
    assert found.shape == (8, 7)
    torch.testing.assert_close(found, critic(input_ids=ids).logits[:, 2:, 0])
    changed = ids.clone()
    changed[:, 3 + 2] = (changed[:, 3 + 2] + 1) % 20 + 2
    differs = (state_values(critic, changed, attention, 6) - found).abs().amax(0) > 1e-5
    assert differs.tolist() == [False, False, False, True, True, True, True]


def test_left_padding_does_not_matter(make_critic, rollout):
    critic, ids, attention = make_critic().eval(), rollout.input_ids, rollout.attention_mask
    padding = torch.zeros(8, 4, dtype=torch.long)
    wider = state_values(critic, torch.cat([padding, ids], 1), torch.cat([padding, attention], 1), 6)
    narrow = state_values(critic, ids, attention, 6)
    used = torch.cat([torch.ones(8, 1), attention[:, 3:]], 1).bool()
    torch.testing.assert_close(wider[used], narrow[used], rtol=1e-5, atol=1e-5)


def test_columns_that_nobody_uses_are_not_computed(make_critic, rollout):
    critic, ids, attention = make_critic().eval(), rollout.input_ids, rollout.attention_mask.clone()
    attention[:, 3 + 4 :] = 0
    widths = []
    critic.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    found = state_values(critic, ids, attention, 6)
    assert widths == [(8, 7)]
    assert (found[:, 5:] == 0).all()
    expected = critic(input_ids=ids, attention_mask=attention).logits[:, 2:7, 0]
    torch.testing.assert_close(found[:, :5], torch.where(attention[:, 2:7].bool(), expected, 0.0))
    assert (found[:, :5] == 0).any()
    # not even a completion
    assert state_values(critic, ids, torch.arange(9).expand(8, 9) < 3, 6).shape == (8, 7)


def test_empty_prompt_is_refused(make_critic, rollout):
    with pytest.raises(ValueError, match="at least one prompt token"):
        state_values(make_critic(), rollout.input_ids[:, :6], rollout.attention_mask[:, :6], 6)


def dropouts(model):
    return {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}


def test_no_dropout(tmp_path, rollout):
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    critic = load_critic(str(tmp_path)).train()
    assert dropouts(critic) == {0.0}
    torch.nn.init.normal_(critic.classifier.weight)
    first, second = (state_values(critic, rollout.input_ids, rollout.attention_mask, 6) for _ in range(2))
    assert torch.equal(first, second)
    # as a module it comes with its dropout
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=1)
    assert dropouts(loaded) == {0.1}
    assert dropouts(load_critic(loaded)) == {0.0}
    # nor when the saved critic is loaded without this package
    critic.save_pretrained(tmp_path / "critic")
    assert dropouts(AutoModelForTokenClassification.from_pretrained(tmp_path / "critic")) == {0.0}


def test_adapter_on_all_linear_layers_leaves_the_value_head_whole(make_critic, tmp_path):
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)  # its layers are Conv1D, its head is linear
    peft_config = LoraConfig(r=2, target_modules="all-linear")
    llama_like = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for critic, layers, head in (
        (make_critic(peft_config=peft_config), llama_like, "score"),
        (load_critic(str(tmp_path), peft_config=peft_config), {"c_attn", "c_proj", "c_fc"}, "classifier"),
    ):
        trained = [name for name, value in critic.named_parameters() if value.requires_grad]
        adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in trained if ".lora_" in name}
        assert adapted == layers
        assert {name.split(f".{head}.")[1] for name in trained if ".lora_" not in name} == {
            "modules_to_save.default.weight",
            "modules_to_save.default.bias",
        }
    assert peft_config.target_modules == "all-linear"


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["full", "lora"])
def test_values_of_bfloat16_weights_are_float32(make_critic, rollout, peft_config):
    critic = make_critic(dtype=torch.bfloat16, peft_config=peft_config)
    assert {value.dtype for value in critic.parameters()} == {torch.bfloat16}
    found = state_values(critic, rollout.input_ids, rollout.attention_mask, 6).detach()
    assert found.dtype == torch.float32
    used = found[found != 0]
    assert (used != used.bfloat16().float()).float().mean() > 0.9
    reference = state_values(make_critic(), rollout.input_ids, rollout.attention_mask, 6)
    assert (found - reference).abs().max() < 0.05 * reference.abs().max()


def test_autocast_leaves_the_head_in_float32(make_critic, rollout):
    critic = make_critic()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = state_values(critic, rollout.input_ids, rollout.attention_mask, 6).detach()
    used = found[found != 0]
    assert (used != used.bfloat16().float()).float().mean() > 0.9


def test_gradient_checkpointing_changes_nothing(make_critic, rollout):
    gradients = []
    for checkpointing in (False, True):
        critic = make_critic(gradient_checkpointing=checkpointing).train()
        calls = []
        critic.model.layers[0].input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        state_values(critic, rollout.input_ids, rollout.attention_mask, 6).square().sum().backward()
        assert len(calls) == 1 + checkpointing
        gradients.append([value.grad for value in critic.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_adapter_trains_itself_and_the_head(make_critic, tiny_model_path, rollout, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    critic = make_critic(peft_config=config)
    trained = {name for name, value in critic.named_parameters() if value.requires_grad}
    assert {"lora_A", "lora_B", "score"} == {
        part for name in trained for part in ("lora_A", "lora_B", "score") if part in name
    }
    assert config.task_type == "CAUSAL_LM"
    assert config.modules_to_save is None
    critic.save_pretrained(tmp_path)
    again = AutoPeftModelForTokenClassification.from_pretrained(tmp_path, num_labels=1)
    expected = state_values(critic, rollout.input_ids, rollout.attention_mask, 6)
    assert torch.equal(state_values(again.eval(), rollout.input_ids, rollout.attention_mask, 6), expected)
    assert expected.abs().max() > 0.01
    with pytest.raises(ValueError, match=r"lora_dropout=0\.1"):
        load_critic(tiny_model_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))


def test_module_must_have_one_label(tiny_model, tiny_model_path):
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has no value head"):
        load_critic(tiny_model)
    two = AutoModelForTokenClassification.from_pretrained(tiny_model_path, num_labels=2)
    with pytest.raises(ValueError, match="num_labels=2"):
        load_critic(two)
    with pytest.raises(ValueError, match="Linear has no value head"):
        load_critic(torch.nn.Linear(2, 1))


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])  # their heads have one name for both tasks, and two
@pytest.mark.parametrize("as_folder", [False, True], ids=["module", "folder"])
def test_head_of_a_sequence_classification_model_is_applied_to_every_token(
    tiny_model_path, rollout, tmp_path, family, as_folder
):
    """As TRL's PPOTrainer applies that of its value model."""
    if family == "qwen2":
        given = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    else:
        config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=64, num_labels=1)
        given = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(given.score.weight)
    given.config.attention_dropout = given.config.resid_pdrop = 0.1
    with torch.no_grad():
        states = given.base_model.eval()(input_ids=rollout.input_ids, attention_mask=rollout.attention_mask)
        expected = given.score(states.last_hidden_state)[:, -7:].squeeze(-1)
    given.save_pretrained(tmp_path / "given")
    critic = load_critic(str(tmp_path / "given") if as_folder else given)
    for mode in (critic.eval(), critic.train()):
        found = state_values(mode, rollout.input_ids, rollout.attention_mask, 6)
        torch.testing.assert_close(found, torch.where(rollout.attention_mask[:, -7:].bool(), expected, 0.0))
    critic.save_pretrained(tmp_path / "saved")
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(state_values(again, rollout.input_ids, rollout.attention_mask, 6), found)


def test_dropout_that_a_layer_applies_as_a_function_is_off_too(tiny_model_path, rollout):
    model = AutoModelForTokenClassification.from_pretrained(tiny_model_path, num_labels=1, attention_dropout=0.5)
    torch.nn.init.normal_(model.score.weight)
    critic = load_critic(model).train()
    found = [state_values(critic, rollout.input_ids, rollout.attention_mask, 6) for _ in range(2)]
    assert torch.equal(*found)


@pytest.mark.parametrize("task", ["Token", "Sequence"])
def test_classifier_of_several_labels_is_refused_by_name(tiny_model_path, tmp_path, task):
    two = getattr(transformers, f"AutoModelFor{task}Classification").from_pretrained(tiny_model_path, num_labels=2)
    two.save_pretrained(tmp_path)
    for given in (two, str(tmp_path)):
        with pytest.raises(ValueError, match=rf"Qwen2For{task}Classification\)? has num_labels=2"):
            load_critic(given)


def test_family_without_a_token_classification_model_is_refused_by_name(tmp_path):
    config = transformers.GPTJConfig(vocab_size=40, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path)
    for given in (model, str(tmp_path)):
        with pytest.raises(ValueError, match="model_type='gptj', for which transformers has no token-classification"):
            load_critic(given)


def test_adapter_on_the_value_model_of_trls_ppo(tiny_model_path, rollout):
    given = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    expected = load_critic(copy.deepcopy(given)).eval()
    config = LoraConfig(r=2, target_modules=["q_proj"])
    critic = load_critic(given, peft_config=config, gradient_checkpointing=True)
    arguments = (rollout.input_ids, rollout.attention_mask, 6)
    assert torch.equal(state_values(critic.eval(), *arguments), state_values(expected, *arguments))
    state_values(critic.train(), *arguments).square().sum().backward()
    trained = {name for name, value in critic.named_parameters() if value.grad is not None}
    assert any("score" in name for name in trained)
    assert any("lora_B" in name for name in trained)


def test_sequence_classification_model_in_an_adapter_is_refused(tiny_model_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    adapter = peft.get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=r"Qwen2ForSequenceClassification is .* in an adapter"):
        load_critic(adapter)


def test_embedding_must_hold_the_vocabulary(tiny_model_path, small_critic, tiny_tokenizer):
    size = len(tiny_tokenizer)
    assert isinstance(load_critic(tiny_model_path, vocab_size=size), Qwen2ForTokenClassification)
    load_critic(small_critic, vocab_size=size + 8)
    with pytest.raises(ValueError, match=f"vocab_size={size}, and the policy's tokenizer needs {size + 1}"):
        load_critic(tiny_model_path, vocab_size=size + 1)


def other_tokenizer(tokenizer, vocabulary, folder):
    """Save a copy of the tokenizer with another vocabulary."""
    import json

    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"] = vocabulary
    content["added_tokens"] = []
    copy = Tokenizer.from_str(json.dumps(content))
    PreTrainedTokenizerFast(tokenizer_object=copy, unk_token="?").save_pretrained(folder)
    return str(folder)


def test_tokenizer_must_be_the_policys(tiny_tokenizer, tiny_model_path, small_critic, tmp_path):
    check_tokenizer(tiny_tokenizer, tiny_model_path)
    check_tokenizer(tiny_tokenizer, small_critic)
    vocabulary = tiny_tokenizer.get_vocab()
    same = other_tokenizer(tiny_tokenizer, vocabulary, tmp_path / "same")
    check_tokenizer(tiny_tokenizer, same)
    swapped = vocabulary | {"a": vocabulary["b"], "b": vocabulary["a"]}
    with pytest.raises(ValueError, match=f"'a' is token {vocabulary['a']} of the policy's and {vocabulary['b']}"):
        check_tokenizer(tiny_tokenizer, other_tokenizer(tiny_tokenizer, swapped, tmp_path / "swapped"))
    larger = vocabulary | {"z": len(vocabulary)}
    with pytest.raises(
        ValueError, match=f"{len(vocabulary)} tokens in the policy's and {len(larger)} in the critic's"
    ):
        check_tokenizer(tiny_tokenizer, other_tokenizer(tiny_tokenizer, larger, tmp_path / "larger"))


def test_without_a_tokenizer_the_embedding_counts(tiny_tokenizer, small_critic, tmp_path):
    small_critic.save_pretrained(tmp_path)
    check_tokenizer(tiny_tokenizer, str(tmp_path))
    small_critic.config.vocab_size = 5
    small_critic.config.save_pretrained(tmp_path)
    for critic in (small_critic, str(tmp_path)):
        with pytest.raises(ValueError, match=r"vocab_size=5, and .* needs"):
            check_tokenizer(tiny_tokenizer, critic)


def test_deepspeed_is_kept_out(tiny_model_path):
    class ZeRO3:
        def is_zero3(self):
            return True

    settings = ZeRO3()
    deepspeed.set_hf_deepspeed_config(settings)
    try:
        critic = load_critic(tiny_model_path)
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert math.isfinite(sum(value.sum().item() for value in critic.parameters()))
