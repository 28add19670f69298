"""`trl-entropy methods`, and that every row says what its readers need."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, GRPOTrainer

from tests.tasks.test_multi_turn_training import multi_turn_trainer
from trl_entropy import AsyPPOConfig, AsyPPOTrainer, trainers
from trl_entropy.commands.methods import acts, defaults, excluded, main, metrics_table
from trl_entropy.controls import CONTROLS, Control


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.prefix)
def test_a_row_is_complete(control: Control) -> None:
    assert control.summary.endswith(".")
    assert control.published
    assert control.paper
    assert set(control.fields) == set(defaults(control))
    assert isinstance(getattr(AsyPPOConfig, f"{control.prefix}_enabled"), property)
    assert (control.loss_types is None) == (not control.loss_reason)
    assert (len(control.levels) == 2) == (not control.level_reason)
    logged = {f"{control.prefix}/{metric.name}" for metric in control.metrics}
    read = {*control.counts, *(control.drops or ((), ""))[0], *(mark.metric for mark in control.marks)}
    read |= {
        key for figure in control.figures for panel in figure.panels for key in (*panel.keys, *(panel.band or ()))
    }
    assert {key for key in read if key.startswith(f"{control.prefix}/")} <= logged
    known = {one.prefix for one in CONTROLS}
    assert {prefix for prefix, _ in control.excludes} <= known - {control.prefix}


def test_rows_do_not_collide() -> None:
    for names in (
        [control.prefix for control in CONTROLS],
        [control.name for control in CONTROLS],
        [name for control in CONTROLS for name in control.fields],
        [mark.letter for control in CONTROLS for mark in control.marks],
        [mark.column for control in CONTROLS for mark in control.marks],
    ):
        assert len(set(names)) == len(names)
    assert all(
        (one.name in excluded(other)) == (other.name in excluded(one)) for one in CONTROLS for other in CONTROLS
    )


def test_it_lists_all_or_those_named(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    everything = capsys.readouterr().out
    assert all(control.paper in everything and acts(control) in everything for control in CONTROLS)
    main(["erc", "CE-GPPO"])
    some = capsys.readouterr().out
    assert some.startswith("ERC\n")
    assert "ce_gppo_alpha1 (None)" in some
    assert "EPO" not in some
    main(["--markdown"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(CONTROLS)


def test_the_table_of_the_trainers_is_that_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--trainers"])
    page = Path(trainers.__file__).with_name("README.md").read_text(encoding="utf-8")
    table = capsys.readouterr().out
    assert page.partition("<!-- trainers -->\n")[2].partition("<!-- end -->")[0] == table
    cells = {row.split(" | ")[0].strip("| "): row for row in table.splitlines() if row.startswith("| ")}
    assert cells["ERC"] == "| ERC | yes | yes | yes | - | yes |"
    assert cells["EPO"] == "| EPO | yes | yes | yes | yes | yes |"
    assert cells["QAE"] == "| QAE | yes | - | - | yes | - |"
    assert cells["AsyPPO"] == "| AsyPPO | - | yes | yes | - | - |"


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"'grpo' is unknown\. Choose from "):
        main(["grpo"])


EVERYTHING = {
    "critics": (
        {"erc_low": 0.95, "erc_high": 1.05, "ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0, "epo_coef": 0.01}
        | {"positive_nll_coef": 0.1, "entropy_advantage_alpha": 0.4, "par_schedule": "entropy", "entropy_coef": 0.01}
    ),
    "weights": (
        {"qae_quantile": 0.4, "dppo_divergence": "tv", "entropic_target": 0.5, "steer_min_weight": 0.7}
        | {"fipo_half_life": 4.0, "clip_cov_fraction": 0.1}
    ),
    "loop": {"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0, "ce_gppo_loop_target": 1.0, "kl_cov_coef": 1.0},
    "moving": {"erc_low": 0.95, "erc_high": 1.05, "erc_target_fraction": 0.2}
    | {"stare_target_entropy": 9.0, "stare_variant": "C2"},
    "coefficient": {"target_entropy": 0.5, "target_entropy_by": "coefficient"},
}
"""All controls, in as few runs as their exclusions allow."""


def documented() -> re.Pattern[str]:
    """The keys of the table of metrics: code with a slash, and code that is an ending of its row's key."""
    names = set()
    for row in metrics_table().splitlines()[2:]:
        first, *others = re.findall(r"`([^`]+)`", row)
        names |= {first, *(first + name if name.startswith("_") else name for name in others)}
    keys = [re.sub(r"<\w>", r"\\d+", re.escape(name)) for name in names if "/" in name]
    return re.compile("|".join(keys))


def slashed(trainer: Any) -> set[str]:
    return {key for entry in trainer.state.log_history for key in entry if "/" in key}


def test_every_metric_that_is_logged_is_in_the_table(
    make_trainer: Callable[..., Any], tiny_model_path: str, tmp_path: Path
) -> None:
    """And every metric of a row is logged, by a run with its control."""
    plain = make_trainer(tmp_path / "plain", trainer_class=GRPOTrainer, config_class=GRPOConfig)
    runs = {"plain": plain, "turns": multi_turn_trainer(make_trainer, output_dir=tmp_path / "turns")}
    for name, settings in EVERYTHING.items():
        with_critics = {"trainer_class": partial(AsyPPOTrainer, critics=tiny_model_path), "config_class": AsyPPOConfig}
        kinds = with_critics if name == "critics" else {}
        runs[name] = make_trainer(tmp_path / name, steps_per_generation=2, **kinds, **settings)
    for trainer in runs.values():
        trainer.train()
    ours = set().union(*map(slashed, runs.values())) - slashed(plain)
    ours = {key for key in ours if not key.startswith("rewards/")}  # TRL's, by the reward function's name
    unknown = {key for key in ours if not documented().fullmatch(key)}
    assert not unknown
    missing = {
        f"{control.prefix}/{metric.name}"
        for control in CONTROLS
        for metric in control.metrics
        if not any(re.fullmatch(re.sub(r"<\w>", r"\\d+", f"{control.prefix}/{metric.name}"), key) for key in ours)
    }
    assert not missing
