"""Which overrides of a subclass take the place of TRL's methods."""

from typing import Any

import pytest
from torch import Tensor
from trl import GRPOTrainer

from trl_entropy.trainers.overrides import own_loss


class HandsOn(GRPOTrainer):
    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        def doubled(loss: Tensor) -> Tensor:
            return 2.0 * loss

        return doubled(super()._compute_loss(model, inputs))


class HandsOnWithin(GRPOTrainer):
    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        def loss() -> Tensor:
            return super(HandsOnWithin, self)._compute_loss(model, inputs)

        return loss()


class GoesOnward(GRPOTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self._compute_loss(model, inputs)


class HasItsOwn(GRPOTrainer):
    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return model(**inputs).loss


class StepsAround(GRPOTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return model(**inputs).loss


@pytest.mark.parametrize(
    ("trainer_class", "own"),
    [
        (HandsOn, None),
        (HandsOnWithin, None),
        (GoesOnward, None),
        (HasItsOwn, "HasItsOwn._compute_loss"),
        (StepsAround, "StepsAround.compute_loss"),
    ],
)
def test_a_method_hands_on_where_its_code_names_it(trainer_class: type, own: str | None) -> None:
    assert own_loss(trainer_class) == own
