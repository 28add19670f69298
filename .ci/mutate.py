"""Breaks the package on purpose, one place at a time, and says which breaks no test notices.

    python .ci/mutate.py RESULTS.jsonl               # 300 seeded mutants of controls and critics; goes on if stopped
    python .ci/mutate.py RESULTS.jsonl --count 50 --seed 1 controls/erc.py trainers

The tests are run unbroken first, which must pass, and what each of them runs of the package is written to
RESULTS.tests.json. Then for each mutant those that run the function it is in, the nearest and quickest first
(`tests/controls/test_erc.py`, then the rest of its folder, then the others), until one fails. Every run is a fork of
this process, which has imported torch, TRL and pytest; its CPU time is limited. RESULTS has one JSON object a line:
the place, the mutation, `killed` or `survived`, and by how many tests.
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "trl_entropy"
PREFIX = f"{PACKAGE}/"
FOLDERS = ("controls", "critics")
TESTS = tuple(f"tests/{name}" for name in ("controls", "critics", "telemetry", "trainers"))
"""Tests, without those marked slow and those of several processes, which have no mutant."""
PASSED, NO_TESTS = 0, 5
"""pytest's exit codes."""
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


def files_of(modules: Sequence[str]) -> list[str]:
    """The Python files of these files and folders below the package."""
    paths = [path for name in modules for path in sorted((PACKAGE / name).rglob("*.py")) or [PACKAGE / name]]
    return [str(path.relative_to(PACKAGE)) for path in paths]


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


