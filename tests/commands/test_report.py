"""`trl-entropy report`."""

import json
from pathlib import Path

import pytest

from tests.commands.conftest import full_disk
from tests.telemetry.made_record import write_record
from trl_entropy.commands.report import main
from trl_entropy.telemetry import figures

pytest.importorskip("matplotlib")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    state = {"log_history": [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.6}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def test_report_of_one_run_is_in_its_folder(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run_folder)])
    assert capsys.readouterr().out.strip() == str(run_folder / "report.html")
    assert "<h1>run</h1>" in (run_folder / "report.html").read_text(encoding="utf-8")
    assert (run_folder / "report_figures" / "reward.png").is_file()


def test_report_of_several_runs_is_in_the_working_directory(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main([str(run_folder), str(run_folder)])
    assert "2 runs compared" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_output_is_where_it_is_asked_for(run_folder: Path, tmp_path: Path) -> None:
    main([str(run_folder), "--output", str(tmp_path / "new" / "page.html")])
    assert (tmp_path / "new" / "page.html").is_file()
    assert not (run_folder / "report.html").exists()


def test_wrong_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"trl-entropy report: error: .*none holds no run"):
        main([str(tmp_path / "none")])


@pytest.mark.parametrize("largest_file", [4_000, 20_000])
def test_a_full_disk_is_one_line_and_the_last_page_stays(run_folder: Path, largest_file: int) -> None:
    """There is no room for a figure, or for the page."""
    page = run_folder / "report.html"
    page.write_text("the last one", encoding="utf-8")
    with full_disk(largest_file), pytest.raises(SystemExit) as stopped:
        main([str(run_folder)])
    assert str(stopped.value).startswith("trl-entropy report: error: a file could not be written (")
    assert page.read_text(encoding="utf-8") == "the last one"
    main([str(run_folder)])
    assert "<h1>run</h1>" in page.read_text(encoding="utf-8")
    assert not list(run_folder.rglob("*.part"))


def test_recorded_tokens_are_shown(run_folder: Path) -> None:
    write_record(run_folder, 5)
    main([str(run_folder)])
    assert "four classes of tokens" in (run_folder / "report.html").read_text(encoding="utf-8")
    assert (run_folder / "report_figures" / "token_classes.csv").is_file()


def test_broken_record_is_one_line(run_folder: Path) -> None:
    write_record(run_folder, 5)
    next((run_folder / "tokens").iterdir()).write_bytes(b"")
    with pytest.raises(SystemExit, match=r"trl-entropy report: error: .*\.parquet is not a Parquet file"):
        main([str(run_folder)])


def test_missing_matplotlib_names_the_extra(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"trl-entropy report: error: .*trl_entropy\[plots\]"):
        main([str(run_folder)])
