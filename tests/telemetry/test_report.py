"""Reading run folders and writing the page."""

import html as html_module
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.telemetry.made_record import write_record
from trl_entropy.telemetry.completions import MARKS
from trl_entropy.telemetry.figures import FIGURES
from trl_entropy.telemetry.report import write_report
from trl_entropy.telemetry.runs import read_runs
from trl_entropy.telemetry.token_figures import TOKEN_FIGURES

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
    assert "Not logged by any of these runs: Gradient norm; Tokens outside the PPO clip range; " in page.text
    shown = [figure for figure in FIGURES if figure.name in ("reward", "entropy")]
    assert all(figure.title in page.text and figure.reading in page.text for figure in shown)


def test_files_beside_the_page_are_where_its_links_say(tmp_path: Path) -> None:
    output = tmp_path / "sub folder" / "a & b.html"
    page = page_of([write_run(tmp_path / "run", history())], output)
    links = [value for key, value in page.attributes if key == "href" and value and not value.startswith("#")]
    assert "a%20%26%20b_figures/reward.png" in links
    assert sorted(path.name for path in (output.parent / "a & b_figures").iterdir()) == [
        "entropy.csv",
        "entropy.png",
        "entropy.svg",
        "reward.csv",
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


def test_findings_are_at_the_top_run_by_run(tmp_path: Path) -> None:
    collapsed = [{"step": step, "reward": 0.5, "entropy": 0.8 * 0.8**step} for step in range(32)]
    folders = [
        write_run(tmp_path / "collapsed", collapsed),
        write_run(tmp_path / "calm", history(steps=16)),
        write_run(tmp_path / "short", history(steps=15)),
    ]
    text = re.sub(r"\s+", " ", page_of(folders, tmp_path / "report.html").text)
    assert re.search(
        r"Diagnosis collapsed Entropy collapse: .*? Try ce_gppo_alpha2=1 .*? Nothing found in calm:", text
    )
    assert "fewer than 16 optimizer steps or 8 log entries are not judged: short." in text
    assert text.index("Diagnosis") < text.index("Training")


def test_report_of_a_single_run_needs_no_names(tmp_path: Path) -> None:
    short, quiet = (
        page_of([write_run(tmp_path / str(n), history(steps=n))], tmp_path / "r.html").text for n in (3, 16)
    )
    assert "fewer than 16 optimizer steps or 8 log entries are not judged." in short
    assert "Nothing found" not in short
    assert "Nothing found: no entropy collapse" in quiet
    assert "not judged" not in quiet


CONTROLS = {"erc_low": 0.95, "erc_high": 1.05}
FLAGS = {
    "erc_clipped": [1, 0, 0, 0] * 10,
    "ppo_low": [0, 1, 0, 0] * 10,
    "advantage_masked": [0, 0, 1, 0] * 10,
    "entropy_filtered": [1, 0, 0, 0] * 10,
    "value_std": [0.1, 0.2] * 20,
    "value_mean": 0.5,
    "turn": [0] * 20 + [1] * 20,
    "A": [1.0, -1.0] * 20,
    "gradient": [1.0, -1.0] * 20,
}


def write_recorded_run(folder: Path, **columns: Any) -> Path:
    """A run with 40 sampled tokens, and a completion of 40 tokens that is recorded whole."""
    write_run(folder, history())
    every = {mark.column: [1, 0, 0, 0] * 10 for mark in MARKS}
    write_record(folder, 40, step=1, settings=CONTROLS, **{**every, **FLAGS})
    write_record(folder, 40, step=2, whole=1, settings=CONTROLS, **{**FLAGS, **columns})
    return folder


def test_record_gives_figures_and_completions(tmp_path: Path) -> None:
    page = page_of([write_recorded_run(tmp_path / "run")], tmp_path / "report.html")
    assert all(figure.title in page.text and figure.reading in page.text for figure in TOKEN_FIGURES)
    files = {path.name for path in (tmp_path / "report_figures").iterdir()}
    assert {f"{figure.name}.{kind}" for figure in TOKEN_FIGURES for kind in ("svg", "png", "csv")} <= files
    assert "Step 2, completion 0: 40 tokens, advantage +0; 10 of 40 masked" in page.text
    assert "10 of 40 clipped by ERC" in page.text
    shown = {mark for mark in MARKS if mark.meaning in page.text}
    assert {mark.letter for mark in shown} == {"E", "L", "M", "F"}
    labels = [value for key, value in page.attributes if key == "aria-label"]
    assert len([label for label in labels if label and label.startswith("a: ")]) == 30
    assert len([key for key, _ in page.attributes if key == "tabindex"]) == 30
    assert page.text.count("aFE") == 10  # the letters of both marks stand beside the token


def test_report_without_a_record_says_how_to_get_one(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "bare", history())]
    assert "With record_tokens=256 a run records" in page_of(folders, tmp_path / "report.html").text
    folders.append(write_recorded_run(tmp_path / "recorded"))
    assert "record_tokens=256" not in page_of(folders, tmp_path / "report.html").text


