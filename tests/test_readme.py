"""The README's promises that a test can check; what holds for every document is in `test_documents.py`."""

import inspect
import re
from pathlib import Path

from trl import GRPOTrainer

import trl_entropy
from trl_entropy.commands.methods import short_table
from trl_entropy.controls import CONTROLS

ROOT = Path(trl_entropy.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
MAX_LINES = 150
FIRST_SCREEN = 20
"""Lines that a newcomer reads without scrolling."""


def test_first_command_is_the_quickstart_in_one_line() -> None:
    first = COMMANDS[0]
    assert "\n" not in first
    assert first.startswith("git clone ")
    assert first.endswith("trl-entropy quickstart")


def test_second_command_runs_the_tests_as_ci_does() -> None:
    second = COMMANDS[1]
    assert "\n" not in second
    assert second.endswith("-m pytest")
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()[-1] == second


def test_it_is_short_and_the_class_swap_is_high_up() -> None:
    lines = README.splitlines()
    assert len(lines) <= MAX_LINES
    assert any(line.startswith("+trainer = EntropyGRPOTrainer(") for line in lines[:FIRST_SCREEN])


def test_what_is_handed_over_by_place_is_in_trls_order() -> None:
    names = ["model", "reward_funcs", "args", "train_dataset"]
    assert list(inspect.signature(GRPOTrainer.__init__).parameters)[1:5] == names


def test_its_methods_are_rows_of_the_table_in_its_order() -> None:
    shown = README.partition("<!-- methods -->\n")[2].partition("\n<!-- end -->")[0].splitlines()
    table = short_table().splitlines()
    assert shown[:2] == table[:2]
    assert len(shown) == 2 + 5
    assert [line for line in table if line in shown] == shown
    assert f"Five of the {len(CONTROLS)}." in README
