"""`trl-entropy eval` end to end on a tiny model and a local file: results, interruption, resumption and refusals."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from tests.children import kill_when
from tests.commands.conftest import full_disk
from trl_entropy import EntropyGRPOTrainer
from trl_entropy.commands import train
from trl_entropy.commands.evaluate import main
from trl_entropy.evaluation import measure
from trl_entropy.evaluation.engines import TransformersEngine

NUM_PROBLEMS = 6
REWARD = """
import functools
import os
import time

def odd(completions, **columns):
    time.sleep(float(os.environ.get("PAUSE", "0")))
    texts = [completion[0]["content"] for completion in completions]
    return [float(ord(text[0]) % 2) if text else 0.0 for text in texts]

def even(completions, **columns):
    return [1 - reward for reward in odd(completions)]

async def unsure(completions, **columns):
    return [float("nan") if i % 2 else reward for i, reward in enumerate(odd(completions))]

def never(completions, **columns):
    return [None] * len(completions)

def short(completions, **columns):
    return odd(completions)[1:]

class Odd:
    async def __call__(self, completions, **columns):
        return iter(odd(completions))

judge, lenient, strict = Odd(), functools.partial(odd, bias=0), functools.partial(odd, bias=1)
"""
SETTINGS = ["--dataset_file", "rows.jsonl", "--reward_funcs", "odd_reward.odd", "--backend", "transformers"]
SETTINGS += ["--temperature", "1.0", "--max_new_tokens", "20", "--n", "4", "--template", "none"]


@pytest.fixture
def workplace(tmp_path: Path, tiny_model_path: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the tiny model in `m`, problems of different lengths, and a reward."""
    rows = [{"problem": "+".join("123456"[: i + 1]) + "=", "answer": str(i)} for i in range(NUM_PROBLEMS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "odd_reward.py").write_text(REWARD, encoding="utf-8")
    shutil.copytree(tiny_model_path, tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "odd_reward", raising=False)
    return tmp_path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of the samples that were generated, in order."""
    seeds: list[int] = []
    generate = TransformersEngine.generate

    def spy(self: TransformersEngine, prompts: Any, wanted: Any) -> Any:
        seeds.extend(wanted)
        return generate(self, prompts, wanted)

    monkeypatch.setattr(TransformersEngine, "generate", spy)
    return seeds


def run(*arguments: str, out: str = "out", model: str = "m") -> dict[str, Any]:
    main(["--model", *model.split(), "--output_dir", out, *SETTINGS, *arguments])
    return json.loads(Path(out, "results.json").read_text(encoding="utf-8"))["results"]


def samples(out: str = "out", model: str = "m") -> dict[tuple[int, int], dict[str, Any]]:
    lines = Path(out, "samples", model, "rows.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    records = [json.loads(line) for line in lines]
    found = {(record["problem"], record["sample"]): record for record in records}
    assert len(found) == len(records)
    return found


def test_results_of_a_model_and_its_adapter(
    workplace: Path, tiny_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = get_peft_model(tiny_model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapter.peft_config["default"].base_model_name_or_path = "m"
    adapter.save_pretrained("lora")
    results = run("--k", "1", "4", model="m lora")["rows"]
    for model in ("m", "lora"):
        records = samples(model=model)
        assert set(records) == {(problem, i) for problem in range(NUM_PROBLEMS) for i in range(4)}
        correct = [sum(records[problem, i]["reward"] == 1 for i in range(4)) for problem in range(NUM_PROBLEMS)]
        assert results[model]["correct"] == correct
        assert results[model]["avg"]["value"] == pytest.approx(sum(correct) / 24)
        assert results[model]["pass"]["4"]["value"] == pytest.approx(sum(c > 0 for c in correct) / NUM_PROBLEMS)
        for record in records.values():
            assert record["reward"] == float(ord((record["completion"] or "\0")[0]) % 2)
            # the twentieth token may be the end-of-sequence token
            assert record["num_tokens"] == 20 or not record["truncated"]
    assert samples(model="lora") != samples()
    difference = results["lora"]["avg"]["value"] - results["m"]["avg"]["value"]
    assert results["lora"]["difference"]["value"] == pytest.approx(difference)
    shown = capsys.readouterr().out
    assert Path("out", "results.md").read_text(encoding="utf-8") in shown
    assert "avg@4" in shown


def test_killed_and_run_again_it_ends_like_an_uninterrupted_run(workplace: Path, drawn: list[int]) -> None:
    arguments = ["--batch_size", "1"]
    expected = run(*arguments, out="whole")
    all_seeds, path = list(drawn), Path("out", "samples", "m", "rows.jsonl")
    drawn.clear()
    command = ["-m", "trl_entropy.commands.evaluate", "--model", "m", "--output_dir", "out", *SETTINGS, *arguments]
    # the pause gives the time to kill it
    kill_when(lambda: path.exists() and path.read_bytes().count(b"\n") > 4, command, PAUSE="0.3")
    with path.open("ab") as file:
        file.write(b'{"problem": 5, "sample": 7, "rew')
    kept = path.read_bytes().rpartition(b"\n")[0]
    num_kept = kept.count(b"\n")
    assert 4 <= num_kept < NUM_PROBLEMS * 4
    assert run(*arguments) == expected
    # what was there is untouched and was not drawn again, and every sample is the uninterrupted run's
    assert path.read_bytes().startswith(kept)
    assert sorted(drawn) == sorted(all_seeds[num_kept:])
    assert samples() == samples("whole")


@pytest.mark.parametrize("largest_file", [800, 1500, 2600])
def test_a_full_disk_is_one_line_and_finished_samples_stay(workplace: Path, largest_file: int) -> None:
    """There is no room for the second sample, for a later one, or for `results.json`."""
    expected = run("--batch_size", "1", out="whole")
    path = Path("out", "samples", "m", "rows.jsonl")
    with full_disk(largest_file), pytest.raises(SystemExit) as stopped:
        run("--batch_size", "1")
    assert str(stopped.value).startswith("trl-entropy eval: error: a file could not be written (")
    assert str(stopped.value).endswith("Make room, and run it again: finished samples are kept.")
    assert "\n" not in str(stopped.value)
    kept = path.read_bytes().rpartition(b"\n")[0]
    assert not Path("out", "results.json").exists()
    assert run("--batch_size", "1") == expected
    assert path.read_bytes().startswith(kept)


def test_a_finished_evaluation_loads_no_model(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run()
    monkeypatch.setattr(measure, "TransformersEngine", None)
    assert run() == first
    # and of what is there, less can be asked for
    fewer = run("--n", "2", "--limit", "3")["rows"]["m"]
    records = samples()
    assert fewer["correct"] == [sum(records[problem, i]["reward"] == 1 for i in range(2)) for problem in range(3)]


def test_more_samples_and_problems_keep_what_is_there(workplace: Path, drawn: list[int]) -> None:
    run("--n", "1", "--limit", "2")
    assert len(drawn) == 2
    run("--n", "2", "--limit", "4")
    assert len(drawn) == len(set(drawn)) == 8
    more = samples()
    run("--n", "2", "--limit", "4", out="other")
    assert more == samples("other")


def test_samples_depend_on_the_seed_and_not_on_the_batch(workplace: Path) -> None:
    few = ["--n", "2", "--limit", "4"]
    run(*few, "--batch_size", "1", out="one")
    run(*few, "--batch_size", "7", out="seven")
    run(*few, "--seed", "1", out="seed")
    assert samples("one") == samples("seven")
    assert samples("one") != samples("seed")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--temperature", "0.5"], r"made with temperature=1\.0, not 0\.5\. Restore"),
        (["--max_new_tokens", "10", "--seed", "3"], r"max_new_tokens=20, not 10; seed=0, not 3"),
        (["--template", "qwen3"], r"template='none', not 'qwen3'"),
        (["--reward_funcs", "odd_reward.even"], r"reward_funcs=\['odd'\], not \['even'\]"),
    ],
)
def test_changed_settings_are_refused(changed: list[str], message: str, workplace: Path) -> None:
    run("--n", "1", "--limit", "1")
    with pytest.raises(SystemExit, match=message):
        run("--n", "1", "--limit", "1", *changed)


def test_changed_weights_and_problems_are_refused(workplace: Path) -> None:
    run("--n", "1", "--limit", "1")
    rows = Path("rows.jsonl").read_text(encoding="utf-8")
    Path("rows.jsonl").write_text(rows.replace("1+2=", "2+1="), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"made with prompts='\w+', not"):
        run("--n", "1", "--limit", "1")
    Path("rows.jsonl").write_text(rows, encoding="utf-8")
    weights = bytearray(Path("m", "model.safetensors").read_bytes())
    weights[-1] ^= 1
    Path("m", "model.safetensors").write_bytes(weights)
    with pytest.raises(SystemExit, match=r"made with weights='\w+', not"):
        run("--n", "1", "--limit", "1")


def test_a_task_keeps_its_prompts_and_a_config_file_its_fields(workplace: Path) -> None:
    fields = {"model": "m", "output_dir": "out", "task": "arithmetic", "task_args": {"size": 3}, "n": 2, "k": 2}
    fields |= {"max_new_tokens": 4, "backend": "transformers", "temperature": 0.9}
    Path("eval.yaml").write_text(json.dumps(fields), encoding="utf-8")
    main(["--config=eval.yaml", "--temperature", "1.0"])
    report = json.loads(Path("out", "results.json").read_text(encoding="utf-8"))
    assert (report["settings"]["temperature"], report["settings"]["k"]) == (1.0, [2])
    assert len(report["results"]["arithmetic"]["m"]["correct"]) == 3
    header = json.loads(Path("out", "samples", "m", "arithmetic.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert header["template"] == "none"


def test_a_prompt_that_leaves_no_room_is_refused_before_the_model_is_loaded(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "TransformersEngine", None)
    # the longest prompt has 12 tokens: 1+2+3+4+5+6= and a blank line
    with pytest.raises(
        SystemExit, match=r"makes 132 tokens, and its context is 128\. Set max_new_tokens to at most 116"
    ):
        run("--max_new_tokens", "120")
    Path("long.jsonl").write_text(json.dumps({"prompt": "1+" * 70, "answer": "70"}), encoding="utf-8")
    with pytest.raises(SystemExit, match="Choose problems with shorter prompts"):
        run("--dataset_file", "long.jsonl", "--max_new_tokens", "4")


def test_unknown_fields_are_one_line(workplace: Path) -> None:
    with pytest.raises(SystemExit, match=r"^trl-entropy eval: error: Unknown field '--temprature'"):
        run("--temprature", "1")
    with pytest.raises(SystemExit, match=r"^trl-entropy eval: error: .*none\.yaml"):
        main(["--config", "none.yaml"])


def test_prompts_are_those_of_the_training(
    workplace: Path, chat_model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same task, model and arguments of the chat template: the same tokens reach the model."""
    opened = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "Let me see:"}]
    tools = [{"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}, {"role": "tool", "content": "2"}]
    prompts = ["1+2?", opened, [*opened[:1], *tools], [{"role": "system", "content": "1+1?"}]]
    prompts += [[{"role": "user", "content": [{"type": "text", "text": "parts"}]}]]
    rows = [{"prompt": p if isinstance(p, list) else [{"role": "user", "content": p}], "answer": "2"} for p in prompts]
    Path("chat.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given: dict[str, list[list[int]]] = {"train": [], "eval": []}

    def stop(self: Any, prompt_ids: Any, *arguments: Any, **options: Any) -> None:
        given["train"].extend(map(list, prompt_ids))
        raise InterruptedError

    def spy(self: TransformersEngine, prompt_ids: Any, seeds: Any) -> Any:
        given["eval"].extend(prompt_ids)
        return generate(self, prompt_ids, seeds)

    generate = TransformersEngine.generate
    monkeypatch.setattr(EntropyGRPOTrainer, "_generate_single_turn", stop)
    monkeypatch.setattr(TransformersEngine, "generate", spy)
    task = ["--task", "maths", "--task_args", '{"source": "chat.jsonl", "template": "qwen3"}']
    task += ["--reward_funcs", "odd_reward.odd", "--chat_template_kwargs", '{"enable_thinking": false}']
    sizes = ["--per_device_train_batch_size", "10", "--num_generations", "2", "--gradient_accumulation_steps", "1"]
    on_cpu = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    with pytest.raises(InterruptedError):
        train.main(["--model_name_or_path", chat_model_path, "--output_dir", "run", *task, *sizes, *on_cpu])
    settings = ["--n", "2", "--max_new_tokens", "2", "--backend", "transformers", "--split", "train"]
    main(["--model", chat_model_path, "--output_dir", "out", *task, *settings])
    assert len(given["train"]) == len(given["eval"]) == 10
    assert sorted(given["train"]) == sorted(given["eval"])


def test_asynchronous_rewards_and_samples_that_are_not_scored(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run("--reward_funcs", "odd_reward.unsure", "--batch_size", "4")["rows"]["m"]
    scored = {key: record["reward"] for key, record in samples().items() if record["reward"] is not None}
    assert set(scored) == {(problem, i) for problem in range(NUM_PROBLEMS) for i in (0, 2)}
    correct = [sum(scored[problem, i] for i in (0, 2)) for problem in range(NUM_PROBLEMS)]
    assert (results["correct"], results["scored"]) == (correct, [2] * NUM_PROBLEMS)
    assert results["avg"]["value"] == pytest.approx(sum(correct) / (2 * NUM_PROBLEMS))
    assert results["pass"]["4"] is None
    assert "6 of 6, 12 samples not scored" in capsys.readouterr().out
    assert run("--reward_funcs", "odd_reward.judge", out="object") == run(out="plain")


def test_partials_of_one_function_are_two_rewards(workplace: Path) -> None:
    few = ["--n", "1", "--limit", "1"]
    run(*few, "--reward_funcs", "odd_reward.lenient")
    with pytest.raises(SystemExit, match=r"reward_funcs=\['lenient'\], not \['strict'\]"):
        run(*few, "--reward_funcs", "odd_reward.strict")


def test_rewards_that_are_no_use_are_one_line(workplace: Path) -> None:
    few = ["--n", "2", "--limit", "2", "--k", "1"]
    with pytest.raises(
        SystemExit, match=r"^trl-entropy eval: error: The reward function 'short' returned 3 rewards for 4"
    ):
        run(*few, "--reward_funcs", "odd_reward.short", out="short")
    with pytest.raises(SystemExit, match=r"^trl-entropy eval: error: rows: The rewards could grade none"):
        run(*few, "--reward_funcs", "odd_reward.never", out="never")
    with pytest.raises(
        SystemExit, match=r"reward_funcs='org/judge' is no function\..*eval` grades by functions alone"
    ):
        run(*few, "--reward_funcs", "org/judge")
    with pytest.raises(
        SystemExit, match=r"Unknown field '--reward_model_name_or_path'.* eval grades by functions alone"
    ):
        run(*few, "--reward_model_name_or_path", "org/judge")


def test_an_adapters_base_that_is_not_here_is_one_line(
    workplace: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = get_peft_model(tiny_model, LoraConfig(r=4, target_modules=["q_proj"]))
    adapter.peft_config["default"].base_model_name_or_path = "./m"
    adapter.save_pretrained("lora")
    (workplace / "elsewhere").mkdir()
    shutil.copy("rows.jsonl", "elsewhere")
    monkeypatch.chdir(workplace / "elsewhere")
    with pytest.raises(SystemExit) as stopped:
        run(model="../lora")
    message = "model='../lora' is an adapter on the base model './m', which is not found from"
    assert str(stopped.value).startswith(
        f"trl-entropy eval: error: {message} {workplace / 'elsewhere'}. A relative path"
    )
    assert f"It may be {workplace / 'm'}." in str(stopped.value)
