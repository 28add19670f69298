"""A control is one file and one row: one that is made up turns up everywhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trl_entropy

HERE = Path(__file__).parent / "new_control"
EDITS = {
    "controls/table.py": (
        ("from .control import Control\n", "from .brake import BRAKE\nfrom .control import Control\n"),
        ("    ASYPPO,\n", "    BRAKE,\n    ASYPPO,\n"),
    ),
    "trainers/config.py": (
        ("from ..controls.ce_gppo import", "from ..controls.brake import BrakeFields\nfrom ..controls.ce_gppo import"),
        ("class EntropyControls(ERCFields,", "class EntropyControls(BrakeFields, ERCFields,"),
    ),
}
"""All that a new control changes in the package, beside its own file: the table, and the configuration's bases."""


@pytest.fixture(scope="module")
def seen(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What a run with the made-up control left behind."""
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    folder = tmp_path_factory.mktemp("new_control")
    package = folder / "trl_entropy"
    shutil.copytree(Path(trl_entropy.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE / "brake.py", package / "controls" / "brake.py")
    for name, edits in EDITS.items():
        text = (package / name).read_text(encoding="utf-8")
        for old, new in edits:
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, new)
        (package / name).write_text(text, encoding="utf-8")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(HERE / "run.py"), tiny_model_path, str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {**json.loads((folder / "seen.json").read_text(encoding="utf-8")), "output": done.stdout}


def test_it_is_in_the_configuration_and_off(seen: dict) -> None:
    assert seen["default"] == 0.0
    assert not seen["is TRL's field"]
    assert "brake_rollouts=-1.0 must be finite and at least 0" in seen["refusals"][0]
    assert "brake_rollouts=1.0 cannot be used with importance_sampling_level='sequence', which" in seen["refusals"][1]


def test_it_is_in_the_loss_and_the_metrics(seen: dict) -> None:
    assert seen["acts"]
    assert seen["fractions"] == [0.0] * 4 + [1.0] * 4  # two steps a rollout, from the third rollout on


def test_it_is_in_the_checkpoint(seen: dict) -> None:
    assert seen["resumed"]
    assert seen["rollouts"] == 4


def test_it_is_in_the_card_and_the_table_of_methods(seen: dict) -> None:
    assert "| Brake | `brake_rollouts=2.0` | [On Brakes]" in seen["card"]
    assert "Brake" in seen["output"]
    assert "brake_rollouts" in seen["output"]


def test_it_is_in_the_record_and_the_report(seen: dict) -> None:
    assert seen["braked"] == [0.0, 1.0]
    assert {0.5, 1.0} <= set(seen["gradient"])
    assert seen["figures"] == ["brake.svg", "token_brake.svg"]
    for text in ("half its advantage, by Brake", ".braked { background: #eee", "What Brake halves", "Tokens braked"):
        assert text in seen["page"]
