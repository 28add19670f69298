"""The section of the model card that names the methods of a run."""

from typing import Any

from huggingface_hub import ModelCard

from ..controls import controls_of

SCHEDULE = ("loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "beta", "learning_rate")


def methods_section(args: Any) -> str:
    """Markdown that lists the controls that are on, their settings and their papers."""
    schedule = ", ".join(f"`{name}={getattr(args, name)}`" for name in SCHEDULE if hasattr(args, name))
    lines = ["## Entropy control", "", "| method | settings | paper |", "|---|---|---|"]
    for control in controls_of(args):
        settings = ", ".join(f"`{name}={value}`" for name, value in control.settings_of(args).items())
        paper = f"[{control.paper}](https://huggingface.co/papers/{control.arxiv}) (arXiv {control.arxiv})"
        lines.append(f"| {control.name} | {settings} | {paper} |")
    if hasattr(args, "max_staleness"):
        lines += ["", f"On asynchronous GRPO with {schedule}, `max_staleness={args.max_staleness}`."]
    else:
        updates = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
        lines += ["", f"On GRPO with {schedule}, {updates:g} optimizer steps per rollout."]
    return "\n".join(lines) + "\n"


def add_methods(path: str, args: Any) -> None:
    """Add the section to the model card at `path`, before its framework versions where it has them."""
    card = ModelCard.load(path)
    marker = "### Framework versions"
    section = methods_section(args)
    card.text = card.text.replace(marker, f"{section}\n{marker}", 1) if marker in card.text else card.text + section
    card.save(path)
