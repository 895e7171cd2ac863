"""Whom a rank knows as its launchers, by real processes above it, and that it ends when one of them goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lumina_ds.train.watch.orphans import START_MARK, STARTED_BY, launchers_above, start_variables

CHECKOUT = Path(__file__).parents[2]
# A process that is called what its last word says, and starts the next one: python -c PARENT NAME WORDS
PARENT = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[2:]).returncode)"
LAUNCH, RUNNER, SCRIPT = "deepspeed.launcher.launch", "deepspeed.launcher.runner", "train.sh"
NAMES = """
import json, sys
from lumina_ds.train.watch.orphans import launchers_above
print(json.dumps([launcher.name.partition(" (")[0] for launcher in launchers_above()]))
"""
# A rank in a long import: its main thread does not answer.
RANK = """
import sys, time
from lumina_ds.train.watch.orphans import saving_first, watch_launchers
watch_launchers()
stop = lambda gone: (print("saves:", gone, flush=True), __import__("os")._exit(7))
with saving_first(stop) if sys.argv[1] == "trains" else open("/dev/null"):
    print("up", flush=True)
    time.sleep(60)
"""


def below(*names: str, rank: list[str]) -> list[str]:
    """The command of a rank under processes of these names, the outermost first."""
    words = rank
    for name in reversed(names):
        words = [sys.executable, "-c", PARENT, name, *words]
    return words


def environment(**variables: str) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if name not in (STARTED_BY, START_MARK, "CROSS_RANK")}
    return others | {"PYTHONPATH": str(CHECKOUT)} | variables


@pytest.mark.parametrize(
    ("names", "variables", "known"),
    [
        ((), {}, []),
        ((SCRIPT,), {}, []),
        ((RUNNER, LAUNCH), {"CROSS_RANK": "0"}, ["the deepspeed launcher"] * 2),
        ((SCRIPT, RUNNER, LAUNCH), {"CROSS_RANK": "0"}, ["the deepspeed launcher"] * 2),
        # A script between the launcher and its rank; the shell above the launcher may go.
        ((SCRIPT, RUNNER, LAUNCH, SCRIPT), {"CROSS_RANK": "0"}, ["the deepspeed launcher"] * 2),
        # As ssh starts it for a runner on another host.
        ((SCRIPT, LAUNCH), {}, ["the deepspeed launcher", "the connection to the host that started it"]),
        (("/usr/bin/torchrun",), {}, ["torchrun"]),
        ((), {"CROSS_RANK": "0"}, ["its launcher"]),
        ((), {STARTED_BY: "1:5"}, ["lumina train"]),
        ((RUNNER, LAUNCH), {STARTED_BY: "1:5"}, ["the deepspeed launcher"] * 2 + ["lumina train"]),
        ((), {STARTED_BY: "nonsense"}, []),
    ],
)
def test_who_counts_as_a_launcher(names: tuple[str, ...], variables: dict[str, str], known: list[str]) -> None:
    rank = [sys.executable, "-c", NAMES]
    done = subprocess.run(
        below(*names, rank=rank), env=environment(**variables), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == known


def test_a_later_process_of_the_same_number_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    own = start_variables("m")[STARTED_BY]
    for variable, there in ((own, True), (own + "0", False), ("0:0", False), (f"{os.getpid()}:0", False)):
        monkeypatch.setenv(STARTED_BY, variable)
        assert launchers_above()[-1].is_there is there
    zombie = subprocess.Popen(["true"])
    while psutil.Process(zombie.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    began = Path(f"/proc/{zombie.pid}/stat").read_text().rpartition(")")[2].split()[19]
    monkeypatch.setenv(STARTED_BY, f"{zombie.pid}:{began}")
    assert not launchers_above()[-1].is_there
    zombie.wait()


@pytest.mark.parametrize(("phase", "code", "says"), [
    ("starts", 75, "has gone before there was anything to save, so this run ends"),
    ("trains", 7, "saves: the deepspeed launcher (process "),
])  # fmt: skip
@pytest.mark.parametrize("victim", [RUNNER, LAUNCH])
def test_a_rank_ends_when_a_launcher_goes(phase: str, code: int, says: str, victim: str, tmp_path: Path) -> None:
    with open(tmp_path / "printed", "w+") as printed:
        words = below(RUNNER, LAUNCH, rank=[sys.executable, "-c", RANK, phase])
        runner = subprocess.Popen(words, env=environment(), stdout=printed, stderr=subprocess.STDOUT)
        try:
            while "up" not in (tmp_path / "printed").read_text():
                assert runner.poll() is None
                time.sleep(0.02)
            launch = psutil.Process(runner.pid).children()[0]
            (rank,) = launch.children()
            (runner if victim == RUNNER else launch).send_signal(signal.SIGKILL)
            assert psutil.wait_procs([rank], timeout=30)[1] == []
            assert says in (tmp_path / "printed").read_text()
            if victim == RUNNER:
                # The launch module passes its rank's code on, to whoever is its parent now.
                psutil.wait_procs([launch], timeout=30)
        finally:
            runner.kill()
            runner.wait()


# In DeepSpeed's place: it starts a child, or looks at how that ended.
STARTS = """
import subprocess, sys
from lumina_ds.ranks import deepspeed_runner
from lumina_ds.engine.deepspeed import remote_start
def started():
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
    print(child.pid, flush=True)
    child.wait()
remote_start.run_deepspeed_runner = started
deepspeed_runner.main()
"""


@pytest.mark.parametrize(
    ("child", "code"), [("pass", 0), ("import os; os.kill(os.getpid(), 9)", 137), ("import os; os.kill(os.getpid(), 6)", 134)]
)  # fmt: skip
def test_a_launch_module_that_a_signal_ended_is_no_success(child: str, code: int) -> None:
    words = [sys.executable, "-c", STARTS, child]
    assert subprocess.run(words, env=environment(**start_variables("m")), stdout=subprocess.PIPE).returncode == code


def test_what_the_runner_starts_ends_with_the_runner_and_the_runner_with_its_starter() -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", "import os, subprocess, sys\n"
         "from lumina_ds.train.watch.orphans import start_variables\n"
         "subprocess.run(sys.argv[1:], env=os.environ | start_variables('m'))",
         sys.executable, "-c", STARTS, "import time; time.sleep(60)"],
        env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert starter.stdout is not None
    child = psutil.Process(int(starter.stdout.readline()))
    runner = child.parent()
    assert runner is not None and runner.ppid() == starter.pid
    starter.kill()
    starter.wait()
    starter.stdout.close()
    assert psutil.wait_procs([child, runner], timeout=20)[1] == []
    # One whose starter went before it began does nothing.
    gone = environment(**{STARTED_BY: f"{starter.pid}:1"})
    done = subprocess.run([sys.executable, "-c", STARTS, "pass"], env=gone, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, "")
