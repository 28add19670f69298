"""What the PPO loop builds on in TRL's PPOTrainer is looked for when a trainer is built; what is gone is named."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl.experimental.ppo", reason="trl.experimental.ppo is in TRL 1.12 alone")

from trl.experimental.ppo import PPOTrainer

from trl_entropy.ppo.contact import PPO_ATTRIBUTES, PPO_METHODS, check_ppo_trainer
from trl_entropy.trainers.contact_table import OLDEST

SUPPORTED = rf"\(found: .*\)\. Supported: TRL {OLDEST} with what it requires: pip install 'trl=={OLDEST}\.\*'"


@pytest.mark.parametrize("name", PPO_METHODS)
def test_a_renamed_method_is_named_before_anything_is_built(
    make_ppo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for cls in PPOTrainer.__mro__[:-1]:
        if name in vars(cls):
            monkeypatch.delattr(cls, name)
    with pytest.raises(ImportError, match=rf"not there: PPOTrainer\.{name} {SUPPORTED}"):
        make_ppo()


def test_an_argument_that_is_gone_is_named(make_ppo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PPOTrainer, "generate_completions", lambda self: None)
    with pytest.raises(ImportError, match=rf"not there: PPOTrainer\.generate_completions\(sampling\) {SUPPORTED}"):
        make_ppo()


@pytest.mark.parametrize("name", PPO_ATTRIBUTES)
def test_an_attribute_that_is_gone_is_named(name: str) -> None:
    trainer = SimpleNamespace(args=SimpleNamespace(), state=SimpleNamespace())
    for each in PPO_ATTRIBUTES:
        *path, last = each.split(".")
        setattr(getattr(trainer, path[0]) if path else trainer, last, None)
    check_ppo_trainer(trainer)
    *path, last = name.split(".")
    delattr(getattr(trainer, path[0]) if path else trainer, last)
    with pytest.raises(ImportError, match=rf"not there: trainer\.{name} {SUPPORTED}"):
        check_ppo_trainer(trainer)


def test_a_trainer_is_looked_over(make_ppo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check_ppo_trainer(make_ppo())
    monkeypatch.setattr("trl_entropy.ppo.contact.PPO_ATTRIBUTES", ("args.no_such",))
    with pytest.raises(ImportError, match=r"not there: trainer\.args\.no_such"):
        make_ppo()
