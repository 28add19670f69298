"""The `trl-entropy` command: picks a subcommand and hands it the rest of the command line."""

import sys
from importlib import import_module

COMMANDS = {
    "quickstart": ("trl_entropy.commands.quickstart", "compare the methods on a small policy, on CPU in minutes"),
    "train": ("trl_entropy.commands.train", "train a policy from a recipe"),
    "probe": ("trl_entropy.commands.probe", "before a run, how much of what the controls clip is rounding"),
    "report": ("trl_entropy.commands.report", "write a page that compares runs"),
    "eval": ("trl_entropy.commands.evaluate", "avg@n and pass@k of models on benchmarks"),
    "methods": ("trl_entropy.commands.methods", "list the controls: papers, fields, what excludes what"),
    "recipes": ("trl_entropy.commands.recipes", "list, show or copy the shipped recipes"),
}
"""Each command's module, imported only when it is run, and what it does."""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: trl-entropy COMMAND [--help] [ARGUMENTS]",
            "",
            "Entropy control for RL fine-tuning of language models.",
            "",
            "commands:",
            *lines,
            "",
            "options:",
            "  --help     this text, or with a command its arguments",
            "  --version  the version",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Run `trl-entropy`.

    Args:
        argv: The command line without the program's name; `None` for `sys.argv[1:]`.

    Raises:
        SystemExit: With status 2 for an unknown command.
    """
    argv = sys.argv[1:] if argv is None else argv
    command, arguments = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("-h", "--help"):
        print(usage())
    elif command == "--version":
        from trl_entropy import __version__

        print(f"trl-entropy {__version__}")
    elif command in COMMANDS:
        import_module(COMMANDS[command][0]).main(arguments)
    else:
        print(f"{usage()}\n\ntrl-entropy: error: unknown command {command!r}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
