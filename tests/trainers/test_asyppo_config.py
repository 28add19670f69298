"""AsyPPO's configuration: defaults, refusals, warnings."""

import warnings

import pytest

from trl_entropy import AsyPPOConfig

QUIET = {"per_device_train_batch_size": 8, "report_to": "none", "bf16": False, "entropy_filter_fraction": 0.0}


def config(tmp_path, **fields):
    return AsyPPOConfig(output_dir=str(tmp_path), **{**QUIET, **fields})


def test_published_defaults(tmp_path):
    with pytest.warns(UserWarning, match=r"entropy_filter_fraction=0.2 does nothing"):
        defaults = AsyPPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False)
    assert (defaults.num_critics, defaults.critic_learning_rate, defaults.critic_num_epochs) == (2, 1e-5, 1)
    assert (defaults.gae_gamma, defaults.gae_lambda, defaults.critic_gae_lambda) == (1.0, 1.0, 1.0)
    assert (defaults.advantage_mask_fraction, defaults.entropy_filter_fraction) == (0.2, 0.2)
    assert defaults.whiten_advantages
    assert defaults.critic_warmup_rollouts == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_critics": 0}, r"num_critics=0 must be in 1..num_generations=8"),
        ({"num_critics": 9}, r"num_critics=9 must be in 1..num_generations=8"),
        ({"num_critics": 1}, "advantage_mask_fraction=0.2 needs the disagreement of at least two critics"),
        (
            {"num_critics": 1, "advantage_mask_fraction": 0.0, "entropy_filter_fraction": 0.1},
            "entropy_filter_fraction=0.1 needs the disagreement",
        ),
        ({"critic_num_epochs": 0}, "critic_num_epochs=0 must be at least 1"),
        ({"critic_warmup_rollouts": -1}, "critic_warmup_rollouts=-1 must be at least 0"),
        ({"critic_per_device_train_batch_size": 0}, "critic_per_device_train_batch_size=0 must be at least 1"),
        ({"critic_learning_rate": 0.0}, r"critic_learning_rate=0.0 must be above 0"),
        ({"critic_learning_rate": float("nan")}, r"critic_learning_rate=nan must be above 0"),
        ({"critic_dtype": "float16"}, "critic_dtype='float16' is unknown"),
        ({"gae_gamma": 1.1}, r"gae_gamma=1.1 must be in \[0, 1\]"),
        ({"gae_lambda": -0.1}, r"gae_lambda=-0.1 must be in \[0, 1\]"),
        ({"critic_gae_lambda": float("nan")}, r"critic_gae_lambda=nan must be in \[0, 1\]"),
        ({"advantage_mask_fraction": 1.0}, r"advantage_mask_fraction=1.0 must be in \[0, 1\)"),
        ({"entropy_filter_fraction": -0.2}, r"entropy_filter_fraction=-0.2 must be in \[0, 1\)"),
        ({"loss_type": "vespo"}, "loss_type='vespo'"),
        ({"erc_low": 0.95}, "erc_low=0.95 and erc_high=None"),
    ],
)
def test_nonsense_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_critics": 1, "advantage_mask_fraction": 0.0},
        {"num_critics": 8},
        {"entropy_filter_fraction": 0.2, "entropy_coef": 0.01},
        {"entropy_filter_fraction": 0.2, "use_adaptive_entropy": True},
        {"entropy_filter_fraction": 0.2, "epo_coef": 0.001},
    ],
)
def test_sense_is_accepted_without_a_warning(tmp_path, fields):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(tmp_path, **fields)
