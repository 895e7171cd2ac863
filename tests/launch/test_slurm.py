"""slurm.sbatch under SLURM itself: a controller and two nodes on loopback addresses of this machine, run by any user.

Nodes are named by their addresses, so that a job finds the first one's as it does on a cluster; each has one GPU as far
as SLURM knows. SLURM's own files, ports and key are this test's; no service of the machine is touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from lumina_ds.engine.world import free_port
from lumina_ds.monitor.writers import read_records

SCRIPT = Path(__file__).parents[2] / "launch/slurm.sbatch"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/local/sbin", "/usr/sbin"])
MISSING = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
NODES = ("127.0.0.1", "127.0.0.2")
STEPS = 40
# A job that was queued again waits until its old credentials have expired: SLURM allows 5 s at the least. The number of
# the first job spreads the ports that slurm.sbatch derives from it.
CONFIGURATION = """ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SchedulerParameters=sched_interval=1
FirstJobId={first_job}
SelectType=select/cons_tres
GresTypes=gpu
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
PartitionName=all Nodes=ALL Default=YES
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"needs SLURM and munge, without {', '.join(MISSING)}: apt-get install slurm-wlm munge"
    ),
]


@dataclass(frozen=True)
class Cluster:
    folder: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def configuration(self) -> str:
        return str(self.folder / "slurm.conf")

    def ask(self, *words: object, environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """What a command of SLURM prints."""
        variables = {**(environment or os.environ), "SLURM_CONF": self.configuration}
        done = subprocess.run(list(map(str, words)), env=variables, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "--oneliner", "show", "job", number)))

    def has_ended(self, number: str) -> bool:
        return self.job(number)["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")

    def processes(self) -> list[psutil.Process]:
        """The daemons and whatever they started: only they have this configuration."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("SLURM_CONF") == self.configuration:
                    found.append(process)
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        start(made)
        yield made
    finally:
        for _ in range(10):  # one that is killed may just have started another
            left = made.processes()
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=5)
        for daemon in made.daemons:
            daemon.wait()


def start(cluster: Cluster) -> None:
    """Returns when both nodes wait for work."""
    folder = cluster.folder
    (folder / "key").write_bytes(secrets.token_bytes(64))
    (folder / "key").chmod(0o600)
    text = CONFIGURATION.format(folder=folder, user=os.getuid(), port=free_port(), first_job=free_port())
    for node in NODES:
        (folder / node).mkdir()
        text += f"NodeName={node} NodeHostname=localhost Port={free_port()} CPUs=2 Gres=gpu:1\n"
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    files = {"socket": "munge.socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
    # --force: the folder is open to this user alone, which munged takes for a mistake.
    munged = ["munged", "--foreground", "--force", *(f"--{option}={folder / name}" for option, name in files.items())]
    slurmd = [["slurmd", "-D", "-N", node, "-f", cluster.configuration] for node in NODES]
    log = folder / "daemons.log"
    variables = {**outside_of_jobs(dict(os.environ)), "PATH": PATH, "SLURM_CONF": cluster.configuration}

    def all_run() -> bool:
        assert all(daemon.poll() is None for daemon in cluster.daemons), log.read_text()
        return True

    with open(log, "ab") as stream:
        for command in (munged, ["slurmctld", "-D", "-f", cluster.configuration], *slurmd):
            cluster.daemons.append(
                subprocess.Popen(command, env=variables, stdout=stream, stderr=stream, start_new_session=True)
            )
            wait_for(lambda: all_run() and (folder / "munge.socket").exists(), "munged", log)
    wait_for(lambda: all_run() and idle(variables) == len(NODES), "two idle nodes", log)


def idle(variables: dict[str, str]) -> int:
    asked = ["sinfo", "--Node", "--noheader", "--format=%t"]
    return subprocess.run(asked, env=variables, capture_output=True, text=True).stdout.split().count("idle")


def outside_of_jobs(environment: dict[str, str]) -> dict[str, str]:
    """Without what a job around these tests, or its user, has chosen."""
    ours = ("SLURM", "SBATCH", "MASTER_", "LAUNCHER", "LUMINA_VENV")
    return {name: value for name, value in environment.items() if not name.startswith(ours)}


@pytest.fixture
def submit(cluster: Cluster, environment: dict[str, str], tmp_path: Path) -> Callable[..., str]:
    """submit(launcher, *options) queues slurm.sbatch on both nodes and returns the job's number."""

    def queue(launcher: str, *options: object) -> str:
        given = ["--parsable", "--nodes=2", "--gpus-per-node=1", "--cpus-per-gpu=1", "--output=log"]
        variables = {**outside_of_jobs(environment), "LAUNCHER": launcher}
        return cluster.ask("sbatch", *given, SCRIPT, *options, environment=variables, cwd=tmp_path).strip()

    return queue


@pytest.mark.parametrize("launcher", ["srun", "deepspeed"])
def test_a_job_saves_at_the_signal_is_queued_again_and_goes_on(
    launcher: str,
    cluster: Cluster,
    submit: Callable[..., str],
    write_config: Callable[..., Path],
    tmp_path: Path,
) -> None:
    config, log = write_config(max_steps=STEPS, gradient_accumulation_steps=4), tmp_path / "log"
    metrics = tmp_path / "runs/job/metrics.jsonl"
    options = ["--config", config, "--zero", "2", "--expert-parallel", "2", "--experiment-name", "job"]

    job = submit(launcher, *options)
    wait_for(lambda: len(steps(metrics)) >= 3 or cluster.has_ended(job), "three steps", log)
    # As before the time limit (--signal=USR1@180): to every process of the job's step, and not to the job's shell.
    cluster.ask("scancel", f"--signal={signal.SIGUSR1.name}", job)
    wait_for(lambda: cluster.job(job)["Restarts"] == "1" or cluster.has_ended(job), "second life", log)
    saved = len(steps(metrics))
    assert 3 <= saved < STEPS, log.read_text()
    wait_for(lambda: cluster.has_ended(job), "end", log)

    printed, ended = log.read_text(), cluster.job(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), printed
    assert steps(metrics) == list(range(1, STEPS + 1))
    first, second = printed.split("interrupted; back into the queue\n")
    assert (
        f"+ MASTER_ADDR={NODES[0]} MASTER_PORT=" in first and "ZeRO-2 EP2 fp32" in first and "2 ranks on cpu" in first
    )
    assert f"stopped by a signal at step {saved} of {STEPS}; the checkpoint is saved" in first
    assert first.count("Exited with exit code 75") == len(NODES) and "anything to save" not in first
    assert f"resumed from runs/job/checkpoints/step-{saved:08d}" in second and f"ended at step {STEPS}" in second
    assert not list(tmp_path.glob("hostfile-*"))


def test_a_job_that_fails_is_not_queued_again(cluster: Cluster, submit: Callable[..., str], tmp_path: Path) -> None:
    job = submit("srun", "--config", "nowhere")
    wait_for(lambda: cluster.has_ended(job), "end", tmp_path / "log")
    ended = cluster.job(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")


def steps(metrics: Path) -> list[int]:
    return [record["step"] for record in read_records(metrics)]


def wait_for(condition: Callable[[], bool], what: str, log: Path) -> None:
    end = time.monotonic() + 240
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"no {what} in four minutes:\n{log.read_text() if log.exists() else 'no log'}")
        time.sleep(0.1)
