"""Two processes with sharded critics give the values, updates and selections of one."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification

from tests.children import run_processes
from trl_entropy.critics import state_values

from .conftest import make_rollout
from .ensemble_worker import ROWS, SETTINGS, TOKENS, VOCABULARY

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("ensemble_worker.py")


@pytest.fixture(scope="module")
def runs(tiny_model_path, tmp_path_factory):
    """Folders of the worker's results on one and on two processes."""
    folders = []
    for count in (1, 2):
        folder = tmp_path_factory.mktemp(f"critics_on_{count}")
        run_processes(count, WORKER, tiny_model_path, folder)
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def results(runs):
    found = [torch.load(folder / "results.pt", weights_only=True) for folder in runs]
    assert [result["processes"] for result in found] == [1, 2]
    return found


@pytest.mark.parametrize("case", SETTINGS)
def test_values_and_updates_are_equal(results, case):
    one, two = (result[case] for result in results)
    assert one["before"].shape == (2, ROWS, TOKENS + 1)
    torch.testing.assert_close(two["before"], one["before"], rtol=1e-5, atol=1e-5)
    moved = (one["after"] - one["before"]).abs().mean((1, 2))
    differing = (two["after"] - one["after"]).abs().mean((1, 2))
    # bfloat16 gradients are rounded for each process before they are summed
    limit = 0.15 if case == "bfloat16" else 1e-4
    assert (differing <= limit * moved).all()
    assert moved.min() > 0.01
    assert two["metrics"] == pytest.approx(one["metrics"], rel=limit)


@pytest.mark.parametrize("case", SETTINGS)
def test_resume_is_exact(results, case):
    for result in results:
        assert torch.equal(result[case]["resumed"], result[case]["after"])


def test_forward_passes_are_as_many_on_both(results):
    first, second = results[1]["forwards"]
    assert first == second
    assert min(min(counts) for counts in first) > 0


def test_sharded_critics_are_saved_whole(runs, results):
    rollout = make_rollout(VOCABULARY, rows=ROWS, tokens=TOKENS)
    for folder, result in zip(runs, results, strict=True):
        for index, expected in enumerate(result["float32"]["saved"]):
            critic = AutoModelForTokenClassification.from_pretrained(
                folder / "float32" / "critics" / f"critic_{index}"
            )
            found = state_values(critic.eval(), rollout.input_ids, rollout.attention_mask, TOKENS)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_selections_are_equal(results):
    one, two = (result["selection"] for result in results)
    for name, selected in one.items():
        assert torch.equal(two[name], selected)
        assert selected.any()
