"""Where the shipped recipes are."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def recipes_dir() -> Path:
    """Folder of the shipped recipes: inside the package when installed from a wheel, beside it in a source tree.

    Raises:
        FileNotFoundError: If neither folder is there.
    """
    for folder in (_PACKAGE / "_recipes", _PACKAGE.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"No recipes beside {_PACKAGE}. Install trl_entropy from its wheel or from a checkout (`pip install -e .`)."
    )


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted: their paths below `recipes_dir()` without the `.yaml`.

    Those that start with `accelerate/` say how to launch, all others what to train.
    """
    folder = recipes_dir()
    # not `with_suffix`, which takes the end of "...-1.5b" for one
    return sorted(path.relative_to(folder).as_posix().removesuffix(".yaml") for path in folder.rglob("*.yaml"))


def recipe_path(name: str) -> Path:
    """Path of the shipped recipe `name`, for example `"quickstart"`.

    Raises:
        FileNotFoundError: If no shipped recipe has that name; the message lists those that exist.
    """
    if name not in recipe_names():
        raise FileNotFoundError(f"There is no recipe {name!r}. Choose one of {', '.join(recipe_names())}.")
    return recipes_dir() / f"{name}.yaml"
