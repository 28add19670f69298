"""Resuming of asynchronous GRPO where transformers is of version 4, or a process has lost its part."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import TrainerState


def test_the_position_is_the_checkpoints_where_the_state_is_read_later(
    make_async: Callable[..., Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers 4 does it."""
    fields = {"epo_coef": 0.1, "save_strategy": "steps", "save_steps": 2}
    make_async(tmp_path / "run", **fields, max_steps=2).train()
    resumed, found = make_async(tmp_path / "resumed", **fields, max_steps=3), []
    load = resumed._load_optimizer_and_scheduler

    def later(checkpoint: str) -> None:
        state, resumed.state = resumed.state, TrainerState()
        load(checkpoint)
        found.append(resumed._micro_step)
        resumed.state = state

    monkeypatch.setattr(resumed, "_load_optimizer_and_scheduler", later)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert found == [2 * resumed.args.gradient_accumulation_steps]


@pytest.mark.parametrize("other", ["has its own", "has the first one's", "has nothing"])
def test_a_state_is_its_own_only_if_it_is_so_on_every_process(
    make_async: Callable[..., Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """Or they would not agree on what there is to sum."""
    fields = {"epo_coef": 0.1, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_async(tmp_path / "run", **fields).train()
    resumed, owned = make_async(tmp_path / "resumed", **fields), []
    theirs = {"has its own": [1, 1], "has the first one's": [0, 1], "has nothing": [0, 0]}[other]
    monkeypatch.setattr(resumed.accelerator, "gather", lambda ours: torch.cat([ours, torch.tensor([theirs])]))
    monkeypatch.setattr(type(resumed.active), "load_state_dict", lambda *_, own: owned.append(own) or [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed._load_controls(str(tmp_path / "run/checkpoint-2"))
    assert owned == {"has its own": [True], "has the first one's": [False], "has nothing": []}[other]
    assert any("another process cannot read" in str(one.message) for one in caught) == (other == "has nothing")
