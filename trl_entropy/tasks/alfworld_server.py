"""The program of ALFWorld's child processes: plays games by lines of JSON. Run by `trl_entropy.tasks.alfworld`.

It is run as a file and imports nothing of this package, so it starts without TRL and torch.
"""

import json
import os
import sys
from typing import Any


def main() -> None:
    """Answer each request on the standard input with a line on the standard output.

    Requests are `{"game": number, "path": file}` (start a game), `{"game": number, "action": text}` and
    `{"game": number}` (end it). Answers are those of `describe`, or `{"error": text}`.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the games print must not be taken for an answer
    games: dict[int, Any] = {}
    for line in sys.stdin:
        try:
            answer = play(games, json.loads(line))
        except Exception as error:
            answer = {"error": f"ALFWorld: {error!r}"}
        print(json.dumps(answer), file=answers, flush=True)


def play(games: dict[int, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Carry out one request."""
    number = request["game"]
    if "action" in request:
        state, _, done = games[number].step(request["action"])
        return describe(state, bool(done))
    if number in games:
        games.pop(number).close()
    if "path" not in request:
        return {}
    games[number] = start(request["path"])
    return describe(games[number].reset(), False)


def start(path: str) -> Any:
    """The game of that file, with names for people."""
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler

    request = textworld.EnvInfos(feedback=True, won=True, admissible_commands=True)
    return textworld.start(path, request, wrappers=[AlfredDemangler(shuffle=False)])


def describe(state: Any, done: bool) -> dict[str, Any]:
    """What the parent needs of a game's state: `observation`, `actions` (admissible ones), `won` and `done`."""
    return {
        "observation": state["feedback"].strip(),
        "actions": [action for action in state["admissible_commands"] if action != "help"],
        "won": bool(state["won"]),
        "done": done,
    }


if __name__ == "__main__":
    del sys.path[0]  # this file's folder, where `alfworld` is not the package
    main()
