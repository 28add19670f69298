"""The weights that a policy had when they were last handed to the inference server, version by version."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightVersions:
    """Copies of a model's trained parameters in the host's memory, and the way back to one of them.

    Only what is trained is copied: with LoRA that is the adapter.

    Args:
        count: How many versions are kept, the newest ones.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: dict[int, dict[str, Tensor]] = {}

    def keep(self, version: int, model: nn.Module) -> None:
        """Copy the parameters of `model` as `version`, and forget what is older than the newest `count`."""
        self._kept[version] = {name: value.detach().to("cpu", copy=True) for name, value in _trained(model)}
        for old in sorted(self._kept)[: -self._count]:
            del self._kept[old]

    @contextmanager
    def at(self, version: int, model: nn.Module) -> Iterator[None]:
        """Within this context `model` has the parameters of `version`; afterwards its own, to the last bit.

        Raises:
            ValueError: If the version is not kept.
        """
        if version not in self._kept:
            kept = ", ".join(map(str, sorted(self._kept))) or "none"
            raise ValueError(
                f"A sample was written by version {version} of the weights, and those kept are {kept}. Let the "
                "rollout worker tag each sample with the version that `update_model_version` gave it."
            )
        current = {name: value.detach().clone() for name, value in _trained(model)}
        _load(model, self._kept[version])
        try:
            yield
        finally:
            _load(model, current)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)


def _load(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in _trained(model):
        # not counted as a change by autograd, for whom the parameters are the same before and after
        parameter.data.copy_(values[name])
    torch.clear_autocast_cache()  # else a context of autocast goes on with the casts of the weights before
