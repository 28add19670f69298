"""Train with Brake: `python run.py MODEL FOLDER`. Its folder must hold the package with the control in it."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from trl import GRPOConfig

from trl_entropy import EntropyGRPOConfig, EntropyGRPOTrainer
from trl_entropy.commands.methods import main as methods
from trl_entropy.commands.report import main as report
from trl_entropy.telemetry.record import read_record


def parity(completion_ids: list[list[int]], **kwargs: object) -> list[float]:
    return [float(sum(ids) % 2) for ids in completion_ids]


def train(model: str, folder: str, resume: str | None = None, **fields: object) -> EntropyGRPOTrainer:
    config = EntropyGRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=8,
        num_generations=4,
        steps_per_generation=2,
        max_completion_length=6,
        max_steps=8,
        save_strategy="steps",
        save_steps=5,
        logging_steps=1,
        learning_rate=1e-3,
        record_tokens=64,
        disable_tqdm=True,
        **fields,
    )
    rows = Dataset.from_dict({"prompt": [f"{i}+{i}=" for i in range(32)]})
    trainer = EntropyGRPOTrainer(model, parity, args=config, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    trainer.create_model_card()
    return trainer


def main(model: str, folder: str) -> None:
    whole = train(model, f"{folder}/run", brake_rollouts=2.0)
    resumed = train(model, f"{folder}/again", resume=f"{folder}/run/checkpoint-5", brake_rollouts=2.0)
    plain = train(model, f"{folder}/plain")
    report([f"{folder}/run", "--output", f"{folder}/report.html"])
    refusals = []
    for fields in ({"brake_rollouts": -1.0}, {"brake_rollouts": 1.0, "importance_sampling_level": "sequence"}):
        try:
            EntropyGRPOConfig(output_dir=folder, use_cpu=True, bf16=False, **fields)
        except ValueError as error:
            refusals.append(str(error))
    record = read_record(Path(folder, "run"))
    weights = [dict(trainer.model.named_parameters()) for trainer in (whole, resumed, plain)]
    methods([])
    seen = {
        "default": EntropyGRPOConfig(output_dir=folder, use_cpu=True, bf16=False).brake_rollouts,
        "is TRL's field": hasattr(GRPOConfig, "brake_rollouts"),
        "resumed": all(torch.equal(value, weights[1][name]) for name, value in weights[0].items()),
        "acts": not all(torch.equal(value, weights[2][name]) for name, value in weights[0].items()),
        "fractions": [entry["brake/fraction"] for entry in whole.state.log_history if "brake/fraction" in entry],
        "rollouts": resumed.active.states["brake"].rollouts,
        "card": Path(folder, "run", "README.md").read_text(encoding="utf-8"),
        "braked": sorted(set(record.sampled.column("braked").tolist())),
        "gradient": sorted(set((record.sampled.column("gradient") / record.sampled.column("A")).round(1).tolist())),
        "page": Path(folder, "report.html").read_text(encoding="utf-8"),
        "figures": sorted(path.name for path in Path(folder, "report_figures").glob("*brake*.svg")),
        "refusals": refusals,
    }
    Path(folder, "seen.json").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
