"""`trl-entropy report RUN [RUN ...]`: one page with the figures and settings of runs."""

import argparse
from pathlib import Path

from trl_entropy.commands.errors import one_line_if_full, one_line_if_wrong
from trl_entropy.telemetry.report import write_report


def main(argv: list[str] | None = None) -> None:
    """Run `trl-entropy report`.

    Args:
        argv: The command line without the command's name; `None` for `sys.argv[1:]`.

    Raises:
        SystemExit: With a one-line message if a folder holds no run or matplotlib is not installed.
    """
    parser = argparse.ArgumentParser(prog="trl-entropy report", description="Write a page that compares runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a training run, or of the quickstart")
    parser.add_argument("--output", help="HTML file (default: report.html, in RUN if there is one RUN, else here)")
    arguments = parser.parse_args(argv)
    folder = arguments.runs[0] if len(arguments.runs) == 1 else "."
    with one_line_if_wrong("report"), one_line_if_full("report", "and run it again."):
        page = write_report(arguments.runs, arguments.output or Path(folder, "report.html"))
    print(page)


if __name__ == "__main__":
    main()
