"""The README's promises that a test can check."""

import re
from pathlib import Path

import trl_entropy
from trl_entropy.commands.methods import methods_table, metrics_table, short_table
from trl_entropy.controls import CONTROLS
from trl_entropy.recipes import recipe_names

ROOT = Path(trl_entropy.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
PREFIXES = "|".join(["ppo_clip", *(control.prefix for control in CONTROLS)])
METRIC = re.compile(rf"\"((?:{PREFIXES})/\w+)\"")
CONTROLS_README = (ROOT / "trl_entropy/controls/README.md").read_text(encoding="utf-8")


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


def test_every_metric_is_defined() -> None:
    defined = set(re.findall(r"^\| `([\w/]+)` \|", CONTROLS_README, re.MULTILINE))
    emitted = {
        key
        for path in (ROOT / "trl_entropy").rglob("*.py")
        for key in METRIC.findall(path.read_text(encoding="utf-8"))
    }
    assert "erc/clip_fraction" in emitted
    assert emitted <= defined, sorted(emitted - defined)


def test_every_recipe_is_listed() -> None:
    """Variants share a row: `erc-r1-distill-qwen-1.5b`, `-1.5b-lora`."""
    listed = set()
    for row in re.findall(r"^\| (`[^|]*`) \|", README, re.MULTILINE):
        first, *variants = re.findall(r"`([^`]*)`", row)
        listed |= {first, *(first[: first.rindex("-")] + variant for variant in variants if variant.startswith("-"))}
    launching = README.partition("`recipes/accelerate/`")[2].partition("\n\n")[0]
    listed |= {f"accelerate/{name}" for name in re.findall(r"`([\w-]+)`", launching)}
    assert set(recipe_names()) <= listed, sorted(set(recipe_names()) - listed)


def test_tables_are_those_of_the_controls() -> None:
    """`trl-entropy methods --markdown` and `--metrics` print what belongs between the marks."""
    for page, name, table in (
        (README, "methods", short_table()),
        (CONTROLS_README, "methods", methods_table()),
        (CONTROLS_README, "metrics", metrics_table()),
    ):
        assert page.partition(f"<!-- {name} -->\n")[2].partition("\n<!-- end -->")[0] == table
