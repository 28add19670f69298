"""Breaks `controls` and `critics` on purpose, one place at a time, and says which breaks no test notices.

    python .ci/mutate.py RESULTS.jsonl                          # 300 seeded mutants; go on where it was stopped
    python .ci/mutate.py RESULTS.jsonl --count 50 --seed 1 controls/erc.py

For each mutant the mirror of its module is run first (`tests/controls/test_erc.py`), then what else tests it, until
something fails. Every run is a fork of this process, which has imported torch, TRL and pytest; its CPU time is
limited. RESULTS has one JSON object a line: the place, the mutation, `killed` or `survived`, and by which tests.
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "trl_entropy"
FOLDERS = ("controls", "critics")
CPU_LIMIT = 180
"""Seconds of CPU time of one run of tests."""
WALL_LIMIT = 1800

SWAPS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
NAMES = {
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
    "amin": "amax",
    "amax": "amin",
    "any": "all",
    "all": "any",
    "sum": "mean",
    "exp": "expm1",
    "ge": "gt",
    "le": "lt",
    "gt": "ge",
    "lt": "le",
}
"""Of functions and methods, and of their keyword `min` and `max`."""
UNWRAPPED = ("detach", "abs", "float", "clamp", "masked_fill", "nan_to_num", "contiguous", "clone", "flip")
"""Methods that are left out."""


class Mutant(NamedTuple):
    """A mutation of one node.

    Attributes:
        module: File below the package.
        node: Which node of `ast.walk`.
        choice: Which of the mutations of that node.
    """

    module: str
    node: int
    choice: int


def mutations(node: ast.AST) -> list[ast.AST]:
    """What may stand in the place of a node."""
    found: list[ast.AST] = []
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            others = [other() for other in SWAPS[type(operator)]]
            found += [changed(node, ops=[*node.ops[:index], other, *node.ops[index + 1 :]]) for other in others]
    elif isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        found += [changed(node, op=other()) for other in SWAPS.get(type(node.op), ())]
    elif isinstance(node, ast.UnaryOp):
        found.append(node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        found.append(changed(node, value=not node.value if isinstance(node.value, bool) else node.value + 1))
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        found.append(changed(node, test=ast.UnaryOp(ast.Not(), node.test)))
    elif isinstance(node, ast.Call):
        found += of_a_call(node)
    return [*found, ast.Pass()] if is_removable(node) else found


def is_removable(node: ast.AST) -> bool:
    """Whether the code without this statement is still code."""
    called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    return called or isinstance(node, ast.AugAssign | ast.Raise | ast.Continue | ast.Break)


def of_a_call(node: ast.Call) -> list[ast.AST]:
    """Another function or method, or the object of the method itself."""
    found: list[ast.AST] = []
    if isinstance(node.func, ast.Name) and node.func.id in NAMES:
        found.append(changed(node, func=changed(node.func, id=NAMES[node.func.id])))
    elif isinstance(node.func, ast.Attribute):
        if node.func.attr in NAMES:
            found.append(changed(node, func=changed(node.func, attr=NAMES[node.func.attr])))
        if node.func.attr in UNWRAPPED:
            found.append(node.func.value)
    for index, keyword in enumerate(node.keywords):
        if keyword.arg in ("min", "max"):
            other = changed(keyword, arg=NAMES[keyword.arg])
            found.append(changed(node, keywords=[*node.keywords[:index], other, *node.keywords[index + 1 :]]))
    return found


def changed(node: Any, **fields: Any) -> Any:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def left_out(tree: ast.AST) -> set[ast.AST]:
    """Nodes that are not code to be tested: annotations and the words of an error, a warning or a help text."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        parts: list[Any] = [getattr(node, name, None) for name in ("annotation", "returns")]
        if isinstance(node, ast.JoinedStr):
            parts.append(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
            parts += node.keywords
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            parts += node.decorator_list
        for part in filter(None, parts):
            found |= set(ast.walk(part))
    return found


def mutants_of(module: str) -> Iterator[Mutant]:
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    skipped = left_out(tree)
    for index, node in enumerate(ast.walk(tree)):
        if node not in skipped:
            yield from (Mutant(module, index, choice) for choice in range(len(mutations(node))))


class Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else self.generic_visit(node)


def apply(mutant: Mutant) -> tuple[ast.Module, int, str]:
    """The mutated module, the line and the words of the mutation."""
    tree = ast.parse((PACKAGE / mutant.module).read_text(encoding="utf-8"))
    old = list(ast.walk(tree))[mutant.node]
    new = ast.copy_location(mutations(old)[mutant.choice], old)
    before = ast.unparse(old).partition("\n")[0]
    words = f"{before}  ->  {ast.unparse(ast.fix_missing_locations(new)).partition(chr(10))[0]}"
    return ast.fix_missing_locations(Replace(old, new).visit(tree)), old.lineno, words  # type: ignore[attr-defined]


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a syntax tree."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self.name, self.path, self.tree = name, path, tree

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        folders = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(name, self.path, loader=self, submodule_search_locations=folders)

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.tree, str(self.path), "exec"), vars(module))


