"""The shape of the package: imports point downwards and make no circle, no file and no function outgrows a reader.

The scripts of `recipes/` are held to the same, but for layers, and the tests to the lengths.
"""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import trl_entropy

ROOT = Path(trl_entropy.__file__).parent
LAYERS = (
    "vllm_on_cpu",
    "files",
    "recipes",
    "pretrained",
    "controls",
    "critics",
    "telemetry",
    "trainers",
    "ppo",
    "tasks",
    "evaluation",
    "trl_entropy",  # the public names
    "commands",
)
"""Folders and modules of the package, each of which may import those before it."""
ALONE = ("controls", "tasks")
"""These import nothing of the package but themselves: losses for any loop, and tasks for any trainer."""
LONGEST_FILE, LONGEST_FUNCTION = 350, 50
FILES = {".".join(("trl_entropy", *path.relative_to(ROOT).with_suffix("").parts)): path for path in ROOT.rglob("*.py")}
TREES = {
    name.removesuffix(".__init__"): (path, ast.parse(path.read_text(encoding="utf-8"))) for name, path in FILES.items()
}
SCRIPTS, TESTS = (
    {
        path.relative_to(ROOT.parent).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT.parent / folder).rglob("*.py"))
    }
    for folder in ("recipes", "tests")
)


def layer_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def imports_of(module: str) -> set[str]:
    """The package's modules that a module imports, wherever in its file."""
    path, tree = TREES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            found |= {
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in TREES else source for alias in node.names
            }
    return found & TREES.keys()


def functions_of(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Name and number of lines of every function, its docstring left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield node.name, lines


def test_every_module_is_in_a_layer() -> None:
    assert {layer_of(module) for module in TREES} == set(LAYERS)


@pytest.mark.parametrize("module", sorted(TREES))
def test_imports_point_downwards(module: str) -> None:
    layer = layer_of(module)
    below = {layer} if layer in ALONE else set(LAYERS[: LAYERS.index(layer) + 1])
    assert {layer_of(other) for other in imports_of(module)} <= below


def test_imports_make_no_circle() -> None:
    check_no_circle({module: imports_of(module) for module in TREES})


def test_scripts_make_no_circle() -> None:
    """They import each other by their files' names."""
    named = {Path(script).stem: script for script in SCRIPTS}
    check_no_circle(
        {
            script: {
                named[node.module]
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and node.module in named
            }
            for script, tree in SCRIPTS.items()
        }
    )


def check_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter({name: imported - {name} for name, imported in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("module", sorted(TREES))
def test_no_file_and_no_function_is_too_long(module: str) -> None:
    check_length(*TREES[module])


@pytest.mark.parametrize("script", sorted(SCRIPTS | TESTS))
def test_no_script_and_none_of_its_functions_is_too_long(script: str) -> None:
    check_length(ROOT.parent / script, (SCRIPTS | TESTS)[script])


def check_length(path: Path, tree: ast.Module) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    assert not [(name, lines) for name, lines in functions_of(tree) if lines > LONGEST_FUNCTION]


def test_controls_import_torch_and_nothing_else() -> None:
    for path in (ROOT / "controls").glob("*.py"):
        for line in re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert line == "torch" or line in sys.stdlib_module_names, f"{path.name} imports {line}"
