"""The study on a pretrained model is what was registered, measures what it says, and does each run once."""

import argparse
import gzip
import json
import re
import statistics
from itertools import product

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.smollm2_study import (
    STUDY,
    arms,
    compare,
    fake,
    page,
    plan,
    problems,
    products,
    registered,
    train,
    whole_results,
)
from trl_entropy import AsyPPOConfig

TEXT = (STUDY / "PREREGISTRATION.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama with one token a character, a line break among them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    characters = ["<pad>", "Ċ", "Ġ", *"0123456789+=:abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(characters)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(characters), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, None, 1
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def even_reward(completion_ids, **columns):
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def test_arms_are_those_registered():
    rows = re.findall(r"^\| `(\S+)` \| (.+) \|$", TEXT.split("## Arms")[1].split("## Learning rates")[0], re.MULTILINE)
    assert [name for name, _ in rows] == [*arms.ARMS, "best"]
    assert [name for name, _ in rows][:12] == list(arms.DECISIVE)
    assert [name for name, _ in rows][:8] == list(arms.MAIN)
    assert set(arms.DECISIVE) <= set(arms.ARMS)
    for rate in (*arms.LEARNING_RATES, *arms.RATE_LIMITS):
        assert f"{rate:.0e}".replace("e-0", "e-") in TEXT or f"{rate:g}".replace("e-0", "e-") in TEXT
    steps, degree = arms.TRAINING["max_steps"], arms.TRAINING["steps_per_generation"]
    amendments = " ".join(TEXT.split("## Amendments")[1].split())
    assert f"{steps} optimizer steps, {degree} steps a rollout ({steps // degree} rollouts)" in amendments
    assert tuple(range(5)) == arms.SEEDS
    assert tuple(range(5, 10)) == arms.MORE_SEEDS
    assert "seeds 100 and 101" in TEXT
    assert arms.TUNING_SEEDS == (100, 101)


def test_claims_are_those_registered():
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+) \|$", TEXT.split("## Tests")[1], re.MULTILINE)
    claims = registered.CLAIMS | {"18": registered.LAST_CLAIM}
    assert {number: (claim.text, claim.source) for number, claim in claims.items()} == {
        number: (text, source) for number, text, source, _ in rows
    }
    assert all(f"**{name}**".lower() in TEXT.lower() for name in registered.PRIMARY)
    for number, _, _, tests in rows[:-1]:
        found = registered.CLAIMS[number].tests
        pairs = dict.fromkeys((test.arm, test.than) for test in found)  # in order, each once
        assert re.findall(r"`(.+?)`", tests) == [
            name for pair in pairs for name in pair if name not in ("", arms.BASE)
        ]
        sides = re.findall(r"higher|lower", tests) or ["higher"]
        assert {test.expected for test in found} == set(sides)
        quantities = {test.quantity.replace("outside ERC's", "outside the").partition(" -")[0] for test in found}
        assert all(quantity.split(",")[0].lower() in tests.lower() for quantity in quantities)


def test_tests_know_how_many_seeds_they_are_registered_with():
    seeds = {number: {test.num_seeds for test in claim.tests} for number, claim in registered.CLAIMS.items()}
    assert {number for number, found in seeds.items() if found == {5}} == {"5", "15", "16"}
    assert seeds["8"] == {5, 10}  # GPPO has five


@pytest.mark.parametrize("arm", arms.ARMS)
def test_arm_has_a_valid_configuration_of_its_own(arm, tmp_path):
    folder = {"output_dir": str(tmp_path)}
    args = plan.make_config(train.settings_of_run(arms.Run("sums", arm, 1e-5, 3), {}) | folder)
    assert (args.learning_rate, args.seed, args.max_completion_length) == (1e-5, 3, 3)
    assert args.bf16 == (not arm.endswith("float32"))
    assert isinstance(args, AsyPPOConfig) == (arm in ("asyppo", "ppo-critic"))
    control = plan.make_config(train.settings_of_run(arms.Run("sums", "ppo-clip", 1e-5, 3), {}) | folder)
    assert (arm == "ppo-clip") == (args.to_dict() == control.to_dict())


