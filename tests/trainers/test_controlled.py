"""The controls for subclasses of TRL's trainer that override what people override."""

import abc
import inspect
import multiprocessing
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import trl
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from tests import reference
from tests.reference import Settings
from tests.stubbed import gradients, stub_forward, stubbed_trainer, trainer_gradients
from tests.trainers.test_exact_gradients import BASE, CE_GPPO, ERC, NLL, check, random_batch
from tests.trainers.test_grpo import assert_same_weights, trained, weights
from trl_entropy import AsyPPOConfig, AsyPPOTrainer, EntropyGRPOConfig, EntropyGRPOTrainer, entropy_controlled
from trl_entropy.trainers import EntropyControlMixin
from trl_entropy.trainers.controlled import config_of

if TYPE_CHECKING:
    from nowhere import Missing  # type: ignore[import-not-found]

ERC_ALONE = {"erc_low": 0.95, "erc_high": 1.05}
SHAPED = {**ERC_ALONE, "ce_gppo_alpha1": 0.75, "ce_gppo_alpha2": 1.0}


@dataclass
class ScaledConfig(GRPOConfig):
    """One field more, and another default."""

    scale: float = field(default=3.0, metadata={"help": "Of the loss."})
    epsilon: float = 0.25


class ScaledTrainer(GRPOTrainer):
    """Scales TRL's loss and adds to it, after it."""

    def __init__(self, model: Any, reward_funcs: Any, args: "ScaledConfig | None" = None, **kwargs: Any) -> None:
        super().__init__(model, reward_funcs, args or ScaledConfig(output_dir="scaled"), **kwargs)

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return self.args.scale * super()._compute_loss(model, inputs) + 0.5


class BeforeTrainer(GRPOTrainer):
    """Gives TRL's loss other inputs than it got, in a dict of its own."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return super()._compute_loss(model, {**inputs, "advantages": 2.0 * inputs["advantages"]})


class AuxiliaryTrainer(GRPOTrainer):
    """Makes a forward pass of its own before TRL's, and adds its mean."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        ids, mask = inputs["prompt_ids"], inputs["prompt_mask"]
        logps = self._get_per_token_logps_and_entropies(model, ids, mask, 1, compute_entropy=True)[0]
        return super()._compute_loss(model, inputs) - 0.1 * logps.mean()


class RewardTrainer(GRPOTrainer):
    """Doubles the rewards, and halves the advantages that come of them."""

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        return 2.0 * super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        return {**output, "advantages": output["advantages"] / 2}


class GenerationTrainer(GRPOTrainer):
    """Cuts every completion to its first four tokens, and scales what a step gets."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        ids, *others = super()._generate_single_turn(*args, **kwargs)
        return [one[:4] for one in ids], *others

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        return {**inputs, "advantages": 1.5 * inputs["advantages"]}


class LoggingTrainer(GRPOTrainer, metaclass=abc.ABCMeta):
    """Logs a number of its own; its metaclass is not `type`."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, "own": 1.0}, start_time)


class ReinforceTrainer(GRPOTrainer):
    """A loss of its own that takes advantages of either shape, and no ratio."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        length = inputs["completion_ids"].size(1)
        logps, *_ = self._get_per_token_logps_and_entropies(model, ids, mask, length, compute_entropy=True)
        advantages = inputs["advantages"]
        if advantages.dim() == 1:
            advantages = advantages.unsqueeze(1)
        return -(logps * advantages * inputs["completion_mask"]).sum() / inputs["completion_mask"].sum()


class ColumnTrainer(ReinforceTrainer):
    """A loss of its own that takes advantages as one per completion."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        length = inputs["completion_ids"].size(1)
        logps, *_ = self._get_per_token_logps_and_entropies(
            model, ids, torch.ones_like(ids), length, compute_entropy=True
        )
        advantages = inputs["advantages"]
        return -(logps * self.column(advantages)).mean()

    @staticmethod
    def column(advantages: Tensor) -> Tensor:
        return advantages.unsqueeze(1)


class EarlyTrainer(ReinforceTrainer):
    """A loss of its own that reads the advantages before its forward pass."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        advantages = inputs["advantages"]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        length = inputs["completion_ids"].size(1)
        logps, *_ = self._get_per_token_logps_and_entropies(
            model, ids, torch.ones_like(ids), length, compute_entropy=True
        )
        return -(logps * advantages.unsqueeze(1)).mean()


class AloneTrainer(GRPOTrainer):
    """A loss of its own with the model's own forward pass."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return model(inputs["completion_ids"]).logits.mean()


