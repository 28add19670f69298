"""`trl-entropy quickstart`, with a policy that is not warmed up and two optimizer steps an arm."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.commands.conftest import full_disk
from tests.commands.small_quickstart import make_small
from trl_entropy import AsyPPOConfig, EntropyGRPOConfig
from trl_entropy import pretrained as pretrained_module
from trl_entropy.commands import quickstart
from trl_entropy.pretrained import SMOLLM2, resolve_model
from trl_entropy.recipes import recipe_path
from trl_entropy.tasks import arithmetic
from trl_entropy.telemetry import figures

pytest.importorskip("matplotlib")

ARMS = ["ppo-clip", "ce-gppo+erc", "asyppo"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe of two small steps, 64 held-out problems, a reward that the random policy gets, and that policy."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch, tmp_path_factory.mktemp("recipe") / "quickstart.yaml")
        yield patch
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(small: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished quickstart of two arms."""
    folder = tmp_path_factory.mktemp("quickstart")
    run(folder, ARMS)
    return folder


def run(folder: Path, arms: list[str], *more: str) -> dict[str, Any]:
    quickstart.main(["--output_dir", str(folder), "--arms", ",".join(arms), *more])
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def numbers(results: dict[str, Any], arm: str) -> dict[str, Any]:
    return {key: value for key, value in results["arms"][arm].items() if key != "seconds"}


