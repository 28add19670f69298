"""Trains a tiny policy with every control, on the processes that this script is launched with.

Six steps of all weights, six of LoRA, and six of all weights with critics that first have a rollout to themselves;
each with a checkpoint after the third, in the middle of a rollout. With `--resume`, the last three of them from there.
Every process writes what it ended with.

    accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 2 --mixed_precision no \
        tests/distributed/training_worker.py MODEL FOLDER [--resume]
"""

import gc
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast, TrainerState

from tests.worker import work
from trl_entropy import AsyPPOConfig, AsyPPOTrainer, EntropyGRPOConfig, EntropyGRPOTrainer

CONTROLS = {
    "erc_low": 0.95,
    "erc_high": 1.05,
    "ce_gppo_alpha1": 0.75,
    "ce_gppo_alpha2": 1.0,
    "epo_coef": 0.05,
    "positive_nll_coef": 0.1,
}
SCHEDULE = {"max_steps": 6, "per_device_train_batch_size": 4, "num_generations": 4, "steps_per_generation": 4}
CRITICS = {"num_critics": 2, "critic_warmup_rollouts": 1, "critic_learning_rate": 0.01}
POLICIES = ("full", "lora", "asyppo")
PROMPTS = [f"{i}+{7 * i % 10}="[: 1 + i % 4] for i in range(16)]


class Recorded:
    """Keeps the completions that this process sampled, and what a checkpoint lacked when it was declared complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.sampled: list[list[int]] = []
        self.lacking: list[str] = []
        super().__init__(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        save_to_json = TrainerState.save_to_json

        def spy(state: TrainerState, path: str) -> None:
            needed = {f"rollout_rank{rank}.pt" for rank in (0, 1)} | {f"rng_state_{rank}.pth" for rank in (0, 1)}
            self.lacking += sorted(needed - set(os.listdir(os.path.dirname(path))))
            save_to_json(state, path)

        TrainerState.save_to_json = spy
        try:
            super()._save_checkpoint(model, trial)
        finally:
            TrainerState.save_to_json = save_to_json

    def on_rollout(self, output: dict[str, Any], rewards: torch.Tensor) -> None:
        super().on_rollout(output, rewards)
        self.sampled += output["completion_ids"].tolist()

    def _save_rng_state(self, output_dir: str) -> None:
        time.sleep(0.3 * self.accelerator.process_index)  # the second process is late
        super()._save_rng_state(output_dir)


class RecordedGRPO(Recorded, EntropyGRPOTrainer):
    pass


class RecordedAsyPPO(Recorded, AsyPPOTrainer):
    pass


def parity_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(ord(text[0]) % 2) if text else 0.0 for text in completions]


def build(model: str, output_dir: str, policy: str) -> Any:
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    lora, critics = policy == "lora", policy == "asyppo"
    args = (AsyPPOConfig if critics else EntropyGRPOConfig)(
        output_dir,
        **CONTROLS,
        **SCHEDULE,
        **(CRITICS if critics else {}),
        # DeepSpeed takes two processes on a machine without a GPU for its own, if they are not declared to be on CPU
        **({"ddp_backend": "gloo"} if deepspeed else {"use_cpu": True}),
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        learning_rate=0.1 if lora else 0.03,
        epsilon=0.1,
        max_completion_length=6,
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        per_device_eval_batch_size=4,
        seed=0,
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate shards on accelerators only: it would call two CPU processes MULTI_CPU and use DDP
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    prompts = Dataset.from_dict({"prompt": PROMPTS})
    return (RecordedAsyPPO if critics else RecordedGRPO)(
        model,
        parity_reward,
        args,
        prompts,
        eval_dataset=prompts.select(range(2)),
        processing_class=PreTrainedTokenizerFast.from_pretrained(model),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
        **({"critics": model} if critics else {}),
    )


def unsharded(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of the parameters, whole on every process."""
    gather: Any = nullcontext()
    if any(hasattr(value, "ds_id") for value in parameters.values()):  # DeepSpeed ZeRO-3
        import deepspeed

        gather = deepspeed.zero.GatheredParameters(list(parameters.values()))
    with gather:
        return {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
            for name, value in parameters.items()
        }


def run(model: str, folder: Path, policy: str, resume: bool) -> None:
    """Train and write `FOLDER/POLICY-whole-rankN.pt`, or `-resumed-`."""
    name = f"{policy}-{'resumed' if resume else 'whole'}"
    trainer = build(model, str(folder / name), policy)
    start = unsharded(dict(trainer.model.named_parameters()))
    trainer.train(resume_from_checkpoint=str(folder / f"{policy}-whole" / "checkpoint-3") if resume else None)
    parameters = dict(trainer.model.named_parameters())
    found = {
        "processes": trainer.accelerator.num_processes,
        "kind": trainer.accelerator.distributed_type.value,
        "sharded": [
            name for name, value in parameters.items() if isinstance(value, DTensor) or hasattr(value, "ds_id")
        ],
        "start": start,
        "weights": unsharded(parameters),
        "log": trainer.state.log_history,
        "sampled": trainer.sampled,
        "lacking": trainer.lacking,
    }
    torch.save(found, folder / f"{name}-rank{trainer.accelerator.process_index}.pt")


def leave_to_gloo() -> None:
    """Keep DeepSpeed from compiling collectives through shared memory, which it has for inference."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    model, folder = sys.argv[1:3]
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        leave_to_gloo()
    for policy in POLICIES:
        run(model, Path(folder), policy, "--resume" in sys.argv)
        gc.collect()  # the trainer's DDP wrapper must go before the process group


if __name__ == "__main__":
    work(main)
