"""The recipe of `trl-entropy train`: where it is not there, broken or tries to run code."""

from pathlib import Path

import pytest

from tests.commands.conftest import WriteRecipe
from trl_entropy.commands import train


@pytest.mark.usefixtures("no_model")
def test_missing_or_broken_recipe(tmp_path: Path) -> None:
    for argv in (["--config", "no.yaml"], ["--config=no.yaml"], ["--config"]):
        with pytest.raises(SystemExit, match=r"is not a file\. .*`trl-entropy recipes copy NAME`.*erc-r1-distill"):
            train.main(argv)
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1", encoding="utf-8")
    with pytest.raises(SystemExit, match="not valid YAML"):
        train.main(["--config", str(broken)])


@pytest.mark.usefixtures("no_model")
def test_recipe_cannot_run_code(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="not valid YAML"):
        train.main(["--config", str(recipe)])
    assert not (tmp_path / "made").exists()


def test_config_with_an_equals_sign(recipe: WriteRecipe) -> None:
    option, path = recipe()
    assert train.parse([f"{option}={path}"])[1].erc_low == 0.95
