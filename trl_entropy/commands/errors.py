"""What the commands say of an error, and when there is no room left for what they write."""

from collections.abc import Iterator
from contextlib import contextmanager

from trl_entropy.files import is_full

WRONG = (ValueError, OSError, ImportError)
"""What says that an argument is wrong, or that what it names is not there."""


def in_one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())


@contextmanager
def one_line_if_wrong(command: str, errors: tuple[type[Exception], ...] = WRONG) -> Iterator[None]:
    """End the command with one line if its block finds that what it was given is wrong.

    Args:
        command: Its name.
        errors: What says so.

    Raises:
        SystemExit: In place of such an error; any other is raised as it is.
    """
    try:
        yield
    except errors as error:
        raise SystemExit(f"trl-entropy {command}: error: {in_one_line(error)}") from error


@contextmanager
def one_line_if_full(command: str, remedy: str) -> Iterator[None]:
    """End the command with one line if its block finds the disk full.

    Args:
        command: Its name.
        remedy: What to do when there is room again.

    Raises:
        SystemExit: In place of such an error; any other is raised as it is.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        reason = in_one_line(error)
        raise SystemExit(
            f"trl-entropy {command}: error: a file could not be written ({reason}): the disk is full, or a "
            f"limit on space or file size is reached. Make room, {remedy}"
        ) from error