SUBCLASSES = [
    ScaledTrainer,
    BeforeTrainer,
    AuxiliaryTrainer,
    RewardTrainer,
    GenerationTrainer,
    LoggingTrainer,
    ReinforceTrainer,
    ColumnTrainer,
    EarlyTrainer,
    AloneTrainer,
]
CONTROLLED = [cls for cls in SUBCLASSES if cls not in (ColumnTrainer, EarlyTrainer, AloneTrainer)]


def made(make_trainer: Callable[..., Any], base: type, *arguments: Any, **overrides: Any) -> Any:
    """A controlled trainer."""
    cls = entropy_controlled(base)
    return make_trainer(*arguments, trainer_class=cls, config_class=cls.config_class, **overrides)


@pytest.mark.parametrize("base", SUBCLASSES)
def test_no_control_is_bit_for_bit_the_trainer_s_own(
    make_trainer: Callable[..., Any], tmp_path: Path, base: type
) -> None:
    ours = trained(made(make_trainer, base, tmp_path / "ours", max_steps=2))
    theirs = make_trainer(tmp_path / "own", trainer_class=base, config_class=config_of(base), max_steps=2)
    start = weights(theirs)
    assert_same_weights(weights(ours), weights(trained(theirs)))
    assert any(not torch.equal(start[name], value) for name, value in weights(theirs).items())


@pytest.mark.parametrize("base", CONTROLLED)
def test_controls_train_and_change_the_training(make_trainer: Callable[..., Any], tmp_path: Path, base: type) -> None:
    theirs = trained(make_trainer(tmp_path / "own", trainer_class=base, config_class=config_of(base)))
    shaped = ERC_ALONE if base is ReinforceTrainer else SHAPED  # it reads no old log-probs, which CE-GPPO changes
    controlled = trained(made(make_trainer, base, tmp_path / "ours", **shaped, positive_nll_coef=0.1))
    assert any(not torch.equal(value, weights(controlled)[name]) for name, value in weights(theirs).items())
    assert all("erc/clip_fraction" in entry for entry in controlled.state.log_history[:-1])
    if base is LoggingTrainer:
        assert all(entry["own"] == 1.0 for entry in controlled.state.log_history)


