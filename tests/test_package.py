"""The package as a whole: every module imports, and the public names keep their signatures."""

import ast
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import trl
from packaging.version import Version

import trl_entropy
from tests.trainers import async_parts
from trl_entropy import EntropyGRPOConfig, EntropyGRPOTrainer
from trl_entropy.recipes import recipe_path
from trl_entropy.tasks import TASKS, Task, get_task

ROOT = Path(trl_entropy.__file__).parent
MODULES = sorted(module.name for module in pkgutil.walk_packages([str(ROOT)], "trl_entropy."))


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_and_says_what_it_is(name: str) -> None:
    if name.startswith("trl_entropy.ppo") and find_spec("trl.experimental.ppo") is None:
        pytest.skip("TRL 1.12 is the last release with PPOTrainer")
    if name == "trl_entropy.tasks.equality":
        pytest.importorskip("math_verify", reason="the extra `maths` is not installed")
    try:
        module = import_module(name)
    except ImportError as error:
        if not name.startswith("trl_entropy.trainers.async_") or "asynchronous" not in str(error).lower():
            raise
        async_parts.skip(error)
    assert module.__doc__


def test_what_is_imported_is_required() -> None:
    """Not left to what happens to come with another package."""
    text = (ROOT.parent / "pyproject.toml").read_text(encoding="utf-8")
    requirements = re.findall(r'"([\w.-]+)(?:\[\w+\])?(?:[<>=!~][^"]*)?"', text)
    required = {name.lower().replace("-", "_").replace("pyyaml", "yaml") for name in requirements}
    of_an_extra = {"latex2sympy2_extended", "sympy", "py4j", "textworld"}  # what its package is an interface to
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    packages = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"trl_entropy", "vllm"}
    assert packages - of_an_extra <= required


def test_the_floors_are_what_is_tested() -> None:
    """`.ci/floors.txt` has the oldest of every requirement, or says why it cannot."""
    text = (ROOT.parent / "pyproject.toml").read_text(encoding="utf-8")
    required = dict(re.findall(r'^    "([\w.-]+)>=([\d.]+)",$', text.partition("dependencies = [")[2], re.MULTILINE))
    lines = (ROOT.parent / ".ci/floors.txt").read_text(encoding="utf-8").lower().replace("_", "-").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    for name, floor in required.items():
        pin, _, reason = pins[name.replace("_", "-")].partition("  # ")
        assert Version(pin) == Version(floor) or (reason and Version(pin) > Version(floor)), name
    assert len(required) == 17


def test_public_names() -> None:
    assert {"EntropyGRPOConfig", "EntropyGRPOTrainer", "__version__"} <= set(trl_entropy.__all__)
    # `import *` asks for each of these, and not every TRL has an asynchronous trainer
    assert not [name for name in trl_entropy.__all__ if "Async" in name]
    assert issubclass(EntropyGRPOConfig, trl.GRPOConfig)
    assert issubclass(EntropyGRPOTrainer, trl.GRPOTrainer)


def test_config_adds_these_fields_with_these_defaults() -> None:
    defaults = {field.name: field.default for field in fields(EntropyGRPOConfig)}
    published = {
        "erc_low": None,
        "erc_high": None,
        "ce_gppo_alpha1": None,
        "ce_gppo_alpha2": None,
        "positive_nll_coef": 0.0,
        "positive_nll_min_reward": 1.0,
    }
    assert {name: defaults[name] for name in published} == published


def test_config_keeps_trl_defaults() -> None:
    own = {field.name: field for field in fields(EntropyGRPOConfig)}
    for field in fields(trl.GRPOConfig):
        same = (own[field.name].default, own[field.name].default_factory)
        assert same == (field.default, field.default_factory), field.name


def test_recipe_functions() -> None:
    assert list(inspect.signature(recipe_path).parameters) == ["name"]
    assert inspect.signature(recipe_path).return_annotation is Path


@pytest.mark.parametrize("name", sorted(TASKS))
def test_tasks_keep_the_contract(name: str) -> None:
    try:
        task = get_task(name)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("trl_entropy"):
            raise
        pytest.skip(f"the task needs {error.name}")
    assert isinstance(task, Task)
    assert task.name == name
    assert next(iter(inspect.signature(task.load).parameters)) == "split"
    assert task.reward_funcs
    assert task.build_policy is None or list(inspect.signature(task.build_policy).parameters) == ["output_dir", "seed"]


def test_unknown_task_lists_those_that_exist() -> None:
    with pytest.raises(ValueError, match=f"task='chess'.*{', '.join(sorted(TASKS))}"):
        get_task("chess")


def test_import_is_lazy_about_optional_packages() -> None:
    """The extras are needed by their users alone."""
    code = """
import sys
from trl_entropy import *
print([name for name in ("matplotlib", "math_verify", "vllm") if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=300
    )
    assert done.stdout.strip() == "[]"
