"""Every combination that makes no sense is refused when the config is built, with field, value and remedy."""

import math
import warnings

import pytest
from trl import GRPOTrainer

from trl_entropy import EntropyGRPOConfig

ERC = {"erc_low": 0.95, "erc_high": 1.05}
CE_GPPO = {"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0}
LIGER_SWAPS_LAYERS = pytest.mark.skipif(
    hasattr(GRPOTrainer, "compute_liger_loss"), reason="Liger computes the loss on TRL 1.12 and 1.13"
)
OFF_POLICY = {"steps_per_generation": 8, "per_device_train_batch_size": 8, "report_to": "none", "bf16": False}


def config(tmp_path, **fields):
    return EntropyGRPOConfig(output_dir=str(tmp_path), **{**OFF_POLICY, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"erc_low": 0.95}, "erc_low=0.95 and erc_high=None: set both"),
        ({"erc_high": 1.05}, "erc_low=None and erc_high=1.05: set both"),
        ({"erc_low": 1.0, "erc_high": 1.05}, r"erc_low=1.0 must be in \[0, 1\)"),
        ({"erc_low": -0.1, "erc_high": 1.05}, r"erc_low=-0.1 must be in \[0, 1\)"),
        ({"erc_low": math.nan, "erc_high": 1.05}, r"erc_low=nan must be in \[0, 1\)"),
        ({"erc_low": 0.95, "erc_high": 1.0}, "erc_high=1.0 must be above 1"),
        ({"erc_low": 0.95, "erc_high": math.nan}, "erc_high=nan must be above 1"),
        (
            {**ERC, "erc_entropy_floor": -1e-8},
            "erc_entropy_floor=-1e-08 must be finite and at least 0. Published: 1e-8",
        ),
        ({**ERC, "erc_entropy_floor": math.nan}, "erc_entropy_floor=nan must be finite"),
        ({**ERC, "loss_type": "vespo"}, "loss_type='vespo'.*Set loss_type to one of"),
        ({"ce_gppo_alpha1": 0.75}, "ce_gppo_alpha1=0.75 and ce_gppo_alpha2=None: set both"),
        ({"ce_gppo_alpha2": 1.0}, "ce_gppo_alpha1=None and ce_gppo_alpha2=1.0: set both"),
        ({**CE_GPPO, "ce_gppo_alpha1": -0.5}, "ce_gppo_alpha1=-0.5 must be finite and at least 0"),
        ({**CE_GPPO, "ce_gppo_alpha2": math.inf}, "ce_gppo_alpha2=inf must be finite"),
        ({**CE_GPPO, "ce_gppo_alpha2": math.nan}, "ce_gppo_alpha2=nan must be finite"),
        ({**CE_GPPO, "loss_type": "cispo"}, "loss_type='cispo'.*no PPO clip"),
        ({**CE_GPPO, "loss_type": "sapo"}, "loss_type='sapo'.*no PPO clip"),
        ({**CE_GPPO, "loss_type": "vespo"}, "loss_type='vespo'.*no PPO clip"),
        ({**CE_GPPO, "delta": 1.2, "epsilon": 0.2}, "delta=1.2 must be above 1 [+] epsilon_high = 1.2"),
        ({**CE_GPPO, "delta": 1.25, "epsilon_high": 0.28}, "delta=1.25 must be above 1 [+] epsilon_high = 1.28"),
        ({**CE_GPPO, "beta": 0.04, "use_bias_correction_kl": True}, "Set use_bias_correction_kl=False, or beta=0"),
        (
            {**ERC, "importance_sampling_level": "sequence", "beta": 0.04, "use_bias_correction_kl": True},
            "beta=0.04 with use_bias_correction_kl=True.*ratio of the sequence.*use_bias_correction_kl=False",
        ),
        ({"epo_coef": -0.001}, "epo_coef=-0.001 must be finite and at least 0"),
        ({"epo_coef": math.nan}, "epo_coef=nan must be finite"),
        ({"epo_coef": 0.001, "epo_penalty": -0.1}, "epo_penalty=-0.1 must be finite and at least 0"),
        ({"epo_coef": 0.001, "epo_gamma": math.inf}, "epo_gamma=inf must be finite"),
        ({"epo_coef": 0.001, "epo_kappa_low": 1.2, "epo_kappa_high": 1.2}, "epo_kappa_low < epo_kappa_high"),
        ({"epo_coef": 0.001, "epo_kappa_low": -0.1}, "epo_kappa_low=-0.1"),
        ({"epo_coef": 0.001, "epo_kappa_high": math.nan}, "epo_kappa_high=nan"),
        ({"epo_coef": 0.001, "epo_schedule": "cosine"}, "epo_schedule='cosine' is unknown. Choose one of decay"),
        ({"epo_coef": 0.001, "epo_form": "soft"}, "epo_form='soft' is unknown"),
        ({"epo_coef": 0.001, "epo_history": "window"}, "epo_history='window' is unknown"),
        ({"positive_nll_coef": -0.1}, "positive_nll_coef=-0.1 must be finite and at least 0"),
        ({"positive_nll_coef": math.nan}, "positive_nll_coef=nan must be finite"),
        ({"positive_nll_coef": 0.1, "positive_nll_min_reward": math.nan}, "positive_nll_min_reward=nan"),
    ],
)
def test_nonsense_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        ERC,
        {"erc_low": 0.0, "erc_high": math.inf},
        {**ERC, "erc_entropy_floor": 0.0},
        CE_GPPO,
        {**ERC, **CE_GPPO, "positive_nll_coef": 0.1, "delta": 10.0, "epsilon_high": 0.28},
        {**CE_GPPO, "beta": 0.04, "use_bias_correction_kl": False},
        {**ERC, "beta": 0.04, "use_bias_correction_kl": True},
        {**ERC, "importance_sampling_level": "sequence", "beta": 0.04, "use_bias_correction_kl": False},
        {**ERC, "importance_sampling_level": "sequence", "beta": 0.04, "loss_type": "cispo"},
        {**ERC, "loss_type": "cispo"},
        {**ERC, "loss_type": "sapo"},
        {**ERC, **CE_GPPO, "importance_sampling_level": "sequence", "loss_type": "luspo"},
        {"epo_coef": 0.001, "epo_kappa_low": 0.0, "epo_kappa_high": 2.0, "loss_type": "vespo"},
        {"epo_coef": 0.001, "steps_per_generation": None, "epo_history": "per_turn", "epo_form": "indicator"},
        pytest.param({**ERC, "use_liger_kernel": True, "record_tokens": 8}, marks=LIGER_SWAPS_LAYERS),
        pytest.param({"epo_coef": 0.001, "use_liger_kernel": True}, marks=LIGER_SWAPS_LAYERS),
        {"use_liger_kernel": False, "loss_type": "vespo", "positive_nll_coef": 0.1},
    ],
)
def test_sense_is_accepted_without_a_warning(tmp_path, fields):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(tmp_path, **fields)


