"""quickstart.sh itself, with programs that only note how they are called: which commands it shows and runs, on which
machine, and that it ends with a reason when one of them fails. The real programs run in the quickstart."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

PIP = "#!/bin/sh\nexit 0\n"
# Tells the number of GPUs; fails in the script that $FAIL_IN names, as the checks at the end would.
PYTHON = """#!/bin/sh
case "$*" in
  *device_count*) echo "$GPUS" ;;
  *"${FAIL_IN:-nothing}"*) echo "made to fail" >&2; exit 9 ;;
esac
"""
# Trains by making the checkpoint at which the run is to stop.
LUMINA = """#!/bin/sh
case "$*" in *"${FAIL_IN:-nothing}"*) exit 9 ;; esac
case "$*" in
  *--stop-at-step*) [ -n "$NO_CHECKPOINT" ] || mkdir -p quickstart/runs/quickstart/checkpoints/step-00000200 ;;
  generate*) echo '{"reply": "hello"}' ;;
esac
"""


class Machine:
    """A copy of the scripts, and an environment that looks installed."""

    def __init__(self, folder: Path) -> None:
        self.checkout = folder / "checkout"
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        for name in ("setup.py", "constraints.txt"):
            shutil.copyfile(ROOT / name, self.checkout / name)
        self.environment = folder / "environment"
        self.environment.joinpath("bin").mkdir(parents=True)
        self.environment.joinpath("pyvenv.cfg").touch()
        for name, text in (("pip", PIP), ("python", PYTHON), ("lumina", LUMINA)):
            self.environment.joinpath("bin", name).write_text(text)
            self.environment.joinpath("bin", name).chmod(0o755)
        self.environment.joinpath("bin", "activate").write_text(f'PATH="{self.environment}/bin:$PATH"\n')
        stamp = f'. launch/environment.sh; environment_digest > "{self.environment}/.lumina-installed"'
        subprocess.run(["bash", "-c", stamp], cwd=self.checkout, check=True)

    def quickstart(self, gpus: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        values = {"LUMINA_VENV": str(self.environment), "GPUS": str(gpus), **variables}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("QUICKSTART_")}
        # From another folder, as a user may call it.
        command = ["bash", str(self.checkout / "launch" / "quickstart.sh")]
        return subprocess.run(command, cwd="/", env=kept | values, capture_output=True, text=True)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def shown_commands(done: subprocess.CompletedProcess[str]) -> list[str]:
    lines = [line[2:] for line in done.stdout.splitlines() if line.startswith("+ ")]
    return [line for line in lines if not line.startswith(". ")]


def test_the_readme_has_the_same_commands_in_the_same_order(machine: Machine) -> None:
    done = machine.quickstart()
    assert done.returncode == 0, done.stderr
    shown = shown_commands(done)
    assert len(shown) == 11
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n```bash\n" + "\n".join(shown) + "\n```\n" in readme


@pytest.mark.parametrize(("gpus", "device", "ranks"), [(0, "cpu", 2), (1, "cuda", 1), (2, "cuda", 2), (8, "cuda", 2)])
def test_the_machine_decides_device_and_ranks(machine: Machine, gpus: int, device: str, ranks: int) -> None:
    done = machine.quickstart(gpus)
    assert done.returncode == 0, done.stderr
    commands = "\n".join(shown_commands(done))
    assert f"--gpus {ranks} --device {device} --zero 2 --expert-parallel {ranks}\n" in commands
    assert commands.count(f"-- --num_gpus {ranks}\n") == 2
    assert ("one GPU" in done.stdout) == (gpus == 1)


@pytest.mark.parametrize(
    ("fails_in", "stage"),
    [
        ("chitchat_to_jsonl", "human chats"),
        ("tokenizer train", "tokenizer"),
        ("preprocess", "preprocessing"),
        ("plan", "memory plan"),
        ("stop-at-step", "training, first half"),
        ("max-steps 400 -- ", "training, resumed"),
        ("checkpoint verify", "training, resumed"),
        ("evaluate", "evaluation"),
        ("generate", "a reply"),
        ("quickstart_report", "the checks"),
    ],
)
def test_a_failing_command_ends_it_and_is_named(machine: Machine, fails_in: str, stage: str) -> None:
    done = machine.quickstart(FAIL_IN=fails_in)
    assert done.returncode == 9
    assert done.stderr.endswith(f"error: the quickstart failed in: {stage}\n")


def test_a_stop_without_a_checkpoint_ends_it(machine: Machine) -> None:
    done = machine.quickstart(NO_CHECKPOINT="1")
    assert done.returncode == 1
    assert "stopped without a checkpoint of step 200" in done.stderr


def test_only_its_own_earlier_output_is_removed(machine: Machine, tmp_path: Path) -> None:
    folder = tmp_path / "my files"
    (folder / "runs" / "quickstart").mkdir(parents=True)
    for name in ("thesis.txt", "train.jsonl", "runs/quickstart/metrics.jsonl"):
        (folder / name).write_text("earlier")
    done = machine.quickstart(QUICKSTART_DIR=str(folder), NO_CHECKPOINT="1")
    assert done.returncode == 1
    assert (folder / "thesis.txt").read_text() == "earlier"
    assert not (folder / "train.jsonl").exists()
    assert not (folder / "runs").exists()
