"""Simulator processes behind environments: shared by many environments, started again when one has died."""

import itertools
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any, Generic, Protocol, TypeVar

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
PIPE_SIZE = 1 << 16
"""Bytes read at once: what a pipe holds on Linux."""


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
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdin.fileno(), False)
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
        with self._lock:
            try:
                answer = self._exchange(json.dumps(request).encode() + b"\n")
            except (OSError, EOFError, ValueError, subprocess.TimeoutExpired) as error:
                self._kill()  # what it would answer later belongs to no call
                late = isinstance(error, TimeoutError | subprocess.TimeoutExpired)
                reason = f"no answer in {self._timeout} s" if late else error
                raise EnvironmentCrash(f"the simulator process failed ({reason})") from error
        if "error" in answer:
            raise EnvironmentCrash(answer["error"])
        return answer

    def _exchange(self, line: bytes) -> dict[str, Any]:
        # `multiprocessing`'s connections have a poll for what is read alone, and their `send` and `recv` of a message
        # that has begun wait for ever. Here each write and each read is waited for, all with the one limit.
        deadline = time.monotonic() + self._timeout
        unsent = memoryview(line)
        while unsent:
            _wait(self._stdin, select.POLLOUT, deadline)
            unsent = unsent[os.write(self._stdin.fileno(), unsent) :]
        answer = bytearray()
        while not answer.endswith(b"\n"):
            _wait(self._stdout, select.POLLIN, deadline)
            part = os.read(self._stdout.fileno(), PIPE_SIZE)
            if not part:
                code = self._process.wait(max(0.0, deadline - time.monotonic()))
                raise EOFError(f"it ended with exit code {code}")
            answer += part
        return json.loads(answer)

    def _kill(self) -> None:
        """End the process and what it started."""
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End the process by closing its input, or by force if it does not end."""
        self._stdin.close()
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self._kill()
        self._stdout.close()


def _wait(pipe: IO[bytes], event: int, deadline: float) -> None:
    """Wait until a pipe can be written to or read from, or its other end is closed.

    Raises:
        TimeoutError: If that is not so at the deadline, in seconds of `time.monotonic`.
    """
    poll = select.poll()
    poll.register(pipe, event)
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(left * 1000):
        raise TimeoutError
