"""Simulator processes: dealt in turn, started again when dead, crashes told apart from errors."""

import os
import time

import pytest

from trl_entropy.tasks.multi_turn import EnvironmentCrash, EnvironmentPool, Step
from trl_entropy.tasks.simulators import EnvironmentProcess, SimulatorPool


class Echo:
    """Answers with the action, its own process and the number of the step; obeys `die`, `hang`, `crash`, `fail`."""

    def reset(self, episode):
        self.steps = 0
        return f"{episode} in {os.getpid()}"

    def step(self, action):
        self.steps += 1
        if action == "die":
            os._exit(3)
        if action == "hang":
            time.sleep(60.0)
        if action == "crash":
            raise EnvironmentCrash("of its own")
        if action == "fail":
            raise KeyError("a mistake")
        return Step(f"{action} {self.steps}", reward=0.5)

    def close(self):
        pass


@pytest.fixture
def process():
    process = EnvironmentProcess(Echo, timeout=60.0)
    yield process
    process.close()


def test_environments_of_a_process_are_apart(process):
    one, two = process.environment(), process.environment()
    pid = one.reset("a").split()[-1]
    assert pid != str(os.getpid())
    assert two.reset("b") == f"b in {pid}"
    assert one.step("x") == Step("x 1", reward=0.5)
    assert one.step("x").observation == "x 2"
    assert two.step("y").observation == "y 1"
    one.close()
    assert two.step("y").observation == "y 2"


def test_crash_and_error_come_back_as_themselves(process):
    environment = process.environment()
    environment.reset("a")
    with pytest.raises(EnvironmentCrash, match="of its own"):
        environment.step("crash")
    with pytest.raises(KeyError, match="a mistake"):
        environment.step("fail")
    assert environment.step("x").observation == "x 3"


def test_dead_process_is_a_crash_for_all_it_hosts_and_is_replaced():
    simulators = SimulatorPool(lambda: EnvironmentProcess(Echo, timeout=60.0), 1)
    pool = EnvironmentPool(lambda: simulators.next().environment(), close=simulators.close)
    first = {text.split()[-1] for text in pool.reset(["a", "b"])}
    assert pool.step({0: "x", 1: "die"}) == [Step("x 1", reward=0.5), None]
    assert pool.step({0: "x"}) == [None]
    second = {text.split()[-1] for text in pool.reset(["a", "b"])}
    assert len(first) == len(second) == 1
    assert first != second
    simulator = simulators.next()
    pool.close()
    assert not simulator.alive


def test_idle_environment_of_a_dead_process_starts_again():
    simulators = SimulatorPool(lambda: EnvironmentProcess(Echo, timeout=60.0), 1)
    pool = EnvironmentPool(lambda: simulators.next().environment(), close=simulators.close)
    pool.reset(["a", "b"])
    assert pool.step({1: "die"}) == [None]
    # slot 0 was not stepped, so it still holds an environment of the dead process
    assert len({text.split()[-1] for text in pool.reset(["a", "b"])}) == 1
    assert pool.step({0: "x", 1: "x"}) == [Step("x 1", reward=0.5)] * 2
    pool.close()


def test_silence_is_a_crash(process):
    environment = process.environment()
    environment.reset("a")
    process._timeout = 0.2
    with pytest.raises(EnvironmentCrash, match=r"no answer to step in 0\.2 s"):
        environment.step("hang")
    with pytest.raises(EnvironmentCrash, match="died"):
        environment.step("x")
    process.close()
    assert not process.alive


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
