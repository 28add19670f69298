"""What each arm drops of the first rollout, where almost no completion is right: why some seeds learn little with ERC.

From the repository, with the extras `plots` and `smollm2`, a quarter of an hour of one thread:

    python recipes/study/smollm2/first_rollout.py

The first eight optimizer steps of the runs `sums/{arm}/1e-05/{seed}`, seeds 0 to 4. All arms train on the same sampled
completions, one prompt's eight at a step, and differ only by what they drop. Counted are the tokens of the steps after
the first: those before which the policy has moved. A finished run is a line of `first-rollout.jsonl` and is not done
again; then the table of `README.md` is made.
"""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import torch
from arms import MIDDLE_RATE, MODEL, SEEDS, TASK, TRAINING, Results, Run
from epo_oscillation import put_table
from page import PAGE, RESULTS, table
from problems import load_tokenizer, make_reward
from run import append_result, keep_memory, read_results
from tqdm import tqdm
from train import settings_of_run, trained

from trl_entropy.pretrained import resolve_model
from trl_entropy.telemetry.record import TokenRecord, read_record

COUNTED = Path(__file__).parent / "first-rollout.jsonl"
COMPARED = ("ppo-clip", "erc", "erc-outward")
MARKER = "first rollout"
STEPS = TRAINING["steps_per_generation"]


def counts(record: TokenRecord) -> dict[str, dict[str, Any]]:
    """Of the tokens with a positive and with a negative advantage: how many, how many dropped, importance ratio."""
    found = {name: record.sampled.column(name) for name in ("step", "A", "gradient", "ratio")}
    late = found["step"] > 1
    result = {}
    for name, chosen in (("rewarded", late & (found["A"] > 0)), ("others", late & (found["A"] < 0))):
        ratios = found["ratio"][chosen].tolist()
        result[name] = {
            "tokens": len(ratios),
            "dropped": int((found["gradient"][chosen] == 0).sum()),
            "ratio": round(statistics.median(ratios), 3) if ratios else None,
        }
    return result


def count(run: Run, model: str) -> dict[str, Any]:
    """Train on the first rollout of a run, and count."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"output_dir": folder, "max_steps": STEPS, "record_tokens": 1000}
        trained(run, model, [make_reward(load_tokenizer(model))], settings_of_run(run, {}) | own)
        return {"run": run.name} | counts(read_record(Path(folder)))


def first_rollout_table(counted: Results, results: Results) -> str:
    """A row a seed: of each arm the shares that it drops, and what becomes of the rewarded tokens."""
    rows = []
    for seed in SEEDS:
        names = [Run(TASK, arm, MIDDLE_RATE, seed).name for arm in COMPARED]
        found = [counted[name] for name in names]
        ends = [f"{results[name]['pass']['1']:.3f}" if name in results else "not run" for name in names]
        rows.append((seed, found[0]["rewarded"]["tokens"], *map(_shown, found), " / ".join(ends)))
    shown = (f"`{arm}`" for arm in COMPARED)
    return table(("seed", "rewarded tokens", *shown, "pass@1 after the whole run"), rows)


def _shown(one: dict[str, Any]) -> str:
    shares = [one[name]["dropped"] / one[name]["tokens"] for name in ("rewarded", "others")]
    return "{:.2f}, {:.2f}; {:.2f}".format(*shares, one["rewarded"]["ratio"])


def main() -> None:
    torch.set_num_threads(1)
    keep_memory()
    model, counted = resolve_model(MODEL), read_results(COUNTED)
    for run in tqdm([Run(TASK, arm, MIDDLE_RATE, seed) for seed in SEEDS for arm in COMPARED], unit="run"):
        if run.name not in counted:
            counted[run.name] = count(run, model)
            append_result(counted[run.name], COUNTED)
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(put_table(text, MARKER, first_rollout_table(counted, read_results(RESULTS))), encoding="utf-8")


if __name__ == "__main__":
    main()
