"""Dropout makes two forward passes of one policy differ, which ratios of the new and the old policy cannot tell."""

import warnings

from torch import nn


def active_dropout(model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
    """The dropout that is on in a model, by name, with the largest probability of each name.

    Returns:
        Layers, by the attribute that holds them, such as `lora_dropout` or `resid_dropout`; and what modules apply as
        a function, by the attribute with the number, such as `attention_dropout`. TRL's `disable_dropout` turns off
        the layers and not the functions.
    """
    layers: dict[str, float] = {}
    functions: dict[str, float] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            names = path.split(".")
            name = next((name for name in reversed(names) if "drop" in name), names[-1])
            layers[name] = max(module.p, layers.get(name, 0.0))
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                functions[name] = max(value, functions.get(name, 0.0))
    return {name: p for name, p in layers.items() if p}, {name: p for name, p in functions.items() if p}


def warn_of_dropout(model: nn.Module, methods: str) -> None:
    """Warn where dropout of the policy would look to a control like a change of the policy.

    Args:
        model: The policy, as it is trained.
        methods: The controls that compare the new policy with the old one, in words.
    """
    layers, functions = active_dropout(model)
    if not layers and not functions:
        return
    remedies = ["lora_dropout=0"] if "lora_dropout" in layers else []
    remedies += ["disable_dropout=True"] if layers.keys() - {"lora_dropout"} else []
    remedies += [f"model_init_kwargs={dict.fromkeys(functions, 0.0)}"] if functions else []
    found = ", ".join(f"{name}={p}" for name, p in (layers | functions).items())
    warnings.warn(
        f"The policy has dropout ({found}), whose noise {methods} cannot tell from a change of the policy: ratios "
        f"differ from 1 before any update. Set {' and '.join(remedies)}.",
        UserWarning,
        stacklevel=4,
    )