def test_broken_record_is_an_error(tmp_path: Path) -> None:
    folder = write_recorded_run(tmp_path / "run")
    next((folder / "tokens").iterdir()).write_bytes(b"")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        write_report([folder], tmp_path / "report.html")


HOSTILE = [
    "<script>document.title = 'run'</script>",
    '"><img src=x onerror="document.title = 1">',
    "</span></p></details></body>",
    "' onfocus='document.title = 2' autofocus='",
    "<!--",
    "\n",
    "\u202e",
    "&lt;b&gt;",
]


def hostile_run(folder: Path) -> Path:
    tokens = (HOSTILE * 5)[:40]
    return write_recorded_run(folder, token=tokens, position=[-2, -1, *range(38)], written=[0, 0] + [1] * 38)


def test_completion_is_shown_and_not_run(tmp_path: Path) -> None:
    html = write_report([hostile_run(tmp_path / "run")], tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "<script" not in html
    assert not {"script", "img"} & set(page.elements)
    assert not {"onerror", "onfocus", "autofocus"} & {key for key, _ in page.attributes}
    for text in HOSTILE:
        assert page.text.count(text.replace("\n", "\u23ce\n")) >= 4
    assert html.count("</body>") == 1


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<pre id="probe"></pre><script>
const token = document.querySelector('.m[tabindex]');
token.focus();
const detail = getComputedStyle(token, '::after');
document.querySelector('#probe').textContent = JSON.stringify({
  title: document.title, width: innerWidth, needed: document.documentElement.scrollWidth,
  focused: document.activeElement === token, detail: detail.content, position: detail.position,
  resources: performance.getEntriesByType('resource').length,
  svg: Math.max(...[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().right)),
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(tmp_path: Path, width: int) -> None:
    assert CHROMIUM is not None
    html = write_report([hostile_run(tmp_path / "run")], tmp_path / "report.html", "Mine").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(html.replace("</body>", PROBE), encoding="utf-8")
    # a window cannot be as narrow as a phone, a frame can
    frame = (
        f'<iframe style="width:{width}px;height:800px" srcdoc="{html_module.escape(html.replace("</body>", PROBE))}">'
    )
    (tmp_path / "frame.html").write_text(
        f"""<body>{frame}</iframe><pre id="found"></pre><script>onload = () => {{
        document.querySelector("#found").textContent =
            document.querySelector("iframe").contentDocument.querySelector("#probe").textContent; }}</script></body>"""
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    found = json.loads(html_module.unescape(match[1]))
    assert found["title"] == "Mine"  # no token's script ran
    assert found["resources"] == 0
    assert found["width"] == width
    assert found["needed"] <= width
    assert found["svg"] <= width
    assert found["focused"]
    assert "probability" in found["detail"]
    assert found["position"] == "fixed"
