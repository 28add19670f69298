"""Simulator processes behind environments: shared by many environments, started again when one has died."""

import itertools
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

from trl_entropy.tasks.environments import EnvironmentCrash


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


class ChildProcess:
    """A program that answers each line of JSON on its input with one on its output; one call at a time.

    Args:
        command: The program and its arguments.
        timeout: Seconds after which an answer counts as a crash.
    """

    def __init__(self, command: Sequence[str], timeout: float) -> None:
        # a session of its own, so that what the program started can be ended with it
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._timeout = timeout
        self._lock = threading.Lock()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            EnvironmentCrash: If the answer has the key `"error"`, or the process died, or did not read the request
                and answer it in time.
        """
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._kill()  # which ends a write that nobody reads, and the wait for the rest of a line

        with self._lock:
            watch = threading.Timer(self._timeout, expire)
            watch.start()
            try:
                answer = self._exchange(json.dumps(request).encode() + b"\n")
            except (OSError, EOFError, ValueError) as error:
                reason = f"no answer in {self._timeout} s" if expired.is_set() else error
                self._kill()  # what it would answer later belongs to no call
                raise EnvironmentCrash(f"the simulator process failed ({reason})") from error
            finally:
                watch.cancel()
        if "error" in answer:
            raise EnvironmentCrash(answer["error"])
        return answer

    def _exchange(self, line: bytes) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer.endswith(b"\n"):
            raise EOFError(f"it ended with exit code {self._process.wait()}")
        return json.loads(answer)

    def _kill(self) -> None:
        """End the process and what it started."""
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End the process by closing its input, or by force if it does not end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):  # a request that it never read
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self._kill()
        self._process.stdout.close()
