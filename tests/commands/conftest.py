"""A recipe for the tiny policy, and a trainer that must not be built."""

import io
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_entropy.commands import train

FIELDS: dict[str, Any] = {
    "dataset_name": "rows.jsonl",
    "reward_funcs": "tests.commands.conftest.first_character_reward",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": "1e-3",  # as YAML reads 1e-3 without a dot: text
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 6,
    "steps_per_generation": 4,
    "erc_low": 0.95,
    "erc_high": 1.05,
}


def first_character_reward(completions: list[str], **kwargs: object) -> list[float]:
    """1.0 where the first character has an odd code point."""
    return [float(ord(text[0]) % 2) if text else 0.0 for text in completions]


def write_rows(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def log_history(run: str = "run") -> list[dict[str, float]]:
    return json.loads(Path(run, "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


@contextmanager
def full_disk(largest_file: int) -> Iterator[None]:
    """Within this context no file can grow beyond so many bytes, and what is printed goes nowhere."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


WriteRecipe = Callable[..., list[str]]


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_path: str, monkeypatch: pytest.MonkeyPatch) -> WriteRecipe:
    """Writes a recipe and its rows: `recipe(**fields)` returns `["--config", PATH]`; `None` takes a field out."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}+{7 * i % 10}="[: 1 + i % 4], "note": i} for i in range(16)]
    write_rows("rows.jsonl", rows)
    chat = [{"prompt": [{"role": "user", "content": text}], "solution": "2"} for text in ["1+1?"] * 16 + ["1+1+1?"]]
    write_rows("chat.jsonl", chat)
    write_rows("solved.jsonl", [{"prompt": "1+1=", "solution": "2"}] * 16)
    write_rows("empty.jsonl", [{"prompt": "1+1=" * (i != 9)} for i in range(16)])
    write_rows("gap.jsonl", [{"prompt": "1+1=" if i != 7 else None} for i in range(16)])
    write_rows("hole.jsonl", [{"prompt": chat[i]["prompt"] if i != 5 else []} for i in range(16)])
    write_rows("numbers.jsonl", [{"prompt": 12}] * 16)
    shutil.copytree(tiny_model_path, "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    Path("pickled", "pytorch_model.bin").touch()
    Path("adapter").mkdir()
    Path("adapter", "adapter_config.json").write_text("{}", encoding="utf-8")

    def write(**overrides: Any) -> list[str]:
        fields = {**FIELDS, "model_name_or_path": tiny_model_path, "output_dir": "run", **overrides}
        fields = {name: value for name, value in fields.items() if value is not None}
        Path("recipe.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
        return ["--config", str(tmp_path / "recipe.yaml")]

    return write


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which a trainer is built."""

    def refuse(**kwargs: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(train, "EntropyGRPOTrainer", refuse)
