"""Gradients and metrics of one global batch, on as many processes as this script is launched with.

Every process takes its slice of the same handmade batch. Rank 0 writes, for every case, the gradients that the
optimizer would see and the metrics that would be logged.

    torchrun --standalone --nproc_per_node 2 tests/distributed/gradients_worker.py MODEL OUTPUT.pt
"""

import itertools
import os
import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from tests.worker import work
from trl_entropy import AsyPPOConfig, AsyPPOTrainer, EntropyGRPOConfig, EntropyGRPOTrainer

ROWS, PROMPT, TOKENS, STEPS_PER_GENERATION = 8, 3, 7, 4
ERC = {"erc_low": 0.95, "erc_high": 1.05}
CE_GPPO = {"ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0}
NLL = {"positive_nll_coef": 0.1}
EPO = {"epo_coef": 0.1}
# No `entropy_coef`: TRL's own bonus is a mean over each process's tokens. The entropy filter gates EPO's here.
ASYPPO = {"critic_learning_rate": 1e-3}
LOOP = {"ce_gppo_loop_target": 9.0, "ce_gppo_loop_kp": 0.05}
STARE = {"stare_target_entropy": 9.0, "stare_variant": "C2", "stare_fraction": 0.3, "stare_adaptive_step": 0.1}
FAMILY: dict[str, dict[str, Any]] = {
    "stare": STARE,
    "qae": {"qae_quantile": 0.4},
    "entropy_advantage": {"entropy_advantage_alpha": 0.4},
    "dppo": {"dppo_divergence": "tv", "dppo_delta_low": 1e-3, "dppo_delta_high": 1e-3},
    "ce_gppo_loop": {**CE_GPPO, **LOOP},
    "par": {"par_schedule": "entropy", "par_target": 0.1, "par_delta": 0.2},
    "entropic": {"entropic_target": 9.0, "entropic_kp": 0.05, "entropic_probability": 0.02},
    "steer": {"steer_min_weight": 0.7},
    "fipo": {"fipo_half_life": 2.0},
    "clip_cov": {"clip_cov_fraction": 0.2, "clip_cov_low": -9.0, "clip_cov_high": 9.0},
    "kl_cov": {"kl_cov_coef": 1.0, "kl_cov_fraction": 0.2},
    "erc_target": {**ERC, "erc_target_fraction": 0.3, "erc_side": "outward"},
}
"""What selects or steers by the global batch, and the rest of the table, each on its own; mostly per token."""
CONTROLS: dict[str, dict[str, Any]] = {
    "none": {},
    "erc": ERC,
    "ce_gppo": CE_GPPO,
    "nll": NLL,
    "epo": EPO,
    "epo_per_turn": {**EPO, "epo_history": "per_turn"},
    "all": {**ERC, **CE_GPPO, **NLL, **EPO},
    **FAMILY,
    "asyppo": ASYPPO,
    "asyppo_all": {**ASYPPO, **ERC, **CE_GPPO, **NLL, **EPO},
}
CASES = [
    *itertools.product(
        [name for name in CONTROLS if "asyppo" not in name and name not in FAMILY],
        ["dapo", "grpo"],
        ["token", "sequence"],
    ),
    *((name, "dapo", "token") for name in FAMILY),
    ("asyppo", "dapo", "token"),
    ("asyppo_all", "grpo", "sequence"),
]


def global_batch(vocabulary: int) -> dict[str, torch.Tensor]:
    """Random completions of ragged lengths, old log-probs and entropies near and far from the policy's."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, vocabulary, (ROWS, PROMPT + TOKENS), generator=generator)
    lengths = torch.tensor([7, 1, 4, 7, 2, 6, 3, 5])
    return {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": torch.ones(ROWS, PROMPT, dtype=torch.long),
        "completion_ids": ids[:, PROMPT:],
        "completion_mask": (torch.arange(TOKENS) < lengths.unsqueeze(1)).long(),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.0, 1.0]),
        # an observation in the second token of every completion, so that the others are in two turns
        "tool_mask": torch.tensor([1, 0, 1, 1, 1, 1, 1]).repeat(ROWS, 1),
        "noise": torch.randn(ROWS, TOKENS, generator=generator),
        "entropy_scale": 1 + 0.1 * torch.randn(ROWS, TOKENS, generator=generator),
        "rewards": torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]),
    }


def local_inputs(trainer: EntropyGRPOTrainer) -> dict[str, Any]:
    """This process's slice of the batch, with what the trainer's own rollout would add to it."""
    device = trainer.accelerator.device
    batch = {name: value.to(device) for name, value in global_batch(trainer.model.config.vocab_size).items()}
    num_items = (batch["completion_mask"] * batch["tool_mask"]).sum() * STEPS_PER_GENERATION
    share = ROWS // trainer.accelerator.num_processes
    start = trainer.accelerator.process_index * share
    inputs: dict[str, Any] = {name: value[start : start + share] for name, value in batch.items()}
    noise, scale = inputs.pop("noise"), inputs.pop("entropy_scale")
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        logps, entropies, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, TOKENS, compute_entropy=True
        )
    inputs |= {"old_per_token_logps": logps + 0.4 * noise, "old_entropies": entropies * scale}
    trainer.on_rollout(inputs, inputs.pop("rewards"))
    # the counts span a rollout, of which this batch is one step of several
    for name in ("num_correct_tokens", "num_trajectories"):
        if name in inputs:
            inputs[name] = inputs[name] * STEPS_PER_GENERATION
    return inputs | {"num_items_in_batch": num_items}


def build(model: str, folder: str, case: tuple[str, str, str], **precision: bool) -> EntropyGRPOTrainer:
    """The trainer of a case; on CPU in float32, unless `use_cpu` and `bf16` say otherwise."""
    name, loss_type, level = case
    with_critics, processes = name.startswith("asyppo"), int(os.environ.get("WORLD_SIZE", "1"))
    args = (AsyPPOConfig if with_critics else EntropyGRPOConfig)(
        folder,
        **CONTROLS[name],
        **({"critic_per_device_train_batch_size": 4 // processes} if with_critics else {}),
        loss_type=loss_type,
        importance_sampling_level=level,
        **{"use_cpu": True, "bf16": False, **precision},
        gradient_checkpointing=False,
        report_to="none",
        num_generations=2,
        max_completion_length=TOKENS,  # the longest completions are truncated
        generation_batch_size=ROWS * STEPS_PER_GENERATION,
        per_device_train_batch_size=ROWS // processes,
    )
    trainer = (AsyPPOTrainer if with_critics else EntropyGRPOTrainer)(
        model,
        lambda completions, **_: [0.0] * len(completions),
        args,
        Dataset.from_dict({"prompt": ["1"] * 64}),
        processing_class=AutoTokenizer.from_pretrained(model),
        **({"critics": model} if with_critics else {}),
    )
    return trainer


def run_case(model: str, folder: str, case: tuple[str, str, str]) -> dict[str, Any]:
    trainer = build(model, folder, case)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer.state.max_steps = 8 * STEPS_PER_GENERATION
    wrapped = trainer.accelerator.prepare(trainer.model)
    # the first rollout's step enters the history that the second one is smoothed against
    inputs = local_inputs(trainer)
    with torch.no_grad():
        trainer.compute_loss(wrapped, inputs)
    inputs = local_inputs(trainer)
    loss = trainer.compute_loss(wrapped, inputs)
    trainer.accelerator.backward(loss)
    return {
        "gradients": {name: value.grad for name, value in trainer.model.named_parameters()},
        "metrics": trainer.control_metrics() | critic_metrics(trainer),
        "history": trainer.control_state().get("epo", {"steps": []})["steps"],
        "processes": trainer.accelerator.num_processes,
    }


def critic_metrics(trainer: EntropyGRPOTrainer) -> dict[str, float]:
    """Of both rollouts, as they would be averaged in the log."""
    found = {key: value for key, value in trainer._metrics["train"].items() if key.startswith("asyppo/")}
    return {key: sum(values) / len(values) for key, values in found.items()}


def main() -> None:
    model, output = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        results = {case: run_case(model, folder, case) for case in CASES}
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(results, output)


if __name__ == "__main__":
    work(main)
