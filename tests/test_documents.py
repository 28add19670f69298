"""Every document of the repository: links lead somewhere, commands parse, code imports, fields and tables are real."""

import ast
import inspect
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from trl import DatasetMixtureConfig, ModelConfig
from trl.scripts.grpo import GRPOScriptArguments

import trl_entropy
from tests.trainers import async_parts
from trl_entropy.commands import cli, evaluate, probe, quickstart, report, train
from trl_entropy.commands.methods import methods_table, metrics_table
from trl_entropy.commands.train_arguments import TrainArguments
from trl_entropy.recipes import recipe_names, recipe_path
from trl_entropy.tasks import TASKS, get_task
from trl_entropy.trainers import AsyPPOConfig, AsyPPOTrainer

ROOT = Path(trl_entropy.__file__).parents[1]
FOLDERS = (".github", "recipes", "tests", "trl_entropy")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
OURS = re.compile(r"(?<![\w/.])((?:trl_entropy|tests|recipes|\.ci|\.github)/[\w./-]+\.(?:py|yaml|jsonl?|txt|md))\b")
"""A path of a file of the repository, wherever in a text."""
SETTING = re.compile(r"(?:^|, )([a-z]\w+)=")
MINE = "erc-r1-distill-qwen-1.5b"
"""The recipe that the documents copy to `my.yaml`."""


class Parsed(Exception):
    """A command has read its arguments and is about to work."""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(*languages: str) -> list[Any]:
    """The fenced blocks of all pages in one of the languages, each a parameter of a test."""
    found = []
    for page in PAGES:
        numbers = Counter(dict.fromkeys(languages, 0))
        for language, code in FENCE.findall(text_of(page)):
            if language in languages:
                numbers[language] += 1
                found.append(pytest.param(code, id=f"{name_of(page)}-{language}{numbers[language]}"))
    return found


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#{1,6} (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE):
        shown = LINK.sub("]", heading).replace("`", "")
        anchor = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Files of the repository, and headings of their pages; a table's code may hold brackets that are no link."""
    for target in LINK.findall(FENCE.sub("", text_of(page))):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_are_there(page: Path) -> None:
    assert not [path for path in OURS.findall(text_of(page)) if not (ROOT / path).is_file()]


@pytest.mark.parametrize("name", [name_of(page) for page in PAGES if page.parent.name != "study"])
def test_a_page_is_linked_from_another(name: str) -> None:
    if name == "README.md":
        return
    others = [page for page in PAGES if name_of(page) != name]
    targets = {
        (page.parent / target.partition("#")[0]).resolve() for page in others for target in LINK.findall(text_of(page))
    }
    assert targets & {ROOT / name, (ROOT / name).parent}


def commands() -> list[Any]:
    """Every `trl-entropy` and `accelerate launch ... -m trl_entropy.commands...` of a fenced block, as arguments."""
    found = []
    for page in PAGES:
        for language, code in FENCE.findall(text_of(page)):
            if language in ("bash", "sh", "console"):
                for words in in_shell(code):
                    found.append(pytest.param(words, id=f"{name_of(page)}: {' '.join(words)[:60]}"))
    return found


def in_shell(code: str) -> Iterator[list[str]]:
    """The arguments of each of our commands in a block of shell."""
    for line in code.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word not in ("&&", ";", "|"):
                words.append(word)
                continue
            if words and Path(words[0]).name == "trl-entropy":
                yield words[1:]
            modules = [word for word in words if word.startswith("trl_entropy.commands.")]
            if modules:
                name = modules[0].rpartition(".")[2]
                yield [name, *words[words.index(modules[0]) + 1 :]]
            words = []


