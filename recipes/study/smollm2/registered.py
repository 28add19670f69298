"""What `PREREGISTRATION.md` has of endpoints, claims and their tests."""

from dataclasses import dataclass

from arms import BASE, BEST, DECISIVE, MORE_SEEDS, SEEDS

CONTROL = "ppo-clip"
LEVEL = 0.05
EQUAL_REWARD = "entropy at equal reward"
"""A quantity of two runs: see `compare.entropies_at_equal_reward`."""
PRIMARY = ("pass@1", "pass@32", "AUC of reward", EQUAL_REWARD)
DECIDING = ("pass@1", "pass@32", EQUAL_REWARD)
"""Endpoints of the last claim."""
CLIPPED = "outside ERC's bounds - clipped"
"""A quantity of one run: two shares of its tokens."""


@dataclass(frozen=True)
class Test:
    """A claim as "`quantity` of `arm` is higher (or lower) than that of `than`"."""

    quantity: str
    arm: str
    than: str
    expected: str

    @property
    def num_seeds(self) -> int:
        """As many as it is registered with."""
        both = {self.arm, self.than} - {"", BASE}
        return len(SEEDS) + len(MORE_SEEDS) if both <= {*DECISIVE, BEST} else len(SEEDS)


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, or ours, and the tests it is decided by; all of them have to hold.

    Attributes:
        text: In a sentence.
        source: Who claims it.
        tests: Its tests, on the first task, at each arm's own rate.
        first: What the first study says to it.
    """

    text: str
    source: str
    tests: tuple[Test, ...]
    first: str = "not tested"


def _better(arm: str, than: str, *quantities: str) -> tuple[Test, ...]:
    return tuple(Test(quantity, arm, than, "higher") for quantity in quantities)


CLAIMS: dict[str, Claim] = {
    "1": Claim(
        "ERC clips more tokens than PPO-clip",
        "ERC",
        (Test(CLIPPED, "erc", "", "higher"),),
        "holds, one order of magnitude",
    ),
    "2": Claim(
        "ERC calms the entropy and the gradient norm",
        "ERC",
        (
            Test("entropy oscillation", "erc-float32", "ppo-clip-float32", "lower"),
            Test("gradient norm, relative spread", "erc-float32", "ppo-clip-float32", "lower"),
        ),
        "does not hold",
    ),
    "3": Claim(
        "ERC learns better than PPO-clip", "ERC", _better("erc-float32", "ppo-clip-float32", "pass@1"), "does not hold"
    ),
    "4": Claim(
        "ERC is better than a KL penalty and than steering the entropy",
        "ERC",
        (*_better("erc", "kl", "pass@1"), *_better("erc", "adaptive-entropy", "pass@1")),
        "does not hold",
    ),
    "5": Claim("ERC helps CE-GPPO", "ERC", _better("erc+ce-gppo", "ce-gppo", "pass@1"), "no effect seen"),
    "6": Claim(
        "CE-GPPO keeps more entropy than PPO-clip at equal reward",
        "CE-GPPO",
        _better("ce-gppo", "ppo-clip", EQUAL_REWARD),
        "does not hold",
    ),
    "7": Claim(
        "CE-GPPO learns better than PPO-clip",
        "CE-GPPO",
        _better("ce-gppo", "ppo-clip", "pass@1"),
        "not seen, opposite in the steep setting",
    ),
    "8": Claim(
        "CE-GPPO learns better than clip-higher, and than GPPO",
        "CE-GPPO",
        (*_better("ce-gppo", "clip-higher", "pass@1"), *_better("ce-gppo", "gppo", "pass@1")),
        "not seen",
    ),
    "9": Claim(
        "EPO damps the oscillation of entropy",
        "EPO",
        (Test("entropy oscillation", "epo", "ppo-clip", "lower"),),
        "holds at a stronger penalty than published",
    ),
    "10": Claim("EPO learns better than PPO-clip", "EPO", _better("epo", "ppo-clip", "pass@1"), "not seen"),
    "11": Claim("AsyPPO learns better than GRPO", "AsyPPO", _better("asyppo", "ppo-clip", "pass@1"), "not seen"),
    "12": Claim(
        "AsyPPO learns better than PPO with one critic",
        "AsyPPO",
        _better("asyppo", "ppo-critic", "pass@1"),
        "not seen",
    ),
    "13": Claim(
        "In bfloat16 ERC clips more than in float32, and its remedy clips less",
        "ours",
        (
            Test("outside ERC's bounds", "erc-bf16", "erc-float32", "higher"),
            Test("outside ERC's bounds", "erc", "erc-bf16", "lower"),
        ),
    ),
    "14": Claim("The remedy makes ERC learn better in bfloat16", "ours", _better("erc", "erc-bf16", "pass@1")),
    "15": Claim(
        "One-sided ERC learns better than ERC",
        "ours",
        _better("erc-outward", "erc", "pass@1"),
        "seen in the steep setting alone",
    ),
    "16": Claim("ERC at a target share learns better than ERC", "ours", _better("erc-target", "erc", "pass@1")),
    "17": Claim(
        "PPO-clip costs answers that the model had: its pass@32 falls below the model's own",
        "field",
        (Test("pass@32", CONTROL, BASE, "lower"),),
    ),
}
"""By number. Claim 1 compares two shares of one arm's tokens; the last compares with the model itself."""
LAST_CLAIM = Claim(
    "At least one control beats PPO-clip in pass@1, pass@32 or entropy at equal reward", "ours", (), "not seen"
)
"""Number 18: of a family of arms, see `compare.beating`."""
