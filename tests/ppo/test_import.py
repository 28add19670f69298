"""Where TRL has no PPOTrainer, the import says which release has it and what to use instead."""

import importlib
import importlib.util
import sys

import pytest
import trl

PPO = "trl.experimental.ppo"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget that the modules have been imported, for the length of a test."""
    for name in [name for name in sys.modules if f"{name}.".startswith((f"{PPO}.", "trl_entropy.ppo."))]:
        monkeypatch.delitem(sys.modules, name)


def without(monkeypatch: pytest.MonkeyPatch, module: str) -> pytest.ExceptionInfo[ImportError]:
    """What importing `trl_entropy.ppo` raises where `module` is not installed."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as caught:
        importlib.import_module("trl_entropy.ppo")
    return caught


@pytest.mark.usefixtures("fresh")
def test_import_names_the_release_and_the_alternative(monkeypatch) -> None:
    message = str(without(monkeypatch, PPO).value)
    for words in (f"TRL {trl.__version__} has no PPOTrainer", "TRL 1.12", "trl_entropy.AsyPPOTrainer", "trl==1.12.0"):
        assert words in message


@pytest.mark.usefixtures("fresh")
def test_it_is_so_on_this_trl() -> None:
    if importlib.util.find_spec(PPO):
        pytest.skip(f"TRL {trl.__version__} has a PPOTrainer")
    with pytest.raises(ImportError, match=r"has no PPOTrainer; TRL 1\.12 is the last release that has it"):
        importlib.import_module("trl_entropy.ppo")


@pytest.mark.usefixtures("fresh")
def test_another_missing_module_is_not_taken_for_a_missing_trainer(monkeypatch) -> None:
    pytest.importorskip(PPO, reason=f"{PPO} is in TRL 1.12 alone")
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{PPO}.")]:
        monkeypatch.delitem(sys.modules, name)
    assert "has no PPOTrainer" not in str(without(monkeypatch, f"{PPO}.ppo_config").value)