@pytest.fixture
def only_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands stop where their arguments are read; the working directory has the recipes, and `my.yaml`."""

    def stop(*args: object, **kwargs: object) -> None:
        raise Parsed

    def only_read(argv: list[str]) -> None:
        train.parse([*argv, "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"])
        raise Parsed

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "my.yaml").write_text(text_of(ROOT / f"recipes/{MINE}.yaml"), encoding="utf-8")
    monkeypatch.setattr(train, "prepare", only_read)
    monkeypatch.setattr(probe, "prepare", only_read)
    monkeypatch.setattr(evaluate, "prepare", stop)
    monkeypatch.setattr(quickstart, "require_plots", stop)
    monkeypatch.setattr(report, "write_report", stop)


@pytest.mark.usefixtures("only_parsed")
@pytest.mark.parametrize("words", commands())
def test_commands_are_understood(words: list[str]) -> None:
    """`methods` and `recipes` only print, so they run; `recipes copy NAME my.yaml` finds that one there."""
    if words[:2] == ["recipes", "copy"]:
        words = [*words, "--force"]
    if words[0] in ("methods", "recipes"):
        cli.main(words)
        return
    with pytest.raises(Parsed):
        cli.main(words)


@pytest.mark.usefixtures("only_parsed")
@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_a_wrong_command_would_be_seen(command: str) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--no_such_field", "1"])


def test_every_command_is_in_a_document() -> None:
    shown = {parameter.values[0][0] for parameter in commands()}
    assert set(cli.COMMANDS) <= shown


def variants(language: str, code: str) -> list[str]:
    """The Python of a block: as it is, or before and after a change."""
    if language == "python":
        return [code]
    lines = code.splitlines()
    return ["\n".join(line[1:] for line in lines if line.startswith((sign, " "))) for sign in ("-", "+")]


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_headings_that_a_recipe_names_are_there(recipe: str) -> None:
    for page, heading in re.findall(r'([\w/.]+\.md), "([^"]+)"', recipe_path(recipe).read_text(encoding="utf-8")):
        assert re.search(f"^#+ {re.escape(heading)}$", text_of(ROOT / page), re.MULTILINE), (page, heading)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_is_real(code: str) -> None:
    try:
        check_python(code)
    except ImportError as error:
        if "asynchronous" not in str(error).lower():
            raise
        async_parts.skip(error)


@pytest.mark.parametrize("code", blocks("diff"))
def test_both_sides_of_a_change_are_real(code: str) -> None:
    for side in variants("diff", code):
        check_python(side)


def check_python(code: str) -> None:
    """It compiles, what it imports is there, and what it hands to those classes they take."""
    tree = ast.parse(code)
    classes: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            if node.module == "trl_entropy.ppo" and find_spec("trl.experimental.ppo") is None:
                continue  # TRL 1.12 is the last release with PPOTrainer
            module = import_module(node.module)
            classes |= {alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                import_module(alias.name)
    assert any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree)), "says not what it uses"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes:
            known = parameters(classes[node.func.id])
            assert {word.arg for word in node.keywords} <= known, node.func.id


def parameters(kind: Any) -> set[str]:
    """What a function takes by name, or a class, of itself or of what it hands its arguments on to."""
    if not isinstance(kind, type):
        return set(inspect.signature(kind).parameters)
    return {name for one in kind.__mro__ for name in inspect.signature(one.__init__).parameters}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_in_the_text_are_real(page: Path) -> None:
    """`name=value` in a sentence or a table is a field of a configuration or an argument of a trainer."""
    elsewhere = {"use_safetensors"}  # of transformers' `from_pretrained`
    known = {field.name for field in fields(AsyPPOConfig)} | parameters(AsyPPOTrainer) | elsewhere
    named = {
        name for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", text_of(page))) for name in SETTING.findall(code)
    }
    assert named <= known


@pytest.mark.parametrize("code", blocks("yaml"))
def test_yaml_is_a_recipe(code: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(code, encoding="utf-8")
    train.parse(["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu", "true"])


def test_tables_are_those_of_the_controls() -> None:
    """`trl-entropy methods --markdown` and `--metrics` print what belongs between the marks."""
    page = text_of(ROOT / "trl_entropy/controls/README.md")
    for name, table in (("methods", methods_table()), ("metrics", metrics_table())):
        assert page.partition(f"<!-- {name} -->\n")[2].partition("\n<!-- end -->")[0] == table


def first_cells(page: Path) -> list[list[str]]:
    """The code in the first cell of every row of a page's tables."""
    return [re.findall(r"`([^`]*)`", cell) for cell in re.findall(r"^\| (.*?) \|", text_of(page), re.MULTILINE)]


def test_every_recipe_is_listed() -> None:
    """Variants share a row: `erc-r1-distill-qwen-1.5b`, `-1.5b-lora`."""
    page, listed = ROOT / "recipes/README.md", set()
    for names in filter(None, first_cells(page)):
        first, *others = names
        listed |= {first, *(first[: first.rindex("-")] + other for other in others if other.startswith("-"))}
    launching = text_of(page).partition("`recipes/accelerate/`")[2].partition("\n\n")[0]
    listed |= {f"accelerate/{name}" for name in re.findall(r"`([\w-]+)`", launching)}
    assert set(recipe_names()) <= listed, sorted(set(recipe_names()) - listed)


def test_fields_of_a_recipe_are_those_of_the_command() -> None:
    """The table has every field that `TrainArguments` adds to TRL's, and none that the command does not know."""
    table = text_of(ROOT / "recipes/README.md").partition("| field | meaning |\n")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    base = {field.name for field in fields(GRPOScriptArguments)}
    kinds = (TrainArguments, AsyPPOConfig, ModelConfig, DatasetMixtureConfig)
    known = {field.name for kind in kinds for field in fields(kind)}
    assert {field.name for field in fields(TrainArguments)} - base <= named
    assert named <= known


@pytest.mark.parametrize("name", sorted(TASKS))
def test_arguments_of_a_task_are_those_of_its_load(name: str) -> None:
    try:
        task = get_task(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"the task needs {error.name}")
    page = text_of(ROOT / "trl_entropy/tasks/README.md")
    row = re.search(rf"^\| `{name}` \|.*\| (.*) \|$", page, re.MULTILINE)
    assert row is not None
    assert set(re.findall(r"`(\w+)`", row[1])) == set(inspect.signature(task.load).parameters) - {"split"}
