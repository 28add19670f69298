"""What a model's name leads to, and the weights that are not loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from trl_entropy import pretrained
from trl_entropy.evaluation import checkpoints
from trl_entropy.evaluation.checkpoints import find_checkpoint, load_tokenizer


@pytest.fixture
def model(tiny_model_path: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_path, tmp_path / "model"))


@pytest.fixture
def adapter(model: Path, tiny_model: Any, tmp_path: Path) -> Path:
    config = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False, rank_pattern={"q_proj": 5})
    wrapped = get_peft_model(tiny_model, config)
    wrapped.peft_config["default"].base_model_name_or_path = str(model)
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_models_folder(model: Path) -> None:
    found = find_checkpoint(str(model))
    assert (found.model, found.adapter, found.context, found.lora_rank) == (str(model), None, 128, 0)
    assert found == find_checkpoint(str(model))


def test_an_adapters_folder(model: Path, adapter: Path) -> None:
    found = find_checkpoint(str(adapter))
    assert (found.model, found.adapter, found.context, found.lora_rank) == (str(model), str(adapter), 128, 5)
    assert found.tokenizer_path == str(model)
    load_tokenizer(found).save_pretrained(adapter)
    assert found.tokenizer_path == str(adapter)


def test_smollm2_is_its_folder_under_the_name_that_was_given(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_smollm2", lambda: model)
    found = find_checkpoint("smollm2-135m")
    assert (found.name, found.model) == ("smollm2-135m", str(model))
    assert found.fingerprint == find_checkpoint(str(model)).fingerprint


def test_an_adapter_finds_smollm2_on_another_machine(
    model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "_smollm2", lambda: model)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    for base, expected in {
        "/elsewhere/hf/trl_entropy/smollm2-135m": str(model),
        str(model): str(model),
    }.items():
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        assert find_checkpoint(str(adapter)).model == expected
    assert pretrained.resolve_base_model("runs/smollm2-135m") == "runs/smollm2-135m"


def test_other_weights_another_fingerprint(model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "FINGERPRINT_BYTES", 64)
    before = find_checkpoint(str(model)).fingerprint, find_checkpoint(str(adapter)).fingerprint
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = find_checkpoint(str(model)).fingerprint, find_checkpoint(str(adapter)).fingerprint
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_pickled_weights_are_refused(model: Path, adapter: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "training_args.bin").touch()
    with pytest.raises(FileNotFoundError, match="no weights"):
        find_checkpoint(str(model))
    torch.save({}, model / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only as pytorch_model\.bin.*can run code.*save_pretrained"):
        find_checkpoint(str(model))
    with pytest.raises(ValueError, match=r"only as pytorch_model\.bin"):
        find_checkpoint(str(adapter))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"only as adapter_model\.bin"):
        find_checkpoint(str(adapter))


def test_a_folder_without_a_model_names_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-20").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"no config\.json and no adapter_config\.json\. Name one of its.*checkpoint-20"
    ):
        find_checkpoint(str(tmp_path / "run"))
    for name in ("./none", str(tmp_path / "none"), "runs/none/checkpoint-1"):
        with pytest.raises(FileNotFoundError, match="is not a folder"):
            find_checkpoint(name)


def test_a_name_on_the_hub_is_known_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def from_pretrained(name: str, **kwargs: Any) -> Any:
        asked.update(kwargs, name=name)
        config = AutoConfig.for_model("qwen2", max_position_embeddings=77)
        config._commit_hash = "abc"
        return config

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    found = find_checkpoint("org/name")
    assert (found.model, found.fingerprint, found.context) == ("org/name", "org/name@abc", 77)
    assert asked == {"name": "org/name", "trust_remote_code": False}


def test_a_name_on_the_hub_whose_revision_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of two revisions would be taken for samples of one model."""
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name, **kwargs: AutoConfig.for_model("qwen2"))
    with pytest.raises(ValueError, match=r"model='org/name' was read from the hub, and .* revision\. Download it"):
        find_checkpoint("org/name")


def test_code_of_a_repository_is_not_run_unless_asked_for(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        find_checkpoint(str(model))


@pytest.fixture
def elsewhere(model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: another one than that in which the adapter, on `model`, was trained. No hub."""

    def no_hub(name: str, **kwargs: Any) -> Any:
        if not Path(name).is_dir():
            raise OSError("We couldn't connect to the hub.\nCheck your connection.")
        return load(name, **kwargs)

    load = AutoConfig.from_pretrained
    monkeypatch.setattr(AutoConfig, "from_pretrained", no_hub)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return adapter


def set_base(adapter: Path, base: str | None) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))


@pytest.mark.parametrize("base", ["model", "./model", "../gone/model", "runs/a/b/model"])
def test_a_base_that_is_not_found_from_here_is_said_to_be(base: str, elsewhere: Path, model: Path) -> None:
    set_base(elsewhere, base)
    with pytest.raises(FileNotFoundError) as refused:
        find_checkpoint(str(elsewhere))
    message = str(refused.value)
    assert f"model={str(elsewhere)!r} is an adapter on the base model {base!r}, which is not found from" in message
    assert str(Path.cwd()) in message
    assert f"as base_model_name_or_path into {elsewhere / 'adapter_config.json'}" in message
    assert "\n" not in message
    assert (f"It may be {model.resolve()}." in message) == (base in ("model", "./model"))
    assert ("couldn't connect" in message) == (base == "model")


def test_a_base_that_is_found_is_taken(elsewhere: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_base(elsewhere, str(model))
    assert find_checkpoint(str(elsewhere)).model == str(model)
    set_base(elsewhere, "model")
    monkeypatch.chdir(model.parent)
    found = find_checkpoint("adapter")
    assert (found.model, found.adapter) == ("model", "adapter")


def test_adapters_without_a_base_or_on_an_adapter(elsewhere: Path, tmp_path: Path) -> None:
    config = (elsewhere / "adapter_config.json").read_text()
    (elsewhere / "adapter_config.json").write_text(config[:-1])
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON \(.*\)\. Save the adapter again"):
        find_checkpoint(str(elsewhere))
    (elsewhere / "adapter_config.json").write_text(config)
    set_base(elsewhere, None)
    with pytest.raises(ValueError, match="does not say which model it belongs to"):
        find_checkpoint(str(elsewhere))
    set_base(elsewhere, str(shutil.copytree(elsewhere, tmp_path / "first")))
    with pytest.raises(ValueError, match=r"which is an adapter itself\. Merge that one"):
        find_checkpoint(str(elsewhere))
