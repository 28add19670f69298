"""`trl-entropy probe`: what it writes, that it computes what the run would, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import WriteRecipe
from trl_entropy.commands import probe
from trl_entropy.telemetry.rounding import Gates

SHORT = ["--max_completion_length", "12", "--steps", "1", "2", "--learning_rate", "1e-3"]
KEYS = ["settings", "float32_left_out", "tokens", "rounding", "updates", "advice"]
GATES = {"erc", "ppo_clip", "ce_gppo_low", "ce_gppo_high"}


@pytest.fixture
def arguments(recipe: WriteRecipe, tiny_model_path: str) -> list[str]:
    """A command line for the tiny policy, without a recipe, in an empty folder."""
    recipe()
    return ["--model", tiny_model_path, "--dataset", "rows.jsonl", *SHORT]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)


@pytest.fixture
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which a model is loaded."""
    monkeypatch.setattr(probe, "open_trainer", lambda *args: pytest.fail("a model was loaded"))


def run(arguments: list[str], folder: str = "probe") -> dict[str, Any]:
    probe.main(arguments)
    return json.loads(Path(folder, "probe.json").read_text(encoding="utf-8"))


def test_float32_rounds_nothing_away(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = run([*arguments, "--dtype", "float32"])
    assert list(found) == KEYS
    assert set(found["rounding"]) == {"half batches", "one by one, unpadded", "more padding", "float32"}
    for by_gate in found["rounding"].values():
        assert set(by_gate) == GATES
        assert all(shares["all"] == 0.0 for shares in by_gate.values())
    assert [update["step"] for update in found["updates"]] == [1, 2]
    erc = found["updates"][-1]["erc"]["all"]
    assert erc["share"] == erc["share_float32"] > 0
    assert erc["precision"] == erc["recall"] == 1.0
    assert list(erc) == ["share", "share_float32", "precision", "recall"]
    counts = list(found["tokens"].values())
    assert counts[0] == sum(counts[1:]) > 50
    assert found["settings"]["dtype"] == "float32"
    assert found["settings"]["autocast"] is None
    assert found["settings"]["learning_rate"] == 1e-3
    out, err = capsys.readouterr()
    assert "| optimizer steps | control " in out
    assert found["advice"][0] in out
    assert "it measures the policy" in found["advice"][0]
    assert out.splitlines()[-1] == f"Results: {Path('probe', 'probe.json')}"
    assert "train_runtime" not in out
    assert [line for line in err.splitlines() if line.startswith("probe: ")] == [
        "probe: sampling completions",
        "probe: same weights, other batch shapes and paddings",
        "probe: after optimizer step 1",
        "probe: after optimizer step 2",
    ]


@pytest.mark.parametrize(("dtype", "weights"), [("autocast", "float32"), ("bfloat16", "bfloat16")])
def test_bfloat16_rounds_tokens_out_of_ercs_bounds(arguments: list[str], dtype: str, weights: str) -> None:
    found = run([*arguments, "--dtype", dtype, "--output_dir", "there"], "there")
    assert found["rounding"]["float32"]["erc"]["all"] > 0
    assert found["rounding"]["more padding"]["erc"]["all"] > 0
    assert found["updates"][0]["erc"]["all"]["precision"] < 1
    assert found["settings"]["dtype"] == weights
    assert found["settings"]["autocast"] == ("bfloat16" if dtype == "autocast" else None)


def test_figure(arguments: list[str]) -> None:
    pytest.importorskip("matplotlib")
    run(arguments)
    assert {path.suffix for path in Path("probe").glob("probe.*")} == {".json", ".png", ".svg", ".csv"}


def test_without_matplotlib_there_is_no_figure(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trl_entropy.telemetry.figures.find_spec", lambda name: None)
    run(arguments)
    assert "No figure: " in capsys.readouterr().err
    assert [path.name for path in Path("probe").glob("probe.*")] == ["probe.json"]


def test_a_recipe_is_probed_as_it_trains(recipe: WriteRecipe) -> None:
    argv = recipe(
        erc_low=0.9,
        erc_high=1.2,
        erc_entropy_floor=0.01,
        epsilon=0.1,
        epsilon_high=0.3,
        temperature=0.7,
        use_vllm=True,
        eval_strategy="steps",
        resume_from_checkpoint="nowhere",
        reward_funcs="no.such.reward",
        per_device_train_batch_size=4,
        max_completion_length=4000,
        lora_r=4,
        use_peft=True,
    )
    asked = probe.prepare_probe([*argv, "--steps", "3", "1", "3", "--output_dir", "there", "--learning_rate", "1e-5"])
    config = asked.plan.config
    assert asked.steps == (1, 3)
    assert asked.gates == Gates(0.9, 1.2, 0.1, 0.3, "token", 0.01)
    assert (config.temperature, config.learning_rate, config.per_device_train_batch_size) == (0.7, 1e-5, 4)
    assert (config.max_steps, config.max_completion_length, config.output_dir) == (3, 64, "there")
    assert (config.erc_enabled, config.use_vllm, config.bf16) == (False, False, False)
    assert asked.plan.model.use_peft
    assert asked.plan.eval_dataset is None
    assert asked.plan.checkpoint is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
def test_the_precision_asked_for_replaces_that_of_the_recipe(recipe: WriteRecipe, dtype: str) -> None:
    config = probe.prepare_probe([*recipe(fp16=True), "--dtype", dtype]).plan.config
    assert (config.fp16, config.bf16) == (False, dtype == "autocast")


def test_critics_of_a_recipe_are_not_loaded(recipe: WriteRecipe) -> None:
    asked = probe.prepare_probe(recipe(critics=["policy"], critic_lora_r=4, erc_low=None, erc_high=None))
    assert asked.plan.script.critics is None
    assert asked.gates == Gates(0.95, 1.05, 0.2, 0.2, "token")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--steps", "0"], r"steps=\[0\] must all be at least 1"),
        (["--max_completion_length", "0"], "max_completion_length=0 must be at least 1"),
        (["--learning_rat", "1"], "Unknown field 'learning_rat'.*Did you mean learning_rate"),
        (["--dataset", "nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
        (["--dataset", "rows.jsonl", "--task", "arithmetic"], "task and dataset_name are set"),
        (["--per_device_train_batch_size", "200"], "The 16 rows to train on are fewer than the"),
        (["--dtype", "float16"], "fp16=True needs a GPU. Set dtype to"),
        (["--erc_low", "0.9"], "erc_low=0.9 and erc_high=None: set both"),
        (["--config", "nowhere.yaml"], "'nowhere.yaml' is not a file"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], no_probe: None, given: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=f"^trl-entropy probe: error: .*{message}") as stopped:
        probe.main([*arguments, *given])
    assert "\n" not in str(stopped.value)


def test_model_is_needed(no_probe: None, recipe: WriteRecipe) -> None:
    recipe()
    with pytest.raises(SystemExit, match="model_name_or_path is missing"):
        probe.main(["--dataset", "rows.jsonl"])


def test_unknown_precision_lists_those_that_exist(
    arguments: list[str], no_probe: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        probe.main([*arguments, "--dtype", "bf16"])
    assert stopped.value.code == 2
    assert "float32" in capsys.readouterr().err


def test_one_process_only(arguments: list[str], no_probe: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="runs as one process"):
        probe.main(arguments)


def test_help_names_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        probe.main(["--help"])
    out = capsys.readouterr().out
    for word in ("--model", "--dataset", "--dtype", "--steps", "trl-entropy train"):
        assert word in out


def test_a_task_with_its_own_policy_needs_no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked = probe.prepare_probe(["--task", "arithmetic", "--dtype", "float32"])
    assert asked.plan.task is not None
    assert asked.plan.task.build_policy is not None
    assert asked.plan.model.model_name_or_path is None


@pytest.mark.real_model
@pytest.mark.slow
def test_a_pretrained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bfloat16 moves tokens of a real model out of ERC's bounds, hardly one out of PPO-clip's range; float32 none."""
    from trl_entropy.pretrained import SMOLLM2, resolve_model

    monkeypatch.chdir(tmp_path)
    prompts = [f"The sum of {i} and {i + 3} is" for i in range(16)]
    Path("rows.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts), encoding="utf-8")
    given = ["--model", resolve_model(SMOLLM2), "--dataset", "rows.jsonl", "--dtype", "autocast", "--steps", "1"]
    found = run([*given, "--max_completion_length", "16", "--learning_rate", "1e-5"])
    for name in ("more padding", "float32"):
        assert found["rounding"][name]["erc"]["all"] > 0.02, found["rounding"]
        assert found["rounding"][name]["ppo_clip"]["all"] < found["rounding"][name]["erc"]["all"]
    assert found["updates"][0]["erc"]["all"]["precision"] is not None
