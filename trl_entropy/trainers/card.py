"""The section of the model card that names the methods of a run."""

from huggingface_hub import ModelCard

from .config import EntropyGRPOConfig

METHODS = {
    "ERC": (
        "erc_enabled",
        ("erc_low", "erc_high", "erc_entropy_floor"),
        "Entropy Ratio Clipping as a Soft Global Constraint for Stable Reinforcement Learning",
        "2512.05591",
    ),
    "CE-GPPO": (
        "ce_gppo_enabled",
        ("ce_gppo_alpha1", "ce_gppo_alpha2"),
        "CE-GPPO: Coordinating Entropy via Gradient-Preserving Clipping Policy Optimization in Reinforcement Learning",
        "2509.20712",
    ),
    "EPO": (
        "epo_enabled",
        (
            "epo_coef",
            "epo_kappa_low",
            "epo_kappa_high",
            "epo_penalty",
            "epo_gamma",
            "epo_schedule",
            "epo_form",
            "epo_history",
        ),
        "EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning",
        "2509.22576",
    ),
    "AsyPPO": (
        "asyppo_enabled",
        (
            "num_critics",
            "critic_learning_rate",
            "critic_num_epochs",
            "critic_warmup_rollouts",
            "gae_gamma",
            "gae_lambda",
            "critic_gae_lambda",
            "whiten_advantages",
            "advantage_mask_fraction",
            "entropy_filter_fraction",
        ),
        "Asymmetric Proximal Policy Optimization: mini-critics boost LLM reasoning",
        "2510.01656",
    ),
    "Positive NLL": (
        "positive_nll_enabled",
        ("positive_nll_coef", "positive_nll_min_reward"),
        "Klear-Reasoner: Advancing Reasoning Capability via Gradient-Preserving Clipping Policy Optimization",
        "2508.07629",
    ),
}
"""Name: the property that says whether it is on, its settings, the title and the arXiv id of its paper."""

SCHEDULE = ("loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "beta", "learning_rate")


def methods_section(args: EntropyGRPOConfig) -> str:
    """Markdown that lists the controls that are on, their settings and their papers."""
    updates = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    schedule = ", ".join(f"`{name}={getattr(args, name)}`" for name in SCHEDULE)
    lines = ["## Entropy control", "", "| method | settings | paper |", "|---|---|---|"]
    for name, (enabled, fields, title, arxiv) in METHODS.items():
        if getattr(args, enabled, False):
            settings = ", ".join(f"`{field}={getattr(args, field)}`" for field in fields)
            lines.append(f"| {name} | {settings} | [{title}](https://huggingface.co/papers/{arxiv}) (arXiv {arxiv}) |")
    lines += ["", f"On GRPO with {schedule}, {updates:g} optimizer steps per rollout."]
    return "\n".join(lines) + "\n"


def add_methods(path: str, args: EntropyGRPOConfig) -> None:
    """Add the section to the model card at `path`, before its framework versions where it has them."""
    card = ModelCard.load(path)
    marker = "### Framework versions"
    section = methods_section(args)
    card.text = card.text.replace(marker, f"{section}\n{marker}", 1) if marker in card.text else card.text + section
    card.save(path)
