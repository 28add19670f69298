"""`trl-entropy recipes [show NAME | copy NAME [DEST]]`: the recipes that were installed with the package."""

import argparse
import shutil
from pathlib import Path

from trl_entropy.commands.errors import one_line_if_wrong
from trl_entropy.files import whole_file
from trl_entropy.recipes import recipe_names, recipe_path


def describe(name: str) -> str:
    """A recipe's first comment line; empty where it has none."""
    first = recipe_path(name).read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").rstrip() if first.startswith("#") else ""


def listing() -> str:
    """Every recipe with its description, a line each."""
    width = max(map(len, recipe_names()), default=0)
    return "\n".join(f"{name:{width}}  {describe(name)}".rstrip() for name in recipe_names())


def copy(name: str, destination: str | None = None, force: bool = False) -> Path:
    """Write a recipe out to edit.

    Args:
        name: As `listing` names it.
        destination: A file, or a folder that exists; the working directory if left out.
        force: Overwrite a file that is there.

    Returns:
        The file written. Its folder is made if it is not there.

    Raises:
        FileNotFoundError: If no recipe has that name.
        FileExistsError: If the file is there and `force` is not set.
    """
    source, target = recipe_path(name), Path(destination or ".")
    target = target / source.name if target.is_dir() else target
    if target.exists() and not force:
        raise FileExistsError(f"{str(target)!r} exists. Name another destination, or overwrite it with --force.")
    with whole_file(target) as part:
        shutil.copyfile(source, part)
    return target


def main(argv: list[str] | None = None) -> None:
    """Run `trl-entropy recipes`.

    Args:
        argv: The command line without the command's name; `None` for `sys.argv[1:]`.

    Raises:
        SystemExit: With a one-line message if the arguments are wrong.
    """
    parser = argparse.ArgumentParser(prog="trl-entropy recipes", description="List, show or copy the shipped recipes.")
    actions = parser.add_subparsers(dest="action", metavar="{show,copy}")
    show = actions.add_parser("show", help="print a recipe")
    show.add_argument("name")
    writer = actions.add_parser("copy", help="write a recipe out to edit")
    writer.add_argument("name")
    writer.add_argument("destination", nargs="?", help="a file or a folder; the working directory if left out")
    writer.add_argument("--force", action="store_true", help="overwrite a file that is there")
    arguments = parser.parse_args(argv)
    with one_line_if_wrong("recipes", (OSError,)):
        if arguments.action == "show":
            print(recipe_path(arguments.name).read_text(encoding="utf-8"), end="")
        elif arguments.action == "copy":
            print(copy(arguments.name, arguments.destination, arguments.force))
        else:
            print(listing())


if __name__ == "__main__":
    main()
