"""Every name of TRL that asynchronous training builds on is there; one that is gone is named."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trl_entropy.trainers import contact_table

from . import async_parts

async_contact = async_parts.require("async_contact")


def test_a_loss_without_its_model_is_named(make_async: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_async(epo_coef=0.1)
    monkeypatch.setattr(
        async_contact.AsyncGRPOTrainer, "compute_loss", lambda self, model, inputs, *args, **kwargs: torch.zeros(())
    )
    with pytest.raises(RuntimeError, match="without calling the model that it is given"):
        trainer.train()


@pytest.mark.parametrize("name", contact_table.ASYNC_METHODS)
def test_a_method_that_is_gone_is_named(
    make_async: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(contact_table.ASYNC_METHODS, f"{name}_gone", ())
    with pytest.raises(ImportError, match=rf"not there: AsyncGRPOTrainer\.{name}_gone "):
        make_async()


def test_a_trl_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(async_contact, "import_module", gone)
    with pytest.raises(ImportError, match=r"TRL [\d.]+ has no AsyncGRPOTrainer: .*pip install 'trl==1.16"):
        async_contact.find("AsyncGRPOTrainer")


def test_a_package_that_it_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> Any:
        if name == async_contact.WHERE[-1]:
            raise ModuleNotFoundError("No module named 'aiohttp'", name="aiohttp")
        return SimpleNamespace()

    monkeypatch.setattr(async_contact, "import_module", without)
    with pytest.raises(ImportError, match=r"cannot be imported: No module named 'aiohttp'\..*pip install aiohttp$"):
        async_contact.find("AsyncGRPOTrainer")


def test_the_stable_trainer_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    stable = SimpleNamespace(AsyncGRPOTrainer="stable")
    modules = {"trl.trainer.async_grpo_trainer": stable, "trl.experimental.async_grpo": SimpleNamespace()}
    monkeypatch.setattr(async_contact, "import_module", lambda name: modules.get(name, SimpleNamespace()))
    assert async_contact.find("AsyncGRPOTrainer") == "stable"
