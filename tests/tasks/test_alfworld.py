"""ALFWorld against stand-ins for its two packages, in real child processes; the games themselves are a download."""

import json
import os
import signal

import pytest

from trl_entropy.tasks import alfworld, get_task
from trl_entropy.tasks.environments import Step

TEXTWORLD = '''
class EnvInfos:
    def __init__(self, feedback=False, won=False, admissible_commands=False):
        assert feedback and won and admissible_commands


class Game:
    """Won by the action that its file names."""

    def reset(self):
        print("noise on the output")
        return self.state("Welcome. Your task is to: put a mug on the desk. ")

    def step(self, command):
        if command == "segfault":
            import os
            os._exit(139)
        if command == "fail":
            raise IndexError("of the engine")
        self.won = command == self.solution
        return self.state(f"You {command}."), int(self.won), self.won

    def state(self, feedback):
        return {"feedback": feedback, "won": self.won, "admissible_commands": ["go to desk 1", "help", "look"]}

    def close(self):
        pass


def start(path, request_infos, wrappers):
    import json
    (wrapper,) = wrappers
    assert wrapper.shuffle is False
    game = Game()
    game.won, game.solution = False, json.load(open(path))["solution"]
    return game
'''
DEMANGLER = """
class AlfredDemangler:
    def __init__(self, shuffle=False):
        self.shuffle = shuffle
"""


