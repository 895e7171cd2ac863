"""Training on two hosts under a hostfile, killed and resumed: two network namespaces with one rank each, joined by a
pair of virtual Ethernet devices. Each reaches the other by its address alone; their common host name leads to neither.

Without the right to make namespaces, both ranks start on the loopback device.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from namespaces import Host, set_link, two_namespaces

from lumina_ds.engine.world import free_port
from lumina_ds.monitor.writers import read_records

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]
STEPS = 24


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with two_namespaces() as made:
        yield made or [Host("127.0.0.1"), Host("127.0.0.2")]


def test_a_run_across_hosts_is_killed_on_one_of_them_and_goes_on(
    hosts: list[Host], write_config: Callable[..., Path], tmp_path: Path, environment: dict[str, str]
) -> None:
    hostfile, metrics = tmp_path / "hosts", tmp_path / "runs/two/metrics.jsonl"
    hostfile.write_text("# two hosts\n" + "".join(f"{host.address} slots=1\n" for host in hosts))
    config = write_config(max_steps=STEPS, save_every_n_batches=4, gradient_accumulation_steps=4)
    options = ["--config", config, "--zero", "2", "--expert-parallel", "2", "--experiment-name", "two"]

    first = start(hosts, hostfile, options, environment, tmp_path)
    wait_for(lambda: len(steps(metrics)) >= 6, first, "six steps")
    kill(first[1])
    # The other host's rank loses its peer, and must not hang.
    assert first[0].wait(timeout=120) not in (0, 75)

    again = start(hosts, hostfile, options, environment, tmp_path)
    ends = [process.wait(timeout=240) for process in again]
    log = "".join((tmp_path / f"host-{number}.log").read_text() for number in range(2))
    assert ends == [0, 0], log
    assert "resumed from runs/two/checkpoints/step-" in log and f"ended at step {STEPS} of {STEPS}" in log
    assert steps(metrics) == list(range(1, STEPS + 1))


@pytest.mark.faults
def test_a_cut_link_ends_both_hosts_and_each_names_the_other(
    hosts: list[Host], write_config: Callable[..., Path], tmp_path: Path, environment: dict[str, str]
) -> None:
    if not hosts[0].enter:
        pytest.skip("needs the right to make network namespaces, and iproute2")
    hostfile, metrics = tmp_path / "hosts", tmp_path / "runs/cut/metrics.jsonl"
    hostfile.write_text("".join(f"{host.address} slots=1\n" for host in hosts))
    config = write_config(max_steps=100_000, save_every_n_batches=100_000)
    options = ["--config", config, "--zero", "2", "--experiment-name", "cut", "--health.stall_timeout_seconds", "5"]
    started = start(hosts, hostfile, options, environment, tmp_path)
    wait_for(lambda: len(steps(metrics)) >= 3, started, "three steps")
    assert set_link(hosts[1], "down")
    # The stall, and what a connection may take to fail.
    ends = [process.wait(timeout=60) for process in started]
    logs = [(tmp_path / f"host-{number}.log").read_text() for number in range(2)]
    assert ends == [8, 8], logs
    for number, other in ((0, 1), (1, 0)):
        [line] = [line for line in logs[number].splitlines() if "error: no progress" in line]
        assert f"({hosts[other].address}) with rank {other} cannot be reached from " in line
        assert f"({hosts[number].address}): " in line and line.endswith("; check the network between them")
        assert "Traceback" not in logs[number]


def start(
    hosts: list[Host], hostfile: Path, options: list[object], environment: dict[str, str], folder: Path
) -> list[subprocess.Popen[bytes]]:
    port, started = str(free_port()), []
    for rank, host in enumerate(hosts):
        variables = {"HOSTFILE": str(hostfile), "NODE_RANK": str(rank), "MASTER_PORT": port}
        command = [*host.enter, "bash", str(CHECKOUT / "launch/multi_node.sh"), *map(str, options)]
        with open(folder / f"host-{rank}.log", "wb") as log:
            started.append(
                subprocess.Popen(
                    command, cwd=folder, env=environment | variables, stdout=log, stderr=log, start_new_session=True
                )
            )
    return started


def kill(launcher: subprocess.Popen[bytes]) -> None:
    """The host loses its power."""
    processes = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    for process in processes:
        process.send_signal(signal.SIGKILL)
    launcher.wait()


def steps(metrics: Path) -> list[int]:
    return [record["step"] for record in read_records(metrics)] if metrics.exists() else []


def wait_for(condition, processes, what) -> None:  # type: ignore[no-untyped-def]
    for _ in range(1800):
        if condition():
            return
        assert all(process.poll() is None for process in processes), f"ended before {what}"
        time.sleep(0.1)
    pytest.fail(f"no {what} in three minutes")
