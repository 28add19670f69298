"""What a model's name leads to, and the weights that are not loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from trl_entropy.commands import checkpoints
from trl_entropy.commands.checkpoints import find_checkpoint, load_tokenizer


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


def test_code_of_a_repository_is_not_run_unless_asked_for(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        find_checkpoint(str(model))