@pytest.fixture
def games(tmp_path, monkeypatch):
    """ALFWorld's folder with three usable training games and one of each other split."""
    root = tmp_path / "json_2.1.1"
    content = {
        "train/pick/trial_1": {"solvable": True},
        "train/pick/trial_2": {"solvable": True},
        "train/heat/trial_1": {"solvable": True},
        "train/heat/trial_2": {"solvable": False},
        "train/heat/trial_3": {},
        "train/pick_and_place_movable/trial_1": {"solvable": True},
        "train/pick-AppleSliced-None/trial_1": {"solvable": True},
        "valid_seen/pick/trial_3": {"solvable": True},
        "valid_unseen/pick/trial_4": {"solvable": True},
    }
    for name, data in content.items():
        (root / name).mkdir(parents=True)
        (root / name / "game.tw-pddl").write_text(json.dumps({**data, "solution": "put mug on desk 1"}))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    return root


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Stand-ins for `textworld` and `alfworld`, for this process and its children."""
    folder = tmp_path / "packages"
    module = folder / "alfworld" / "agents" / "environment" / "alfred_tw_env.py"
    module.parent.mkdir(parents=True)
    module.write_text(DEMANGLER)
    (folder / "textworld.py").write_text(TEXTWORLD)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))


EPISODE = "train/pick/trial_1/game.tw-pddl"


def test_splits(games):
    names = {split: [row[-1]["episode"] for row in alfworld.load(split)["prompt"]] for split in alfworld.FOLDERS}
    assert sorted(names["train"]) == [
        f"train/{name}/game.tw-pddl" for name in ("heat/trial_1", "pick/trial_1", "pick/trial_2")
    ]
    assert names["dev"] == ["valid_seen/pick/trial_3/game.tw-pddl"]
    assert names["test"] == ["valid_unseen/pick/trial_4/game.tw-pddl"]
    assert [row[-1]["episode"] for row in alfworld.load("train", size=2)["prompt"]] == names["train"][:2]


@pytest.mark.usefixtures("games", "packages")
def test_play():
    with alfworld.build_rollout(num_simulators=2) as rollout:
        first = rollout.pool.reset([EPISODE, EPISODE])
        welcome = "Welcome. Your task is to: put a mug on the desk.\n\nAdmissible actions: go to desk 1, look"
        assert first == [welcome, welcome]
        steps = rollout.pool.step(
            {0: "A desk.\n<action>Go to desk 1</action>", 1: "<action>put mug on desk 1</action>"}
        )
        assert steps == [
            Step("You go to desk 1.\n\nAdmissible actions: go to desk 1, look"),
            Step(
                "You put mug on desk 1.\n\nAdmissible actions: go to desk 1, look", reward=1.0, done=True, success=True
            ),
        ]


@pytest.mark.usefixtures("games", "packages")
def test_admissible_actions_can_be_left_out():
    with alfworld.build_rollout(list_actions=False, num_simulators=1) as rollout:
        assert rollout.pool.reset([EPISODE]) == ["Welcome. Your task is to: put a mug on the desk."]


@pytest.mark.usefixtures("games", "packages")
def test_crashes_are_discarded_and_the_process_is_replaced():
    with alfworld.build_rollout(num_simulators=1) as rollout:
        rollout.pool.reset([EPISODE] * 3)
        assert rollout.pool.step({0: "fail"}) == [None]  # an error of the engine: the others play on
        assert rollout.pool.step({1: "look", 2: "segfault"})[1] is None
        assert rollout.pool.step({1: "look"}) == [None]
        rollout.pool.reset([EPISODE] * 3)
        os.kill(rollout.pool._environments[0]._process._process.pid, signal.SIGKILL)
        assert rollout.pool.step({0: "look", 1: "look"}) == [None, None]
        rollout.pool.reset([EPISODE] * 3)
        assert rollout.pool.step({0: "look", 1: "look", 2: "look"})[2].observation.startswith("You look.")


@pytest.mark.usefixtures("games", "packages")
def test_unknown_episode():
    with alfworld.build_rollout() as rollout, pytest.raises(ValueError, match=r"'train/9/game.tw-pddl' is not a game"):
        rollout.pool.reset(["train/9/game.tw-pddl"])


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    "episode",
    ["../secret/game.tw-pddl", "{root}/../secret/game.tw-pddl", "train/linked/game.tw-pddl", "train/pick/file.json"],
)
def test_an_episode_stays_in_the_folder_of_the_games(games, episode):
    """Its name comes with the dataset. No `..`, absolute path or link leads out, nor to another file."""
    (games.parent / "secret").mkdir()
    (games.parent / "secret" / "game.tw-pddl").write_text(json.dumps({"solution": "stolen", "solvable": True}))
    (games / "train" / "linked").mkdir()
    (games / "train" / "linked" / "game.tw-pddl").symlink_to(games.parent / "secret" / "game.tw-pddl")
    (games / "train" / "pick" / "file.json").write_text(json.dumps({"solution": "not a game"}))
    with alfworld.build_rollout() as rollout, pytest.raises(ValueError, match=r"The episode '.*' is not a game in"):
        rollout.pool.reset([episode.format(root=games)])
    with pytest.raises(ValueError, match=r"The episode 'train/linked/game.tw-pddl' is not a game in"):
        alfworld.load("train")


def test_the_folder_of_the_games_may_be_a_link(games, packages, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "json_2.1.1").symlink_to(games)
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "elsewhere"))
    assert len(alfworld.load("train")) == 3
    with alfworld.build_rollout(num_simulators=1) as rollout:
        assert rollout.pool.reset([EPISODE])[0].startswith("Welcome")


def test_missing_games_name_the_download(tmp_path, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="Run alfworld-download, or set ALFWORLD_DATA"):
        alfworld.load("train")
    (tmp_path / "json_2.1.1").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no game in .*train\. Run alfworld-download -f"):
        alfworld.load("train")


def test_missing_package_names_the_extra(games, monkeypatch):
    monkeypatch.setattr(alfworld, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"trl_entropy\[alfworld\]"):
        alfworld.build_rollout()


@pytest.mark.usefixtures("packages")
def test_missing_games_are_noticed_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="alfworld-download"):
        alfworld.build_rollout()


def test_bad_arguments(games):
    with pytest.raises(ValueError, match="split='valid_seen' is unknown"):
        alfworld.load("valid_seen")
    with pytest.raises(ValueError, match=r"size=4 is out of range. Set it to 1\.\.3"):
        alfworld.load("train", size=4)


def test_it_is_a_task():
    assert get_task("alfworld") is alfworld.TASK
