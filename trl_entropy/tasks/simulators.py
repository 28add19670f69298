"""Simulator processes behind environments: shared by many environments, started again when one has died."""

import itertools
import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Generic, Protocol, TypeVar

from trl_entropy.tasks.multi_turn import Environment, EnvironmentCrash, Step


class Simulator(Protocol):
    """A process that hosts environments."""

    @property
    def alive(self) -> bool:
        """Whether it can host a new environment."""
        ...

    def close(self) -> None:
        """End the process; a second call does nothing."""
        ...


S = TypeVar("S", bound=Simulator)


class SimulatorPool(Generic[S]):
    """Simulators that start when first needed; environments are dealt to them in turn.

    Args:
        start: Starts a simulator; raises [`EnvironmentCrash`] if that fails.
        count: Number of simulators, at least 1.

    Raises:
        ValueError: If `count` is below 1.
    """

    def __init__(self, start: Callable[[], S], count: int) -> None:
        if count < 1:
            raise ValueError(f"num_simulators={count} must be at least 1.")
        self._start = start
        self._simulators: list[S | None] = [None] * count
        self._turns = itertools.cycle(range(count))
        self._lock = threading.Lock()

    def next(self) -> S:
        """The simulator for the next environment, started if it does not run."""
        with self._lock:
            slot = next(self._turns)
            simulator = self._simulators[slot]
            if simulator is None or not simulator.alive:
                if simulator is not None:
                    simulator.close()
                simulator = self._simulators[slot] = self._start()
            return simulator

    def close(self) -> None:
        """End all of them. `next` starts new ones."""
        with self._lock:
            for simulator in filter(None, self._simulators):
                simulator.close()
            self._simulators = [None] * len(self._simulators)


class EnvironmentProcess:
    """A child process that hosts environments, so that a crash of theirs costs no more than their episodes.

    Args:
        make: Makes an environment, in the child; must be picklable.
        timeout: Seconds after which an answer counts as a crash.
    """

    def __init__(self, make: Callable[[], Environment], timeout: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()
        self._timeout = timeout
        self._lock = threading.Lock()
        self._names = itertools.count()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def environment(self) -> "RemoteEnvironment":
        """A new environment in this process."""
        return RemoteEnvironment(self, next(self._names))

    def call(self, name: int, method: str, *arguments: str) -> Any:
        """Call a method of one of its environments.

        Raises:
            EnvironmentCrash: If the environment raised it, or the process died or did not answer in time.
            Exception: Whatever else the environment raised.
        """
        with self._lock:
            try:
                self._connection.send((name, method, arguments))
                if not self._connection.poll(self._timeout):
                    self._process.kill()
                    raise EnvironmentCrash(f"no answer to {method} in {self._timeout} s")
                answer = self._connection.recv()
            except (OSError, EOFError) as error:
                self._process.kill()
                raise EnvironmentCrash(f"the simulator process died (exit code {self._process.exitcode})") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=1.0)
        self._process.kill()
        self._process.join()


class RemoteEnvironment:
    """An environment of an `EnvironmentProcess`."""

    def __init__(self, process: EnvironmentProcess, name: int) -> None:
        self._process = process
        self._name = name

    def reset(self, episode: str) -> str:
        return self._process.call(self._name, "reset", episode)

    def step(self, action: str) -> Step:
        return self._process.call(self._name, "step", action)

    def close(self) -> None:
        if self._process.alive:
            self._process.call(self._name, "close")


def _serve(connection: Connection, make: Callable[[], Environment]) -> None:
    """Answer calls until the other end closes."""
    environments: dict[int, Environment] = {}
    while True:
        try:
            name, method, arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            break
        try:
            if name not in environments:
                environments[name] = make()
            answer = getattr(environments[name], method)(*arguments)
            if method == "close":
                del environments[name]
        except Exception as error:
            answer = error
        connection.send(answer)
    for environment in environments.values():
        environment.close()