@pytest.mark.parametrize("base", [ScaledTrainer, RewardTrainer, GenerationTrainer, AuxiliaryTrainer])
def test_a_resumed_run_equals_an_uninterrupted_one(
    make_trainer: Callable[..., Any], tmp_path: Path, base: type
) -> None:
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "epo_coef": 0.1, **SHAPED}
    whole = trained(made(make_trainer, base, tmp_path / "run", **settings))
    resumed = made(make_trainer, base, tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same_weights(weights(resumed), weights(whole))
    args = torch.load(tmp_path / "run" / "checkpoint-3" / "training_args.bin", weights_only=False)
    assert type(args) is entropy_controlled(base).config_class
    assert args.erc_low == 0.95


@pytest.fixture
def build(make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`build(base, settings)`: a controlled trainer on top of the stubbed forward pass."""
    stub_forward(monkeypatch)

    def built(base: type, s: Settings) -> Any:
        cls = entropy_controlled(base)
        return stubbed_trainer(make_trainer, s, trainer_class=cls, config_class=cls.config_class)

    return built


LEVELS = ["token", "sequence"]
S = replace(BASE, **ERC, **CE_GPPO, **NLL)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("base", [RewardTrainer, GenerationTrainer, LoggingTrainer])
def test_gradients_where_the_loss_is_trl_s(build: Callable[..., Any], base: type, level: str) -> None:
    s = replace(S, level=level)
    check(build(base, s), s, *random_batch(1))


@pytest.mark.parametrize("level", LEVELS)
def test_the_controls_act_on_the_inputs_that_the_override_hands_on(build: Callable[..., Any], level: str) -> None:
    s = replace(S, level=level)
    b, inputs = random_batch(1)
    check(build(BeforeTrainer, s), s, replace(b, advantages=2.0 * b.advantages), inputs)


@pytest.mark.parametrize("level", LEVELS)
def test_what_a_control_adds_is_not_scaled_with_the_trainer_s_loss(build: Callable[..., Any], level: str) -> None:
    s = replace(S, level=level)
    b, inputs = random_batch(1)
    added = reference.loss(b, s) - reference.loss(b, replace(s, nll_coef=0.0))
    expected = 3.0 * reference.loss(b, replace(s, nll_coef=0.0)) + added
    _, found = trainer_gradients(build(ScaledTrainer, s), b, inputs)
    for got, want in zip(found, gradients(expected, b), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_a_forward_pass_of_the_override_is_left_alone(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    b, inputs = random_batch(1)
    trainer = build(AuxiliaryTrainer, S)
    first = torch.full((8, 1), -1.0, dtype=torch.float64, requires_grad=True)
    stub = GRPOTrainer._get_per_token_logps_and_entropies

    def forward(self: Any, model: Any, ids: Any, mask: Any, kept: int, *args: Any, **kwargs: Any) -> Any:
        return (first, first.detach(), None) if kept == 1 else stub(self, model, ids, mask, kept, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", forward)
    _, (found, _) = trainer_gradients(trainer, b, inputs)
    want, _ = gradients(reference.loss(b, S), b)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-14)


def test_a_loss_of_its_own_gets_the_shaped_advantages(build: Callable[..., Any]) -> None:
    """ERC on REINFORCE: the gradient of a token outside the band is exactly 0, of the others `-A / tokens`."""
    b, inputs = random_batch(1)
    s = replace(BASE, **ERC)
    _, (found, _) = trainer_gradients(build(ReinforceTrainer, s), b, inputs)
    count = b.mask.sum().item()
    for i, t in reference.valid_tokens(b):
        want = -reference.advantage(b, i, t) / count if reference.keeps_gradient(b, s, i, t) else 0.0
        assert found[i, t].item() == pytest.approx(want, rel=1e-12, abs=0.0), (i, t)


def test_a_loss_that_takes_advantages_as_a_column_is_refused(build: Callable[..., Any]) -> None:
    """With as many completions as tokens the product would be `(B, B, T)`, and nothing would complain."""
    b, inputs = random_batch(1)
    trainer = build(ColumnTrainer, replace(BASE, **ERC))
    with pytest.raises(ValueError, match=r"one per token, of shape \(8, 7\), .* as if they were one per completion"):
        trainer_gradients(trainer, b, inputs)
    takes: tuple[Callable[[Tensor], Tensor], ...] = (
        *(lambda a: a[:, None], lambda a: torch.unsqueeze(a, 1), lambda a: a[:, None, :]),
        *(lambda a: a.view(-1, 1), lambda a: a.reshape(-1, 1), lambda a: a.unsqueeze_(1)),
    )
    for take in takes:
        trainer.column = take
        with pytest.raises(ValueError, match="as if they were one per completion"):
            trainer_gradients(trainer, b, inputs)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (EarlyTrainer, r"EarlyTrainer\._compute_loss does not read advantages .* would do nothing"),
        (AloneTrainer, r"AloneTrainer\._compute_loss computes a loss without `self\._get_per_token_logps"),
    ],
)
def test_a_control_without_effect_is_an_error_at_the_first_loss(
    make_trainer: Callable[..., Any], base: type, said: str
) -> None:
    trainer = made(make_trainer, base, **SHAPED)
    with pytest.raises(RuntimeError, match=said):
        trainer.train()
    assert trainer.state.global_step == 0


def test_old_log_probs_that_are_not_read_are_an_error_once_a_control_changes_them(build: Callable[..., Any]) -> None:
    b, inputs = random_batch(1)
    _ = trainer_gradients(build(ReinforceTrainer, replace(BASE, **ERC)), b, inputs)
    with pytest.raises(RuntimeError, match=r"ReinforceTrainer\._compute_loss does not read old_per_token_logps "):
        trainer_gradients(build(ReinforceTrainer, replace(BASE, **CE_GPPO)), b, inputs)


def test_trl_s_adaptive_coefficient_needs_trl_s_loss(make_trainer: Callable[..., Any]) -> None:
    settings = {"target_entropy": 0.3, "target_entropy_by": "coefficient"}
    with pytest.raises(ValueError, match=r"target_entropy=0\.3.* ReinforceTrainer\._compute_loss, which takes the"):
        made(make_trainer, ReinforceTrainer, model="no-such/model", **settings)
    made(make_trainer, ScaledTrainer, **settings)


class StepTrainer(GRPOTrainer):
    """A step of its own, which calls the loss behind `compute_loss`."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = self._compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_step_that_goes_around_compute_loss_is_refused(make_trainer: Callable[..., Any]) -> None:
    with pytest.raises(
        RuntimeError, match=r"StepTrainer\.training_step calls `self\._compute_loss` without `self\.co"
    ):
        made(make_trainer, StepTrainer, positive_nll_coef=0.5).train()
    trained(made(make_trainer, StepTrainer, max_steps=1))


class ReferenceFirstTrainer(GRPOTrainer):
    """A loss of its own whose first forward pass is the reference's."""

    with_entropy = True

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        length = inputs["completion_ids"].size(1)
        forward = self._get_per_token_logps_and_entropies
        with torch.no_grad():
            ref, *_ = forward(self.ref_model or model, ids, torch.ones_like(ids), length)
        logps, *_ = forward(model, ids, torch.ones_like(ids), length, compute_entropy=self.with_entropy)
        return ((logps - ref.clone()) ** 2 - logps * inputs["advantages"].view(len(ids), -1)).mean()


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_reference_s_forward_pass_is_not_the_loss_s(
    make_trainer: Callable[..., Any], tmp_path: Path, beta: float
) -> None:
    runs = [
        trained(made(make_trainer, ReferenceFirstTrainer, tmp_path / name, beta=beta, max_steps=1, **controls))
        for name, controls in (("off", {}), ("on", {"positive_nll_coef": 0.5}))
    ]
    assert any(not torch.equal(value, weights(runs[1])[name]) for name, value in weights(runs[0]).items())
    trainer = made(make_trainer, ReferenceFirstTrainer, tmp_path / "none", beta=beta, positive_nll_coef=0.5)
    trainer.with_entropy = False
    with pytest.raises(RuntimeError, match=r"ReferenceFirstTrainer\._compute_loss calls .* without `compute_entropy="):
        trainer.train()


class AfterTrainer(GRPOTrainer):
    """Reads its inputs after TRL's loss."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        before = dict(inputs)
        loss = super()._compute_loss(model, inputs)
        assert all(inputs[name] is value for name, value in before.items())
        return loss


def test_an_override_finds_its_inputs_as_they_were(build: Callable[..., Any]) -> None:
    check(build(AfterTrainer, S), S, *random_batch(1))


def test_a_configuration_that_the_trainer_makes_itself_is_checked(make_trainer: Callable[..., Any]) -> None:
    class SettingsTrainer(ReinforceTrainer):
        def __init__(self, *, settings: dict[str, Any], **kwargs: Any) -> None:
            super().__init__(**settings, **kwargs)

    cls = entropy_controlled(SettingsTrainer, config_class=GRPOConfig)

    def construct(*, args: Any, **given: Any) -> Any:
        return cls(settings={"args": args}, **given)

    with pytest.raises(ValueError, match=r"target_entropy=0\.3.* ReinforceTrainer\._compute_loss, which takes the"):
        make_trainer(trainer_class=construct, target_entropy=0.3, target_entropy_by="coefficient")


class ShuffledTrainer(GRPOTrainer):
    """Hands on the rows of a rollout in another order."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        return {name: value.flip(0) if value.dim() else value for name, value in output.items()}


class UnscoredTrainer(GRPOTrainer):
    """Makes its rollout anew, without `_calculate_rewards`."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self.__dict__["_calculate_rewards"] = lambda *args: GRPOTrainer._calculate_rewards(self, *args)
        return super()._generate_and_score_completions(inputs)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (ShuffledTrainer, r"ShuffledTrainer\._generate_and_score_completions .*(other completions|does not take)"),
        (UnscoredTrainer, r"UnscoredTrainer\._generate_and_score_completions scores a rollout without"),
    ],
)
def test_a_rollout_whose_rewards_are_unknown_is_refused(
    make_trainer: Callable[..., Any], base: type, said: str
) -> None:
    with pytest.raises(RuntimeError, match=said):
        made(make_trainer, base, positive_nll_coef=0.1).train()
    trained(made(make_trainer, base, ce_gppo_alpha1=0.5, ce_gppo_alpha2=1.0))  # needs neither


# --- the classes that are made


def test_names_types_and_defaults() -> None:
    cls = entropy_controlled(ScaledTrainer)
    assert cls.__name__ == "EntropyScaledTrainer"
    assert cls.__module__ == ScaledTrainer.__module__
    assert issubclass(cls, ScaledTrainer)
    assert issubclass(cls, EntropyControlMixin)
    config = cls.config_class
    assert config.__name__ == "EntropyScaledConfig"
    assert issubclass(config, ScaledConfig)
    own, base = ({one.name: one.default for one in fields(one)} for one in (config, ScaledConfig))
    assert {name: own[name] for name in base} == base
    assert (own["epsilon"], own["scale"], own["erc_low"]) == (0.25, 3.0, None)
    assert cls._tag_names[-1] == "trl-entropy"


def test_trl_s_own_and_what_has_the_controls_already() -> None:
    assert entropy_controlled(GRPOTrainer) is EntropyGRPOTrainer
    assert EntropyGRPOTrainer.config_class is EntropyGRPOConfig
    assert entropy_controlled(AsyPPOTrainer) is AsyPPOTrainer
    assert AsyPPOTrainer.config_class is AsyPPOConfig
    cls = entropy_controlled(ScaledTrainer)
    assert entropy_controlled(ScaledTrainer) is cls
    assert entropy_controlled(cls) is cls
    assert entropy_controlled(ScaledTrainer, config_class=ScaledConfig) is cls
    other = entropy_controlled(ScaledTrainer, config_class=GRPOConfig)
    assert other is not cls
    assert other.config_class is EntropyGRPOConfig


def checked_elsewhere(packed: bytes) -> tuple[str, float]:
    """In a process in which `entropy_controlled` has not been called."""
    trainer_class, config = pickle.loads(packed)
    assert trainer_class is entropy_controlled(ScaledTrainer)
    assert type(config) is trainer_class.config_class
    return trainer_class.__name__, config.erc_low


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_classes_and_configurations_are_pickled(tmp_path: Path, protocol: int) -> None:
    for base in (ScaledTrainer, LoggingTrainer):
        cls = entropy_controlled(base)
        config = cls.config_class(output_dir=str(tmp_path), erc_low=0.9, erc_high=1.1, bf16=False, use_cpu=True)
        again, copied = pickle.loads(pickle.dumps((cls, config), protocol))
        assert again is cls
        assert type(copied) is cls.config_class
        assert copied.to_dict() == config.to_dict()


class BelowTrainer(entropy_controlled(ScaledTrainer)):  # type: ignore[misc]
    """Written below a class that is made."""


@dataclass
class BelowConfig(BelowTrainer.config_class):  # type: ignore[name-defined,misc]
    more: int = 1


def test_a_class_below_one_that_is_made_is_pickled_by_its_name(tmp_path: Path) -> None:
    config = BelowConfig(output_dir=str(tmp_path), more=2, bf16=False, use_cpu=True)
    again, copied = pickle.loads(pickle.dumps((BelowTrainer, config)))
    assert again is BelowTrainer
    assert (type(copied), copied.more) == (BelowConfig, 2)


def test_a_spawned_worker_makes_the_same_classes(tmp_path: Path) -> None:
    cls = entropy_controlled(ScaledTrainer)
    config = cls.config_class(output_dir=str(tmp_path), erc_low=0.9, erc_high=1.1, bf16=False, use_cpu=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(checked_elsewhere, (pickle.dumps((cls, config)),)) == ("EntropyScaledTrainer", 0.9)


class NoArgsTrainer(GRPOTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class BelowScaledTrainer(ScaledTrainer):
    def __init__(self, *args: Any, extra: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class NamesakeTrainer(GRPOTrainer):
    def __init__(self, model: Any, reward_funcs: Any, args=None, **kwargs: Any) -> None:  # type: ignore[no-untyped-def]
        super().__init__(model, reward_funcs, args, **kwargs)


@dataclass
class NamesakeConfig(GRPOConfig):
    """Found by its name."""


class UnknownTrainer(GRPOTrainer):
    def __init__(self, model: Any, reward_funcs: Any, args: "Missing | None" = None, **kwargs: Any) -> None:
        super().__init__(model, reward_funcs, args, **kwargs)


@dataclass
class TakenConfig(GRPOConfig):
    epo_coef: float = 1.0


class ByHandConfig(GRPOConfig):
    def __init__(self, extra: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class TakenTrainer(GRPOTrainer):
    def on_rollout(self) -> None:
        """Something else."""


def test_the_configuration_class_is_found() -> None:
    found = {cls: config_of(cls) for cls in (NoArgsTrainer, BelowScaledTrainer, NamesakeTrainer, BeforeTrainer)}
    assert found == {
        NoArgsTrainer: GRPOConfig,
        BelowScaledTrainer: ScaledConfig,
        NamesakeTrainer: NamesakeConfig,
        BeforeTrainer: GRPOConfig,
    }
    assert entropy_controlled(UnknownTrainer, config_class=ScaledConfig).config_class.scale == 3.0


@pytest.mark.parametrize(
    ("trainer_class", "config_class", "said"),
    [
        (UnknownTrainer, None, r"configuration class of UnknownTrainer cannot be found: .* entropy_controlled\(Unkno"),
        (BeforeTrainer, dict, r"config_class=dict is not a subclass of trl\.GRPOConfig"),
        (BeforeTrainer, TakenConfig, r"TakenConfig and the entropy controls both have epo_coef, with another meaning"),
        (BeforeTrainer, ByHandConfig, r"ByHandConfig\.__init__ is written by hand.* dataclass"),
        (TakenTrainer, None, r"TakenTrainer and the entropy controls both have on_rollout, with another meaning"),
        (trl.SFTTrainer, None, r"SFTTrainer is not a subclass of trl\.GRPOTrainer"),
        ("GRPOTrainer", None, r"'GRPOTrainer' is not a subclass of trl\.GRPOTrainer"),
    ],
)
def test_what_cannot_be_controlled_is_said(trainer_class: Any, config_class: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        entropy_controlled(trainer_class, config_class=config_class)


# --- the subclasses that TRL has

SHIPPED = {
    "GMPOTrainer": "trl.experimental.gmpo",
    "GRPOTrainer": "trl.experimental.gspo_token.grpo_trainer",
    "GRPOWithReplayBufferTrainer": "trl.experimental.grpo_with_replay_buffer",
    "MiniLLMTrainer": "trl.experimental.minillm",
}
"""By name; not every release has each."""


def shipped(name: str) -> Any:
    if find_spec(SHIPPED[name].removesuffix(".grpo_trainer")) is None:
        pytest.skip(f"TRL {trl.__version__} has no {name}")
    return getattr(import_module(SHIPPED[name]), name)


def test_no_subclass_of_trl_is_left_out() -> None:
    sources = [path.read_text(encoding="utf-8") for path in Path(inspect.getfile(trl)).parent.rglob("*.py")]
    found = {
        name for source in sources for name in re.findall(r"(?m)^class (\w+)\((?:\w+, *)*_?GRPOTrainer\)", source)
    }
    assert found
    assert found <= set(SHIPPED)


def of_trl(make_trainer: Callable[..., Any], cls: Any, model_path: str) -> Callable[..., Any]:
    """A factory of trainers of one of these classes, or of what is made of it."""

    def construct(**given: Any) -> Any:
        return cls(**given, **({"teacher_model": model_path} if "MiniLLM" in cls.__name__ else {}))

    return partial(
        make_trainer, trainer_class=construct, config_class=getattr(cls, "config_class", None) or config_of(cls)
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_no_control_is_bit_for_bit_trl_s_subclass(
    make_trainer: Callable[..., Any], tmp_path: Path, tiny_model_path: str, name: str
) -> None:
    base = shipped(name)
    for level in ("token", "sequence_token") if name == "GRPOTrainer" else ("token",):
        settings = {"max_steps": 3, "importance_sampling_level": level, "loss_type": "grpo", "steps_per_generation": 2}
        ours = of_trl(make_trainer, entropy_controlled(base), tiny_model_path)(tmp_path / "ours", **settings)
        trained(ours)
        theirs = of_trl(make_trainer, base, tiny_model_path)(tmp_path / "own", **settings)
        start = weights(theirs)
        assert_same_weights(weights(ours), weights(trained(theirs)))
        assert any(not torch.equal(start[key], value) for key, value in weights(theirs).items())


@pytest.fixture
def build_shipped(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tiny_model_path: str
) -> Callable[..., Any]:
    """`build_shipped(name, settings)`: a controlled trainer of TRL's subclass on top of the stubbed forward pass."""
    stub_forward(monkeypatch)

    def built(name: str, s: Settings, **overrides: Any) -> Any:
        cls = entropy_controlled(shipped(name))
        return stubbed_trainer(of_trl(make_trainer, cls, tiny_model_path), s, **overrides)

    return built


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_gspo_token_with_controls(build_shipped: Callable[..., Any], level: str, loss_type: str) -> None:
    s = replace(S, level=level, loss_type=loss_type)
    check(build_shipped("GRPOTrainer", s), s, *random_batch(1))
    with pytest.raises(ValueError, match=r"cannot be used with importance_sampling_level='sequence_token', which no"):
        build_shipped("GRPOTrainer", replace(s, level="sequence_token"))


@pytest.mark.parametrize("level", LEVELS)
def test_minillm_with_controls(build_shipped: Callable[..., Any], level: str) -> None:
    """The controls act on the sum of the group's advantage and that of the reverse KL divergence, per token."""
    s = replace(S, level=level)
    b, inputs = random_batch(1)
    plain = build_shipped("MiniLLMTrainer", s, rkl_advantage=False, single_step_decomposition=False)
    check(plain, s, b, inputs)
    trainer = build_shipped("MiniLLMTrainer", s, single_step_decomposition=False)
    per_token = torch.linspace(-1.0, 1.0, 56, dtype=torch.float64).view(8, 7)
    trainer._compute_advantage = lambda **given: per_token
    check(trainer, s, replace(b, advantages=b.advantages.unsqueeze(1) + per_token), inputs)


def test_gmpo_with_controls_that_leave_its_loss_alone(build_shipped: Callable[..., Any]) -> None:
    b, inputs = random_batch(1)
    s = replace(BASE, **NLL)
    _, (plain, _) = trainer_gradients(build_shipped("GMPOTrainer", BASE), b, inputs)
    _, (found, _) = trainer_gradients(build_shipped("GMPOTrainer", s), b, inputs)
    want, _ = gradients(s.nll_coef * reference.positive_nll(b, s), b)
    assert plain.abs().max() > 0.0
    torch.testing.assert_close(found - plain, want, rtol=1e-10, atol=1e-14)


def test_gmpo_learns_from_the_advantages_of_a_control(
    make_trainer: Callable[..., Any], tmp_path: Path, tiny_model_path: str
) -> None:
    make = of_trl(make_trainer, entropy_controlled(shipped("GMPOTrainer")), tiny_model_path)
    plain, controlled = trained(make(tmp_path / "plain")), trained(make(tmp_path / "qae", qae_quantile=0.4))
    assert any(not torch.equal(value, weights(controlled)[name]) for name, value in weights(plain).items())


def test_a_replay_buffer_with_a_control_that_needs_no_rollout(build_shipped: Callable[..., Any]) -> None:
    s = replace(BASE, **CE_GPPO)
    check(build_shipped("GRPOWithReplayBufferTrainer", s), s, *random_batch(1))


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("GMPOTrainer", {"erc_low": 0.95, "erc_high": 1.05}, r"erc_low=0\.95.* GMPOTrainer, whose loss takes one adv"),
        ("GMPOTrainer", {"target_entropy": 0.3, "target_entropy_by": "coefficient"}, r"target_entropy=0\.3.*GMPOTrai"),
        ("GRPOWithReplayBufferTrainer", {"positive_nll_coef": 0.1}, r"positive_nll_coef=0\.1.*, which puts completio"),
        ("GRPOWithReplayBufferTrainer", {"record_tokens": 8}, r"record_tokens=8 cannot be used with GRPOWithReplayBu"),
    ],
)
def test_what_a_subclass_of_trl_leaves_no_place_for_is_refused(
    make_trainer: Callable[..., Any], tiny_model_path: str, name: str, settings: dict[str, Any], said: str
) -> None:
    make = of_trl(make_trainer, entropy_controlled(shipped(name)), tiny_model_path)
    with pytest.raises(ValueError, match=said):
        make(model="no-such/model", **settings)
