"""Reading run folders and writing the page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from trl_entropy.telemetry.figures import FIGURES
from trl_entropy.telemetry.report import write_report
from trl_entropy.telemetry.runs import read_runs

pytest.importorskip("matplotlib")

EVIL = "<script>alert('x')</script>"
RESULT = {
    "accuracy_before": 0.25,
    "accuracy_before_ci95": [0.2, 0.3],
    "accuracy_after": 0.5,
    "accuracy_after_ci95": [0.45, 0.55],
    "greedy_accuracy_before": 0.4,
    "greedy_accuracy_after": 0.6,
    "num_problems": 300,
    "settings": {"learning_rate": 5e-5, "erc_low": 0.95},
    "versions": {"torch": "2.0"},
}


class Page(HTMLParser):
    """Elements, links and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def write_run(folder: Path, log_history: list[dict[str, Any]] | None = None, result: object = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if log_history is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log_history}))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def history(reward: float = 0.5, steps: int = 3) -> list[dict[str, Any]]:
    return [{"step": step, "reward": reward, "entropy": 0.4} for step in range(steps)]


def page_of(folders: list[Path], output: Path) -> Page:
    return Page(write_report(folders, output).read_text(encoding="utf-8"))


def test_run_folder_is_read(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "mine", history(), RESULT)])
    assert (run.name, run.log_history, run.result) == ("mine", history(), RESULT)


def test_newest_checkpoint_is_read_by_number_and_after_the_folder_itself(tmp_path: Path) -> None:
    write_run(tmp_path / "mine" / "checkpoint-9", history(0.9))
    write_run(tmp_path / "mine" / "checkpoint-10", history(0.1))
    write_run(tmp_path / "mine" / "checkpoint-11")  # killed before its state was written
    write_run(tmp_path / "mine" / "checkpoint-best", history(0.2))
    assert read_runs([tmp_path / "mine"])[0].log_history == history(0.1)
    write_run(tmp_path / "mine", history(0.7))
    assert read_runs([tmp_path / "mine"])[0].log_history == history(0.7)


def test_quickstart_folder_gives_a_run_an_arm(tmp_path: Path) -> None:
    for arm, reward in (("one", 0.1), ("two", 0.2)):
        write_run(tmp_path / arm, history(reward))
    (tmp_path / "results.json").write_text(json.dumps({"arms": {"two": RESULT, "one": {}}}))
    assert [(run.name, run.log_history[0]["reward"]) for run in read_runs([tmp_path])] == [("two", 0.2), ("one", 0.1)]


def test_names_stay_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / parent / "run", history()) for parent in "ab"]
    assert [run.name for run in read_runs(folders)] == ["run (1)", "run (2)"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("trainer_state.json", "{", "trainer_state.json is not JSON"),
        ("trainer_state.json", "[]", "trainer_state.json holds list, not a JSON object"),
        ("trainer_state.json", "{}", "trainer_state.json has no 'log_history' list"),
        ("trainer_state.json", '{"log_history": [1]}', "trainer_state.json has no 'log_history' list"),
        ("results.json", '{"arms": [1]}', "results.json has no 'arms' that map names to results"),
        ("results.json", '{"arms": {"one": 1}}', "results.json has no 'arms' that map names to results"),
    ],
)
def test_broken_file_is_named(file: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_runs([tmp_path])


def test_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path.name} holds no run: .* Name the output_dir"):
        read_runs([tmp_path])


def test_page_shows_accuracies_settings_and_figures(tmp_path: Path) -> None:
    other = {**RESULT, "accuracy_after": 0.125, "settings": {"learning_rate": 5e-5}}
    folders = [write_run(tmp_path / "erc", history(), RESULT), write_run(tmp_path / "ppo", history(), other)]
    page = page_of(folders, tmp_path / "report.html")
    for text in ("2 runs compared", "0.450 to 0.550", "+0.250", "-0.125", "300 held-out", "learning_rate=5e-05"):
        assert text in page.text
    assert re.search(r"run\s*erc_low\s*erc\s*0\.95\s*ppo\s*-", page.text)  # only what differs is in the table
    assert page.elements.count("svg") == page.elements.count("figure") == 2
    assert "Not logged by any of these runs: Gradient norm; Tokens clipped by ERC" in page.text
    shown = [figure for figure in FIGURES if figure.name in ("reward", "entropy")]
    assert all(figure.title in page.text and figure.reading in page.text for figure in shown)


def test_files_beside_the_page_are_where_its_links_say(tmp_path: Path) -> None:
    output = tmp_path / "sub folder" / "a & b.html"
    page = page_of([write_run(tmp_path / "run", history())], output)
    links = [value for key, value in page.attributes if key == "href" and value and not value.startswith("#")]
    assert "a%20%26%20b_figures/reward.png" in links
    assert sorted(path.name for path in (output.parent / "a & b_figures").iterdir()) == [
        "entropy.png",
        "entropy.svg",
        "reward.png",
        "reward.svg",
    ]


def test_page_loads_nothing(tmp_path: Path) -> None:
    page = page_of([write_run(tmp_path / "run", history(), RESULT)], tmp_path / "report.html")
    assert not {"script", "img", "link", "iframe", "object"} & set(page.elements)
    assert not [value for key, value in page.attributes if key in ("src", "href") and value and "//" in value]
    assert "@import" not in page.text


def test_data_is_shown_and_not_run(tmp_path: Path) -> None:
    result = {
        **RESULT,
        "num_problems": EVIL,
        "settings": {EVIL: EVIL, "differs": EVIL},
        "versions": {EVIL: EVIL},
    }
    entries: list[dict[str, Any]] = [{"step": 1, "reward": 0.5, EVIL: 1.0}, {"step": EVIL, "reward": EVIL}]
    for arm in (EVIL.replace("/", "\u2215"), "plain"):
        write_run(tmp_path / arm, entries)
    arms = {EVIL.replace("/", "\u2215"): result, "plain": {**result, "settings": {EVIL: EVIL, "differs": 1}}}
    (tmp_path / "results.json").write_text(json.dumps({"arms": arms}))
    html = write_report([tmp_path], tmp_path / "report.html", title=EVIL).read_text(encoding="utf-8")
    page = Page(html)
    assert "<script" not in html
    assert "script" not in page.elements
    assert page.text.count("alert('x')") >= 8
    svg = (tmp_path / "report_figures" / "reward.svg").read_text(encoding="utf-8")
    assert "<script" not in svg
    assert "alert" in svg


def test_report_of_a_bare_run_says_what_is_missing(tmp_path: Path) -> None:
    page = page_of([write_run(tmp_path / "bare", [])], tmp_path / "report.html")
    assert "No held-out accuracy" in page.text
    assert "Not logged by this run: Reward;" in page.text
    assert not {"svg", "table"} & set(page.elements)


def test_result_with_the_accuracy_after_alone_is_shown(tmp_path: Path) -> None:
    page = page_of([write_run(tmp_path / "run", [], {"accuracy_after": 1.0})], tmp_path / "report.html")
    assert re.search(r"run\s*-\s*1\.000\s*-\s*-\s*-", page.text)
