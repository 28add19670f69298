"""What `EntropyPPOConfig` refuses and warns of, and that its controls' fields are `EntropyGRPOConfig`'s."""

import math
import warnings
from dataclasses import fields

import pytest

from trl_entropy import EntropyGRPOConfig
from trl_entropy.trainers.config import EntropyControls

ppo = pytest.importorskip("trl.experimental.ppo", reason="trl.experimental.ppo is in TRL 1.12 alone")

from trl_entropy.ppo import EntropyPPOConfig  # noqa: E402

ERC = {"erc_low": 0.95, "erc_high": 1.05}
CE_GPPO = {"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0}


def config(tmp_path, **given):
    return EntropyPPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"erc_low": 0.95}, "erc_low=0.95 and erc_high=None: set both"),
        ({"erc_low": 1.0, "erc_high": 1.05}, r"erc_low=1.0 must be in \[0, 1\)"),
        ({"erc_low": 0.95, "erc_high": 1.0}, "erc_high=1.0 must be above 1"),
        ({"ce_gppo_alpha1": 0.75}, "ce_gppo_alpha1=0.75 and ce_gppo_alpha2=None: set both"),
        ({**CE_GPPO, "ce_gppo_alpha2": math.inf}, "ce_gppo_alpha2=inf must be finite"),
        ({**CE_GPPO, "cliprange": 1.0}, "cliprange=1.0 must be in"),
        ({"epo_coef": -0.001}, "epo_coef=-0.001 must be finite and at least 0"),
        ({"epo_coef": 0.001, "epo_kappa_low": 1.2}, "epo_kappa_low < epo_kappa_high"),
        ({"epo_coef": 0.001, "epo_form": "soft"}, "epo_form='soft' is unknown"),
        ({"entropy_coef": -0.1}, "entropy_coef=-0.1 must be finite and at least 0"),
        ({"num_critics": 0}, "num_critics=0 must be at least 1"),
        ({"critic_num_epochs": 0}, "critic_num_epochs=0 must be at least 1"),
        ({"critic_per_device_train_batch_size": 0}, "critic_per_device_train_batch_size=0 must be at least 1"),
        ({"critic_learning_rate": 0.0}, "critic_learning_rate=0.0 must be above 0"),
        ({"critic_dtype": "float16"}, "critic_dtype='float16' is unknown"),
        ({"critic_gae_lambda": 1.1}, r"critic_gae_lambda=1.1 must be in \[0, 1\]"),
        ({"advantage_mask_fraction": 1.0}, r"advantage_mask_fraction=1.0 must be in \[0, 1\)"),
        ({"num_critics": 1, "advantage_mask_fraction": 0.0}, "entropy_filter_fraction=0.2 needs the disagreement"),
    ],
)
def test_nonsense_is_refused(tmp_path, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **given)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {**ERC, **CE_GPPO, "epo_coef": 0.001, "entropy_coef": 0.01},
        {"num_ppo_epochs": 1, "epo_coef": 0.001},
        {"num_critics": 1, "advantage_mask_fraction": 0.0, "entropy_filter_fraction": 0.0},
    ],
)
def test_sense_is_accepted_without_a_warning(tmp_path, given) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(tmp_path, **given)


@pytest.mark.parametrize(("given", "methods"), [(ERC, "ERC will"), (ERC | CE_GPPO, "CE-GPPO and ERC will")])
def test_on_policy_schedule_warns_and_names_the_field(tmp_path, given, methods) -> None:
    with pytest.warns(UserWarning, match=f"{methods} do nothing: with num_ppo_epochs=1") as caught:
        config(tmp_path, num_ppo_epochs=1, **given)
    assert caught[-1].filename == __file__


def test_fields_are_those_of_the_grpo_config_with_their_defaults() -> None:
    grpo, own = ({field.name: field.default for field in fields(cls)} for cls in (EntropyGRPOConfig, EntropyPPOConfig))
    controls = {field.name for field in fields(EntropyControls)}
    assert len(controls) == 15
    assert {name: own[name] for name in controls} == {name: grpo[name] for name in controls}


def test_everything_else_is_trls(tmp_path) -> None:
    own = {field.name: field for field in fields(EntropyPPOConfig)}
    for field in fields(ppo.PPOConfig):
        assert (own[field.name].default, own[field.name].default_factory) == (field.default, field.default_factory)
    assert not config(tmp_path).any_control_enabled