@pytest.mark.parametrize(
    ("controls", "schedule", "methods"),
    [
        (ERC, {"steps_per_generation": None}, "ERC will do nothing"),
        (CE_GPPO, {"steps_per_generation": 1, "gradient_accumulation_steps": 4}, "CE-GPPO will do nothing"),
        (
            {**ERC, **CE_GPPO},
            {"steps_per_generation": 2, "num_iterations": 2, "gradient_accumulation_steps": 4},
            "CE-GPPO and ERC will do nothing",
        ),
    ],
)
def test_on_policy_schedule_warns_and_names_the_fields(tmp_path, controls, schedule, methods):
    with pytest.warns(UserWarning, match=methods) as caught:
        config(tmp_path, **{**controls, **schedule})
    message = str(caught[-1].message)
    for name in ("steps_per_generation", "num_iterations", "gradient_accumulation_steps"):
        assert name in message


@pytest.mark.parametrize("schedule", [{"steps_per_generation": None}, {"steps_per_generation": 1}])
def test_no_warning_without_a_clip(tmp_path, schedule):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(tmp_path, positive_nll_coef=0.1, **schedule)


def test_switches_follow_the_fields(tmp_path):
    off = config(tmp_path)
    assert not off.any_control_enabled
    assert config(tmp_path, **ERC).erc_enabled
    assert not config(tmp_path, **ERC).ce_gppo_enabled
    assert config(tmp_path, ce_gppo_alpha1=0.0, ce_gppo_alpha2=0.0).ce_gppo_enabled
    assert config(tmp_path, positive_nll_coef=0.1).any_control_enabled
    assert config(tmp_path, epo_coef=0.001).any_control_enabled
    assert config(tmp_path, epsilon=0.2).eps_high == 0.2
    assert config(tmp_path, epsilon=0.2, epsilon_high=0.28).eps_high == 0.28


@pytest.mark.parametrize(
    "control", [ERC, CE_GPPO, {"epo_coef": 0.001}, {"positive_nll_coef": 0.1}, {"record_tokens": 8}]
)
def test_liger_is_refused_where_it_hides_the_loss(tmp_path, monkeypatch, control):
    monkeypatch.setattr(GRPOTrainer, "compute_liger_loss", None, raising=False)  # as TRL 1.12 and 1.13 have it
    with pytest.raises(ValueError, match=r"use_liger_kernel=True.*1\.12 and 1\.13.*Set use_liger_kernel=False"):
        config(tmp_path, **control, use_liger_kernel=True)
    config(tmp_path, use_liger_kernel=True)
