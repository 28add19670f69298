"""What the tests look at: a run's rollouts, weights and metrics, and the greedy output of vLLM and of the policy."""

from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import set_seed

ALL_CONTROLS = {
    "erc_low": 0.95,
    "erc_high": 1.05,
    "ce_gppo_alpha1": 0.75,
    "ce_gppo_alpha2": 1.0,
    "epo_coef": 0.001,
    "positive_nll_coef": 0.1,
}
METRICS = ("erc/clip_fraction", "ce_gppo/low_fraction", "ce_gppo/high_fraction", "epo/beta", "positive_nll/loss")
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
POLICIES: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 0.01},
    "lora": {"peft_config": LORA, "learning_rate": 0.05},
}
PROMPTS = [f"{i}+{7 * i % 32}="[: 2 + i % 5] for i in range(32)]
NEW_TOKENS = 8


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def keep_rollouts(trainer: Any) -> list[dict[str, Tensor]]:
    """A list that fills with the scored rollouts as training goes on."""
    rollouts, score = [], trainer._generate_and_score_completions

    def observed(inputs: Any) -> dict[str, Tensor]:
        rollouts.append(score(inputs))
        return rollouts[-1]

    trainer._generate_and_score_completions = observed
    return rollouts


def sampled_and_recomputed(rollout: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probs of the rollout's tokens, by vLLM and by the trainer."""
    valid = rollout["completion_mask"].bool()
    return rollout["sampling_per_token_logps"][valid], rollout["old_per_token_logps"][valid]


def greedy_by_engine(trainer: Any) -> list[list[int]]:
    from vllm import SamplingParams

    prompts = trainer.processing_class(PROMPTS)["input_ids"]
    settings = {"temperature": 0.0, "max_tokens": NEW_TOKENS}
    if trainer.vllm_generation.mode == "server":
        return trainer.vllm_generation.vllm_client.generate(prompts, **settings)["completion_ids"]
    outputs = trainer.vllm_generation.llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts], SamplingParams(**settings), use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def greedy_by_policy(trainer: Any) -> list[list[int]]:
    tokenizer = trainer.processing_class
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    training = trainer.model.training
    output = trainer.model.eval().generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    trainer.model.train(training)
    completions = output[:, inputs["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in completions]


def agreeing(trainer: Any) -> int:
    """Number of prompts whose greedy completion is the same by vLLM and by the policy."""
    pairs = zip(greedy_by_engine(trainer), greedy_by_policy(trainer), strict=True)
    return sum(engine == policy for engine, policy in pairs)


def change_a_lot(trainer: Any, noise: float = 0.2) -> None:
    """Add noise of this standard deviation, as large as the weights themselves, to everything that is trained."""
    set_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(noise * torch.randn_like(parameter))
