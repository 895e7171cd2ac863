"""Starting ranks on other hosts by the real pdsh and a real sshd on the loopback addresses: what arrives, who is missing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from loopback_ssh import HOSTS, MISSING, client_environment, sshd

from lumina_ds.checkpoint.format import checkpoint_faults, step_folders
from lumina_ds.data.sampler import TrainingOrder
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.engine.world import free_port
from lumina_ds.errors import MachineError
from lumina_ds.monitor.writers import read_records
from lumina_ds.ranks.reach import check_hosts
from lumina_ds.train.watch.orphans import start_variables

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"needs {', '.join(MISSING)} (Debian: openssh-server, openssh-client, pdsh)"
    ),
]

CHECKOUT = Path(__file__).parents[2]
NASTY = [
    "", " ", "two words", "$(touch made)", "`touch made`", "; touch made", "it's", 'say "x"', "(a) {b,c} [d]", "*", "?",
    "~", "#no", "a&b|c<d>e", "!!", "$HOME", "\\n\\", "%n %h %% %", "first\nsecond", "\ttab", "--x=$y", "naïve 語", "-",
]  # fmt: skip
# What a rank was given; the launch module puts --local_rank first.
SAY = """
import json, os, sys
json.dump([sys.argv[1:], os.environ["MLFLOW_NOTE"], os.getcwd()], open("said.json", "w"))
sys.exit(7)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a running sshd, with the `ssh` that knows it."""
    folder = tmp_path_factory.mktemp("loopback") / "ssh"
    with sshd(folder):
        yield folder


@pytest.fixture
def environment(server: Path) -> dict[str, str]:
    return dict(client_environment(server, CHECKOUT))


def test_every_word_crosses_pdsh_and_ssh_unchanged(environment: dict[str, str], tmp_path: Path) -> None:
    """With a variable that DeepSpeed exports and the folder; and pdsh brings the rank's code."""
    folder = tmp_path / "it's $(touch made) `touch made` (1) 100%n 語"
    folder.mkdir()
    (folder / "hosts").write_text(f"{HOSTS[1]} slots=1\n")
    (folder / "say it.py").write_text(SAY)
    runner = ["--hostfile", "hosts", "--force_multi", "--master_addr", HOSTS[0], "--log_level", "critical"]
    command = [sys.executable, "-m", "lumina_ds.ranks.deepspeed_runner", *runner, "say it.py", *NASTY]
    note = "\n".join(NASTY)
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment | start_variables("m") | {"MLFLOW_NOTE": note},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 7, done.stderr
    assert json.loads((folder / "said.json").read_text()) == [["--local_rank=0", *NASTY], note, str(folder)]
    assert sorted(path.name for path in folder.iterdir()) == ["hosts", "said.json", "say it.py"]


