"""Token rewards of a group that is spread over two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.children import run_processes

from . import token_level_worker as worker

pytestmark = pytest.mark.slow
SCRIPT = Path(worker.__file__)


@pytest.fixture(scope="module")
def results(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What the processes of one and of two ended with."""
    found = []
    for count in (1, 2):
        folder = tmp_path_factory.mktemp(f"{count}_processes")
        run_processes(count, SCRIPT, tiny_model_path, folder)
        found.append([torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(count)])
    return found


def by_hand(case: str) -> list[list[float]]:
    """The advantages of the group's tokens."""
    given = [worker.values(index) for index in range(worker.GROUP)]
    if case == "token_advantages":
        return given
    ended = [worker.completion(index)[-1] == worker.EOS for index in range(worker.GROUP)]
    texts = ["x" * (length - end) for length, end in zip(worker.LENGTHS, ended, strict=True)]
    rewards = torch.tensor(worker.rewards(texts))
    of_completions = ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()
    baseline = sum(map(sum, given)) / worker.GROUP
    found = []
    for index, row in enumerate(given):
        counts = case != "masked" or ended[index]
        found.append(
            [of_completions[index] + sum(row[t:]) - baseline if counts else 0.0 for t in range(worker.LENGTHS[index])]
        )
    return found


@pytest.mark.parametrize("case", worker.CASES)
def test_the_group_is_whole_on_every_process(results: list[list[dict[str, Any]]], case: str) -> None:
    one, two = ([process[case] for process in processes] for processes in results)
    assert [process["processes"] for process in (*one, *two)] == [1, 2, 2]
    expected = by_hand(case)
    for processes in (one, two):
        found = [row for process in processes for row in process["advantages"]]
        assert len(found) == worker.GROUP
        for row, want in zip(found, expected, strict=True):
            assert row == pytest.approx(want, abs=1e-5)
    assert (len(one[0]["logged"]) > 0) == (case != "token_advantages")
    for process in two:
        assert process["logged"] == pytest.approx(one[0]["logged"], rel=1e-6)
        torch.testing.assert_close(process["weights"], one[0]["weights"], rtol=1e-5, atol=1e-6)
