"""`trl-entropy eval --model A [B ...] --benchmark aime24 [...]`: avg@n and pass@k with confidence intervals.

The fields are those of `EvaluateArguments`, on the command line or in a YAML file given as `--config`. Every finished
sample is on the disk before the next batch starts; run again with the same settings, it does only what is missing.
"""

from itertools import pairwise

from trl_entropy.commands.errors import one_line_if_full, one_line_if_wrong
from trl_entropy.commands.fields import FieldParser, arguments_of, read_fields
from trl_entropy.evaluation.arguments import EvaluateArguments
from trl_entropy.evaluation.measure import evaluate, prepare
from trl_entropy.evaluation.results import table
from trl_entropy.evaluation.suites import RewardError


def parse(argv: list[str] | None = None) -> EvaluateArguments:
    """Read the command line, and the YAML file that its `--config` names.

    Raises:
        ValueError: If a field is unknown or has a bad value, or the file is not YAML.
        FileNotFoundError: If the file does not exist.
        ImportError: If the backend is not installed.
    """
    argv = arguments_of(argv)
    for option, path in pairwise(argv):
        if option == "--config":
            read_fields(path)  # which says more of a bad file than TRL
    parser = FieldParser((EvaluateArguments,), prog="trl-entropy eval", allow_abbrev=False)
    parser.epilog = "--config FILE reads fields from a YAML file; the command line overrides it."
    arguments, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    if unknown:
        hint = " eval grades by functions alone: name them as reward_funcs." if "reward_model" in unknown[0] else ""
        raise ValueError(f"Unknown field {unknown[0]!r}. `trl-entropy eval --help` lists the fields.{hint}")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Run `trl-entropy eval`.

    Args:
        argv: The command line without the command's name; `None` for `sys.argv[1:]`.

    Raises:
        SystemExit: With a one-line message if the arguments are wrong, or what a reward function returns is.
    """
    with one_line_if_full("eval", "and run it again: finished samples are kept."):
        with one_line_if_wrong("eval"):
            arguments = parse(argv)
            prepared = prepare(arguments)
        with one_line_if_wrong("eval", (RewardError,)):
            results = evaluate(arguments, prepared)["results"]
    print(table(results))
    print(f"Means over problems in per cent, with 95 % intervals. Written to {arguments.output_dir}.")


if __name__ == "__main__":
    main()
