"""Models against suites: what is not on the disk yet is generated and graded, and all of it is summarised.

Every finished sample is on the disk before the next batch starts; called again with the same settings, it does only
what is missing.
"""

import gc
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from trl_entropy.evaluation.arguments import DEFAULT_BATCH_SIZES, EvaluateArguments
from trl_entropy.evaluation.checkpoints import Checkpoint, find_checkpoint, load_tokenizer
from trl_entropy.evaluation.engines import Engine, Sampling, TransformersEngine, VLLMEngine
from trl_entropy.evaluation.results import compare, summarise, table
from trl_entropy.evaluation.samples import Sample, SampleFile
from trl_entropy.evaluation.suites import RewardError, Suite, grade, load_suites
from trl_entropy.files import write_text
from trl_entropy.tasks.templates import add_instruction, paragraphs, render, reply, template_of


class ModelOnSuite:
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


def prepare(arguments: EvaluateArguments) -> list[tuple[Checkpoint, list[ModelOnSuite]]]:
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
        prepared.append((checkpoint, [ModelOnSuite(arguments, suite, checkpoint, tokenizer) for suite in suites]))
    return prepared


def evaluate(arguments: EvaluateArguments, prepared: list[tuple[Checkpoint, list[ModelOnSuite]]]) -> dict[str, Any]:
    """Evaluate every model on every suite, and write `results.json` and `results.md`.

    Returns:
        What `results.json` holds: `settings`, and `results` by suite and model, each as `summarise` with, for every
        model but the first, the `difference` from the first.
    """
    results: dict[str, dict[str, Any]] = {}
    for checkpoint, on_suites in prepared:
        _complete(arguments, checkpoint, on_suites)
        for on_suite in on_suites:
            by_model = results.setdefault(on_suite.suite.name, {})
            try:
                result = summarise(on_suite.samples(), list(arguments.k or ()), arguments.seed)
            except ValueError as error:
                raise RewardError(f"{on_suite.suite.name}: {error}") from error
            if by_model:
                result["difference"] = compare(result, next(iter(by_model.values())), arguments.seed)
            by_model[checkpoint.name] = result
    report = {"settings": asdict(arguments), "results": results}
    write_text(Path(arguments.output_dir, "results.json"), json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_text(Path(arguments.output_dir, "results.md"), table(results) + "\n")
    return report


def _complete(arguments: EvaluateArguments, checkpoint: Checkpoint, on_suites: list[ModelOnSuite]) -> None:
    """Do what one model misses. The model is loaded only if there is something to do."""
    if not any(on_suite.missing() for on_suite in on_suites):
        return
    engine = _load(arguments, checkpoint, max(on_suite.longest for on_suite in on_suites))
    for on_suite in on_suites:
        on_suite.complete(engine, arguments.batch_size or DEFAULT_BATCH_SIZES[arguments.backend])
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