@pytest.fixture
def refused(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """refused(hosts, *runner) is the line that they are refused with, within `seconds`."""
    monkeypatch.setenv("PATH", environment["PATH"])

    def check(hosts: list[str], *runner: str, seconds: float = 20) -> str:
        (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
        with pytest.raises(MachineError) as error:
            check_hosts(["--hostfile", str(tmp_path / "hosts"), *runner], seconds)
        assert "\n" not in str(error.value)
        return str(error.value)

    return check


def test_hosts_that_ssh_reaches_pass_and_others_are_named(
    refused: Callable[..., str], server: Path, tmp_path: Path
) -> None:
    (tmp_path / "both").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    check_hosts(["--hostfile", str(tmp_path / "both")], 20)
    # 127.0.0.3 has no sshd there.
    line = refused([*HOSTS, "127.0.0.3"])
    assert line.startswith("ssh does not reach 127.0.0.3: ssh: connect to host 127.0.0.3 port ")
    assert line.endswith(
        "Connection refused; `ssh 127.0.0.3 true` must work without a password, or start this on every host yourself, "
        "with --no_ssh --node_rank N"
    )
    assert "Could not resolve hostname" in refused([HOSTS[0], "no-such-host.invalid"])
    # A closed port that the user names.
    assert "Connection refused" in refused(list(HOSTS), "--ssh_port", str(free_port()))
    check_hosts(["--hostfile", str(tmp_path / "hosts"), "--no_ssh", "--node_rank", "1"], 20)
    known, key = server / "known_hosts", server / "user"
    was = known.read_text()
    try:
        known.write_text("")
        assert f"ssh does not reach {HOSTS[0]}, {HOSTS[1]}: Host key verification failed." in refused(list(HOSTS))
        known.write_text(was)
        key.rename(server / "elsewhere")
        assert "Permission denied (publickey)." in refused(list(HOSTS))
    finally:
        known.write_text(was)
        if not key.exists():
            (server / "elsewhere").rename(key)


def test_a_host_that_never_answers_is_named_within_the_time(refused: Callable[..., str]) -> None:
    with socket.create_server((HOSTS[0], 0)) as silent:
        line = refused([HOSTS[0]], "--ssh_port", str(silent.getsockname()[1]), seconds=1)
    assert line.startswith(f"ssh does not reach {HOSTS[0]}: ") and "time" in line.lower()


def test_pdsh_must_be_there_for_several_hosts(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, server: Path
) -> None:
    monkeypatch.setenv("PATH", str(server))
    assert refused(list(HOSTS)).startswith("pdsh is not installed, which starts ranks on other hosts; install it")


@pytest.mark.faults
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)])
def test_ranks_that_ssh_started_save_when_lumina_train_is_told_to_end_or_killed(
    number: signal.Signals,
    code: int,
    environment: dict[str, str],
    write_config: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """On two hosts, in folders whose names a shell would obey."""
    config = yaml.safe_load(write_config(max_steps=100000, save_every_n_batches=100000).read_text())
    folder = tmp_path / "my $(touch made) (runs)"
    folder.mkdir()
    (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    (folder / "it's.yaml").write_text(yaml.safe_dump(config))
    runs, name = "runs `touch made` 100%n", "r"
    words = ["--config", "it's.yaml", "--runs-dir", runs, "--experiment-name", name]
    runner = ["--hostfile", "hosts", "--master_addr", HOSTS[0], "--master_port", str(free_port())]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lumina_ds", "train", *words, "--", *runner],
            cwd=folder, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    metrics = folder / runs / name / "metrics.jsonl"
    try:
        while not metrics.exists() or len(read_records(metrics)) < 3:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(60) == code, (tmp_path / "log").read_text()
        while _ranks(folder):
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
        for pid in _ranks(folder):
            os.kill(pid, signal.SIGKILL)
    (saved,) = step_folders(folder / runs / name / "checkpoints")
    assert checkpoint_faults(saved) == [] and int(saved.name[-8:]) == read_records(metrics)[-1]["step"]
    assert not list(tmp_path.rglob("made"))


@pytest.mark.faults
@pytest.mark.parametrize(("lost", "left"), [HOSTS[::-1], HOSTS])
def test_an_elastic_run_goes_on_without_a_host_and_takes_it_in_again(
    lost: str,
    left: str,
    environment: dict[str, str],
    write_config: Callable[..., Path],
    server: Path,
    tmp_path: Path,
    corpus: Any,
) -> None:
    """A host's processes are killed, and ssh reaches it no more, until its key is known again."""
    config = write_config(max_steps=100000, save_every_n_batches=20, micro_batch_size=2)
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    run, log, known = tmp_path / "runs/r", tmp_path / "log", server / "known_hosts"
    words = ["--config", config, "--experiment-name", "r", "--record-samples"]
    words += ["--elastic", "1:2", "--max-restarts", "3"]
    words += ["--zero", "2", "--expert-parallel", "2", "--run.elastic_check_seconds", "2"]
    runner = ["--hostfile", "hosts", "--master_addr", HOSTS[0], "--master_port", str(free_port())]
    with open(log, "w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "lumina_ds", "train", *map(str, words), "--", *runner],
            cwd=tmp_path, env=environment, stdout=stream, stderr=stream,
        )  # fmt: skip

    def wait_for(lives: int) -> None:
        """That many lives, the last of which trains."""
        deadline = time.monotonic() + 120
        while True:
            begun = read_records(run / "logs/layouts.jsonl")
            if len(begun) == lives and len(read_records(run / "metrics.jsonl")) > begun[-1]["step"] + 30:
                return
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    was = known.read_text()
    try:
        wait_for(1)
        known.write_text("".join(line for line in was.splitlines(True) if lost not in line))
        for one in _of_rank(tmp_path, HOSTS.index(lost)):
            one.kill()
        wait_for(2)
        known.write_text(was)
        wait_for(3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75, log.read_text()
    finally:
        known.write_text(was)
        process.kill()
        process.wait()
        for pid in _ranks(tmp_path):
            os.kill(pid, signal.SIGKILL)
    lives = read_records(run / "logs/layouts.jsonl")
    assert [(one["ranks"], one["expert_parallel_size"]) for one in lives] == [(2, 2), (1, 1), (2, 2)]
    said = log.read_text()
    assert f"on {left} slots=1; without {lost}: " in said
    assert "elastic: 2 ranks can run now instead of 1" in said
    # Every step once, with the rows that the order gives it.
    records = read_records(run / "metrics.jsonl")
    order = TrainingOrder(ShardFolder.open(corpus.shards, False).packing(64).num_rows, 42)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert [record["samples"] for record in records] == [
        [order.row_at(position) for position in range(4 * step, 4 * step + 4)] for step in range(len(records))
    ]


def _of_rank(folder: Path, rank: int) -> list[psutil.Process]:
    """A rank with all that started it on its host, up to the connection."""
    ranks = [psutil.Process(pid) for pid in _ranks(folder)]
    [process] = [one for one in ranks if one.environ().get("RANK") == str(rank)]
    found = [process]
    while not found[-1].name().startswith("sshd"):
        parent = found[-1].parent()
        assert parent is not None
        found.append(parent)
    return found[::-1]


def _ranks(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"lumina_ds.cli.train" in (process / "cmdline").read_bytes() and os.readlink(process / "cwd") == str(
                folder
            ):
                found.append(int(process.name))
        except OSError:
            continue
    return found
