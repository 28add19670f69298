"""`trl-entropy methods`, and that every row says what its readers need."""

import pytest

from trl_entropy import AsyPPOConfig
from trl_entropy.commands.methods import acts, defaults, excluded, main
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


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"'grpo' is unknown\. Choose from "):
        main(["grpo"])