def log_history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def test_results_hold_every_arm_with_its_settings(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert list(results["arms"]) == ARMS
    assert results["seed"] == 0
    assert {"trl", "torch", "trl_entropy"} <= set(results["versions"])
    for arm in ARMS:
        result = results["arms"][arm]
        assert result["num_problems"] == 64
        for when in ("before", "after"):
            low, high = result[f"accuracy_{when}_ci95"]
            assert low <= result[f"accuracy_{when}"] <= high
            assert 0 <= result[f"greedy_accuracy_{when}"] <= 1
        assert {key: result["settings"].get(key) for key in ("max_steps", "seed", "erc_low")} == {
            "max_steps": 2,
            "seed": 0,
            "erc_low": quickstart.ARMS[arm].get("erc_low"),
        }
        assert result["seconds"] > 0


def test_arms_train_from_one_start_with_their_own_control(finished: Path) -> None:
    start, *trained = (load_file(finished / name / "model.safetensors") for name in ("policy", *ARMS))
    assert all(not all(torch.equal(weights[key], start[key]) for key in start) for weights in trained)
    first, second, third = (log_history(finished / arm) for arm in ARMS)
    assert any("asyppo/explained_variance" in entry for entry in third)
    assert first[0]["reward"] == second[0]["reward"]  # the first rollout is the same policy's, with the same seed
    assert not any(key.startswith("erc/") for entry in first for key in entry)
    assert all({"erc/clip_fraction", "ce_gppo/low_fraction"} <= set(entry) for entry in second[:2])


def test_page_and_figures_are_written(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "Quickstart: arithmetic, seed 0" in page
    assert page.count("<svg") >= 5
    names = {path.name for path in (finished / "report_figures").iterdir()}
    for name in ("reward", "entropy", "grad_norm", "ppo_clip", "erc", "ce_gppo", "explained_variance"):
        assert {f"{name}.svg", f"{name}.png"} <= names


def test_same_seed_gives_the_same_numbers_again(finished: Path, small: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    torch.rand(5)  # whatever the process did before must not matter
    again = run(tmp_path / "again", ARMS[1:])
    assert numbers(again, ARMS[1]) == numbers(results, ARMS[1])
    shown = ("grad_norm", "reward", "entropy", "loss")
    first, second = (
        [[entry.get(key, 0.0) for key in shown] for entry in log_history(folder / ARMS[1])]
        for folder in (finished, tmp_path / "again")
    )
    assert first == second
    assert first[0][0] > 0


def test_finished_arms_are_kept_and_others_trained(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    trained = []

    def train_arm(name: str, start: object, folder: Path, settings: dict[str, Any]) -> None:
        trained.append((name, settings["max_steps"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "_train_arm", train_arm)
    assert run(finished, ARMS) == results
    assert capsys.readouterr().out.count("Kept from an earlier run") == 4  # the policy and three arms
    for arms, more in ((["ppo-clip", "erc"], []), (ARMS, ["--steps", "3"])):
        with pytest.raises(KeyboardInterrupt):
            run(finished, arms, *more)
    assert trained == [("erc", 2), ("ppo-clip", 3)]


def test_arm_of_other_versions_is_not_kept(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = json.loads((finished / ARMS[0] / "result.json").read_text(encoding="utf-8"))
    assert quickstart._finished(finished / ARMS[0], result["settings"]) == result
    monkeypatch.setattr(quickstart, "_versions", lambda: {**result["versions"], "torch": "0.1"})
    assert quickstart._finished(finished / ARMS[0], result["settings"]) is None


def test_torn_result_is_made_anew(finished: Path, small: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = (finished / ARMS[0] / "result.json").read_text(encoding="utf-8")
    for name in ("policy", ARMS[0]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(whole[: len(whole) // 2])
    assert numbers(run(tmp_path, ARMS[:1]), ARMS[0]) == {
        key: value for key, value in json.loads(whole).items() if key != "seconds"
    }


FULL: dict[str, tuple[list[str], int]] = {
    "the policy": ([], 100_000),
    "the record": (["policy"], 10_000),
    "the weights": (["policy"], 1_000_000),
    "the results": (["policy", "ppo-clip"], 1_000),
    "a figure": (["policy", "ppo-clip"], 10_000),
}
"""What there is no room for: what is finished before it, and the largest size of a file, bytes."""
ONE_LINE_IF_FULL = (
    r"^trl-entropy quickstart: error: a file could not be written \([^\n]*"
    r"Make room, and run it again: finished arms are kept\.$"
)


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_one_line_and_what_is_finished_stays(
    name: str, finished: Path, small: pytest.MonkeyPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, largest_file = FULL[name]
    for folder in done:
        shutil.copytree(finished / folder, tmp_path / folder)
    with full_disk(largest_file), pytest.raises(SystemExit, match=ONE_LINE_IF_FULL):
        run(tmp_path, ["ppo-clip"])
    assert sorted(path.parent.name for path in tmp_path.rglob("result.json")) == sorted(done)
    assert not list(tmp_path.rglob("*.part"))
    monkeypatch.setattr(quickstart, "write_report", lambda runs, page, *more: page)  # figures take most of the time
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert numbers(run(tmp_path, ["ppo-clip"]), "ppo-clip") == numbers(results, "ppo-clip")


@pytest.mark.parametrize("setup", [quickstart.SMALL, quickstart.PRETRAINED], ids=lambda setup: setup.recipe)
def test_asyppo_is_left_out_with_a_reason_or_trained_by_default(setup: quickstart.Setup) -> None:
    assert setup.default_arms == ["ppo-clip", "erc", "ce-gppo", "ce-gppo+erc"]
    assert "asyppo" in replace(setup, without_asyppo="").default_arms


def test_without_names_the_default_arms_are_trained_and_the_page_says_why_not_asyppo(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_arm(name: str, start: object, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        shutil.copytree(finished / "ppo-clip", folder)
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))

    monkeypatch.setattr(quickstart, "_train_arm", train_arm)
    shutil.copytree(finished / "policy", tmp_path / "policy")
    quickstart.main(["--output_dir", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(results["arms"]) == quickstart.SMALL.default_arms
    pages = [(folder / "report.html").read_text(encoding="utf-8") for folder in (tmp_path, finished)]
    assert [quickstart.SMALL.without_asyppo in page for page in pages] == [True, False]


def test_output_is_a_bar_an_arm_and_a_table(
    small: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, ["erc"])
    captured = capfd.readouterr()
    bars = captured.err.replace("\r", "\n").split("\n")
    assert {line.split(":")[0].strip() for line in bars} <= {"", "warm-up", "erc"}
    assert "2/2" in captured.err
    assert "entropy=" in captured.err
    assert "{" not in captured.out  # the log entries, which transformers would print
    *_, table, last = captured.out.strip().splitlines()
    assert table.startswith("erc ")
    assert last == f"Report: {tmp_path / 'report.html'}"


@pytest.fixture
def pretrained(small: pytest.MonkeyPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Folder of a model that takes the place of a pretrained one, and the recipe of those with two small steps."""
    recipe = yaml.safe_load(recipe_path(quickstart.PRETRAINED.recipe).read_text(encoding="utf-8"))
    recipe |= {"per_device_train_batch_size": 16, "steps_per_generation": 2, "logging_steps": 1, "max_steps": 2}
    recipe |= {"task": "arithmetic", "task_args": {"size": 64}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(quickstart, "recipe_path", lambda name: {quickstart.PRETRAINED.recipe: file}[name])
    monkeypatch.setattr(quickstart, "PRETRAINED", replace(quickstart.PRETRAINED, num_problems=32, num_threads=1))
    monkeypatch.setattr(arithmetic, "TASK", replace(arithmetic.TASK, load=arithmetic.load))
    return arithmetic.build_policy(str(tmp_path / "model"), 1)


def test_pretrained_model_is_measured_once_and_gets_an_adapter_an_arm(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "resolve_model", {"smollm2-135m": pretrained}.__getitem__)
    folder = tmp_path / "out"
    results = run(folder, ["erc", "asyppo"], "--model", "smollm2-135m")
    assert results["model"] == "smollm2-135m"
    for result in results["arms"].values():
        assert result["num_problems"] == 32
        assert result["settings"]["model"] == "smollm2-135m"
        assert {"accuracy_before", "accuracy_after", "greedy_accuracy_before"} <= result.keys()
    for adapter in ("erc", "asyppo", "asyppo/critics/critic_0", "asyppo/critics/critic_1"):
        config = json.loads((folder / adapter / "adapter_config.json").read_text(encoding="utf-8"))
        assert (config["base_model_name_or_path"], config["r"]) == (pretrained, 16), adapter
    assert any("asyppo/explained_variance" in entry for entry in log_history(folder / "asyppo"))
    assert "Quickstart: arithmetic, smollm2-135m, seed 0" in (folder / "report.html").read_text(encoding="utf-8")
    figures_of_tokens = {path.name for path in (folder / "report_figures").glob("token_*.svg")}
    assert {"token_entropy_ratio.svg", "token_erc_region.svg", "token_disagreement.svg"} <= figures_of_tokens
    capsys.readouterr()
    assert run(folder, ["erc", "asyppo"], "--model", "smollm2-135m") == results
    assert capsys.readouterr().out.count("Kept from an earlier run") == 3


def test_arms_of_another_model_are_not_kept(pretrained: str, tmp_path: Path) -> None:
    first = run(tmp_path / "out", ["erc"], "--model", pretrained)
    other = shutil.copytree(pretrained, tmp_path / "other")
    second = run(tmp_path / "out", ["erc"], "--model", str(other))
    assert first["arms"]["erc"]["seconds"] != second["arms"]["erc"]["seconds"]


def test_a_model_that_is_not_there_is_told_before_any_work(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    with pytest.raises(SystemExit, match=r"trl-entropy quickstart: error: [^\n]*nowhere[^\n]*$"):
        quickstart.main(["--model", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_model_whose_package_is_missing_is_told_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(pretrained_module, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"trl-entropy quickstart: error: .*trl_entropy\[smollm2\]"):
        quickstart.main(["--output_dir", str(tmp_path / "out"), "--model", "smollm2-135m"])
    assert not (tmp_path / "out").exists()


def test_no_room_for_the_model_that_is_converted_is_one_line_before_any_work(
    tiny_model_path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The error of safetensors, which writes the weights, is no `OSError`."""

    def convert(source: Path, folder: Path) -> None:
        AutoModelForCausalLM.from_pretrained(tiny_model_path).save_pretrained(folder)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(pretrained_module, "_packaged_file", lambda: Path(__file__))
    monkeypatch.setattr(pretrained_module, "find_spec", lambda name: "installed")
    monkeypatch.setattr(pretrained_module, "_convert", convert)
    with full_disk(20_000), pytest.raises(SystemExit, match=ONE_LINE_IF_FULL):
        quickstart.main(["--output_dir", str(tmp_path / "out"), "--model", SMOLLM2])
    assert not [*tmp_path.glob("out"), *tmp_path.rglob("*.part")]
    assert Path(resolve_model(SMOLLM2), "model.safetensors").is_file()


@pytest.mark.parametrize("setup", [quickstart.SMALL, quickstart.PRETRAINED], ids=lambda setup: setup.recipe)
def test_every_arm_is_a_valid_config_with_eight_updates_a_rollout(setup: quickstart.Setup) -> None:
    recipe = yaml.safe_load(recipe_path(setup.recipe).read_text(encoding="utf-8"))
    for arm in setup.arms.values():
        settings: dict[str, Any] = {**quickstart._fields_of(EntropyGRPOConfig, recipe), **arm}
        config_class = AsyPPOConfig if "num_critics" in arm else EntropyGRPOConfig
        config = config_class(output_dir="unused", **settings)
        assert config.steps_per_generation * config.num_iterations // config.gradient_accumulation_steps == 8
        assert config.max_steps % 8 == 0
    assert list(setup.arms) == ["ppo-clip", "erc", "ce-gppo", "ce-gppo+erc", "asyppo"]


@pytest.mark.parametrize(
    ("arm", "recipe"),
    [
        ("ppo-clip", quickstart.PRETRAINED.recipe),
        ("erc", "smollm2-135m-erc-lora"),
        ("ce-gppo", "smollm2-135m-ce-gppo"),
        ("asyppo", "smollm2-135m-asyppo"),
    ],
)
def test_arm_on_the_pretrained_model_has_the_controls_of_its_recipe(arm: str, recipe: str, tmp_path: Path) -> None:
    shared = quickstart._fields_of(AsyPPOConfig, yaml.safe_load(recipe_path(quickstart.PRETRAINED.recipe).read_text()))
    expected = quickstart._fields_of(AsyPPOConfig, yaml.safe_load(recipe_path(recipe).read_text()))
    how_weights_are_trained = ("learning_rate", "record_tokens")
    found = {**shared, **quickstart.PRETRAINED.arms[arm]}
    for settings in (found, expected):
        for name in how_weights_are_trained:
            settings.pop(name, None)
    assert found == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--arms", "erc,dapo"],
            "--arms: 'dapo' is unknown. Choose from ppo-clip, erc, ce-gppo, ce-gppo+erc, asyppo.",
        ),
        (["--steps", "0"], "--steps: 0 must be at least 1."),
        (["--seed", "-1"], "--seed: -1 must be in 0..2**32 - 1."),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quickstart.main(arguments)
    assert message in capsys.readouterr().err


def test_missing_matplotlib_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"trl-entropy quickstart: error: .*trl_entropy\[plots\]"):
        quickstart.main(["--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
