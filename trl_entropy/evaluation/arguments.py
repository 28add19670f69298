"""The fields of an evaluation, and their checks."""

import json
import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from trl_entropy.evaluation.benchmarks import BENCHMARKS
from trl_entropy.tasks.templates import TEMPLATES

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


def _mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}={value!r} is not JSON ({error}). Write it as in '{{\"size\": 100}}'.") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} is not a mapping. Give one, such as '{{\"size\": 100}}'.")
    return value
