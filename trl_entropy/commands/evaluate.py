"""`trl-entropy eval --model A [B ...] --benchmark aime24 [...]`: avg@n and pass@k with confidence intervals.

The fields are those of `EvaluateArguments`, on the command line or in a YAML file given as `--config`. Every finished
sample is on the disk before the next batch starts; run again with the same settings, it does only what is missing.
"""

import gc
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from trl_entropy.commands.errors import in_one_line, one_line_if_full
from trl_entropy.commands.fields import FieldParser, arguments_of, read_fields
from trl_entropy.evaluation.benchmarks import BENCHMARKS
from trl_entropy.evaluation.checkpoints import Checkpoint, find_checkpoint, load_tokenizer
from trl_entropy.evaluation.engines import Engine, Sampling, TransformersEngine, VLLMEngine
from trl_entropy.evaluation.results import compare, summarise, table
from trl_entropy.evaluation.samples import Sample, SampleFile
from trl_entropy.evaluation.suites import RewardError, Suite, grade, load_suites
from trl_entropy.files import write_text
from trl_entropy.tasks.templates import TEMPLATES, add_instruction, paragraphs, render, reply, template_of

DEFAULT_BATCH_SIZES = {"transformers": 8, "vllm": 512}


@dataclass
class EvaluateArguments:
    """What to evaluate, on what, and how to sample. The sampling defaults are the Klear papers'.

    Args:
        model: One or more of: a name on the hub, a model's folder, a run's checkpoint, a LoRA adapter's folder.
        output_dir: Folder for the samples, `results.json` and `results.md`.
        benchmark: Names of `trl_entropy.evaluation.benchmarks.BENCHMARKS`.
        dataset_file: With one `benchmark`, a local copy of its file; alone, a file of problems with the columns that
            the task `maths` reads.
        task: Name of a task of `trl_entropy.tasks.TASKS`.
        task_args: Arguments of the task's `load`, as JSON on the command line.
        split: Split of the task.
        reward_funcs: Rewards that grade in place of the task's own, such as `reasoning_maths_reward`. A completion
            is correct if its rewards add up to at least 1.
        template: Where the instruction to box the answer goes: `auto`, `none`, or a family of
            `trl_entropy.tasks.templates.TEMPLATES`. A `task` keeps its prompts as they are.
        chat_template_kwargs: Arguments of the chat template, such as `{"enable_thinking": false}`.
        n: Samples per problem. Raising it keeps those that are there.
        temperature: Sampling temperature; 0 for the most likely token, which needs `n` 1.
        top_p: Nucleus probability.
        max_new_tokens: Longest completion.
        k: The k of pass@k; 1, n/2 and n if left out.
        limit: Only the first problems.
        seed: Seeds every sample, and the intervals.
        batch_size: Samples generated, graded and written together; 8 for transformers and 512 for vLLM if left out.
        backend: `vllm`, `transformers`, or `auto` for vLLM if it is installed.
        dtype: Precision of the weights; `auto` for the checkpoint's.
        tensor_parallel_size: GPUs that vLLM spreads a model over.
        trust_remote_code: Run the code that a model's repository brings.
    """

    model: list[str] = field(default_factory=list, metadata={"help": "Hub names, model folders or LoRA folders."})
    output_dir: str = field(default="", metadata={"help": "Folder for samples, results.json and results.md."})
    benchmark: list[str] = field(default_factory=list, metadata={"help": f"Any of {', '.join(BENCHMARKS)}."})
    dataset_file: str | None = field(
        default=None, metadata={"help": "Local copy of the benchmark's file, or with no benchmark, maths problems."}
    )
    task: str | None = field(default=None, metadata={"help": "A task to evaluate on, such as `arithmetic`."})
    task_args: dict[str, Any] | str | None = field(default=None, metadata={"help": "The task's arguments, as JSON."})
    split: str = field(default="test", metadata={"help": "Split of the task."})
    reward_funcs: list[str] | None = field(default=None, metadata={"help": "Rewards in place of the task's own."})
    template: str = field(default="auto", metadata={"help": f"`auto`, `none` or one of {', '.join(TEMPLATES)}."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template, as JSON."}
    )
    n: int = field(default=32, metadata={"help": "Samples per problem."})
    temperature: float = field(default=0.6, metadata={"help": "Sampling temperature; 0 for the most likely token."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus probability."})
    max_new_tokens: int = field(default=32768, metadata={"help": "Longest completion, in tokens."})
    k: list[int] | None = field(default=None, metadata={"help": "The k of pass@k; 1, n/2 and n if left out."})
    limit: int | None = field(default=None, metadata={"help": "Only the first problems."})
    seed: int = field(default=0, metadata={"help": "Seeds every sample, and the intervals."})
    batch_size: int | None = field(default=None, metadata={"help": "Samples generated and written together."})
    backend: str = field(default="auto", metadata={"help": "`auto`, `vllm` or `transformers`."})
    dtype: str = field(default="auto", metadata={"help": "Precision of the weights; `auto` for the checkpoint's."})
    tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that vLLM spreads a model over."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code of a model's repository."})

    def __post_init__(self) -> None:
        for name in ("model", "benchmark", "reward_funcs", "k"):  # in YAML, one may stand without a list
            value = getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str | int) else value)
        self.task_args = _mapping("task_args", self.task_args)
        self.chat_template_kwargs = _mapping("chat_template_kwargs", self.chat_template_kwargs)
        self._check_what()
        self._check_sampling()
        self.k = sorted(set(self.k or (1, max(1, self.n // 2), self.n)))
        if not 1 <= self.k[0] <= self.k[-1] <= self.n:
            raise ValueError(f"k={self.k} must be in 1..n={self.n}. Lower k or raise n.")
        if self.backend not in ("auto", *DEFAULT_BATCH_SIZES):
            raise ValueError(f"backend={self.backend!r} is unknown. Choose auto, vllm or transformers.")
        installed = find_spec("vllm") is not None
        if self.backend == "vllm" and not installed:
            raise ImportError("backend=vllm needs vLLM: pip install 'trl_entropy[vllm]', or set backend=transformers.")
        if self.backend == "auto":
            self.backend = "vllm" if installed else "transformers"

    def _check_what(self) -> None:
        if not self.model or not self.output_dir:
            raise ValueError("model and output_dir are needed: which models, and a folder for the results.")
        for name in ("model", "benchmark"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} has one of them twice. Name each once.")
        if bool(self.benchmark) + bool(self.task) != 1 and not (self.dataset_file and not self.benchmark):
            raise ValueError("Set one of benchmark, task and dataset_file (which may also go with one benchmark).")
        if self.dataset_file and (self.task or len(self.benchmark) > 1):
            raise ValueError("dataset_file goes with one benchmark, or alone. For a task, set task_args.")
        if self.task_args and not self.task:
            raise ValueError(f"task_args={self.task_args!r} needs a task. Set task, or leave task_args out.")
        if self.template not in ("auto", "none", *TEMPLATES):
            raise ValueError(f"template={self.template!r} is unknown. Choose auto, none or {', '.join(TEMPLATES)}.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("eval runs as one process. For several GPUs, use vLLM and set tensor_parallel_size.")

    def _check_sampling(self) -> None:
        for name in ("n", "max_new_tokens", "limit", "batch_size", "tensor_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be at least 0.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1.")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"temperature=0 makes all n={self.n} samples of a problem the same. Set n=1.")


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


class Cell:
    """One model on one suite: its prompts, and its samples so far.

    Args:
        arguments: What was asked for.
        suite: The problems.
        checkpoint: The model.
        tokenizer: The model's.

    Raises:
        ValueError: If a prompt and `max_new_tokens` do not fit into the model's context, or the samples that are there
            were made with other settings.
    """

    def __init__(self, arguments: EvaluateArguments, suite: Suite, checkpoint: Checkpoint, tokenizer: Any) -> None:
        self.suite, self.tokenizer, self.n, self.seed = suite, tokenizer, arguments.n, arguments.seed
        prompts = list(suite.problems["prompt"])
        self.in_chat = not isinstance(prompts[0], str)
        template = template_of(tokenizer) if arguments.template == "auto" else arguments.template
        template = template if suite.is_bare else "none"
        if template != "none":
            prompts = [add_instruction(prompt, template) for prompt in prompts]
        if not tokenizer.chat_template:
            prompts = [prompt if isinstance(prompt, str) else paragraphs(prompt) for prompt in prompts]
        assert not isinstance(arguments.chat_template_kwargs, str)
        token_ids = [render(tokenizer, prompt, arguments.chat_template_kwargs) for prompt in prompts]
        self.prompts = token_ids[: arguments.limit]
        self.longest = max(map(len, self.prompts)) + arguments.max_new_tokens
        if checkpoint.context is not None and self.longest > checkpoint.context:
            room = arguments.max_new_tokens - self.longest + checkpoint.context
            remedy = f"Set max_new_tokens to at most {room}." if room > 0 else "Choose problems with shorter prompts."
            raise ValueError(
                f"max_new_tokens={arguments.max_new_tokens} is too long for {checkpoint.name}: with the longest "
                f"prompt of {suite.name} it makes {self.longest} tokens, and its context is {checkpoint.context}. "
                f"{remedy}"
            )
        same = ("backend", "dtype", "temperature", "top_p", "max_new_tokens", "seed", "chat_template_kwargs")
        settings = {
            **{name: getattr(arguments, name) for name in same},
            "template": template,
            "weights": checkpoint.fingerprint,
            "prompts": _digest(token_ids),
            "columns": _digest(suite.problems.remove_columns("prompt").to_list()),
            "reward_funcs": list(suite.reward_names),
        }
        path = Path(arguments.output_dir, "samples", _file_name(checkpoint.name), f"{_file_name(suite.name)}.jsonl")
        self.file = SampleFile(path, settings)

    def missing(self) -> list[tuple[int, int]]:
        """The (problem, sample) pairs that are not on the disk yet, problem by problem."""
        wanted = ((problem, sample) for problem in range(len(self.prompts)) for sample in range(self.n))
        return [pair for pair in wanted if pair not in self.file.samples]

    def complete(self, engine: Engine, batch_size: int) -> None:
        """Generate, grade and write what is missing, a batch at a time."""
        missing, total = self.missing(), len(self.prompts) * self.n
        with tqdm(total=total, initial=total - len(missing), desc=self.suite.name, unit="sample") as bar:
            for start in range(0, len(missing), batch_size):
                self.file.append(self._draw(engine, missing[start : start + batch_size]))
                bar.update(min(batch_size, len(missing) - start))

    def _draw(self, engine: Engine, pairs: Sequence[tuple[int, int]]) -> list[Sample]:
        problems = [problem for problem, _ in pairs]
        seeds = [_sample_seed(self.seed, *pair) for pair in pairs]
        completions = engine.generate([self.prompts[problem] for problem in problems], seeds)
        token_ids = [completion.token_ids for completion in completions]
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in token_ids]
        replies: list[str | dict[str, Any]] = list(texts)
        if self.in_chat:
            prompts = [self.prompts[problem] for problem in problems]
            replies = [reply(self.tokenizer, *ids) for ids in zip(prompts, token_ids, strict=True)]
        rewards = grade(self.suite, problems, replies, token_ids)
        return [
            Sample(*pair, reward, len(completion.token_ids), completion.truncated, text)
            for pair, completion, text, reward in zip(pairs, completions, texts, rewards, strict=True)
        ]

    def samples(self) -> list[list[Sample]]:
        """The samples of each problem."""
        return [[self.file.samples[problem, i] for i in range(self.n)] for problem in range(len(self.prompts))]


def prepare(arguments: EvaluateArguments) -> list[tuple[Checkpoint, list[Cell]]]:
    """Load the problems and check all that can be checked before the first model is loaded.

    Raises:
        ValueError: If the arguments, problems, models or earlier samples do not fit together.
        OSError: If a file is not there, or the hub cannot be reached.
        ImportError: If a task's or reward's package is not installed.
    """
    args = arguments
    assert not isinstance(args.task_args, str)
    suites = load_suites(args.benchmark, args.dataset_file, args.task, args.task_args, args.split, args.reward_funcs)
    prepared = []
    for name in arguments.model:
        checkpoint = find_checkpoint(name, trust_remote_code=arguments.trust_remote_code)
        tokenizer = load_tokenizer(checkpoint, trust_remote_code=arguments.trust_remote_code)
        prepared.append((checkpoint, [Cell(arguments, suite, checkpoint, tokenizer) for suite in suites]))
    return prepared


def evaluate(arguments: EvaluateArguments, prepared: list[tuple[Checkpoint, list[Cell]]]) -> dict[str, Any]:
    """Evaluate every model on every suite, and write `results.json` and `results.md`.

    Returns:
        What `results.json` holds: `settings`, and `results` by suite and model, each as `summarise` with, for every
        model but the first, the `difference` from the first.
    """
    results: dict[str, dict[str, Any]] = {}
    for checkpoint, cells in prepared:
        _complete(arguments, checkpoint, cells)
        for cell in cells:
            by_model = results.setdefault(cell.suite.name, {})
            try:
                result = summarise(cell.samples(), list(arguments.k or ()), arguments.seed)
            except ValueError as error:
                raise RewardError(f"{cell.suite.name}: {error}") from error
            if by_model:
                result["difference"] = compare(result, next(iter(by_model.values())), arguments.seed)
            by_model[checkpoint.name] = result
    report = {"settings": asdict(arguments), "results": results}
    write_text(Path(arguments.output_dir, "results.json"), json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_text(Path(arguments.output_dir, "results.md"), table(results) + "\n")
    return report


def main(argv: list[str] | None = None) -> None:
    """Run `trl-entropy eval`.

    Args:
        argv: The command line without the command's name; `None` for `sys.argv[1:]`.

    Raises:
        SystemExit: With a one-line message if the arguments are wrong, or what a reward function returns is.
    """
    with one_line_if_full("eval", "and run it again: finished samples are kept."):
        try:
            arguments = parse(argv)
            prepared = prepare(arguments)
        except (ValueError, OSError, ImportError) as error:
            raise SystemExit(f"trl-entropy eval: error: {in_one_line(error)}") from error
        try:
            results = evaluate(arguments, prepared)["results"]
        except RewardError as error:
            raise SystemExit(f"trl-entropy eval: error: {error}") from error
    print(table(results))
    print(f"Means over problems in per cent, with 95 % intervals. Written to {arguments.output_dir}.")


def _complete(arguments: EvaluateArguments, checkpoint: Checkpoint, cells: list[Cell]) -> None:
    """Do what the cells of one model miss. The model is loaded only if there is something to do."""
    if not any(cell.missing() for cell in cells):
        return
    engine = _load(arguments, checkpoint, max(cell.longest for cell in cells))
    for cell in cells:
        cell.complete(engine, arguments.batch_size or DEFAULT_BATCH_SIZES[arguments.backend])
    del engine  # the next model needs its memory
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _load(arguments: EvaluateArguments, checkpoint: Checkpoint, longest: int) -> Engine:
    sampling = Sampling(arguments.temperature, arguments.top_p, arguments.max_new_tokens)
    options: dict[str, Any] = {"dtype": arguments.dtype, "trust_remote_code": arguments.trust_remote_code}
    if arguments.backend == "transformers":
        return TransformersEngine(checkpoint, sampling, **options)
    parallel = arguments.tensor_parallel_size
    return VLLMEngine(checkpoint, sampling, max_model_len=longest, tensor_parallel_size=parallel, **options)


def _sample_seed(seed: int, problem: int, sample: int) -> int:
    """A 63-bit seed of a sample's own: what it is, not when it is drawn."""
    return int.from_bytes(sha256(f"{seed}/{problem}/{sample}".encode()).digest()[:8], "big") >> 1


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "--", name).strip("-.") or "model"


def _mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}={value!r} is not JSON ({error}). Write it as in '{{\"size\": 100}}'.") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} is not a mapping. Give one, such as '{{\"size\": 100}}'.")
    return value


if __name__ == "__main__":
    main()
