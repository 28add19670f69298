"""Parameter gradients of a real model in a real training run, against the papers' losses in float64.

At every optimizer step the policy is copied to float64, its log-probs and entropies are computed from its logits, and
the gradients of `tests/reference.py` with respect to its parameters are compared with the trainer's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import Qwen2ForCausalLM
from transformers.models.qwen2 import modeling_qwen2

from tests import reference
from tests.conftest import parity_reward
from tests.reference import Batch, Settings
from tests.stubbed import trainer_config

TEMPERATURE = 0.8
ALL_CONTROLS = {
    "erc": (0.95, 1.05),
    "alphas": (0.75, 1.1),
    "nll_coef": 0.1,
    "beta": 0.04,
    "entropy_coef": 0.01,
    "eps_lo": 0.2,
    "eps_hi": 0.28,
    "max_completion_length": 12,
    "accumulation": 2,
    "micro_batches_per_rollout": 4,
}


OWN_LAYERS = {name: getattr(modeling_qwen2, name) for name in ("apply_rotary_pos_emb", "Qwen2MLP", "Qwen2RMSNorm")}


class TooClose(AssertionError):
    """A token is too close to a bound to compare: choose another seed."""


@contextmanager
def transformers_own_layers() -> Iterator[None]:
    """Not Liger's, which take their place in the whole process and have no float64 on a CPU."""
    now = {name: getattr(modeling_qwen2, name) for name in OWN_LAYERS}
    vars(modeling_qwen2).update(OWN_LAYERS)
    try:
        yield
    finally:
        vars(modeling_qwen2).update(now)


def float64_copy(model: torch.nn.Module) -> Qwen2ForCausalLM:
    copy = Qwen2ForCausalLM(model.config).double()
    copy.load_state_dict(model.state_dict())
    return copy


def logps_and_entropies(model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probs of the completion's tokens and entropies in nats at the sampling temperature, `(B, T)` each."""
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    length = inputs["completion_ids"].shape[1]
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -length - 1 : -1]
    distribution = torch.log_softmax(logits / TEMPERATURE, dim=-1)
    lp = distribution.gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
    return lp, -(distribution.exp() * distribution).sum(-1)


