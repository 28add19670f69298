"""What a model's name stands for: a model of the hub, a folder, or a LoRA adapter on either. Safetensors only."""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer

from trl_entropy.pretrained import resolve_base_model, resolve_model

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FINGERPRINT_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A model to evaluate.

    Attributes:
        name: As the user gave it.
        model: Name on the hub, or folder, of the model; of the base model for a LoRA adapter.
        adapter: Folder of the adapter; `None` where there is none.
        fingerprint: Changes when the weights do.
        context: Longest sequence that the model takes, in tokens; `None` where its config does not say.
    """

    name: str
    model: str
    adapter: str | None
    fingerprint: str
    context: int | None

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer is: with the adapter if it was saved there, else with the model."""
        saved = self.adapter is not None and Path(self.adapter, "tokenizer_config.json").is_file()
        return str(self.adapter) if saved else self.model

    @property
    def lora_rank(self) -> int:
        """The adapter's highest rank; 0 where there is none."""
        if self.adapter is None:
            return 0
        config = json.loads(Path(self.adapter, ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def find_checkpoint(name: str, *, trust_remote_code: bool = False) -> Checkpoint:
    """What is behind a model's name. Loads its config, not its weights.

    Args:
        name: Name on the hub; `smollm2-135m`; folder of a model, or of a run's checkpoint; folder of a LoRA adapter.
        trust_remote_code: Run the modelling code that a repository brings.

    Raises:
        FileNotFoundError: If it looks like a folder and is not there, or holds no model; if an adapter's base model is
            not found from the working directory.
        ValueError: If the weights are not safetensors, or an adapter names no base model or another adapter.
        OSError: If the hub does not have it or cannot be reached.
        ImportError: As `resolve_model`.
    """
    folder = Path(resolve_model(name)).expanduser()
    if not folder.is_dir():
        if _looks_like_a_folder(name):
            raise FileNotFoundError(f"model={name!r} is not a folder. Give a folder, or a name on the hub.")
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        return Checkpoint(name, name, None, f"{name}@{_revision(name, config)}", _context(config))
    adapter, base = None, str(folder)
    if not (folder / "config.json").is_file():
        adapter, base = str(folder), _base_model(folder)
    require_safetensors("model", folder, adapter is not None)
    if adapter is None:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    else:
        config = _base_config(folder, base, trust_remote_code)
    fingerprint = _fingerprint(folder)
    if adapter is not None and Path(base).is_dir():
        require_safetensors("model", Path(base), False)
        fingerprint += _fingerprint(Path(base))
    return Checkpoint(name, base, adapter, fingerprint, _context(config))


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer."""
    return AutoTokenizer.from_pretrained(checkpoint.tokenizer_path, trust_remote_code=trust_remote_code)


def _revision(name: str, config: Any) -> str:
    """Which commit of the hub was read: without it, samples of two would be taken for samples of one."""
    revision = getattr(config, "_commit_hash", None)
    if revision is None:
        raise ValueError(
            f"model={name!r} was read from the hub, and transformers {transformers.__version__} does not say in which "
            "revision. Download it (`hf download`) and name its folder."
        )
    return revision


def _context(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _base_model(folder: Path) -> str:
    if not (folder / ADAPTER_CONFIG).is_file():
        checkpoints = sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir())
        hint = f" Name one of its checkpoints: {', '.join(checkpoints)}." if checkpoints else ""
        raise FileNotFoundError(f"model={str(folder)!r} has no config.json and no {ADAPTER_CONFIG}.{hint}")
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except ValueError as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG} is not JSON ({error}). Save the adapter again.") from error
    if not base:
        raise ValueError(
            f"model={str(folder)!r} is an adapter that does not say which model it belongs to. Write that model's "
            f"folder or name as base_model_name_or_path into {folder / ADAPTER_CONFIG}."
        )
    return resolve_base_model(base)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def _base_config(folder: Path, base: str, trust_remote_code: bool) -> Any:
    """The config of an adapter's base model, a folder or a name on the hub."""
    if is_adapter(Path(base)):
        raise ValueError(
            f"model={str(folder)!r} is an adapter on {base!r}, which is an adapter itself. Merge that one into its "
            f"own base model, and name the result as base_model_name_or_path in {folder / ADAPTER_CONFIG}."
        )
    reason = ""
    if Path(base).is_dir() or not _looks_like_a_folder(base):
        try:
            return AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        except OSError as error:
            if Path(base).is_dir():
                raise
            reason = f" ({str(error).splitlines()[0].rstrip('.')})"
    above = [parent / base for parent in folder.resolve().parents if (parent / base / "config.json").is_file()]
    raise FileNotFoundError(
        f"model={str(folder)!r} is an adapter on the base model {base!r}, which is not found from {Path.cwd()}{reason}"
        ". A relative path counts from where the adapter was trained: run from there, or write the whole path as "
        f"base_model_name_or_path into {folder / ADAPTER_CONFIG}." + (f" It may be {above[0]}." if above else "")
    )


def _looks_like_a_folder(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def require_safetensors(field: str, folder: Path, is_adapter: bool = False) -> None:
    """Refuse weights that are pickled, as loading them can run whatever code is in them.

    Args:
        field: What names the folder, for the error.
        folder: Of a model.
        is_adapter: Whether it is that of an adapter.

    Raises:
        FileNotFoundError: If it has no weights.
        ValueError: If it has no others.
    """
    safe = {path.name for path in folder.glob("*.safetensors")}
    if (ADAPTER_WEIGHTS in safe) if is_adapter else (safe - {ADAPTER_WEIGHTS}):
        return
    pickled = sorted(path.name for path in folder.glob("*model*.bin"))
    if not pickled:
        raise FileNotFoundError(f"{field}={str(folder)!r} has no weights: no file that ends in .safetensors.")
    raise ValueError(
        f"{field}={str(folder)!r} has its weights only as {', '.join(pickled)}, and loading these can run code. If "
        "you trust their source, load the model with transformers and write it out again with save_pretrained, which "
        "makes safetensors."
    )


def _fingerprint(folder: Path) -> str:
    """Digest of the names, sizes, and first and last MiB of a folder's weight files."""
    digest = sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]
