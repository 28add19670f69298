"""The classes that `entropy_controlled` makes: their names, their configurations, and that they are pickled."""

import functools
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import InitVar, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import trl
from trl import GRPOConfig, GRPOTrainer, RLOOConfig

from tests.trainers.subclasses import BeforeTrainer, LoggingTrainer, ScaledConfig, ScaledTrainer, made
from trl_entropy import AsyPPOConfig, AsyPPOTrainer, EntropyGRPOConfig, EntropyGRPOTrainer, entropy_controlled
from trl_entropy.trainers import EntropyControlMixin
from trl_entropy.trainers.controlled import config_of, controlled_config

if TYPE_CHECKING:
    from nowhere import Missing  # type: ignore[import-not-found]


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
    # of which one that dies is an error, where a pool of `multiprocessing` would start the next for ever
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(checked_elsewhere, pickle.dumps((cls, config))).result(timeout=300)
    assert found == ("EntropyScaledTrainer", 0.9)


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


def decorated(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return call


class StoringTrainer(GRPOTrainer):
    """Its attributes `mode` and `active` are its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.mode = "chain of thought"
        super().__init__(*args, **kwargs)

    @decorated
    def train(self, *args: Any, **kwargs: Any) -> Any:
        def switch_on() -> None:
            self.active, self.own = True, 1

        switch_on()
        return super().train(*args, **kwargs)


class AnnotatedTrainer(GRPOTrainer):
    """Annotates and stores attributes that TRL's trainer has too."""

    reward_funcs: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reward_funcs = [*self.reward_funcs]
        self._step = 0


class OthersTrainer(GRPOTrainer):
    """Stores `active` on other objects than itself, under the first name of a method's arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        class Switch:
            def __init__(self) -> None:
                self.active = True

        super().__init__(*args, **kwargs)
        self.switch = Switch()

    @staticmethod
    def switch_on(module: Any) -> None:
        module.active = True


class PairTrainer(GRPOTrainer):
    """Generates for a rollout of its own."""

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        return "prompts", "completions"


@dataclass
class StoringConfig(GRPOConfig):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.recording_enabled = True


def test_what_is_stored_elsewhere_is_no_collision() -> None:
    assert issubclass(entropy_controlled(OthersTrainer), OthersTrainer)


def test_a_collision_is_seen_among_many_attributes() -> None:
    lines = "\n".join(f"        self.own_{index} = {index}" for index in range(300))
    source = f"class Long(GRPOTrainer):\n    def __init__(self):\n{lines}\n        self.active = True\n"
    namespace: dict[str, Any] = {"GRPOTrainer": GRPOTrainer, "__name__": __name__}
    exec(source, namespace)
    with pytest.raises(TypeError, match="both have active, with another meaning"):
        entropy_controlled(namespace["Long"])


def test_a_rollout_of_its_own_may_return_what_it_likes(make_trainer: Callable[..., Any]) -> None:
    assert made(make_trainer, PairTrainer)._generate() == ("prompts", "completions")


def test_the_configuration_class_is_found() -> None:
    found = {cls: config_of(cls) for cls in (NoArgsTrainer, BelowScaledTrainer, NamesakeTrainer, BeforeTrainer)}
    assert found == {
        NoArgsTrainer: GRPOConfig,
        BelowScaledTrainer: ScaledConfig,
        NamesakeTrainer: NamesakeConfig,
        BeforeTrainer: GRPOConfig,
    }
    assert entropy_controlled(UnknownTrainer, config_class=ScaledConfig).config_class.scale == 3.0


def test_the_trainer_s_module_need_not_be_imported() -> None:
    """As that of a file which is executed."""
    module = ModuleType("executed_file")
    source = """
from dataclasses import dataclass

from trl import GRPOConfig, GRPOTrainer


@dataclass
class OwnConfig(GRPOConfig):
    pass


@dataclass
class NamedConfig(GRPOConfig):
    pass


class AnnotatedTrainer(GRPOTrainer):
    def __init__(self, model, reward_funcs, args: "OwnConfig | None" = None):
        super().__init__(model, reward_funcs, args)


class NamedTrainer(GRPOTrainer):
    def __init__(self, model, reward_funcs, args=None):
        super().__init__(model, reward_funcs, args)
"""
    exec(source, vars(module))
    assert entropy_controlled(module.AnnotatedTrainer).config_class is controlled_config(module.OwnConfig)
    assert config_of(module.NamedTrainer) is module.NamedConfig


def test_what_trl_has_may_be_annotated_and_stored() -> None:
    assert issubclass(entropy_controlled(AnnotatedTrainer), AnnotatedTrainer)


@pytest.mark.parametrize("base", [GRPOConfig, RLOOConfig])
def test_a_configuration_with_a_variable_of_its_init(tmp_path: Path, base: Any) -> None:
    @dataclass
    class InitConfig(base):  # type: ignore[misc]
        doubled: InitVar[int] = 1
        result: int = 0

        def __post_init__(self, doubled: int) -> None:
            super().__post_init__()
            self.result = 2 * doubled

    settings = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    config = controlled_config(InitConfig)(doubled=4, positive_nll_coef=0.1, **settings)
    assert (config.result, config.positive_nll_coef) == (8, 0.1)
    with pytest.raises(ValueError, match=r"positive_nll_coef=-1"):
        controlled_config(InitConfig)(positive_nll_coef=-1.0, **settings)


def test_another_configuration_for_what_has_the_controls_is_refused() -> None:
    cls = entropy_controlled(ScaledTrainer)
    assert entropy_controlled(cls, config_class=cls.config_class) is cls
    for given, config_class in ((cls, ScaledConfig), (AsyPPOTrainer, EntropyGRPOConfig), (BelowTrainer, BelowConfig)):
        with pytest.raises(TypeError, match=rf"{given.__name__} has the controls already, with \w+: config_class="):
            entropy_controlled(given, config_class=config_class)


@pytest.mark.parametrize(
    ("trainer_class", "config_class", "said"),
    [
        (UnknownTrainer, None, r"configuration class of UnknownTrainer cannot be found: .* entropy_controlled\(Unkno"),
        (BeforeTrainer, dict, r"config_class=dict is not a subclass of trl\.GRPOConfig"),
        (BeforeTrainer, TakenConfig, r"TakenConfig and the entropy controls both have epo_coef, with another meaning"),
        (BeforeTrainer, ByHandConfig, r"ByHandConfig\.__init__ is written by hand.* dataclass"),
        (TakenTrainer, None, r"TakenTrainer and the entropy controls both have on_rollout, with another meaning"),
        (StoringTrainer, None, r"StoringTrainer and the entropy controls both have active, mode, with another"),
        (BeforeTrainer, StoringConfig, r"StoringConfig and the entropy controls both have recording_enabled, with an"),
        (trl.SFTTrainer, None, r"SFTTrainer is not a subclass of trl\.GRPOTrainer"),
        ("GRPOTrainer", None, r"'GRPOTrainer' is not a subclass of trl\.GRPOTrainer"),
    ],
)
def test_what_cannot_be_controlled_is_said(trainer_class: Any, config_class: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        entropy_controlled(trainer_class, config_class=config_class)
