"""The recorder of tokens for a trainer of GRPO, synchronous or not."""

from typing import Any

from ..controls import CONTROLS
from ..telemetry.recorder import RecorderCallback, TokenRecorder


def add_recorder(trainer: Any, tokenizer: Any, micro_batches_per_rollout: int) -> TokenRecorder:
    """The recorder that the trainer's configuration asks for, called at the ends of its steps.

    Args:
        trainer: With an `args` that has `record_tokens` and the fields of the controls.
        tokenizer: Of the policy.
        micro_batches_per_rollout: Of a process, all iterations counted.
    """
    args = trainer.args
    settings = {name: value for control in CONTROLS for name, value in control.settings_of(args).items()}
    clip_range = {"epsilon_low": trainer.epsilon_low, "epsilon_high": trainer.epsilon_high}
    recorder = TokenRecorder(
        args.output_dir,
        args.record_tokens,
        tokenizer,
        settings | clip_range | {"record_tokens": args.record_tokens},
        process=trainer.accelerator.process_index,
        num_processes=trainer.accelerator.num_processes,
        seed=args.seed,
        level=args.importance_sampling_level,
        loss_type=args.loss_type,
        delta=args.delta,
        clip_range={"eps_low": trainer.epsilon_low, "eps_high": trainer.epsilon_high},
        entropy_floor=args.erc_entropy_floor,
    )
    trainer.add_callback(RecorderCallback(recorder, micro_batches_per_rollout))
    return recorder