class Watch:
    """Notes what each test runs of the package, and its seconds of CPU time."""

    def __init__(self, into: Path) -> None:
        self.into, self.runs = into, set[str]()
        self.tests: dict[str, Any] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.runs, began = set(), time.process_time()
        sys.settrace(self.note)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.tests[item.nodeid] = {"seconds": time.process_time() - began, "runs": sorted(self.runs)}

    def note(self, frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code.co_filename.startswith(PREFIX):
            self.runs.add(f"{frame.f_code.co_filename.removeprefix(PREFIX)}:{frame.f_code.co_firstlineno}")

    def pytest_sessionfinish(self) -> None:
        self.into.write_text(json.dumps(self.tests), encoding="utf-8")


def run_tests(arguments: list[str], cpu_limit: int, mutant: Mutant | None = None, plugin: Any = None) -> int:
    """pytest's exit code, of a fork."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, cpu_limit))
        signal.alarm(WALL_LIMIT)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        code = 3
        try:
            if mutant:
                finder = Mutated(module_name(mutant.module), PACKAGE / mutant.module, apply(mutant)[0])
                sys.meta_path.insert(0, finder)
            options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
            code = int(pytest.main([*options, *arguments], plugins=[plugin] if plugin else []))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def watch(file: str) -> dict[str, Any]:
    """Its tests, by name: what each runs of the package."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "tests.json"
        if run_tests([file], WALL_LIMIT, plugin=Watch(into)) not in (PASSED, NO_TESTS):
            raise RuntimeError(f"{file} fails without a mutant")
        return json.loads(into.read_text(encoding="utf-8"))


def watch_all(given: list[str], pool: Executor) -> dict[str, Any]:
    files = [str(path) for name in given for path in sorted(Path(name).glob("test_*.py")) or [name]]
    files = [path for path in files if "test_two_processes" not in path]
    return {name: row for tests in pool.map(watch, files) for name, row in tests.items()}


@cache
def functions(module: str) -> dict[int, str]:
    """The innermost function that each node of `ast.walk` is in, as `Watch` notes it."""
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    owners: dict[ast.AST, str] = {}
    for outer in ast.walk(tree):
        if isinstance(outer, ast.FunctionDef):
            first = min(part.lineno for part in (outer, *outer.decorator_list))
            owners |= dict.fromkeys(ast.walk(outer), f"{module}:{first}")
    return {index: owners[node] for index, node in enumerate(ast.walk(tree)) if node in owners}


def choose(mutant: Mutant, tests: dict[str, Any], budget: float) -> list[tuple[list[str], int]]:
    """Tests in its folder, then others, with a limit of CPU time each.

    They are those that run the function of the mutant; where none does, as with what runs on import, its module.
    """
    owner = functions(mutant.module).get(mutant.node)
    names = [name for name, row in tests.items() if owner in row["runs"]] or [
        name for name, row in tests.items() if any(run.startswith(f"{mutant.module}:") for run in row["runs"])
    ]
    folder, stem = Path(mutant.module).parent.name, Path(mutant.module).stem
    groups: tuple[list[str], list[str]] = ([], [])
    spent = [0.0, 0.0]
    for name in sorted(names, key=lambda name: (f"/test_{stem}.py" not in name, tests[name]["seconds"])):
        far = not name.startswith(f"tests/{folder}/")
        if sum(spent) < budget:
            groups[far].append(name)
            spent[far] += tests[name]["seconds"]
    return [(group, 60 + 5 * int(seconds)) for group, seconds in zip(groups, spent, strict=True) if group]


def try_out(trial: tuple[Mutant, list[tuple[list[str], int]]]) -> dict[str, Any]:
    mutant, groups = trial
    _, line, words = apply(mutant)
    began = time.monotonic()
    killed = any(run_tests(names, cpu_limit, mutant) != PASSED for names, cpu_limit in groups)
    return {
        **mutant._asdict(),
        "line": line,
        "mutation": words,
        "result": "killed" if killed else "survived",
        "tests": sum(len(names) for names, _ in groups),
        "seconds": round(time.monotonic() - began, 1),
    }


def try_all(chosen: list[Mutant], given: argparse.Namespace, pool: Executor) -> dict[Mutant, dict[str, Any]]:
    """What became of each mutant; those that RESULTS has are not tried again, or its survivors alone."""
    watched = given.results.with_suffix(".tests.json")
    if given.again or not watched.exists():
        watched.write_text(json.dumps(watch_all(given.tests, pool)), encoding="utf-8")
    tests = json.loads(watched.read_text(encoding="utf-8"))
    lines = given.results.read_text(encoding="utf-8").splitlines() if given.results.exists() else []
    done = {Mutant(row["module"], row["node"], row["choice"]): row for row in map(json.loads, lines)}
    kept = {mutant for mutant, row in done.items() if not given.again or row["result"] == "killed"}
    trials = [(mutant, choose(mutant, tests, given.seconds)) for mutant in chosen if mutant not in kept]
    with given.results.open("a", encoding="utf-8") as file:
        for trial in as_completed([pool.submit(try_out, trial) for trial in trials]):
            row = trial.result()
            done[Mutant(row["module"], row["node"], row["choice"])] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
    return done


def load() -> None:
    """Import what the tests need but the package itself, which each fork imports anew, with its mutant."""
    for name in ("hypothesis", "peft", "transformers", "trl_entropy", "trl_entropy.commands.train"):
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "trl_entropy"]:
        del sys.modules[name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("modules", nargs="*", default=FOLDERS, help="files or folders below trl_entropy")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=120, help="CPU time of the tests of a mutant that survives")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="folders or files")
    parser.add_argument("--again", action="store_true", help="try survivors again, after tests have changed")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    load()
    candidates = [mutant for module in files_of(given.modules) for mutant in mutants_of(module)]
    chosen = random.Random(given.seed).sample(candidates, min(given.count, len(candidates)))
    print(f"{len(chosen)} of {len(candidates)} mutants", flush=True)
    # not a `Pool`, whose processes may start none, which some tests do
    with ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        done = try_all(chosen, given, pool)
    survivors = [done[mutant] for mutant in chosen if done[mutant]["result"] == "survived"]
    for row in sorted(survivors, key=lambda row: (row["module"], row["line"])):
        print(f"{row['module']}:{row['line']}: {row['mutation']} ({row['tests']} tests)")
    print(f"killed: {len(chosen) - len(survivors)} of {len(chosen)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
