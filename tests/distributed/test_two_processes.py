"""Two processes give the gradients and metrics of one on the same global batch."""

from pathlib import Path

import pytest
import torch

from tests.children import run_processes

from .gradients_worker import CASES, CONTROLS

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("gradients_worker.py")


@pytest.fixture(scope="module")
def results(tiny_model_path, tmp_path_factory):
    """The worker's results on one and on two processes."""
    folder = tmp_path_factory.mktemp("two_processes")
    found = []
    for count in (1, 2):
        output = folder / f"{count}.pt"
        run_processes(count, WORKER, tiny_model_path, output)
        found.append(torch.load(output, weights_only=True))
    return found


def test_the_workers_ran_as_intended(results):
    one, two = results
    assert {case["processes"] for case in one.values()} == {1}
    assert {case["processes"] for case in two.values()} == {2}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_gradients_are_equal(results, case):
    one, two = (result[case]["gradients"] for result in results)
    scale = max(gradient.abs().max() for gradient in one.values())
    assert scale > 0
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-5, atol=1e-5 * scale.item())


def test_history_is_equal(results):
    for case in CASES:
        one, two = (result[case]["history"] for result in results)
        assert one == pytest.approx(two, rel=1e-5)
        assert len(one) == (1 if "epo_coef" in CONTROLS[case[0]] else 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_metrics_are_equal(results, case):
    one, two = (result[case]["metrics"] for result in results)
    assert one == pytest.approx(two, rel=1e-5)
    assert bool(one) == (case[0] != "none")
    if case[0].startswith("asyppo"):
        assert {"asyppo/masked_fraction", "asyppo/explained_variance", "asyppo/critic_1/loss"} <= set(one)
