"""Asynchronous GRPO trains the pretrained model, which transformers serves in the place of vLLM."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from tests.conftest import parity_reward
from tests.trainers import async_parts
from tests.trainers.test_grpo import ALL_CONTROLS, logged, weights

from .conftest import KINDS, POLICIES, PRECISIONS, SCHEDULE, check_entries

async_parts.require("async_grpo")

pytestmark = pytest.mark.real_model

NOISE = {"float32": 1e-4, "bfloat16": 0.2}
"""Nats between the log-probs of the server and those of the trainer under the same weights."""


class Server(async_parts.MadeRollouts, async_parts.NoTransfer):
    """Samples of the model as it was handed over last."""

    def __init__(self, path: str, tokenizer: PreTrainedTokenizerBase, prompts: list[str], dtype: torch.dtype) -> None:
        super().__init__(group_size=SCHEDULE["num_generations"])
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self.tokenizer, self.prompts = tokenizer, itertools.cycle(prompts)

    @torch.no_grad()
    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        served = dict(self.model.named_parameters())
        for name, value in iterator:
            served.pop(name).copy_(value)
        assert not served

    def _group(self) -> Iterator[Any]:
        from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

        self.groups += 1
        prompt = self.tokenizer(next(self.prompts))["input_ids"]
        made = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=True,
            top_k=0,
            max_new_tokens=SCHEDULE["max_completion_length"],
            num_return_sequences=self.group_size,
            output_logits=True,
            return_dict_in_generate=True,
        )
        completions = made.sequences[:, len(prompt) :].tolist()
        logps = torch.stack(made.logits, dim=1).float().log_softmax(-1)
        rewards = parity_reward(self.tokenizer.batch_decode(completions, skip_special_tokens=True))
        for ids, log_probs, reward in zip(completions, logps, rewards, strict=True):
            end = self.tokenizer.eos_token_id
            ids = ids[: ids.index(end) + 1] if end in ids else ids
            chosen = log_probs[range(len(ids)), ids].numpy()
            yield RolloutSample(
                prompt=[],
                completion=[],
                input_ids=np.array(prompt + ids),
                completion_mask=np.array([0] * len(prompt) + [1] * len(ids)),
                old_log_probs=np.concatenate([np.zeros(len(prompt), dtype=np.float32), chosen]),
                advantage=reward - sum(rewards) / len(rewards),
                model_version=self.version,
                group_id=self.groups,
                metrics={"reward": reward},
            )


@pytest.mark.parametrize(("policy", "precision"), KINDS)
def test_the_controls_train_on_what_is_served(
    tiny_model_path: str,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tiny_dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    precision: str,
) -> None:
    """The second and third step are on samples that the weights of one step before have written."""
    async_parts.run_on_cpu(monkeypatch)
    dtype = getattr(torch, precision)
    server = Server(tiny_model_path, tiny_tokenizer, tiny_dataset["prompt"], dtype)
    fields = {**PRECISIONS[precision], **POLICIES[policy], **ALL_CONTROLS}
    trainer = async_parts.make_async_trainer(
        str(tmp_path / "run"),
        tiny_model_path,
        tiny_dataset,
        rollout_worker=server,
        weight_transfer=server,
        max_steps=3,
        lr_scheduler_type="constant",
        **fields,
    )
    trained = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert policy == "full" or all("lora_" in name for name in trained)
    start = weights(trainer)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    check_entries(steps)
    assert logged(trainer, "staleness/age") == [0.0, 1.0, 1.0]
    clipped = logged(trainer, "erc/clip_fraction")
    assert clipped[0] == 0.0 < max(clipped)
    gaps = logged(trainer, "staleness/behaviour_gap")
    assert len(gaps) == 2
    assert max(gaps) < NOISE[precision]
    # TRL merges an adapter into the weights for the hand-over and takes it out again, which leaves rounding in them
    assert any(not torch.equal(value, start[name]) for name, value in weights(trainer).items() if name in trained)