def module_name(module: str) -> str:
    return "trl_entropy." + module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def stages(module: str) -> list[list[str]]:
    """Files of tests, the nearest first."""
    folder, stem = Path(module).parent.name, Path(module).stem
    mirrors = [f"tests/{folder}/test_{stem}.py", f"tests/trainers/test_{stem}.py"]
    found = [[path] for path in mirrors if (ROOT / path).exists()]
    found.append([f"tests/{folder}", "--ignore=tests/critics/test_two_processes.py", "-m", "not slow"])
    trained = ["test_config", "test_wiring", "test_exact_gradients", "test_hostile_numbers", "test_new_control"]
    if folder == "critics":
        trained = ["test_asyppo_config", "test_asyppo", "test_asyppo_known_values", "test_wiring"]
    paths = [f"tests/{'' if name == 'test_new_control' else 'trainers/'}{name}.py" for name in trained]
    return [*found, paths]


def run_tests(arguments: list[str], mutant: Mutant | None) -> bool:
    """Whether the tests pass, in a fork."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT))
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        code = 3
        try:
            if mutant:
                finder = Mutated(module_name(mutant.module), PACKAGE / mutant.module, apply(mutant)[0])
                sys.meta_path.insert(0, finder)
            import pytest

            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments]))
        finally:
            os._exit(code)
    deadline = time.monotonic() + WALL_LIMIT
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def try_out(mutant: Mutant) -> dict[str, Any]:
    _, line, words = apply(mutant)
    began, found = time.monotonic(), {**mutant._asdict(), "line": line, "mutation": words}
    for arguments in stages(mutant.module):
        if not run_tests(arguments, mutant):
            return {**found, "result": "killed", "by": arguments[0], "seconds": round(time.monotonic() - began, 1)}
    return {**found, "result": "survived", "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("modules", nargs="*", help="files below trl_entropy; all of controls and critics if left out")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    every = [str(path.relative_to(PACKAGE)) for name in FOLDERS for path in sorted((PACKAGE / name).rglob("*.py"))]
    candidates = [mutant for module in given.modules or every for mutant in mutants_of(module)]
    chosen = random.Random(given.seed).sample(candidates, min(given.count, len(candidates)))
    print(f"{len(chosen)} of {len(candidates)} mutants")
    lines = given.results.read_text(encoding="utf-8").splitlines() if given.results.exists() else []
    done = {(row["module"], row["node"], row["choice"]): row for row in map(json.loads, lines)}
    for name in ("hypothesis", "peft", "pytest", "torch", "transformers", "trl"):
        importlib.import_module(name)
    for mutant in chosen:
        if tuple(mutant) not in done:
            done[tuple(mutant)] = row = try_out(mutant)
            with given.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    survivors = [done[tuple(mutant)] for mutant in chosen if done[tuple(mutant)]["result"] == "survived"]
    for row in sorted(survivors, key=lambda row: (row["module"], row["line"])):
        print(f"{row['module']}:{row['line']}: {row['mutation']}")
    print(f"killed: {len(chosen) - len(survivors)} of {len(chosen)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