class Observer:
    """Stands in for `trainer.compute_loss`, and keeps what the trainer was given and what it made of it.

    Args:
        trainer: Not trained yet.
        s: What its controls are set to.
        margin: Least distance of a token from a bound, in ratios; above what float32 is off by.
    """

    def __init__(self, trainer: Any, s: Settings, margin: float = 1e-6) -> None:
        self.trainer, self.settings, self.margin = trainer, s, margin
        self.compute_loss = trainer.compute_loss
        with transformers_own_layers():
            self.rollout_policy = float64_copy(trainer.model)
        self.entropy_errors: list[float] = []
        self.gradient_errors: list[float] = []
        self.fates: dict[str, int] = {}
        self.short_correct_completions = 0.0
        trainer.compute_loss = self

    def __call__(self, model: torch.nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
        loss = self.compute_loss(model, inputs, **kwargs)
        names, parameters = zip(*model.named_parameters(), strict=True)
        found = torch.autograd.grad(loss, parameters)

        inputs = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        with transformers_own_layers():
            policy = float64_copy(model)
            b = self.batch(policy, inputs)
            expected = torch.autograd.grad(reference.loss(b, self.settings), policy.parameters())
        self.entropy_errors.append(self.max_error(inputs["old_entropies"], b.entropy_old, b.mask))
        assert names == tuple(name for name, _ in policy.named_parameters())
        scale = torch.cat([g.flatten() for g in expected]).norm().item()
        errors = [(got.cpu() - want).norm().item() / scale for got, want in zip(found, expected, strict=True)]
        self.gradient_errors.append(max(errors))
        self.count_fates(b)
        short = (b.mask == 0).any(1)
        self.short_correct_completions += (short & (self.rewards(inputs) >= 1.0)).sum().item()
        # the same value and gradients: a second pass through the loss would find what Liger's first one wrote over
        again = sum((parameter * gradient).sum() for parameter, gradient in zip(parameters, found, strict=True))
        return again + (loss - again).detach()

    @staticmethod
    def max_error(got: Tensor, want: Tensor | None, mask: Tensor) -> float:
        assert want is not None
        return (got - want)[mask.bool()].abs().max().item()

    def batch(self, policy: Qwen2ForCausalLM, inputs: dict[str, Tensor]) -> Batch:
        """Only token ids, masks and advantages are taken from the trainer."""
        lp, entropy = logps_and_entropies(policy, inputs)
        with torch.no_grad():
            lp_old, entropy_old = logps_and_entropies(self.rollout_policy, inputs)
        rollout = self.trainer._buffered_inputs
        correct = [self.rewards(micro_batch) >= 1.0 for micro_batch in rollout]
        correct_tokens = [m["completion_mask"][rows].sum().item() for m, rows in zip(rollout, correct, strict=True)]
        return Batch(
            lp=lp,
            entropy=entropy,
            mask=inputs["completion_mask"],
            advantages=inputs["advantages"],
            num_items=sum(micro_batch["completion_mask"].sum().item() for micro_batch in rollout),
            lp_old=lp_old,
            entropy_old=entropy_old,
            lp_ref=lp_old,  # the reference model is the initial policy, and so is that of the first rollout
            rewards=self.rewards(inputs),
            num_correct_tokens=sum(correct_tokens),
        )

    def rewards(self, inputs: dict[str, Tensor]) -> Tensor:
        texts = self.trainer.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
        return torch.tensor(parity_reward(texts))

    def count_fates(self, b: Batch) -> None:
        """Count what happens to the tokens, and check that rounding to float32 decides none of it."""
        s = self.settings
        assert s.erc is not None
        assert b.entropy_old is not None
        for i, t in reference.valid_tokens(b):
            r, a = reference.ratio(b, s, i, t).item(), reference.advantage(b, i, t)
            rho = (b.entropy[i, t] / b.entropy_old[i, t]).item()
            margins = [abs(rho - bound) for bound in s.erc] + [
                abs(r - bound) for bound in (1 - s.eps_lo, 1 + s.eps_hi)
            ]
            if min(margins) <= self.margin:
                raise TooClose(f"{min(margins)} from a bound: choose another seed.")
            fate = "low" if a < 0 and r < 1 - s.eps_lo else "high" if a > 0 and r > 1 + s.eps_hi else "inside"
            if not reference.keeps_gradient(b, s, i, t):
                fate += ", gated"
            self.fates[fate] = self.fates.get(fate, 0) + 1


def test_the_reference_has_transformers_own_layers(tiny_model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has taken their place in the process."""

    def another(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("no float64 here")

    for name in OWN_LAYERS:
        monkeypatch.setattr(modeling_qwen2, name, another)
    with transformers_own_layers():
        policy = float64_copy(Qwen2ForCausalLM.from_pretrained(tiny_model_path))
        assert policy(input_ids=torch.tensor([[3, 4]])).logits.dtype == torch.float64
    assert modeling_qwen2.Qwen2MLP is another


@pytest.mark.parametrize(("level", "loss_type"), [("token", "dapo"), ("sequence", "grpo")])
def test_every_step_of_one_rollout(make_trainer: Callable[..., Any], level: str, loss_type: str) -> None:
    """Two passes over one rollout, two optimizer steps each: 8 micro-batches, all controls, KL and entropy bonus."""
    s = Settings(level=level, loss_type=loss_type, **ALL_CONTROLS)  # type: ignore[arg-type]
    trainer = make_trainer(
        **trainer_config(s),
        temperature=TEMPERATURE,
        num_iterations=2,
        max_steps=4,
        learning_rate=0.02,
        per_device_train_batch_size=12,
    )
    observer = Observer(trainer, s)
    trainer.train()
    assert len(observer.gradient_errors) == 8
    # float32 rounding leaves 6e-6 nats and 1e-5 of the gradient's norm; one token is about 1 % of that norm
    assert max(observer.entropy_errors) < 3e-5, observer.entropy_errors
    assert max(observer.gradient_errors) < 1e-4, observer.gradient_errors
    assert len(observer.fates) == 6, observer.fates  # low, high and inside, each gated or not
    assert observer.short_correct_completions > 0  # otherwise padding could count as correct tokens


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_old_entropies_are_those_of_the_adapter(make_trainer: Callable[..., Any], beta: float) -> None:
    """With LoRA the reference model is the same module with its adapter off; its entropies must not be taken."""
    trainer = make_trainer(
        peft_config=LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM"),
        erc_low=0.95,
        erc_high=1.05,
        beta=beta,
        temperature=TEMPERATURE,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        _, expected = logps_and_entropies(trainer.model, inputs)
        with trainer.model.disable_adapter():
            _, of_reference = logps_and_entropies(trainer.model, inputs)
    valid = inputs["completion_mask"].bool()
    torch.testing.assert_close(inputs["old_entropies"][valid], expected[valid], rtol=0, atol=3e-5)
    assert not torch.allclose(of_reference[valid], expected[valid], atol=0.1)
