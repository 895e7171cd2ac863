"""The shell scripts: shellcheck over all of them, and what environment.sh and single_node.sh refuse or print."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", *(ROOT / "tests").rglob("*.sh"), ROOT / ".ci" / "run"])


def run(script: str, *arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-euo", "pipefail", "-c", script, "bash", *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | variables, capture_output=True, text=True)


def test_shellcheck() -> None:
    beside_python = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (the extra test brings it)")
    assert len(SCRIPTS) >= 5
    done = subprocess.run([shellcheck, "-x", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_the_first_failure(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    sourced, forwards = script.name == "environment.sh", "exec bash" in text
    assert sourced or forwards or "\nset -euo pipefail\n" in text


def test_a_step_is_printed_so_that_it_can_be_pasted() -> None:
    sourced = f'. "{LAUNCH}/environment.sh"; '
    done = run(sourced + """step printf '%s|' plain "two words" 'a "b" $c' "it's" > /dev/null""")
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert line.startswith("+ printf ")
    assert run(line[2:]).stdout == """plain|two words|a "b" $c|it's|"""


def test_a_failing_step_ends_the_script() -> None:
    done = run(f'. "{LAUNCH}/environment.sh"; step false; echo unreachable')
    assert (done.returncode, done.stdout) == (1, "+ false\n")


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("3, 9", "is no Python 3.10, 3.11, 3.12 or 3.13; set PYTHON to one"),
        ("3, 10", "cannot make a virtual environment; install its venv module"),
        ("3, 13", "cannot make a virtual environment; install its venv module"),
        ("3, 14", "is no Python 3.10, 3.11, 3.12 or 3.13; set PYTHON to one"),
    ],
)
def test_the_version_of_python_decides(tmp_path: Path, version: str, says: str) -> None:
    """The real interpreter pretends to be another version when asked for it, and has no venv module."""
    python = tmp_path / "python"
    pretend = f"import sys; sys.version_info = ({version}, 0); $2"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || exit 1\nexec "{sys.executable}" -c "{pretend}"\n')
    python.chmod(0o755)
    variables = {"PYTHON": str(python), "LUMINA_VENV": str(tmp_path / "environment")}
    done = run(f'. "{LAUNCH}/environment.sh"; prepare_environment', **variables)
    assert done.returncode == 4
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_machine_without_python_is_told_so(tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "sha256sum", "cut", "cat", "ls"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "")
    variables = {"PATH": str(tmp_path), "PYTHON": "", "LUMINA_VENV": str(tmp_path / "environment")}
    done = run(f'. "{LAUNCH}/environment.sh"; prepare_environment', **variables)
    assert done.returncode == 4
    assert done.stderr.startswith("error: no Python 3.10, 3.11, 3.12 or 3.13 found")


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = run(f'. "{LAUNCH}/environment.sh"; prepare_environment', LUMINA_VENV=str(tmp_path))
    assert done.returncode == 4
    assert "is not a virtual environment" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_environment_is_made_once_and_again_when_the_pins_change(tmp_path: Path) -> None:
    """With an installer that only notes its calls: what is tested is when it is called."""
    checkout = tmp_path / "checkout"
    (checkout / "launch").mkdir(parents=True)
    for name in ("setup.py", "constraints.txt", "launch/environment.sh"):
        shutil.copyfile(ROOT / name, checkout / name)
    script = f"""
        . "{checkout}/launch/environment.sh"
        make_environment() {{ mkdir -p "$VENV/bin"; touch "$VENV/pyvenv.cfg" "$VENV/bin/activate"; }}
        install_package() {{ echo "installs [$1]"; }}
        prepare_environment "$@" """

    def installs(*extra: str) -> list[str]:
        done = run(script, *extra, cwd=tmp_path, LUMINA_VENV="relative")
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith("installs")]

    assert installs() == ["installs []"]
    assert installs() == []
    assert installs("test") == ["installs [test]"]
    assert (installs(), installs("test")) == ([], [])
    (checkout / "constraints.txt").write_text("torch==2.12.0\n")
    assert installs("test") == ["installs [test]"]
    assert installs() == []
    assert (tmp_path / "relative" / "pyvenv.cfg").exists()


def test_quickstart_refuses_a_senseless_number_of_steps(tmp_path: Path) -> None:
    done = run(f'bash "{LAUNCH}/quickstart.sh"', QUICKSTART_STEPS="none", QUICKSTART_DIR=str(tmp_path / "out"))
    assert done.returncode == 2
    assert "QUICKSTART_STEPS=none" in done.stderr
    assert not (tmp_path / "out").exists()


