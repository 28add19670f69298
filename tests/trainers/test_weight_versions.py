"""Earlier weights for a forward pass, and the way back."""

import pytest
import torch
from torch import Tensor, nn

from trl_entropy.trainers.weight_versions import WeightVersions


def layer(value: float) -> nn.Linear:
    made = nn.Linear(2, 2)
    with torch.no_grad():
        made.weight.fill_(value)
        made.bias.fill_(value)
    return made


def test_each_version_is_what_it_was_and_the_model_stays_what_it_is() -> None:
    versions, model = WeightVersions(3), layer(0.0)
    for version in range(1, 4):
        with torch.no_grad():
            model.weight.fill_(float(version))
        versions.keep(version, model)
    with torch.no_grad():
        model.weight.fill_(0.1)
    changes = model.weight._version
    for version in (1, 3, 2):
        with versions.at(version, model):
            assert bool((model.weight == version).all())
        assert bool((model.weight == 0.1).all())
    assert model.weight._version == changes, "autograd would refuse a graph that was made before"


def test_the_newest_ones_are_kept() -> None:
    versions, model = WeightVersions(2), layer(1.0)
    for version in (4, 5, 6):
        versions.keep(version, model)
    with versions.at(5, model), versions.at(6, model):
        pass
    with (
        pytest.raises(ValueError, match="written by version 4 of the weights, and those kept are 5, 6"),
        versions.at(4, model),
    ):
        pass
    with pytest.raises(ValueError, match="those kept are none"), WeightVersions(2).at(1, model):
        pass


def test_what_is_not_trained_is_neither_copied_nor_changed() -> None:
    versions, model = WeightVersions(1), layer(1.0)
    model.bias.requires_grad_(False)
    versions.keep(1, model)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(2.0)
    with versions.at(1, model):
        assert (model.weight[0, 0].item(), model.bias[0].item()) == (1.0, 2.0)


def test_after_an_error_the_model_has_its_own_weights() -> None:
    versions, model = WeightVersions(1), layer(1.0)
    versions.keep(1, model)
    with torch.no_grad():
        model.weight.fill_(2.0)
    with pytest.raises(KeyError), versions.at(1, model):
        raise KeyError
    assert bool((model.weight == 2.0).all())


def test_autocast_does_not_go_on_with_the_casts_of_other_weights() -> None:
    versions, model, x = WeightVersions(1), layer(1.0), torch.ones(1, 2)

    def run() -> Tensor:
        return model(x).detach().float()

    versions.keep(1, model)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.bias.fill_(3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        now = run()
        with versions.at(1, model):
            before = run()
        again = run()
    assert (now[0, 0].item(), before[0, 0].item(), again[0, 0].item()) == (9.0, 3.0, 9.0)
