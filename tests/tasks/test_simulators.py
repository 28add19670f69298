"""Simulator processes: dealt in turn, started again when dead, and their failures told apart."""

import os
import signal
import sys
import time

import pytest

from trl_entropy.tasks.environments import EnvironmentCrash, EnvironmentPool, Step
from trl_entropy.tasks.simulators import ChildProcess, SimulatorPool

ECHO = """
import json, os, subprocess, sys, time
for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    if request["say"] == "die":
        os._exit(3)
    if request["say"] == "hang":
        time.sleep(60)
    if request["say"] == "half":
        print('{"say": ', end="", flush=True)
        time.sleep(60)
    if request["say"] in ("orphan", "daemon"):  # its child keeps the pipe open
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        child = subprocess.Popen(sleep, start_new_session=request["say"] == "daemon")
        print(child.pid, file=sys.stderr, flush=True)
        time.sleep(60)
    if request["say"] == "babble":
        while True:
            print("x" * 10_000, end="", flush=True)
    if request["say"] == "mute":
        os.close(1)
        time.sleep(60)
    if request["say"] == "fail":
        request = {"error": "on request"}
    print("no JSON" if request.get("say") == "garbage" else json.dumps({**request, "number": number}), flush=True)
"""


@pytest.fixture
def start():
    """Start an echo process; all are ended afterwards."""
    started = []

    def start():
        started.append(ChildProcess([sys.executable, "-c", ECHO], timeout=60.0))
        return started[-1]

    yield start
    for process in started:
        process.close()
        assert not process.alive


def test_answers_belong_to_their_requests(start):
    process = start()
    assert [process.call({"say": text}) for text in ("a", "é\n")] == [
        {"say": "a", "number": 0},
        {"say": "é\n", "number": 1},
    ]


def test_error_leaves_the_process_alive(start):
    process = start()
    with pytest.raises(EnvironmentCrash, match="on request"):
        process.call({"say": "fail"})
    assert process.call({"say": "a"})["number"] == 1


@pytest.mark.parametrize(
    ("say", "message"),
    [
        ("die", "it ended with exit code 3"),
        ("garbage", "Expecting value"),
        *((say, r"no answer in 0\.3 s") for say in ("hang", "half", "babble", "mute")),
        *((say, r"no answer in 3\.0 s") for say in ("orphan", "daemon")),  # which start another process first
    ],
)
def test_failure_ends_the_process(start, say, message, capfd):
    process = start()
    process.call({"say": "a"})
    waits = 3.0 if say in ("orphan", "daemon") else 0.3
    process._timeout = 60.0 if say in ("die", "garbage") else waits
    started = time.monotonic()
    with pytest.raises(EnvironmentCrash, match=message):
        process.call({"say": say})
    assert time.monotonic() - started < waits + 2.7  # of the 60 that it would sleep
    if say == "daemon":
        os.kill(int(capfd.readouterr().err), signal.SIGKILL)  # in a session of its own, it was not ended
    assert not process.alive
    with pytest.raises(EnvironmentCrash, match="the simulator process failed"):
        process.call({"say": "a"})


def test_a_request_that_is_not_read_counts_as_no_answer():
    process = ChildProcess([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.3)
    started = time.monotonic()
    with pytest.raises(EnvironmentCrash, match=r"no answer in 0\.3 s"):
        process.call({"say": "x" * 10_000_000})  # more than a pipe holds
    assert time.monotonic() - started < 3.0
    assert not process.alive
    process.close()


def test_closing_twice_does_nothing(start):
    process = start()
    process.close()
    process.close()


class Echo:
    def __init__(self, process):
        self.process = process

    def reset(self, episode):
        return str(self.process.call({"say": episode})["number"])

    def step(self, action):
        return Step(self.process.call({"say": action})["say"])

    def close(self):
        pass


def test_environments_of_a_dead_process_move_to_a_new_one(start):
    simulators = SimulatorPool(start, 1)
    pool = EnvironmentPool(lambda: Echo(simulators.next()), close=simulators.close)
    assert pool.reset(["a", "b", "c"]) == ["0", "1", "2"]
    assert pool.step({0: "x", 1: "die"}) == [Step("x"), None]
    assert pool.step({0: "x"}) == [None]
    # slot 2 was not stepped and still holds an environment of the dead process: its new one is no second process
    assert pool.reset(["a", "b", "c"]) == ["0", "1", "2"]
    assert pool.step({0: "x", 1: "y", 2: "z"}) == [Step("x"), Step("y"), Step("z")]
    simulator = simulators.next()
    pool.close()
    assert not simulator.alive


class Counted:
    started = 0

    def __init__(self):
        Counted.started += 1
        self.alive = True

    def close(self):
        self.alive = False


def test_simulators_are_dealt_in_turn_and_started_when_needed():
    Counted.started = 0
    pool = SimulatorPool(Counted, 2)
    assert Counted.started == 0
    one, two, again = pool.next(), pool.next(), pool.next()
    assert one is again
    assert one is not two
    two.alive = False
    assert pool.next() is not two
    assert Counted.started == 3
    pool.close()
    assert not one.alive
    assert pool.next().alive


def test_no_simulators_are_refused():
    with pytest.raises(ValueError, match="num_simulators=0 must be at least 1"):
        SimulatorPool(Counted, 0)