def test_single_node_prints_and_runs_the_command(tmp_path: Path) -> None:
    lumina = tmp_path / "lumina"
    lumina.write_text('#!/bin/sh\necho "threads=$OMP_NUM_THREADS"\nprintf "<%s>" "$@"\n')
    lumina.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    script = f'bash "{LAUNCH}/single_node.sh" --config debug --experiment-name "two words"'
    done = run(script, PATH=path, NUM_GPUS="4", OMP_NUM_THREADS="3")
    assert done.returncode == 0, done.stderr
    shown, threads, received = done.stdout.splitlines()
    assert shown == r"+ lumina train --config debug --experiment-name two\ words -- --num_gpus 4"
    assert threads == "threads=3"
    assert received == "<train><--config><debug><--experiment-name><two words><--><--num_gpus><4>"


def test_single_node_needs_the_package(tmp_path: Path) -> None:
    (tmp_path / "bash").symlink_to(shutil.which("bash") or "")
    done = run(f'bash "{LAUNCH}/single_node.sh" --config debug', PATH=str(tmp_path))
    assert done.returncode == 4
    assert "lumina is not on the PATH" in done.stderr


def test_hostfile_example_is_one_that_deepspeed_reads() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(LAUNCH / "hostfile.example")) == {"node-1": 8, "node-2": 8}


WORKERS = "--durations 10 --numprocesses 2 --dist loadfile --no-loadscope-reorder"


def test_run_sh_runs_every_check_and_keeps_the_first_failure(tmp_path: Path) -> None:
    """With tools that only note their calls, in an environment that looks installed."""
    checkout, environment = tmp_path / "checkout", tmp_path / "environment"
    for name in ("setup.py", "constraints.txt", "launch/environment.sh", "tests/run.sh", ".ci/run"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, checkout / name)
    (environment / "bin").mkdir(parents=True)
    (environment / "pyvenv.cfg").touch()
    (environment / "bin" / "activate").write_text(f'PATH="{environment}/bin:$PATH"\n')
    for name, code in (("ruff", 3), ("mypy", 1), ("python", 0), ("apt-get", 0)):
        tool = environment / "bin" / name
        tool.write_text(f'#!/bin/sh\necho "{name} in $PWD, threads=$OMP_NUM_THREADS: $*"\nexit {code}\n')
        tool.chmod(0o755)
    stamp = f'. "{checkout}/launch/environment.sh"; environment_digest > "$VENV/.lumina-installed-test"'
    assert run(stamp, LUMINA_VENV=str(environment)).returncode == 0
    variables = {"LUMINA_VENV": str(environment), "PATH": f"{environment}/bin:{os.environ['PATH']}"}
    done = run('bash "$0/.ci/run" -k "two words"'.replace("$0", str(checkout)), cwd=tmp_path, **variables)
    assert done.returncode == 3
    assert f"mypy in {checkout}, threads=1: \n" in done.stdout
    assert f"python in {checkout}, threads=1: -m pytest {WORKERS} -k two words\n" in done.stdout
    assert [line.split()[2:] for line in done.stdout.splitlines()[-5:]] == [
        ["ok"],
        ["failed", "(3)"],
        ["failed", "(3)"],
        ["failed", "(1)"],
        ["ok"],
    ]
    quick = run('bash "$0/.ci/run" --quick -x'.replace("$0", str(checkout)), cwd=tmp_path, **variables)
    assert f"threads=1: -m pytest {WORKERS} -m not slow and not faults -x\n" in quick.stdout


@pytest.mark.parametrize(("there", "code"), [(False, 0), (False, 100), (True, 0)])
def test_ci_installs_what_is_missing_and_runs_the_suite_anyway(there: bool, code: int, tmp_path: Path) -> None:
    """With an apt-get that only notes its calls; nobody but root may install."""
    checkout, tools = tmp_path / "checkout", tmp_path / "bin"
    for folder in (checkout / ".ci", checkout / "tests", tools):
        folder.mkdir(parents=True)
    shutil.copyfile(ROOT / ".ci/run", checkout / ".ci/run")
    (checkout / "tests/run.sh").write_text('echo "suite $*"')
    for tool in ("bash", "sh", "dirname", "timeout", "chmod", "rm"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    (tools / "apt-get").write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\nexit {code}\n')
    (tools / "apt-get").chmod(0o755)
    for program in ("ssh", "ip", *(("slurmctld", "sshd", "pdsh") if there else ())):
        (tools / program).symlink_to(tools / "apt-get")
    done = run(f'bash "{checkout}/.ci/run" -x', PATH=str(tools))
    assert (done.returncode, done.stdout) == (0, "suite -x\n")
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    may_install = os.geteuid() == 0 and not there
    packages = "slurmctld slurmd slurm-client munge openssh-server pdsh"
    install = f"install -qq -y --no-install-recommends {packages}"
    assert calls == (["update -qq", install][: 1 if code else 2] if may_install else [])
    assert done.stderr.startswith(f"not installed: {packages}; the tests") == (may_install and code != 0)