def test_problems_are_split_by_pairs():
    for task, number in (("sums", 380), ("letters", 650)):
        splits = {split: problems.STUDY_TASKS[task].load(split) for split in ("train", "test")}
        assert (len(splits["train"]), len(splits["test"])) == (number - 100, 100)
        pairs = [
            {frozenset(re.findall(r"\w+", prompt.split("\n")[-1])) for prompt in rows["prompt"]}
            for rows in splits.values()
        ]
        assert not pairs[0] & pairs[1]
    row = problems.STUDY_TASKS["sums"].load("test")[0]
    first, second = re.fullmatch(r"2\+3=5\n(\d+)\+(\d+)=", row["prompt"]).groups()
    assert int(row["answer"]) == int(first) + int(second)


def test_probabilities_are_those_of_sampling(model):
    tokenizer = problems.load_tokenizer(model)
    policy = LlamaForCausalLM.from_pretrained(model).eval()
    rows = problems.STUDY_TASKS["letters"].load("test").select(range(3))
    found, entropy = problems.answer_statistics(policy, tokenizer, rows)
    expected, entropies = [], []
    for row in rows:
        ids = tokenizer.encode(row["prompt"])
        probability = 1.0
        for token in [*tokenizer.encode(row["answer"]), tokenizer.eos_token_id]:
            chances = policy(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
            probability *= chances[token].item()
            entropies.append(-(chances * chances.log()).sum().item())
            ids.append(token)
        expected.append(probability)
    assert found == pytest.approx(expected, rel=1e-4)
    assert entropy == pytest.approx(statistics.fmean(entropies), rel=1e-4)
    assert problems.pass_at([0.5, 0.0], 2) == pytest.approx(0.375)


def test_reward_is_for_the_right_tokens_alone(model):
    tokenizer = problems.load_tokenizer(model)
    right = [*tokenizer.encode("17"), tokenizer.eos_token_id]
    given = [right, right[:2], [*right, right[0]], [*tokenizer.encode("18"), tokenizer.eos_token_id], []]
    assert problems.make_reward(tokenizer)(completion_ids=given, answer=["17"] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("arm", ["ppo-clip", "erc", "asyppo", "base"])
def test_run_is_measured_and_repeats_to_the_last_digit(arm, model, monkeypatch):
    # a model that knows nothing gets some of it all the same
    monkeypatch.setattr(train, "make_reward", lambda tokenizer: even_reward)
    asked = arms.Run("letters", arm, 1e-2, 0)
    settings = train.settings_of_run(asked, {}) | {"max_steps": 16}
    first, second = (train.train(asked, model, settings) for _ in range(2))
    for result, _ in (first, second):
        assert result.pop("seconds") >= 0
        assert result.pop("cpu_seconds") >= 0
    assert first == second
    result, samples = first
    assert len(result["probabilities"]) == 100
    assert result["pass"]["1"] == pytest.approx(statistics.fmean(result["probabilities"]), abs=1e-4)
    if arm != "base":
        assert len(result["reward"]) == len(result["entropy"]) == len(samples) == 2
        assert [len(rollout) for rollout in samples] == [64, 64]
        base, _ = train.train(arms.base_run("letters"), model, {})
        assert result["probabilities"] != base["probabilities"]
    json.dumps(result)


def test_held_out_problems_are_measured_in_float32(model, monkeypatch):
    seen = []

    def keep(policy, tokenizer, rows):
        policy.lm_head.register_forward_hook(lambda head, inputs, logits: seen.append(logits.dtype))
        policy(input_ids=torch.tensor([[3]]))
        return [0.5], 1.0

    monkeypatch.setattr(train, "answer_statistics", keep)
    asked = arms.Run("letters", "ppo-clip", 1e-3, 0)
    train.train(asked, model, train.settings_of_run(asked, {}) | {"max_steps": 1})
    assert seen == [torch.float32]


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("arm", ["erc-bf16", "asyppo", "erc-float32"])
def test_bfloat16_without_instructions_is_computed_in_float32_and_said(arm, instructions, model, monkeypatch):
    dtypes = []

    def counted(mode, func, types, args=(), kwargs=None):
        backward = torch._C._current_graph_task_id() != -1
        dtypes.append((backward, torch.is_grad_enabled(), args[-1].dtype) if func in products.PRODUCTS else None)
        return dispatch(mode, func, types, args, kwargs)

    dispatch = products.Float32Products.__torch_dispatch__
    monkeypatch.setattr(products.Float32Products, "__torch_dispatch__", counted)
    monkeypatch.setattr(train, "has_bfloat16_products", lambda: instructions)
    asked = arms.Run("letters", arm, 1e-3, 0)
    result, _ = train.train(asked, model, train.settings_of_run(asked, {}) | {"max_steps": 8})
    emulated = arm != "erc-float32" and not instructions
    assert result.get("products") == ("float32" if emulated else None)
    assert bool(dtypes) == emulated
    if emulated:  # generation and the rollout's forward pass; that of a step; its backward pass
        assert {(*when, torch.bfloat16) for when in ((False, False), (False, True), (True, False))} <= set(dtypes)


def test_grid_grows_beyond_a_best_rate_at_its_edge():
    assert arms.missing_rates({}) == [5e-6, 1e-5, 2e-5]
    assert arms.missing_rates({5e-6: 0.1, 1e-5: 0.3, 2e-5: 0.2}) == []
    assert arms.missing_rates({5e-6: 0.1, 1e-5: 0.2, 2e-5: 0.3}) == [4e-5]
    assert arms.missing_rates({5e-6: 0.1, 1e-5: 0.2, 2e-5: 0.3, 4e-5: 0.4}) == [8e-5]
    assert arms.missing_rates({5e-6: 0.1, 1e-5: 0.2, 2e-5: 0.3, 4e-5: 0.4, 8e-5: 0.5}) == []
    assert arms.missing_rates({5e-6: 0.3, 1e-5: 0.2, 2e-5: 0.1}) == [2.5e-6]


def test_plan_has_every_run_once_in_the_registered_order():
    names = [run.name for run in plan.remaining({})]
    assert len(names) == len(set(names))
    assert names[:3] == ["sums/base/0/0", "letters/base/0/0", "sums/ppo-clip/1e-05/0"]
    assert names[2:7] == [f"sums/ppo-clip/1e-05/{seed}" for seed in arms.SEEDS]
    assert names[7:14] == [f"sums/{arm}/1e-05/0" for arm in arms.MAIN[1:]]
    assert names[14] == "sums/erc/1e-05/1"
    for arm, seed in product(arms.ARMS, arms.SEEDS):
        assert f"sums/{arm}/1e-05/{seed}" in names
    shares = [plan.remaining({}, train._share(f"{index}/2")) for index in (1, 2)]
    assert sorted(run.name for share in shares for run in share) == sorted(names)


def test_the_first_arms_have_ten_seeds_at_their_own_rates_before_the_others_begin():
    names = [run.name for run in plan.remaining({})]  # where every own rate is the common one
    first_of_rest = names.index(f"sums/{arms.REST[0]}/1e-05/0")
    before = {f"sums/{arm}/1e-05/{seed}" for arm, seed in product(arms.MAIN, (*arms.SEEDS, *arms.MORE_SEEDS))}
    assert before <= set(names[:first_of_rest])
    assert not any(f"/{arm}/" in name for arm in arms.REST for name in names[:first_of_rest])


def test_more_seeds_at_the_common_rate_come_last():
    results, order = {}, []
    for run in plan.plan(results):
        if run.name not in results:
            order.append(run)
            better = 2e-5 if run.arm in ("erc", "best") else 1e-5
            results[run.name] = fake(run) | {"reward": [float(run.learning_rate == better)] * 12}
    last = order[-10:]
    assert {(run.arm, run.learning_rate, run.seed) for run in last} == set(
        product(("erc", "best"), (1e-5,), arms.MORE_SEEDS)
    )
    assert order[-11].task == "letters"


def test_the_arms_that_earlier_runs_choose(monkeypatch):
    def with_passes(first, last):
        return lambda result: result | {"pass": dict.fromkeys(map(str, arms.PASS_AT), first) | {"32": last}}

    flat = {arm: with_passes(0.4, 0.6) for arm in arms.ARMS} | {"clip-higher": with_passes(0.5, 0.7)}
    chosen = whole_results(**flat | {"gppo": with_passes(0.9, 0.6)})
    assert plan.best_pair(chosen) == ("gppo", "clip-higher")
    assert plan.settings_of("best", chosen) == arms.ARMS["gppo"] | arms.ARMS["clip-higher"]
    assert plan.extra_arm(chosen) == "gppo"
    families = []

    def keep(*args, **of):
        families.append(compare.against_control(*args, **of))
        return families[-1]

    monkeypatch.setattr(plan, "against_control", keep)
    assert plan.extra_arm(chosen) == "gppo"
    assert all(set(family) == set(arms.ARMS) - {"ppo-clip"} for family in families)  # `best` has come since
    seeds = {run.seed for run in map(arms.Run.parse, chosen) if run.arm == "gppo" and run.learning_rate == 1e-5}
    assert set(range(10)) <= seeds
    # the best of both endpoints are one: the second in pass@1 joins it, and not what excludes it
    twice = whole_results(**flat | {"gppo": with_passes(0.9, 0.9), "ce-gppo": with_passes(0.8, 0.8)})
    assert plan.best_pair(twice) == ("gppo", "clip-higher")
    fewer = {name: result for name, result in chosen.items() if name != "sums/dppo/1e-05/4"}
    assert plan.best_pair(fewer) is plan.extra_arm(fewer) is None
    with pytest.raises(LookupError, match="some are missing"):
        plan.settings_of("best", fewer)
    assert page.tables(fewer)["state"].count("an eleventh control") == 1


def test_run_that_raises_is_a_result_without_numbers(tmp_path, monkeypatch):
    results, samples = tmp_path / "results.jsonl", tmp_path / "samples.jsonl.gz"

    def train_some(run, model, settings):
        if run.arm == "kl" and run.seed in (2, 100):
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        return fake(run), []

    monkeypatch.setattr(train, "train", train_some)
    monkeypatch.setattr(train.gc, "collect", lambda: 0)
    train.run_all(["ppo-clip", "kl"], "", results_file=results, samples_file=samples)
    found = train.read_results(results)
    assert found["sums/kl/1e-05/2"] == {
        "run": "sums/kl/1e-05/2",
        "error": "RuntimeError: probability tensor contains either `inf`, `nan` or element < 0",
    }
    assert plan.remaining(found, ["ppo-clip", "kl"]) == []
    assert "| ended with an error | `sums/kl/1e-05/2`" in page.tables(found)["state"]
    assert len(compare.compare(found, "pass@1", "kl", "ppo-clip", rates="common rate").differences) == 9
    # every rate has failed with seed 100: the lowest is taken, at the end of the grid
    assert arms.tuned_rate("sums", "kl", found) == 1.25e-6

    def no_memory(run, model, settings):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(train, "train", no_memory)
    with pytest.raises(RuntimeError, match="allocate"):
        train.run_all(["erc"], "", results_file=results, samples_file=samples)


def test_run_names():
    asked = arms.Run("sums", "erc+ce-gppo", 2e-5, 4)
    assert arms.Run.parse(asked.name) == asked
    for name in ("sums/nothing/1e-05/0", "sums/erc/1e-05", "chess/erc/1e-05/0", "sums/erc/fast/0"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not task/arm"):
            train._run(name)


def test_runs_go_on_where_they_were_killed(tmp_path, monkeypatch):
    results, samples, done = tmp_path / "results.jsonl", tmp_path / "samples.jsonl.gz", []

    def fake_train(run, model, settings):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(run.name)
        return fake(run), [[run.name]]

    monkeypatch.setattr(train, "train", fake_train)
    monkeypatch.setattr(train.gc, "collect", lambda: 0)
    with pytest.raises(KeyboardInterrupt):
        train.run_all(["ppo-clip", "kl"], "", results_file=results, samples_file=samples)
    with results.open("a") as file:
        file.write('{"run": "sums/kl/1e-05/3", "rew')
    done.insert(0, "killed")
    train.run_all(["ppo-clip", "kl"], "", results_file=results, samples_file=samples)
    found = train.read_results(results)
    assert sorted(done[1:]) == sorted(found)
    assert len(done) - 1 == len(found) >= len(plan.remaining({}, ["ppo-clip", "kl"]))
    assert plan.remaining(found, ["ppo-clip", "kl"]) == []
    kept = [json.loads(line) for line in gzip.decompress(samples.read_bytes()).splitlines()]
    assert [entry["run"] for entry in kept] == done[1:]
    train.run_all(["erc"], "", hours=0.0, results_file=results, samples_file=samples)
    assert train.read_results(results) == found
