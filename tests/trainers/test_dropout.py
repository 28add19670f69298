"""Dropout of the policy is warned of where a control would take it for a change of the policy."""

import warnings

import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from trl_entropy.trainers.dropout import active_dropout

ERC = {"erc_low": 0.95, "erc_high": 1.05}


def lora(dropout):
    return LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=dropout, task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_config": 0.05}, r"\(lora_dropout=0.05\).*ERC.*Set lora_dropout=0\."),
        ({"attention_dropout": 0.1}, r"\(attention_dropout=0.1\).*Set model_init_kwargs=.'attention_dropout': 0.0."),
        # TRL turns off the layers and leaves the functions on
        ({"attention_dropout": 0.1, "disable_dropout": True}, r"attention_dropout=0.1"),
        ({"attention_dropout": 0.1, "peft_config": 0.05}, "lora_dropout=0 and model_init_kwargs="),
    ],
)
def test_it_is_named_with_its_remedy(make_trainer, tiny_model_path, settings, message):
    attention = settings.pop("attention_dropout", 0.0)
    if "peft_config" in settings:
        settings["peft_config"] = lora(settings["peft_config"])
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, attention_dropout=attention)
    with pytest.warns(UserWarning, match=message):
        make_trainer(model=model, **ERC, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {**ERC, "peft_config": 0.0},
        {**ERC, "peft_config": 0.05, "disable_dropout": True},
        {"positive_nll_coef": 0.1, "peft_config": 0.05},  # compares no two policies
    ],
)
def test_no_warning_without_harm(make_trainer, tiny_model_path, settings):
    settings["peft_config"] = lora(settings["peft_config"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dropout")
        make_trainer(**settings)


def test_layers_and_functions_are_told_apart():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=8, attn_pdrop=0.2, embd_pdrop=0.0))
    layers, functions = active_dropout(model)
    assert layers == {"attn_dropout": 0.2, "resid_dropout": 0.1, "dropout": 0.1}
    assert functions == {}
